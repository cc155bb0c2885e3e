"""Budgets for the machine code of each kernel, for every kind of launch that the tests made."""

import re
from collections import Counter
from collections.abc import Callable, Iterator

from evidence.compiler import Compiled
from evidence.launches import Specialization
from llmfast_kernels.pairs import CROSS_ENTROPY

_TYPE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "int16": 16, "int8": 8, "uint8": 8}
_SUM = re.compile("FADD|v_(pk_)?(add|sub)_f32")
_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float64": 64}


def violations(compiled: Compiled) -> Iterator[str]:
    """Yield sentences that describe violations of the budget by one kind of launch."""
    kind, facts = compiled.kind, compiled.facts
    if kind.options.get("debug"):
        return  # assertions cost what they cost
    if facts.spill_bytes or facts.stack_bytes:
        yield f"spills {facts.spill_bytes} bytes, with a stack of {facts.stack_bytes}"
    if facts.shared_bytes > _shared_limit(compiled):
        yield f"takes {facts.shared_bytes} bytes of shared memory"
    if facts.num_warps * compiled.warp_size > 1024:
        yield f"has {facts.num_warps} warps of {compiled.warp_size} threads"
    if kind.options.get("enable_fp_fusion") is not True:
        yield "does not say enable_fp_fusion=True"
    if kind.name in BUDGETS:
        yield from BUDGETS[kind.name](compiled)
    else:
        yield f"has no budget: add one to {__file__}"


def _shared_limit(compiled: Compiled) -> int:
    """Return the shared memory limit in bytes: small except for the product, which keeps slices of factors there."""
    if compiled.kind.name != "filtered_matmul_kernel":
        return 48 << 10
    return (64 if compiled.target.startswith("gfx") else 100) << 10


def _constant(compiled: Compiled, name: str) -> int:
    value: int = compiled.kind.argument(name)["constant"]
    return value


def _row_bits(compiled: Compiled, name: str = "logits_ptr") -> int:
    """Return the width of access that strides and addresses of the rows allow, as computed by the launcher."""
    return _constant(compiled, "VECTOR") * _BITS[compiled.kind.argument(name)["dtype"]]


def _logit_bits(compiled: Compiled) -> int:
    return _BITS[compiled.kind.argument("logits_ptr")["dtype"]]


def _has(compiled: Compiled, name: str) -> bool:
    value = compiled.kind.argument(name)
    return isinstance(value, dict) and "dtype" in value


def _rows(compiled: Compiled) -> Iterator[str]:
    """Require loops as wide as the rows allow, and no waiting inside a loop, as each thread folds its own logits."""
    bits = _row_bits(compiled)
    others = {128} if _has(compiled, "terms.bias") or _has(compiled, "terms.column_weights") else set()
    if _has(compiled, "gradient.d_logits"):
        others.add(_row_bits(compiled, "gradient.d_logits"))
    filtered = _has(compiled, "gradient.alive")  # looks at groups of columns, and writes a byte for each
    # Class weights lie on 16 bytes also where rows do not, and change threads to meet them.
    mixed = bits < 128 and _has(compiled, "terms.column_weights")
    loops = compiled.facts.hot_loops
    if compiled.target.startswith("gfx"):
        # AMD's compiler may make a loop, over addresses, of the one store of the targets' gradients.
        loops = [
            loop for loop in loops if loop.load_bits or sum(loop.store_bits.values()) > 1 or loop.instructions > 16
        ]
    if not loops:
        yield "has no loop"
    # A logit takes one exponential in each pass. Softcap adds one special function, or two to logits of 32 bits.
    softcap = compiled.kind.argument("terms.softcap")
    functions = 1 if softcap is None else 2 if _logit_bits(compiled) == 16 else 3
    elements = _constant(compiled, "BLOCK_V") / _constant(compiled, "THREADS")
    others_loaded = _has(compiled, "terms.bias") or _has(compiled, "terms.column_weights")
    products = any(compiled.kind.argument(f"terms.{name}") for name in ("logit_scale", "softcap", "temperatures"))
    for loop in loops:
        sums = 2 * sum(count for name, count in loop.opcodes.items() if _SUM.match(name))  # an instruction may make two
        if loop.load_bits and loop.store_bits and sums < elements and products:
            yield "joins the product that makes a logit with the subtraction of the peak, which is of rounded logits"
        loaded = loop.load_bits.get(bits, 0) * bits / _logit_bits(compiled)  # of several turns, where it is unrolled
        turns = 1 if others_loaded else max(1, loaded / elements)
        if loop.transcendentals > turns * (functions * elements + 4):
            yield f"takes {loop.transcendentals / elements} special functions per logit in a loop, not {functions}"
        if not loop.access_bits or not loop.access_bits <= {bits} | others | ({8} if filtered else set()):
            yield f"accesses {loop.access_bits} bits at a time in a loop, not {bits}"
        if (loop.shuffles or loop.barriers) and not filtered and not mixed:
            yield f"has {loop.shuffles} shuffles and {loop.barriers} barriers in a loop"
    if _has(compiled, "gradient.d_logits"):
        yield from _order(compiled, "rewriting loop, barrier, store")


def _rows_backward(compiled: Compiled) -> Iterator[str]:
    """Require accesses of the logits' full width next to those for the row's end; this kernel has no loop."""
    code, bits, out = compiled.facts.code, _row_bits(compiled), _row_bits(compiled, "d_logits_ptr")
    if bits not in code.load_bits or out not in code.store_bits:
        yield f"loads {code.load_bits} and stores {code.store_bits}, none of {bits} and {out} bits"
    yield from _order(compiled, "load, barrier, store, barrier, store")


def _places(compiled: Compiled) -> Iterator[str]:
    """Require one loop as wide as the rows allow, in which no thread waits for another."""
    bits, loops = _row_bits(compiled), compiled.facts.hot_loops
    others = {128} if _has(compiled, "terms.bias") else set()
    if len(loops) != 1 or not {bits} <= loops[0].access_bits <= {bits} | others:
        yield f"accesses {[loop.access_bits for loop in loops]} bits at a time in its loops, not {bits}"
    for loop in loops:
        if loop.shuffles or loop.barriers:
            yield f"has {loop.shuffles} shuffles and {loop.barriers} barriers in a loop"


def _pairs(compiled: Compiled) -> Iterator[str]:
    """Require loops over both rows as wide as each allows, without waiting inside, and few special functions."""
    amd = compiled.target.startswith("gfx")
    widths = _pair_bits(compiled)
    weighed = _has(compiled, "teacher.class_weights")
    mixed = weighed and widths != {128}  # class weights change threads to meet the rows, as in `_rows`
    if any(_has(compiled, name) for name in ("terms.bias", "teacher.bias", "teacher.class_weights")):
        widths.add(128)
    given, cross_entropy = _constant(compiled, "PROBABILITIES"), _constant(compiled, "KIND") == CROSS_ENTROPY.value
    theirs = _BITS[compiled.kind.argument("teacher.ptr")["dtype"]]
    if amd:
        # A thread has VECTOR neighbours of both rows. LLVM joins the teacher's where it may not read as many at once.
        most = _constant(compiled, "VECTOR") * theirs
        widths |= {bits for bits in (64, 128) if min(_pair_bits(compiled)) < bits <= most}
    loops = [loop for loop in compiled.facts.hot_loops if loop.load_bits]
    if not loops:
        yield "has no loop"
    # An exponential of each logit, and one more without temperature; two for each softcap. The logarithm of a mixture,
    # and of a given probability, is an instruction on AMD; on NVIDIA it is a polynomial, accurate near 1.
    capped = sum(compiled.kind.argument(f"{name}.softcap") is not None for name in ("terms", "teacher"))
    hard = compiled.kind.argument("weights.hard") is not None
    tempered = hard and any(
        compiled.kind.argument(f"weights.{name}") is not None for name in ("temperature", "temperatures")
    )
    logarithms = (compiled.kind.argument("weights.beta") is not None) + (given and not cross_entropy)
    functions = 1 + (not given) + tempered + 2 * capped + amd * logarithms
    elements = _constant(compiled, "BLOCK_V") / _constant(compiled, "THREADS")
    own = _read_bits(compiled, "logits_ptr", "terms.bias")
    taught = _read_bits(compiled, "teacher.ptr", "teacher.bias", "teacher.class_weights")
    for i, loop in enumerate(loops):
        # NVIDIA's assembler unrolls a loop of few registers. The first loop of a mixture needs the student's sum alone,
        # if the teacher gives probabilities.
        alone = i == 0 and given and compiled.kind.argument("weights.beta") is not None
        turn = (own if alone else own + taught) * elements
        turns = max(1, sum(bits * count for bits, count in loop.load_bits.items()) / turn)
        if loop.transcendentals > turns * (functions * elements + 4):
            yield f"takes {loop.transcendentals / elements} special functions per pair in a loop, not {functions}"
        if not loop.access_bits <= widths:
            yield f"accesses {loop.access_bits} bits at a time in a loop, not {widths}"
        if (loop.shuffles or loop.barriers) and not mixed:
            yield f"has {loop.shuffles} shuffles and {loop.barriers} barriers in a loop"
    if _has(compiled, "d_logits_ptr") and hard:
        yield from _order(compiled, "rewriting loop, barrier, store")


def _pairs_backward(compiled: Compiled) -> Iterator[str]:
    """Require accesses of both rows' full width; this kernel has no loop."""
    code, out = compiled.facts.code, _row_bits(compiled, "d_logits_ptr")
    if not _pair_bits(compiled) - {out} <= {*code.load_bits} or out not in code.store_bits:
        yield f"loads {code.load_bits} and stores {code.store_bits}, not {_pair_bits(compiled)} and {out} bits"
    if compiled.kind.argument("weights.hard") is not None:
        yield from _order(compiled, "load, barrier, store, barrier, store")


def _read_bits(compiled: Compiled, *names: str) -> int:
    """Return the bits of one element of each of these tensors together."""
    return sum(_BITS[compiled.kind.argument(name)["dtype"]] for name in names if _has(compiled, name))


def _pair_bits(compiled: Compiled) -> set[int]:
    """Return the widths of access that strides and addresses of both rows, and of the gradient's, allow."""
    teachers = _constant(compiled, "TEACHER_VECTOR") * _BITS[compiled.kind.argument("teacher.ptr")["dtype"]]
    own = {_row_bits(compiled, name) for name in ("logits_ptr", "d_logits_ptr") if _has(compiled, name)}
    return own | {teachers}


def _order(compiled: Compiled, order: str) -> Iterator[str]:
    """Require that threads wait before they access what other warps write, if a program has several warps."""
    if compiled.facts.num_warps > 1 and order not in compiled.facts.orders:
        yield f"does not take this order: {order}"


def _update(compiled: Compiled) -> Iterator[str]:
    """Require one loop for whole tiles, 16 bytes at a time, and one for ends and misaligned views.

    The first may also access each element of the gradient alone, because a gradient may lie anywhere; not where
    unscaled gradients are stored.
    """
    kind = compiled.kind
    loops = [loop for loop in compiled.facts.hot_loops if loop.load_bits]  # one more may store zeros alone
    widths = {name: _TYPE_BITS[kind.arguments[name]["constant"]["triton_type"]] for name in _tensors_of_update(kind)}
    elements = _constant(compiled, "BLOCK") // (compiled.facts.num_warps * compiled.warp_size)
    if 8 in widths.values():
        elements *= 2  # of two tiles at a time
    coded = any(widths.get(name) == 8 for name in ("STATE0_TYPE", "STATE1_TYPE"))
    grad = widths["GRAD_TYPE"]
    expected = {128, 32} if coded else {128}  # a scale for each 128 codes
    if not _constant(compiled, "UNSCALE"):
        expected.add(grad)
    wide = [loop for loop in loops if loop.access_bits == expected]
    if len(loops) != 2 or len(wide) != 1:
        yield f"accesses {[loop.access_bits for loop in loops]} bits at a time in its loops, not {expected} in one"
        return
    if len(set(widths.values())) == 1 and not coded and not _constant(compiled, "AVERAGED") and wide[0].barriers:
        yield f"has {wide[0].barriers} barriers in a loop"
    scales = elements // 2 if coded and grad == 32 else 0
    if wide[0].load_bits.get(grad, 0) > elements + scales or wide[0].store_bits.get(grad, 0) > elements + scales:
        yield f"loads and stores {wide[0].load_bits} and {wide[0].store_bits} bits, not only a gradient's one by one"
    limit = 100 if "rules:adam" in str(kind.arguments["RULE"]) and set(widths.values()) == {32} else 220
    if wide[0].instructions > limit * elements:
        yield f"takes {wide[0].instructions / elements} instructions per element"


def _tensors_of_update(kind: Specialization) -> list[str]:
    """Return the tensors of an update; the parameter itself is not read if there is a float32 copy."""
    names = ["PARAM_TYPE", "GRAD_TYPE", "STATE0_TYPE", "STATE1_TYPE", "STATE2_TYPE", "LOW_TYPE"]
    return [name for name in names if kind.arguments[name]["constant"] is not None]


def _norm(compiled: Compiled) -> Iterator[str]:
    """Require a single loop, 16 bytes at a time, in which a thread has several loads on their way."""
    loops = compiled.facts.hot_loops
    if len(loops) != 1 or loops[0].access_bits != {128} or loops[0].load_bits[128] < 2:
        yield f"loads {[loop.load_bits for loop in loops]} bits at a time in its loops"


def _scale(compiled: Compiled) -> Iterator[str]:
    """Require loads of 16 bytes for whole tiles."""
    tensors = [a for a in compiled.kind.arguments.values() if isinstance(a, dict) and a.get("dtype") and a["aligned"]]
    if len(tensors) >= 2 and 128 not in compiled.facts.code.load_bits:
        yield f"loads {compiled.facts.code.load_bits}"


def _filtered_matmul(compiled: Compiled) -> Iterator[str]:
    """Require tensor cores, and a loop that loads whole slices as wide as the strides allow, plus one number."""
    facts, bits = compiled.facts, _BITS[compiled.kind.arguments["a_ptr"]["dtype"]]
    if bits == 16 and not facts.code.tensor_cores:
        yield "multiplies without tensor cores"
    width = _constant(compiled, "VECTOR") * bits
    blocks = {name: _constant(compiled, name) for name in ("BLOCK", "BLOCK_K", "BLOCK_D")}
    slices = (blocks["BLOCK"] + blocks["BLOCK_D"]) * blocks["BLOCK_K"] * bits
    expected = Counter({width: slices // (width * facts.num_warps * compiled.warp_size)}) + Counter({32: 1})
    if compiled.target == "sm_100" and bits == 16:  # waits for its tensor cores in loops: these are the innermost
        if facts.code.load_bits.get(width, 0) < expected[width]:
            yield f"loads {facts.code.load_bits}"
    elif expected not in [loop.load_bits for loop in facts.hot_loops]:
        yield f"loads {[loop.load_bits for loop in facts.hot_loops]} in its loops, not {dict(expected)}"


def _anything(compiled: Compiled) -> Iterator[str]:
    """Accept a kernel that works on one or two numbers per tensor."""
    return iter(())


BUDGETS: dict[str, Callable[[Compiled], Iterator[str]]] = {
    "cross_entropy_kernel": _rows,
    "cross_entropy_backward_kernel": _rows_backward,
    "count_above_kernel": _places,
    "distillation_kernel": _pairs,
    "distillation_backward_kernel": _pairs_backward,
    "scale_kernel": _scale,
    "filtered_matmul_kernel": _filtered_matmul,
    "prepare_kernel": _anything,
    "norm_kernel": _norm,
    "sum_kernel": _norm,
    "update_kernel": _update,
}
