"""Facts about the machine code that Triton makes of our launches, for GPUs that are not here.

    with capture("sm_90") as launches:        # in a process without TRITON_INTERPRET
        with label("bfloat16, padded"):
            library_function(tensors_on_cpu_or_meta)
    for launch in launches:
        print(launch.kernel, facts(launch.compiled))

Inside `capture` a launch is specialised and compiled as a GPU would have it, on the types, sizes and alignments of
the real arguments, and then not run. The test process interprets kernels, and an interpreting process cannot compile:
tests call `compile_in_subprocess`, which does the above in worker processes.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
OPTIONS = ("num_warps", "num_stages", "num_ctas", "enable_fp_fusion")

_ROOT = Path(__file__).resolve().parents[2]


# What a launch was made of.


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch, compiled and not run."""

    kernel: str
    label: str | None
    target: str
    grid: tuple[int, ...]
    signature: dict[str, str]  # "*bf16:16" is a bfloat16 pointer known to be divisible by 16
    constants: dict[str, Any]  # constexprs, and integer arguments that are 1
    options: dict[str, Any]
    compiled: Any


_labels: list[str] = []


@contextlib.contextmanager
def label(name: str) -> Iterator[None]:
    """Mark the launches made inside; nested names are joined by a slash."""
    _labels.append(name)
    try:
        yield
    finally:
        _labels.pop()


class _CompileOnlyDriver:
    """Answers what Triton asks its driver on the way to a compiled kernel."""

    def __init__(self, target: str) -> None:
        self.target = _gpu_target(target)
        self.device = f"compile only: {target}"  # Triton caches kernels per device: one cache for each target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: object = None) -> int:
        return 0


def _gpu_target(name: str) -> GPUTarget:
    if name not in TARGETS:
        raise ValueError(f"unknown target {name!r}, expected one of {', '.join(TARGETS)}")
    return GPUTarget("cuda", int(name[3:]), 32) if name.startswith("sm_") else GPUTarget("hip", name, 64)


@contextlib.contextmanager
def capture(target: str) -> Iterator[list[Launch]]:
    """Compile every Triton launch made inside for `target` instead of running it; yields the growing list of them."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("a process with TRITON_INTERPRET=1 cannot compile; use compile_in_subprocess")
    launches: list[Launch] = []
    stock_run, stock_driver = JITFunction.run, driver._active

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled = stock_run(self, *args, grid=grid, warmup=True, **kwargs)
        if callable(grid):
            known = {name: value for name, value in kwargs.items() if name in self.arg_names}
            bound = self.signature.bind(*args, **known)
            bound.apply_defaults()
            grid = grid(bound.arguments)
        launches.append(_describe(self, compiled, target, tuple(grid or ())))
        return compiled

    JITFunction.run = run
    driver.set_active(_CompileOnlyDriver(target))
    try:
        yield launches
    finally:
        JITFunction.run = stock_run
        driver._active = stock_driver


def _describe(function: Any, compiled: Any, target: str, grid: tuple[int, ...]) -> Launch:
    source, metadata, names = compiled.src, compiled.metadata, function.arg_names
    aligned = {path for path, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes}
    return Launch(
        kernel=function.fn.__name__,
        label="/".join(_labels) or None,
        target=target,
        grid=grid,
        signature={
            name: str(kind) + (":16" if (index,) in aligned else "")
            for index, (name, kind) in enumerate(source.signature.items())
        },
        constants={".".join([names[path[0]], *map(str, path[1:])]): v for path, v in source.constants.items()},
        options={name: getattr(metadata, name) for name in OPTIONS if hasattr(metadata, name)},
        compiled=compiled,
    )


# What the compiler made of it.


@dataclasses.dataclass(frozen=True)
class Code:
    """Counts over a stretch of machine code: a whole kernel, or the body of a loop."""

    instructions: int
    load_bits: dict[int, int]  # width in bits of a thread's access to global memory -> instructions of that width
    store_bits: dict[int, int]
    transcendentals: int  # exp2, log2, reciprocal, square root, ... : MUFU on NVIDIA
    shuffles: int
    barriers: int
    opcodes: dict[str, int]

    @property
    def access_bits(self) -> set[int]:
        """The widths of all global loads and stores."""
        return {*self.load_bits, *self.store_bits}


@dataclasses.dataclass(frozen=True)
class KernelFacts:
    """What can be read off a compiled kernel."""

    num_warps: int
    shared_bytes: int  # per program
    registers: int  # per thread; on AMD vector registers
    spill_bytes: int  # per thread, stored and loaded together; on AMD 4 for each spilled vector register
    stack_bytes: int  # per thread
    scalar_spills: int  # registers; always 0 on NVIDIA
    code: Code
    hot_loops: tuple[Code, ...]  # innermost loops, in the order of the code

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "KernelFacts":
        """Undo `dataclasses.asdict` and a passage through JSON, which turns the widths into strings."""

        def code(counts: dict[str, Any]) -> Code:
            widths = {
                key: {int(bits): count for bits, count in counts[key].items()} for key in ("load_bits", "store_bits")
            }
            return Code(**{**counts, **widths})

        return cls(**{**fields, "code": code(fields["code"]), "hot_loops": tuple(map(code, fields["hot_loops"]))})


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One machine instruction and where control can go from it."""

    opcode: str
    target: int | None = None  # index of the instruction it may jump to
    falls_through: bool = True


def facts(compiled: Any) -> KernelFacts:
    """The facts of a kernel as Triton returns it from a launch or from `triton.compile`."""
    nvidia = compiled.metadata.target.backend == "cuda"
    instructions, resources = (_read_nvidia if nvidia else _read_amd)(compiled)
    count = _count_nvidia if nvidia else _count_amd
    return KernelFacts(
        num_warps=compiled.metadata.num_warps,
        shared_bytes=compiled.metadata.shared,
        **resources,
        code=count(instructions),
        hot_loops=tuple(map(count, innermost_loops(instructions))),
    )


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The bodies of the loops that contain no other loop, in the order of the code.

    Compilers move unlikely code behind the kernel's end and jump back from there. Such a jump backwards is no loop, so
    it takes the textbook's definition: a jump to a block through which every way to the jump has led before.
    """
    cuts = {0, len(instructions)}
    for index, instruction in enumerate(instructions):
        if instruction.target is not None:
            cuts |= {instruction.target, index + 1}
        elif not instruction.falls_through:
            cuts.add(index + 1)
    starts = sorted(cuts)
    number = {start: block for block, start in enumerate(starts)}
    successors: list[set[int]] = []
    for end in starts[1:]:
        last = instructions[end - 1]
        after = {number[last.target]} if last.target is not None else set()
        if last.falls_through and end < len(instructions):
            after.add(number[end])
        successors.append(after)

    reached = _closure({0}, successors)
    predecessors: list[set[int]] = [set() for _ in successors]
    for block in reached:
        for after in successors[block]:
            predecessors[after].add(block)

    loops: dict[int, set[int]] = {}
    for header in reached:
        before_header = _closure({0} - {header}, successors, without=header)
        jumps = {block for block in predecessors[header] if block not in before_header}
        if jumps:
            loops[header] = _closure(jumps, predecessors, without=header) | {header}
    innermost = [body for body in loops.values() if not any(other < body for other in loops.values())]
    return [
        [instruction for block in sorted(body) for instruction in instructions[starts[block] : starts[block + 1]]]
        for body in sorted(innermost, key=min)
    ]


def _closure(begin: Iterable[int], edges: Sequence[Iterable[int]], without: int | None = None) -> set[int]:
    """All blocks that can be reached from `begin` along `edges`, never entering `without`."""
    seen = set(begin) - {without}
    waiting = list(seen)
    while waiting:
        fresh = set(edges[waiting.pop()]) - seen - {without}
        seen |= fresh
        waiting += fresh
    return seen


# NVIDIA: SASS from the binary, spills from assembling the PTX once more.

_SASS_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_SASS_JUMPS = ("BRA", "JMP", "CALL")
_SASS_ENDS = ("EXIT", "RET", "BRX", "JMX", "KILL")
_SASS_WIDTH = re.compile(r"\.[US]?(8|16|32|64|128|256)(?=\.|$)")


def _read_nvidia(compiled: Any) -> tuple[list[Instruction], dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        dump = _output_of(triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", binary)
    name = re.escape(compiled.metadata.name)
    _, _, code = re.split(rf"^\s*Function : ({name})$", dump, maxsplit=1, flags=re.MULTILINE)
    instructions = _parse_sass(re.split(r"^\s*Function : ", code, maxsplit=1, flags=re.MULTILINE)[0])
    registers = int(re.search(rf"Function {name}:\s+REG:(\d+)", dump)[1])

    log = _ptxas_log(compiled)
    properties = re.search(
        rf"Function properties for {name}\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        log,
    )
    assembled = re.search(r"Used (\d+) registers", log)
    if properties is None or assembled is None or int(assembled[1]) != registers:
        raise RuntimeError(f"ptxas does not reproduce Triton's binary of {registers} registers; it says:\n{log}")
    stack, stored, loaded = map(int, properties.groups())
    return instructions, dict(registers=registers, spill_bytes=stored + loaded, stack_bytes=stack, scalar_spills=0)


def _ptxas_log(compiled: Any) -> str:
    """What ptxas says with -v, run as Triton runs it: the binary does not tell its spills."""
    from triton.backends.nvidia.compiler import get_ptxas

    text = compiled.asm["ptx"]
    architecture = re.search(r"^\.target\s+(\w+)", text, flags=re.MULTILINE)[1]
    fusion = [] if compiled.metadata.enable_fp_fusion else ["--fmad=false"]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(text)
        return _output_of(
            get_ptxas(compiled.metadata.target.arch).path,
            *(
                "-v",
                *fusion,
                "--regAllocOptLevel=2",
                f"--gpu-name={architecture}",
                source,
                "-o",
                source.with_suffix(".o"),
            ),
        )


def _output_of(*command: str | Path) -> str:
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return done.stdout


def _parse_sass(code: str) -> list[Instruction]:
    lines = [(int(at, 16), guard, opcode, operands.strip()) for at, guard, opcode, operands in _SASS_LINE.findall(code)]
    index_of = {address: index for index, (address, *_) in enumerate(lines)}
    instructions = []
    for _, guard, opcode, operands in lines:
        family = opcode.split(".")[0]
        target, falls_through = None, bool(guard) or family not in _SASS_ENDS
        if family in _SASS_JUMPS and (address := re.search(r"0x[0-9a-f]+", operands)):
            target = index_of.get(int(address[0], 16))
            # A bare address is an unconditional jump; `BRA.DIV UR4, 0x..` and the like may go on.
            falls_through = bool(guard) or family == "CALL" or operands != address[0]
        if family in ("BRA", "JMP") and target is None:
            raise RuntimeError(f"cannot tell where {opcode} {operands} goes")
        instructions.append(Instruction(opcode, target, falls_through))
    if not instructions:
        raise RuntimeError("no instruction found in the SASS")
    return instructions


def _count_nvidia(instructions: Sequence[Instruction]) -> Code:
    opcodes = Counter(instruction.opcode.split(".")[0] for instruction in instructions)
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for instruction in instructions:
        family = instruction.opcode.split(".")[0]
        if family in ("LDG", "LDGSTS", "STG"):
            width = _SASS_WIDTH.search(instruction.opcode)
            (stores if family == "STG" else loads)[int(width[1]) if width else 32] += 1
    return Code(
        instructions=len(instructions),
        load_bits=dict(loads),
        store_bits=dict(stores),
        transcendentals=opcodes["MUFU"],
        shuffles=opcodes["SHFL"],
        barriers=opcodes["BAR"],
        opcodes=dict(opcodes),
    )


# AMD: the assembly holds everything.

_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(\w+)")
_AMD_WIDTHS = (
    (r"dwordx(\d)", lambda digits: 32 * int(digits)),
    (r"dword()", lambda digits: 32),
    (r"b(\d+)", int),
    (r"(?:[us]?short|[ui]16|d16)", lambda digits: 16),
    (r"(?:[us]?byte|[ui]8)", lambda digits: 8),
)
_AMD_TRANSCENDENTAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")
_AMD_SHUFFLE = re.compile(r"ds_b?permute|ds_swizzle|v_permlane|\w+_dpp$")


def _read_amd(compiled: Any) -> tuple[list[Instruction], dict[str, int]]:
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", text, flags=re.MULTILINE)
        if found is None:
            raise RuntimeError(f"no {name} in the kernel's metadata")
        return int(found[1])

    body = re.search(rf"^{re.escape(compiled.metadata.name)}:(.*?)^\.Lfunc_end", text, flags=re.MULTILINE | re.DOTALL)
    if body is None:
        raise RuntimeError(f"no code of {compiled.metadata.name} in the assembly")
    return _parse_amd(body[1]), dict(
        registers=field("vgpr_count"),
        spill_bytes=4 * field("vgpr_spill_count"),
        stack_bytes=field("private_segment_fixed_size"),
        scalar_spills=field("sgpr_spill_count"),
    )


def _parse_amd(code: str) -> list[Instruction]:
    labels: dict[str, int] = {}
    lines: list[list[str]] = []
    for line in code.splitlines():
        words = line.split(";")[0].split()
        if words and words[0].endswith(":"):
            labels[words[0][:-1]] = len(lines)
        elif words and re.match(r"[a-z]", words[0]):  # directives begin with a dot
            lines.append(words)
    return [
        Instruction(
            opcode=words[0],
            target=labels[words[1]] if re.match(r"s_c?branch", words[0]) else None,
            falls_through=words[0] not in ("s_branch", "s_endpgm", "s_setpc_b64"),
        )
        for words in lines
    ]


def _count_amd(instructions: Sequence[Instruction]) -> Code:
    opcodes = Counter(instruction.opcode for instruction in instructions)
    widths: dict[str, Counter[int]] = {"load": Counter(), "store": Counter()}
    for opcode, count in opcodes.items():
        if access := _AMD_ACCESS.match(opcode):
            widths[access[1]][_amd_bits(access[2])] += count

    def total(pattern: re.Pattern[str]) -> int:
        return sum(count for opcode, count in opcodes.items() if pattern.match(opcode))

    return Code(
        instructions=len(instructions),
        load_bits=dict(widths["load"]),
        store_bits=dict(widths["store"]),
        transcendentals=total(_AMD_TRANSCENDENTAL),
        shuffles=total(_AMD_SHUFFLE),
        barriers=opcodes["s_barrier"],
        opcodes=dict(opcodes),
    )


@functools.cache
def _amd_bits(suffix: str) -> int:
    for pattern, bits in _AMD_WIDTHS:
        if found := re.match(pattern, suffix):
            return bits(found[1] if found.re.groups else "")
    raise RuntimeError(f"unknown width of an access: {suffix}")


# Worker processes.


def compile_in_subprocess(module_function: str, targets: Sequence[str]) -> list[dict[str, Any]]:
    """Compile the launches of `module_function` ("package.module:function") for each target; one record per kernel.

    The function takes no argument and launches on CPU or meta tensors. A record holds the fields of `Launch`, of the
    first launch of this compiled kernel under this label, with `facts`, a `KernelFacts`, in place of `compiled`.
    Constants that JSON does not know come back as strings. Two workers share the targets.
    """
    shares = [share for share in (targets[0::2], targets[1::2]) if share]
    with ThreadPoolExecutor(max_workers=2) as pool:
        records = [record for share in pool.map(_run_worker, [module_function] * 2, shares) for record in share]
    for record in records:
        record["grid"] = tuple(record["grid"])
        record["facts"] = KernelFacts.from_json(record["facts"])
    return sorted(records, key=lambda record: targets.index(record["target"]))


def _run_worker(module_function: str, targets: Sequence[str]) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(_ROOT), str(_ROOT / "kernels"), str(_ROOT / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "records.json")
        # Not run as a script: the launching module must find its `label` in the very module that captures.
        start = "import sys; from support.machine_code import _work; _work(*sys.argv[1:])"
        command = [sys.executable, "-c", start, str(answer), module_function, *targets]
        done = subprocess.run(command, env=environment, cwd=_ROOT, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"compiling {module_function} for {', '.join(targets)} failed:\n{done.stderr}")
        return json.loads(answer.read_text())


def _work(answer: str, module_function: str, *targets: str) -> None:
    module, function = module_function.split(":")
    launch_all = getattr(importlib.import_module(module), function)
    facts_of: dict[str, KernelFacts] = {}
    records: dict[tuple[str | None, str], dict[str, Any]] = {}
    for target in targets:
        with capture(target) as launches:
            launch_all()
        for launch in launches:
            key = launch.compiled.hash
            if key not in facts_of:
                facts_of[key] = facts(launch.compiled)
            fields = {field.name: getattr(launch, field.name) for field in dataclasses.fields(launch)}
            del fields["compiled"]
            records.setdefault((launch.label, key), {**fields, "facts": dataclasses.asdict(facts_of[key])})
    Path(answer).write_text(json.dumps(list(records.values()), default=str))
