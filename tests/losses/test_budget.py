"""Tests that a linear loss holds what its plan says and keeps to its budget, counted at the sizes of real models."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import llmfast_kernels.cross_entropy
import llmfast_kernels.filtered_matmul
import llmfast_kernels.places
import llmfast_kernels.scale
from evidence.dry_run import reserve
from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import Counts, counting
from llmfast import losses
from llmfast.losses import (
    LinearCrossEntropyPlan,
    TeacherLogits,
    TeacherProbabilities,
    TeacherStates,
    linear_cross_entropy,
    linear_distillation,
    linear_logprobs,
    mtp_cross_entropy,
    mtp_logprobs,
    reference,
)
from llmfast.losses.options import FilterOptions, ProductOptions, declared
from llmfast.losses.plain_distillation import BLOCKS
from support.numerics import assert_close_in_norm
from support.pairs import Case, covering
from support.plans import chosen, forced

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
MODES = ["materialise", "chunk", "two-stage", "recompute"]


class Nothing:
    """A kernel that is not run: memory is what launchers and torch take."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


@contextmanager
def counted_memory() -> Iterator[Counts]:
    """Count the bytes of tensors on a pretended GPU, without computing anything large."""
    cross_entropy = mock.patch.multiple(
        llmfast_kernels.cross_entropy, cross_entropy_kernel=Nothing(), cross_entropy_backward_kernel=Nothing()
    )
    scale = mock.patch.object(llmfast_kernels.scale, "scale_kernel", Nothing())
    product = mock.patch.object(llmfast_kernels.filtered_matmul, "filtered_matmul_kernel", Nothing())
    places = mock.patch.object(llmfast_kernels.places, "count_above_kernel", Nothing())
    with cross_entropy, scale, product, places, pretending_cuda(), counting(dry=True) as counts:
        yield counts


def leaf(*shape: int, dtype: torch.dtype, grad: bool = True) -> Tensor:
    return reserve(*shape, dtype=dtype).requires_grad_(grad)


def backward(loss: Tensor) -> None:
    loss.backward(torch.ones_like(loss) if loss.dim() else None)


# Tokens, width and vocabulary, and what is the most of what is held.
SHAPES = {
    "logits and gradients": (2048, 256, 16384),
    "hidden states": (1024, 1024, 512),
    "weight": (256, 1024, 8192),
    "logits": (2048, 16, 8192),
}
DTYPES = [(BF16, None), (BF16, F32), (F32, None)]
BOTH, FIRST = (True, True), "logits and gradients"
CASES = [(*dtypes, shape, BOTH) for dtypes in DTYPES for shape in SHAPES]
CASES += [(*dtypes, FIRST, wants) for dtypes in DTYPES for wants in ((True, False), (False, True))]
CASES += [(F16, None, "logits", BOTH)]  # which a CPU multiplies slowly
SIZES_OF_MODES = [
    (*case, mode, size)
    for i, case in enumerate(CASES)
    for j, mode in enumerate(MODES)
    for k, size in enumerate(("small", "most"))
    if (i + j + k) % 2 == 0  # any two meet
]


@pytest.mark.parametrize(("dtype", "slab_dtype", "shape", "wants", "mode", "size"), SIZES_OF_MODES, ids=str)
def test_a_mode_holds_what_the_plan_says(
    dtype: torch.dtype, slab_dtype: torch.dtype | None, shape: str, wants: tuple[bool, bool], mode: str, size: str
) -> None:
    """Compare to the byte, except for a few numbers per row."""
    if mode == "two-stage" and not wants[1]:
        pytest.skip("no columns are left to a second stage")
    N, D, V = SHAPES[shape]
    hidden, weight = leaf(N, D, dtype=dtype, grad=wants[0]), leaf(V, D, dtype=dtype, grad=wants[1])
    targets = torch.zeros(N, dtype=torch.int64)
    with forced(mode, size) as plans, counted_memory() as counts:
        linear_cross_entropy(hidden, weight, targets, slab_dtype=slab_dtype).backward()
    (plan,) = plans
    assert plan.mode == mode
    assert 0 <= plan.peak_bytes - counts.peak_bytes <= 16 * N + 128
    assert counts.total().dot_flops.total() == plan.flops


@pytest.mark.parametrize(
    ("mode", "option"), [("chunk", "grad_filter"), ("chunk", "bias"), ("two-stage", "bias"), ("recompute", "bias")]
)
@pytest.mark.parametrize("size", ["small", "most"])
def test_what_a_filter_and_a_bias_take_is_in_the_plan(size: str, mode: str, option: str) -> None:
    hidden, weight, targets = leaf(2048, 16, dtype=BF16), leaf(8192, 16, dtype=BF16), torch.zeros(2048).long()
    given: dict[str, Any] = {"grad_filter": 1e-5} if option == "grad_filter" else {"bias": leaf(8192, dtype=BF16)}
    with forced(mode, size) as plans, counted_memory() as counts:
        linear_cross_entropy(hidden, weight, targets, **given).backward()
    (plan,) = plans
    assert plan.mode == mode
    returned = 2 * 8192 if option == "bias" else 0  # which `peak_bytes` does not count
    assert counts.peak_bytes - returned <= plan.peak_bytes


def test_each_shape_is_dominated_by_another_tensor() -> None:
    """Each argument of every `max` in the plan is then the larger one for some shape."""
    for shape in ("hidden states", "weight", "logits"):
        N, D, V = SHAPES[shape]
        parts = {"hidden states": N * D, "weight": V * D, "logits": N * V}
        if shape != "logits":
            parts.pop("logits")  # of which a slab holds some
        assert parts.pop(shape) >= 2 * max(parts.values())


# D and V.
MODELS = {"GPT-2": (768, 50257), "Llama-3": (4096, 128256), "Gemma-2": (2304, 256000), "Qwen-3": (2560, 151936)}
CALLS: dict[str, dict[str, Any]] = {
    "mean": {},
    "losses per token": {"reduction": "none"},
    "log-probabilities": {"K": 8, "temperature": 0.7, "return_stats": True},
    "temperatures": {"K": 8, "temperature": "N", "softcap": 30.0},
    "ranks": {"K": 64, "return_stats": True, "return_rank": True},
    "64 log-probabilities": {"K": 64, "slab_dtype": F32},
    "four heads": {"heads": 4},
    "float32": {"dtype": F32},
    "float32 logits": {"slab_dtype": F32},
    "sums in bfloat16": {"accumulate_dtype": BF16},
    "float16": {"dtype": F16},
    "softcap, smoothing and statistics": {"softcap": 30.0, "label_smoothing": 0.1, "return_stats": True},
    "targets to shift": {"shift": 1},
    "weights that are cast": {"token_weights": "N", "class_weights": "V"},
    "weights of targets": {"target_weights": "NK"},
}


def made(options: dict[str, Any], N: int, V: int) -> dict[str, Any]:
    """Return options with arguments of these sizes in place of their names; weights are copied to float32."""
    sizes = {"N": (N,), "V": (V,), "NK": (N, 2)}
    return {name: reserve(*sizes[x], dtype=BF16) if x in sizes else x for name, x in options.items()}


LAUNCHES = 200  # as many are counted in a third of a second
BUDGETS = (8 << 20, 64 << 20, 200 << 20, 1 << 30, 3 << 30, 8 << 30)


def run(hidden: Tensor, weight: Tensor, targets: Tensor, heads: int = 0, K: int = 0, **options: Any) -> None:
    function: Any = mtp_cross_entropy if heads else linear_logprobs if K else linear_cross_entropy
    found = function(hidden, weight, targets, **options)
    backward(found[0] if isinstance(found, tuple) else found)


def least_of(hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> int:
    """Return the least budget that the error names."""
    with counted_memory(), pytest.raises(ValueError, match="memory_budget must be at least") as error:
        run(hidden, weight, targets, memory_budget=1, **options)
    found = re.search(r"at least (\d+) bytes", str(error.value))
    assert found is not None
    return int(found[1])


SIZES_OF_CALLS = [(N, "mean", model) for N in (512, 4096, 16384, 65536) for model in MODELS]
SIZES_OF_CALLS += [(65536, "four heads", model) for model in MODELS]
# Other calls with two models each, so that any two of call, N and model meet.
SIZES_OF_CALLS += [
    (N, call, model)
    for i, call in enumerate(CALLS)
    for j, model in enumerate(MODELS)
    for k, N in enumerate((512, 16384))
    if call != "mean" and (i + j + k) % 2 == 0
]


@pytest.mark.parametrize(("N", "call", "model"), SIZES_OF_CALLS)
def test_a_budget_is_kept(N: int, call: str, model: str) -> None:
    (D, V), options = MODELS[model], dict(CALLS[call])
    heads, dtype = options.get("heads", 0), options.pop("dtype", BF16)
    tokens, K = (heads, N // heads) if heads else (N,), options.get("K", 0)
    hidden, weight = leaf(*tokens, D, dtype=dtype), leaf(V, D, dtype=dtype)
    several = [2] if "target_weights" in options else [K] if K else []
    targets = torch.zeros(tokens[-1], *several, dtype=torch.int64)
    options = made(options, N, V)
    least = least_of(hidden, weight, targets, **options)
    for budget in (least, *BUDGETS[:: 1 if call == "mean" else 2]):
        slab = budget - least + 8 * V  # at the least budget, about one row
        if budget >= least and 4 * N * V / slab < LAUNCHES:
            hidden.grad = weight.grad = None
            with counted_memory() as counts:
                run(hidden, weight, targets, memory_budget=budget, **options)
            gradients = hidden.nbytes + weight.nbytes
            assert counts.peak_bytes - gradients <= budget, budget


def first_of_ranks(world: int) -> AbstractContextManager[Any]:
    """Pretend to be the first of several ranks, whose sums are its own."""
    pretended = {"get_world_size": lambda group: world, "get_rank": lambda group: 0, "all_reduce": lambda *given: None}
    return mock.patch.multiple(torch.distributed, **pretended)


@pytest.mark.parametrize("call", ["mean", "losses per token", "everything", "log-probabilities"])
@pytest.mark.parametrize("model", ["GPT-2", "Llama-3"])
def test_one_of_several_ranks_keeps_its_budget(model: str, call: str) -> None:
    everything = {"label_smoothing": 0.1, "z_loss": 1e-4, "token_weights": "N", "return_stats": True}
    D, V = MODELS[model]
    columns, N = -(-V // 4), 16384  # of the first of four ranks
    options = made(dict({**CALLS, "everything": everything}[call]), N, V)
    hidden, weight = leaf(N, D, dtype=BF16), leaf(columns, D, dtype=BF16)
    targets = torch.zeros(N, *([options["K"]] if "K" in options else []), dtype=torch.int64)
    options |= {"process_group": "four ranks", "vocab_size": V}
    with first_of_ranks(4):
        least = least_of(hidden, weight, targets, **options)
        for budget in (least + (8 << 20), least + (64 << 20), 1 << 30):
            hidden.grad = weight.grad = None
            with chosen() as plans, counted_memory() as counts:
                run(hidden, weight, targets, memory_budget=budget, **options)
            held = counts.peak_bytes - hidden.nbytes - weight.nbytes
            assert 0.95 * plans[0].held_bytes <= held <= min(budget, plans[0].held_bytes), budget


@pytest.mark.parametrize("budget", [40 << 20, 64 << 20, 200 << 20])
def test_two_kinds_of_heads_keep_to_one_budget(budget: int) -> None:
    D, V = MODELS["Llama-3"]
    hidden, weight = leaf(4, 256, D, dtype=BF16), leaf(V, D, dtype=BF16)
    with counted_memory() as counts:
        detached = [True, False, False, False]
        run(hidden, weight, torch.zeros(256, dtype=torch.int64), 4, memory_budget=budget, detach_unembedding=detached)
    assert budget / 3 < counts.peak_bytes - hidden.nbytes - weight.nbytes <= budget


@pytest.mark.parametrize("detached", [[True, False, False, False], [False, True, False, True]])
def test_the_gradients_of_two_kinds_of_heads_are_joined_within_the_budget(detached: list[bool]) -> None:
    """Let them be larger than the rest: the hidden states take 128 MiB."""
    D, V = MODELS["Llama-3"]
    hidden, weight = leaf(4, 4096, D, dtype=BF16), leaf(V, D, dtype=BF16)
    targets, options = torch.zeros(4096, dtype=torch.int64), {"heads": 4, "detach_unembedding": detached}
    least = least_of(hidden, weight, targets, **options)
    assert 2 * hidden.nbytes < least < 4 * hidden.nbytes
    for budget in (least + (256 << 20), 1 << 30):  # the least takes too many launches to count
        hidden.grad = weight.grad = None
        with counted_memory() as counts:
            run(hidden, weight, targets, memory_budget=budget, **options)
        assert counts.peak_bytes - hidden.nbytes - weight.nbytes <= budget


# Any two of these, on a GPU; the sizes are such that hidden states, the weight or the logits are the most.
OF_A_CALL: dict[str, list[Any]] = {
    "K": [0, 1, 8],  # of log-probabilities; 0 for a loss
    "dtype": [BF16, F32, F16],
    "slab_dtype": [None, F32],
    "wants": [(True, True), (True, False), (False, True)],
    "bias": [False, True],
    "ranks": [0, 4],
    "return_stats": [False, True],
    "return_rank": [False, True],
    "reduction": ["mean", "none"],
    "accumulate_into": [False, True],
    "grad_filter": [None, 1e-4],
    "size": ["small", "middle", "most"],
    "shape": [(256, 64, 2048), (64, 256, 2048), (128, 512, 256)],
}


def can_be_held(case: Case) -> bool:
    """Return False for options that exclude each other."""
    given, K = case.get, case.get("K")
    return (
        not (K and (given("reduction") == "none" or given("grad_filter")))
        and not (K == 0 and given("return_rank"))
        and not (given("return_rank") and given("return_stats") is False)
        and not (given("grad_filter") and (given("ranks") or given("reduction") == "none"))
        and not (given("accumulate_into") and not given("wants", BOTH)[1])
    )


CALLS_HELD = [case for seed in (0, 1) for case in covering(OF_A_CALL, can_be_held, seed)]


@pytest.mark.parametrize("case", CALLS_HELD, ids=lambda case: "-".join(map(str, case.values())))
def test_any_two_options_hold_what_the_plan_says(case: Case) -> None:
    """Compare with what is counted, but for numbers per row, which are not all there at the same time."""
    (N, D, V), K, ranks = case["shape"], case["K"], case["ranks"]
    hidden, weight = (leaf(n, D, dtype=case["dtype"], grad=g) for n, g in zip((N, V), case["wants"], strict=True))
    given: dict[str, Any] = {"slab_dtype": case["slab_dtype"], "return_stats": case["return_stats"], "K": K}
    given |= {"return_rank": case["return_rank"]} if K else {n: case[n] for n in ("reduction", "grad_filter")}
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    if case["bias"]:
        leaves.append(leaf(V, dtype=F32))
        given["bias"] = leaves[-1]
    if case["accumulate_into"]:
        given["accumulate_into"] = reserve(V, D, dtype=F32)
        leaves = [t for t in leaves if t is not weight]
    if ranks:
        given |= {"process_group": "ranks", "vocab_size": V * ranks}
    targets = torch.zeros(N, *([K] if K else []), dtype=torch.int64)
    of_ranks = first_of_ranks(ranks) if ranks else nullcontext()
    with of_ranks, forced(None, case["size"]) as plans, counted_memory() as counts:
        run(hidden, weight, targets, **given)
    spare = plans[0].held_bytes - (counts.peak_bytes - sum(t.nbytes for t in leaves))
    assert 0 <= spare <= (64 + 60 * max(1, K) + 25 * ranks) * N + 8 * V * case["bias"]


n, d, v = 1024, 64, 2048
# What a call of these sizes copies of its arguments, and the bytes that this takes.
COPIED: list[tuple[dict[str, Any], int]] = [
    ({}, 0),
    ({"shift": 1}, 8 * n),
    ({"num_valid": 256}, 2 * 256 * 2 * d + 256 * 8),  # the rows and their gradient
    ({"num_valid": 256, "token_weights": BF16}, 2 * 256 * 2 * d + 256 * (8 + 4)),
    ({"num_valid": n}, 0),
    ({"token_weights": BF16}, 4 * n),
    ({"token_weights": F32}, 0),
    ({"target_weights": BF16}, 4 * n),
    ({"class_weights": BF16}, 4 * v),
    ({"hidden": F32, "autocast": BF16}, 2 * n * d),
    ({"hidden": F32, "weight": F32, "autocast": BF16}, 2 * (n + v) * d),
    ({"hidden": "transposed"}, 0),
    ({"hidden": "transposed", "weight": "transposed", "grad_filter": 1e-3}, 2 * (n + v) * d),
]


@pytest.mark.parametrize(("options", "bytes_"), COPIED, ids=str)
def test_copies_of_arguments_count(options: dict[str, Any], bytes_: int) -> None:
    sizes = {"hidden": (n, d), "weight": (v, d), "token_weights": (n,), "class_weights": (v,), "target_weights": (n, 1)}

    def made(name: str, kind: Any) -> Tensor:
        if kind == "transposed":
            return torch.zeros(sizes[name][::-1], dtype=BF16).T
        return torch.zeros(sizes[name], dtype=kind)

    given = {"hidden": BF16, "weight": BF16} | options
    autocast = given.pop("autocast", None)
    tensors: Any = {name: made(name, given.pop(name)) for name in sizes if name in given}
    targets = torch.zeros(n, *([1] if "target_weights" in tensors else []), dtype=torch.int64)
    hidden, weight = tensors.pop("hidden").requires_grad_(), tensors.pop("weight").requires_grad_()
    with counted_memory(), forced(None) as plans, torch.autocast("cuda", autocast, enabled=autocast is not None):
        linear_cross_entropy(hidden, weight, targets, **tensors, **given)
    assert [plan.call.held for plan in plans] == [bytes_]


# Where sums are kept.


def trained(
    accumulate_dtype: torch.dtype | None, rows: int, dtype: torch.dtype = BF16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight's gradient, torch's, and the exact one."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(60, 16).to(dtype), (torch.randn(300, 16) / 4).to(dtype)
    targets = torch.randint(0, 300, (60,))

    def gradient(loss: Any, dtype: torch.dtype, **options: Any) -> Tensor:
        w = weight.to(dtype).clone().requires_grad_()
        return torch.autograd.grad(loss(hidden.to(dtype), w, targets, **options), w)[0]

    with forced("chunk", rows=rows):
        ours = gradient(linear_cross_entropy, dtype, accumulate_dtype=accumulate_dtype)
    return ours, gradient(reference.linear_cross_entropy, dtype), gradient(reference.linear_cross_entropy, F64)


def test_sums_in_the_weights_dtype_round_once_per_chunk(path: str) -> None:
    in_float32, in_bfloat16 = trained(None, 60)[0], trained(BF16, 60)[0]
    assert_close_in_norm(in_bfloat16, *trained(None, 60)[1:], factor=1.5)
    assert in_bfloat16.dtype == in_float32.dtype == BF16
    ours, theirs, truth = trained(BF16, 6)
    error = ((ours - truth).norm() / (theirs - truth).norm()).item()
    assert 1.1 < error < 10**0.5 * 1.5  # ten roundings instead of one
    assert torch.equal(trained(F32, 6, F32)[0], trained(None, 6, F32)[0])


def test_accumulate_dtype_is_checked() -> None:
    hidden, weight, targets = (
        torch.randn(4, 8),
        torch.randn(5, 8, requires_grad=True),
        torch.zeros(4, dtype=torch.int64),
    )
    with pytest.raises((TypeError, ValueError), match=r"accumulate_dtype must be .*got torch\.bfloat16"):
        linear_cross_entropy(hidden, weight, targets, accumulate_dtype=BF16)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch 2.10")
@pytest.mark.parametrize("mode", MODES)
def test_a_float32_gradient_of_a_bfloat16_weight_is_not_rounded(path: str, mode: str) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(40, 16).bfloat16(), torch.randint(0, 300, (40,))
    weight = (torch.randn(300, 16) / 4).bfloat16()

    def gradient(grad_dtype: torch.dtype) -> Tensor:
        w = weight.clone().requires_grad_()
        w.grad_dtype = grad_dtype
        with forced(mode) as plans:
            linear_cross_entropy(hidden, w, targets).backward()
        assert w.grad is not None and w.grad.dtype == grad_dtype == plans[0].call.weight_dtype
        assert grad_dtype == BF16 or mode != "chunk" or not plans[0].call.separate(plans[0].way)  # no pass casts it
        return w.grad

    w = weight.double().requires_grad_()
    (truth,) = torch.autograd.grad(reference.linear_cross_entropy(hidden.double(), w, targets), w)
    in_float32, rounded = gradient(F32), gradient(BF16)
    assert (in_float32 - truth).norm() <= 1.1 * (rounded - truth).norm()  # a CPU rounds products
    if mode == "chunk":
        assert torch.equal(in_float32.bfloat16(), rounded)


ON_A_CPU: list[dict[str, Any]] = [{}, {"softcap": 30.0, "label_smoothing": 0.1}, {"return_stats": True}]


OF_ROWS: list[dict[str, Any]] = [{"reduction": x, **options} for x in ("mean", "none") for options in ON_A_CPU]
OF_ROWS += [{"ranks": 2}, {"ranks": 2, "reduction": "none", "label_smoothing": 0.1}, {"ranks": 2, "K": 8}]
OF_ROWS += [{"K": K, "return_stats": K == 8, "softcap": 30.0 if K == 8 else None} for K in (1, 8, 64)]
# Any two of options, dtype and ignored tokens meet.
ON_A_CPU_CASES = [
    (dtype, 12 * ((i + j) % 2), options)
    for i, options in enumerate(OF_ROWS)
    for j, dtype in enumerate((F32, BF16, F64))
]


@pytest.mark.parametrize(("dtype", "ignored", "options"), ON_A_CPU_CASES, ids=str)
def test_a_budget_is_kept_on_a_cpu(dtype: torch.dtype, ignored: int, options: dict[str, Any]) -> None:
    N, D, V = 16, 32, 4096
    hidden, weight = (torch.randn(n, D).to(dtype).requires_grad_() for n in (N, V))
    targets = torch.randint(0, V, (N, options["K"]) if "K" in options else (N,))
    targets[:ignored] = -100
    given = {name: value for name, value in options.items() if name != "ranks"}
    if ranks := options.get("ranks"):
        given |= {"process_group": "ranks", "vocab_size": V * ranks}

    def held(budget: int) -> int:
        hidden.grad = weight.grad = None
        with counting() as counts, first_of_ranks(ranks) if ranks else nullcontext():
            run(hidden, weight, targets, memory_budget=budget, **given)
        return counts.peak_bytes - hidden.nbytes - weight.nbytes

    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        held(1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    each = 15 * max(dtype.itemsize, 4)  # bytes per id: the results, and their places and masks
    assert least < (1 << 18) + each * N * options.get("K", 0)
    for budget in (least, 2 * least, 1 << 19, 1 << 20, 4 << 20):
        assert budget < least or held(budget) <= budget


FACTORS: dict[str, list[Any]] = {
    "kind": ["loss", "log-probabilities", "heads"],
    "dtype": [F32, BF16, F16, F64],
    "wants": [(True, True), (True, False), (False, True)],
    "bias": [False, True],
    "ignored": [0, 5, 16],
    "ranks": [0, 2],
    "K": [1, 3],
    "return_stats": [False, True],
    "softcap": [None, 30.0],
    "logit_scale": [None, 1.5],
    "reduction": ["mean", "none"],
    "label_smoothing": [0.0, 0.1],
    "z_loss": [0.0, 1e-3],
    "class_weights": [False, True],
    "token_weights": [False, True],
    "grad_filter": [None, 1e-4],
}
OF_A_LOSS = ("reduction", "label_smoothing", "z_loss", "class_weights", "token_weights", "grad_filter")


def can_be(case: Case) -> bool:
    """Return False for options that one of the functions does not have, or that exclude each other."""
    set_ = {name for name, value in case.items() if value != FACTORS[name][0]}
    kind = case.get("kind")
    if kind == "log-probabilities" and set_.intersection(OF_A_LOSS):
        return False
    if kind == "heads" and set_.intersection(("reduction", "K")):
        return False
    filtering = "grad_filter" in set_ and set_.intersection(("ranks", "return_stats", "reduction", "K"))
    return not filtering and not (kind == "loss" and "K" in set_)


@pytest.mark.parametrize("case", covering(FACTORS, can_be), ids=lambda case: "-".join(map(str, case.values())))
def test_any_two_options_together_keep_a_budget_on_a_cpu(case: Case) -> None:
    N, D, V, ranks, kind = 32, 16, 2048, case["ranks"], case["kind"]
    names = ("return_stats", "softcap", "logit_scale", *(OF_A_LOSS if kind != "log-probabilities" else ()))
    given = {name: case[name] for name in names if not (kind == "heads" and name == "reduction")}
    given |= {"K": case["K"]} if kind == "log-probabilities" else {"heads": 4} if kind == "heads" else {}
    tokens = (4, N // 4) if kind == "heads" else (N,)
    for name, shape in (("class_weights", (V * max(1, ranks),)), ("token_weights", tokens[-1:])):
        if name in given:
            given[name] = torch.rand(shape) if case[name] else None
    hidden, weight = (
        torch.randn(*shape, D).to(case["dtype"]).requires_grad_(wanted)
        for shape, wanted in zip((tokens, (V,)), case["wants"], strict=True)
    )
    leaves = [t for t in (hidden, weight) if t.requires_grad]
    if case["bias"]:
        leaves.append(torch.randn(V).to(case["dtype"]).requires_grad_())
        given["bias"] = leaves[-1]
    if ranks:
        given |= {"process_group": "ranks", "vocab_size": V * ranks}
    targets = torch.randint(0, V, (tokens[-1], case["K"]) if kind == "log-probabilities" else tokens[-1:])
    targets[: min(case["ignored"], len(targets) - 1)] = -100

    def held(budget: int) -> int:
        for leaf in leaves:
            leaf.grad = None
        with counting() as counts, first_of_ranks(ranks) if ranks else nullcontext():
            run(hidden, weight, targets, memory_budget=budget, **given)
        return counts.peak_bytes - sum(leaf.nbytes for leaf in leaves)

    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        held(1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (least, 2 * least, 1 << 20):
        assert budget < least or held(budget) <= budget, budget


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"K": 1}, {}], ids=str)
@pytest.mark.parametrize("learns", [True, False])
def test_copies_for_unrounded_logits_are_in_the_budget(learns: bool, options: dict[str, Any]) -> None:
    """Take a CPU, which multiplies low precision into float32 by casting."""
    hidden, weight = (torch.randn(n, 256).bfloat16().requires_grad_(learns) for n in (64, 4096))
    targets = torch.randint(0, 4096, (64,))

    def held(budget: int) -> int:
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(learns), counting() as counts:
            given = {"slab_dtype": F32, "memory_budget": budget}
            if "K" in options:
                out = linear_logprobs(hidden, weight, targets, **given)  # type: ignore[arg-type]
            else:
                out = linear_cross_entropy(hidden, weight, targets, **given, **options)
            if learns:
                out.sum().backward()
        return counts.peak_bytes - (hidden.nbytes + weight.nbytes) * learns

    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        held(1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (least, 2 * least, 4 << 20, 16 << 20):
        assert budget < least or held(budget) <= budget


# Options and the plan.

LINEAR = [linear_cross_entropy, linear_logprobs, linear_distillation, mtp_cross_entropy, mtp_logprobs]
# What an option decides of a call of bfloat16.
DECIDES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "bias": (lambda: torch.zeros(40, dtype=BF16).requires_grad_(), {"wants": (True, True, True)}),
    "memory_budget": (lambda: 1 << 17, {}),
    "slab_dtype": (lambda: F32, {"slab_dtype": F32}),
    "accumulate_into": (lambda: torch.zeros(40, 8), {"into": True}),
    "accumulate_dtype": (lambda: BF16, {"accumulate_dtype": BF16}),
    "grad_filter": (lambda: 1e-3, {"filtered": True}),
}
DECIDED = [(f, name) for f in LINEAR for name in DECIDES if name in inspect.signature(f).parameters]


def planned_first(function: Any, *, grad_dtype: torch.dtype | None = None, **options: Any) -> LinearCrossEntropyPlan:
    """Return the plan of a small call."""
    several = function in (mtp_cross_entropy, mtp_logprobs)
    hidden, weight = torch.randn(*([2] if several else []), 4, 8).to(BF16), torch.randn(40, 8).to(BF16).requires_grad_()
    if grad_dtype is not None:
        weight.grad_dtype = grad_dtype
    given = TeacherLogits(torch.randn(4, 40)) if function is linear_distillation else torch.arange(4)
    with chosen() as plans:
        function(hidden.requires_grad_(), weight, given, **options)
    return plans[-1]


@pytest.mark.parametrize(("function", "name"), DECIDED, ids=lambda x: getattr(x, "__name__", x))
def test_what_an_option_decides_reaches_the_plan(path: str, function: Any, name: str) -> None:
    value, wanted = DECIDES[name]
    usual, plan = planned_first(function), planned_first(function, **{name: value()})
    assert {n: getattr(plan.call, n) for n in wanted} == wanted
    assert not any(getattr(usual.call, n) == value for n, value in wanted.items())
    assert (plan.budget == 1 << 17) == (name == "memory_budget")


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch 2.10")
@pytest.mark.parametrize("function", LINEAR)
def test_every_linear_loss_asks_a_weight_for_the_dtype_of_its_gradient(function: Any) -> None:
    assert [planned_first(function, grad_dtype=dtype).call.weight_dtype for dtype in (F32, BF16, None)] == [
        F32,
        *[BF16] * 2,
    ]


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="torch 2.10")
def test_a_teachers_weight_has_a_gradient_and_logits_of_its_own_dtypes() -> None:
    hidden, weight, theirs = (torch.randn(n, 8).to(BF16) for n in (4, 40, 40))
    theirs.requires_grad_().grad_dtype = F32
    for slab_dtype in (None, F32):
        with chosen() as plans:
            loss = linear_distillation(hidden, weight, TeacherStates(hidden, theirs), slab_dtype=slab_dtype)
            theirs.grad = None
            loss.backward()
        call = plans[-1].call
        assert theirs.grad is not None and theirs.grad.dtype == call.weight_dtype == F32
        assert call.slab_dtype == (slab_dtype or BF16) and call.wants == (False, True, False)


@pytest.mark.parametrize(("teacher", "blocks"), [(TeacherLogits, 0), (TeacherProbabilities, BLOCKS)])
def test_what_plain_torch_makes_for_a_teacher_has_room(kernels: None, teacher: Any, blocks: int) -> None:
    """No kernel makes gradients of probabilities: their blocks of rows count, though the student's loss has none."""
    said = torch.full((4, 40), 1 / 40).requires_grad_()
    with chosen() as plans:
        linear_distillation(torch.randn(4, 8), torch.randn(40, 8), teacher(said), kind="reverse_kl").backward()
    assert plans[0].call.blocks == 0 and plans[-1].call.blocks == blocks


def test_autocasts_copies_of_the_student_are_held_while_its_teacher_learns() -> None:
    held = []
    for dtype in (BF16, F32):
        hidden, weight, *theirs = (torch.randn(n, 8) for n in (4, 40, 4, 40))
        teacher = TeacherStates(*(t.to(BF16).requires_grad_() for t in theirs))
        with chosen() as plans, torch.autocast("cpu", BF16, enabled=dtype == F32):
            linear_distillation(hidden.to(dtype), weight.to(dtype), teacher).backward()
        held.append([plan.call.held for plan in (plans[0], plans[-1])])
    assert [b - a for a, b in zip(*held)] == [2 * 44 * 8] * 2


def test_every_option_that_says_how_to_compute_is_tried() -> None:
    assert DECIDES.keys() == declared(ProductOptions).keys() | declared(FilterOptions).keys()
    assert {f for name in losses.__all__ if "memory_budget" in parameters(f := getattr(losses, name))} == {*LINEAR}


def parameters(function: Any) -> Any:
    return inspect.signature(function).parameters if inspect.isfunction(function) else ()
