"""Tests of the linear loss's plan: modes that agree, what they hold and skip, and what the plan reports."""

import dataclasses
import itertools
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.traffic import counting
from llmfast._gpus import H100, MI300X, Gpu
from llmfast._units import in_bytes
from llmfast.losses import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    LinearCrossEntropyPlan,
    linear_cross_entropy,
    reference,
)
from llmfast.losses.plan import may_hold, planned
from llmfast.losses.valid_rows import valid_rows
from llmfast_kernels.terms import Targets
from support.devices import DEVICE
from support.numerics import assert_close_in_norm
from support.plans import SIZES, forced, least_budget

MODES = ["materialise", "chunk", "two-stage", "recompute"]


def tensors(N: int = 40, V: int = 300, D: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, V, (N,))
    targets[3:9] = -100
    return torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(V, D).to(dtype).requires_grad_(), targets


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize(("mode", "size"), list(itertools.product(MODES, SIZES)))
def test_modes_and_slabs_agree(path: str, mode: str, size: str) -> None:
    reduction = ["mean", "sum"][(MODES.index(mode) + [*SIZES].index(size)) % 2]
    hidden, weight, targets = tensors(17)
    bias = torch.randn(300, requires_grad=True)
    options: dict[str, Any] = {"bias": bias, "reduction": reduction, "label_smoothing": 0.1, "z_loss": 0.01}
    truth = reference.linear_cross_entropy(hidden, weight, targets, **options)
    with forced(mode, size) as plans:
        loss = linear_cross_entropy(hidden, weight, targets, **options)
        got = gradients(loss, hidden, weight, bias)
    assert plans[0].mode == mode
    torch.testing.assert_close(loss, truth)
    for a, b in zip(got, gradients(cast(Tensor, truth), hidden, weight, bias)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


LLAMA: dict[str, Any] = {"N": 16384, "D": 4096, "V": 128256}


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        ({}, "chunk"),
        ({"memory_budget": 1 << 30}, "two-stage"),
        ({"N": 1024}, "materialise"),
        ({"N": 1024, "dtype": torch.float16}, "chunk"),
        ({"N": 1024, "device": "cpu", "kernels": False}, "chunk"),
        ({"reduction": "none"}, "recompute"),
        ({"reduction": "none", "memory_budget": 1 << 40}, "materialise"),
        ({"wants": (False, False)}, "chunk"),
    ],
)
def test_the_mode_follows_from_budget_and_gradients(change: dict[str, Any], mode: str) -> None:
    assert LinearCrossEntropyPlan.make(**(LLAMA | change)).mode == mode


def sum_of_gradient(N: int, D: int, V: int) -> int:
    """Return the bytes that "auto" needs for a float32 sum of the weight's gradient, and for numbers per row."""
    return 4 * V * D + 24 * N + 4 * V + 64


def test_a_plan_for_a_gpu_can_be_asked_for_without_one() -> None:
    plan = LinearCrossEntropyPlan.make(**LLAMA)
    assert plan.budget == sum_of_gradient(**LLAMA) and plan.mode == "chunk"
    assert LinearCrossEntropyPlan.make(16384, 1024, 128256).budget == 1 << 30


@pytest.mark.parametrize(("gib", "budget"), [(80, sum_of_gradient(**LLAMA)), (8, (8 << 30) // 10)])
def test_the_default_budget_is_at_most_a_tenth_of_a_gpus_memory(
    gib: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LinearCrossEntropyPlan.make(**LLAMA, gpu_memory=gib << 30).budget == budget
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gib << 30))
    assert LinearCrossEntropyPlan.make(**LLAMA).budget == budget
    on_cpu = LinearCrossEntropyPlan.make(**LLAMA, dtype=torch.float32, device="cpu")
    assert on_cpu.budget == 64 << 20  # float32 sums are the gradient itself


def test_the_plan_prints_what_the_other_modes_cost() -> None:
    plan = LinearCrossEntropyPlan.make(**LLAMA, memory_budget=8 << 30)
    text = str(plan)
    assert "chunk *" in text and "materialise" in text and "recompute" in text and "modelled on H100" in text
    assert plan.flops == 6 * 16384 * 4096 * 128256 and plan.products == 3
    assert {p.mode for p in plan.alternatives} == {"materialise", "two-stage", "recompute"}
    assert all(p.held_bytes <= p.budget == 8 << 30 for p in plan.alternatives)


CALLS: dict[str, dict[str, Any]] = {
    "Llama-3": LLAMA,
    "Llama-3, losses per token": LLAMA | {"reduction": "none"},
    "Gemma-2": {"N": 4096, "D": 2304, "V": 256000},
    "Qwen-3, float32": {"N": 4096, "D": 4096, "V": 151936, "dtype": torch.float32},
    "GPT-2": {"N": 65536, "D": 768, "V": 50257},
    "GPT-2, losses per token": {"N": 65536, "D": 768, "V": 50257, "reduction": "none"},
    "few tokens": {"N": 1024, "D": 4096, "V": 128256},
    "few tokens, on a CPU": {
        "N": 1024,
        "D": 512,
        "V": 50257,
        "dtype": torch.bfloat16,
        "device": "cpu",
        "kernels": False,
    },
    "no gradient of the weight": LLAMA | {"wants": (True, False)},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_smaller_budget_never_holds_more_and_a_larger_one_never_takes_longer(name: str) -> None:
    least = least_budget(**CALLS[name])
    with pytest.raises(ValueError, match=f"memory_budget must be at least {least} bytes.*got {least - 1}"):
        LinearCrossEntropyPlan.make(**CALLS[name], memory_budget=least - 1)
    budgets = [int(least * 1.3**i) for i in range(60)]
    plans = [
        LinearCrossEntropyPlan.make(**CALLS[name], memory_budget=budget) for budget in budgets if budget < 64 << 30
    ]
    for small, large in pairwise(plans):
        assert small.held_bytes <= large.held_bytes and large.seconds <= small.seconds
    assert all(plan.held_bytes <= plan.budget for plan in plans)


def test_a_fifth_of_a_gibibyte_is_enough_for_four_products() -> None:
    plan = LinearCrossEntropyPlan.make(**LLAMA, memory_budget=(1 << 30) // 5)
    assert plan.products <= 4.0 and plan.seconds < 0.106
    per_token = LinearCrossEntropyPlan.make(**LLAMA, memory_budget=(1 << 30) // 5, reduction="none")
    assert per_token.products <= 5.0


@pytest.mark.parametrize("mebibytes", [16, 200, 1024, 1536])
def test_a_column_that_is_not_summed_costs_its_share_of_a_fourth_product(mebibytes: int) -> None:
    plan = LinearCrossEntropyPlan.make(**LLAMA, memory_budget=mebibytes << 20)
    N, D, V = LLAMA["N"], LLAMA["D"], LLAMA["V"]
    assert plan.mode == "two-stage" and plan.way.kept == 0
    assert plan.products == pytest.approx(4 - plan.way.summed / V)
    sums, slab = 4 * plan.way.summed * D, 2 * N * plan.way.columns
    assert plan.held_bytes == pytest.approx(max(slab, sums), abs=16 * N)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("D", "V"), [(4096, 128256), (2304, 256000), (2560, 151936)])
def test_chunks_of_rows_take_the_bytes_of_a_gradient_that_is_not_made_yet(D: int, V: int, reduction: str) -> None:
    """Only the slab of columns counts, so that a small budget costs a product and little else."""
    plans = [
        LinearCrossEntropyPlan.make(16384, D, V, reduction=reduction, memory_budget=most << 20) for most in (16, 200)
    ]
    few, more = plans
    assert few.held_bytes <= 16 << 20 and few.products == {"mean": 4, "none": 5}[reduction]
    assert (16 << 20) < few.slab_bytes <= 2 * V * D
    assert few.seconds < {"mean": 1.1, "none": 1.35}[reduction] * more.seconds


def test_the_bytes_of_the_callers_own_buffer_are_not_free() -> None:
    call = LinearCrossEntropyPlan.make(**LLAMA, memory_budget=16 << 20).call
    plan = planned(replace(call, into=True), 16 << 20, torch.device("cuda"))
    assert plan.slab_bytes <= 16 << 20


@pytest.mark.parametrize("mode", MODES)
def test_a_slab_of_all_classes_is_as_wide_in_backward_as_in_forward(mode: str) -> None:
    """Rows of any number of classes start at multiples of 128 bytes, for accesses of 16."""
    plan = LinearCrossEntropyPlan.make(64, 32, 301, mode=cast(Any, mode), memory_budget=1 << 20)
    assert plan.call.row_width == 320
    assert plan.column_width == (320 if plan.way.columns == 301 else plan.way.columns)
    assert plan.way.columns == 301 or plan.way.columns % 16 == 0


def test_a_masked_row_takes_no_part_in_the_products(path: str) -> None:
    hidden, weight, targets = tensors()
    valid = int((targets != -100).sum())
    hint = None if path == "plain" else valid  # a CPU counts by itself
    truth = reference.linear_cross_entropy(hidden, weight, targets, return_stats=True)
    with counting() as counts:
        loss, stats = linear_cross_entropy(
            hidden, weight, targets, num_valid=hint, return_stats=True, memory_budget=1 << 20
        )
    assert counts.total().dot_flops.total() in (2 * valid * 8 * 300, 6 * valid * 8 * 300)
    torch.testing.assert_close(loss, truth[0])
    for a, b in zip(stats, truth[1]):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(loss, hidden, weight), gradients(cast(Tensor, truth[0]), hidden, weight)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("spare", [0, 3])
def test_rows_gathered_in_vain_change_nothing(kernels: None, spare: int) -> None:
    hidden, weight, targets = tensors()
    valid = int((targets != -100).sum())
    for reduction in ("mean", "none"):
        hint = valid + spare if reduction == "mean" else None
        options: Any = {"num_valid": hint, "reduction": reduction, "return_stats": True}
        loss, stats = linear_cross_entropy(hidden, weight, targets, **options)
        truth, want = reference.linear_cross_entropy(hidden, weight, targets, **options)
        torch.testing.assert_close(loss, truth)
        for a, b in zip(stats, want, strict=True):
            torch.testing.assert_close(a, b)
        up = torch.ones_like(loss)
        for a, b in zip(
            torch.autograd.grad(loss, (hidden, weight), up), torch.autograd.grad(truth, (hidden, weight), up)
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.cpu("the valid rows are counted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_valid_rows_are_copied_where_that_takes_a_quarter_of_the_budget_at_most(dtype: torch.dtype) -> None:
    """Count the copy, which has a gradient too; a quarter is left to nothing but that."""
    hidden, _, targets = tensors(dtype=dtype)
    rows = Targets(targets[:, None])
    copies = 2 * 34 * 8 * dtype.itemsize
    found = valid_rows(hidden, rows, -100, None, 4 * copies)
    assert found is not None and found.index.tolist() == [0, 1, 2, *range(9, 40)] and not found.surplus.any()
    assert valid_rows(hidden, rows, -100, None, 4 * copies - 1) is None
    assert valid_rows(hidden, rows, 77777, None, None) is None, "no row is ignored"
    assert valid_rows(hidden[:0], Targets(targets[:0, None]), -100, None, None) is None


def test_more_valid_rows_than_said_are_not_lost_silently(path: str) -> None:
    hidden, weight, targets = tensors()
    if path == "plain" and DEVICE == "cpu":  # a GPU's targets are not looked at
        with pytest.raises(ValueError, match=r"num_valid must be at least 34, .* got 5"):
            linear_cross_entropy(hidden, weight, targets, num_valid=5, memory_budget=1 << 20)
    else:
        assert linear_cross_entropy(hidden, weight, targets, num_valid=5).isnan()


@pytest.mark.parametrize(
    ("mode", "dtype", "turned"),
    [
        (mode, dtype, turned)
        for i, mode in enumerate(MODES)
        for j, dtype in enumerate((torch.bfloat16, torch.float16))
        for k, turned in enumerate((False, True))
        if (i + j + k) % 2 == 0  # any two meet
    ],
)
def test_accumulates_into_a_main_grad(path: str, mode: str, dtype: torch.dtype, turned: bool) -> None:
    hidden, weight, targets = tensors(dtype=dtype)
    main_grad = torch.full((8, 300), 2.0).T if turned else torch.full((300, 8), 2.0)
    with forced(mode):
        for _ in range(2):
            loss = linear_cross_entropy(hidden, weight, targets, accumulate_into=main_grad)
            (0.5 * loss).backward()
    assert weight.grad is None and hidden.grad is not None
    h, w = hidden.detach().double(), weight.detach().double().requires_grad_()
    (want,) = gradients(cast(Tensor, reference.linear_cross_entropy(h, w, targets)), w)
    plain = gradients(cast(Tensor, reference.linear_cross_entropy(hidden, weight, targets)), weight)[0]
    assert_close_in_norm(main_grad - 2.0, plain, want, factor=2.0)


def test_accumulate_into_is_checked() -> None:
    hidden, weight, targets = tensors()
    with pytest.raises(TypeError, match="accumulate_into must be float32"):
        linear_cross_entropy(hidden, weight, targets, accumulate_into=torch.zeros(300, 8, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"accumulate_into must be \(300, 8\)"):
        linear_cross_entropy(hidden, weight, targets, accumulate_into=torch.zeros(8, 300))
    with pytest.raises(ValueError, match="accumulate_into needs a weight that requires a gradient"):
        linear_cross_entropy(hidden, weight.detach(), targets, accumulate_into=torch.zeros(300, 8))


class Casts(TorchDispatchMode):
    """Counts copies of the weight into another dtype."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ == "_to_copy" and out.shape == self.shape and out.dtype == torch.bfloat16:
            self.count += 1
        return out


@pytest.mark.parametrize("mode", MODES)
def test_autocast_casts_the_weight_once(path: str, mode: str) -> None:
    hidden, weight, targets = tensors()
    with forced(mode), Casts(weight.shape) as casts:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, targets)
        loss.backward()
    assert casts.count == 1
    assert weight.grad is not None and weight.grad.dtype == torch.float32


def blocks(d_logits: Tensor, threshold: float) -> Tensor:
    """Return `d_logits` without the 128 x 128 blocks that nowhere reach the threshold."""
    kept = torch.zeros_like(d_logits)
    for n in range(0, d_logits.shape[0], 128):
        for v in range(0, d_logits.shape[1], 128):
            block = d_logits[n : n + 128, v : v + 128]
            if block.abs().max() >= threshold:
                kept[n : n + 128, v : v + 128] = block
    return kept


def test_gradient_filter_drops_blocks_below_the_threshold(path: str) -> None:
    N, V, D, threshold = 140, 1000, 16, 1e-3
    torch.manual_seed(1)
    hidden = torch.randn(N, D).requires_grad_()
    weight = torch.randn(V, D)
    weight[128:384] -= 2 * hidden.detach()[:128].mean(0)  # classes that most rows rule out
    hidden.data[:128, 0] = 30.0
    weight[128:384, 0] = -1.0
    weight.requires_grad_()
    targets = torch.randint(0, 128, (N,))
    logits = (hidden @ weight.T).detach().double().requires_grad_()
    (d_logits,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), logits)
    kept = blocks(d_logits, threshold)
    assert kept.count_nonzero() < d_logits.count_nonzero()
    first = gradients(
        linear_cross_entropy(hidden, weight, targets, reduction="sum", grad_filter=threshold), hidden, weight
    )
    again = gradients(
        linear_cross_entropy(hidden, weight, targets, reduction="sum", grad_filter=threshold), hidden, weight
    )
    mean = gradients(linear_cross_entropy(hidden, weight, targets, grad_filter=threshold), hidden, weight)
    for a, b, c, want in zip(first, again, mean, (kept @ weight.double(), kept.T @ hidden.double())):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.double(), want, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(N * c, a, rtol=1e-4, atol=1e-4)  # the threshold is for gradients of the sum


def test_a_product_apart_from_its_sum_is_held_only_with_several_chunks() -> None:
    """The first product is the sum on devices that multiply low precision into float32 but do not add it there."""
    N, D, V = 256, 64, 2048
    for rows, apart in ((256, False), (128, True)):
        plan = LinearCrossEntropyPlan.make(N, D, V, memory_budget=1 << 30, mode="chunk")
        plan = replace(plan, way=plan.way._replace(rows=rows))
        assert plan.call.float32_products and plan.call.float32_sums and plan.way.summed == V
        other = replace(plan, call=replace(plan.call, float32_sums=False))
        assert other.held_bytes - plan.held_bytes == 4 * V * D * apart


def test_a_block_whose_gradient_just_reaches_the_threshold_is_kept(path: str) -> None:
    """Use four equal logits: the target's gradient is -3/4, in its own block, and those of the others 1/4."""
    hidden, weight, bias = torch.ones(1, 8), torch.zeros(256, 8, requires_grad=True), torch.full((256,), -1e4)
    bias[[0, 1, 2, 128]] = 0.0
    loss = linear_cross_entropy(hidden, weight, torch.tensor([128]), bias=bias, reduction="sum", grad_filter=0.75)
    (found,) = torch.autograd.grad(loss, weight)
    assert found[128].eq(-0.75).all() and found[:128].eq(0).all()


@pytest.mark.parametrize("threshold", [0.125, 0.126])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_filter_looks_at_the_size_of_gradients_of_either_sign(path: str, threshold: float, sign: float) -> None:
    """Smoothing pulls, without a part of the target, at 128 classes of probability 0, by 32 / 256 each."""
    hidden, weight, bias = torch.ones(1, 8), torch.zeros(256, 8, requires_grad=True), torch.zeros(256)
    bias[128:] = -1e4
    weights, y = torch.tensor([32.0 * sign]), torch.tensor([0])
    loss = linear_cross_entropy(
        hidden, weight, y, bias=bias, label_smoothing=1.0, token_weights=weights, reduction="sum", grad_filter=threshold
    )
    (found,) = torch.autograd.grad(loss, weight)
    kept = 0.125 * sign if threshold == 0.125 else 0.0
    assert found[:128].eq(kept).all() and found[128:].eq(-kept).all()


@pytest.mark.parametrize("rows", [140, 70])
def test_a_gradient_filter_that_keeps_nothing_leaves_the_bias_alone(path: str, rows: int) -> None:
    hidden, weight, bias = (torch.randn(*shape).mul(0.1).requires_grad_() for shape in ((140, 8), (300, 8), (300,)))
    targets = torch.randint(0, 300, (140,))
    with forced("chunk", rows=rows):
        loss = linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="sum", grad_filter=2.0)
        d_hidden, d_weight, d_bias = gradients(loss, hidden, weight, bias)
    whole = torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="sum")
    (wanted,) = gradients(whole, bias)
    assert d_hidden.eq(0).all() and d_weight.eq(0).all()
    assert wanted.abs().min() > 1e-3
    torch.testing.assert_close(d_bias, wanted)


def test_gradient_filter_is_refused_where_it_cannot_work() -> None:
    hidden, weight, targets = tensors()
    with pytest.raises(ValueError, match="grad_filter needs reduction"):
        linear_cross_entropy(hidden, weight, targets, reduction="none", grad_filter=1e-3)
    with pytest.raises(ValueError, match="grad_filter must be positive"):
        linear_cross_entropy(hidden, weight, targets, grad_filter=0.0)


def test_modules_are_torchs(path: str) -> None:
    logits, targets = torch.randn(2, 9, 5), torch.randint(0, 9, (2, 5))
    for options in ({}, {"weight": torch.rand(9), "label_smoothing": 0.1}, {"reduction": "none", "ignore_index": 3}):
        torch.testing.assert_close(
            CrossEntropyLoss(**options)(logits, targets), torch.nn.CrossEntropyLoss(**options)(logits, targets)
        )
    x = torch.randn(4, 6)
    for given, ignored in ((None, -100), (0, 0), (3, 3)):
        linear, y = LinearCrossEntropyLoss(6, 9, ignore_index=given), torch.tensor([0, 3, ignored, 8])
        truth = torch.nn.functional.cross_entropy(linear.linear(x), y, ignore_index=ignored)
        torch.testing.assert_close(linear(x, y), truth)
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):  # torch 2.13
        return
    theirs = torch.nn.LinearCrossEntropyLoss(6, 9, bias=True, label_smoothing=0.1)
    ours = LinearCrossEntropyLoss(6, 9, bias=True, label_smoothing=0.1)
    ours.load_state_dict(theirs.state_dict())
    x, y = torch.randn(7, 6), torch.randint(0, 9, (7,))
    torch.testing.assert_close(ours(x, y), theirs(x, y))


def test_modules_refuse_integers_where_torchs_take_probabilities() -> None:
    """Integers of the logits' shape would be taken for as many classes of each token: a plausible, wrong loss."""
    one_hot = torch.eye(3, dtype=torch.int64)[[2, 1]]
    message = r"target must be floating point probabilities where it has the shape of the logits; got \(2, 3\)"
    with pytest.raises(TypeError, match=message):
        CrossEntropyLoss()(torch.randn(2, 3), one_hot)
    with pytest.raises(TypeError, match=message):
        LinearCrossEntropyLoss(5, 3)(torch.randn(2, 5), one_hot)
    with pytest.raises(TypeError, match="target must be floating point"):  # classes on dimension 1
        CrossEntropyLoss()(torch.randn(2, 3, 3), torch.ones(2, 3, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="target must be floating point"):  # of one token
        CrossEntropyLoss()(torch.randn(3), one_hot[0])


def test_a_sum_is_planned_like_a_mean() -> None:
    """Its upstream gradient is one number too, which the gradients are multiplied by."""
    mean, total, each = (
        LinearCrossEntropyPlan.make(4096, 768, 50257, memory_budget=200 << 20, reduction=reduction)
        for reduction in ("mean", "sum", "none")
    )
    assert total == mean and total.way != each.way


def test_fewer_valid_rows_than_said(path: str) -> None:
    """On a GPU as many rows as said are computed; those beyond the valid ones must not count."""
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(40, 8, requires_grad=True)
    targets = torch.tensor([7, -100, 3, -100, -100, 39])
    ours = linear_cross_entropy(hidden, weight, targets, num_valid=5)
    truth = F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / 5
    torch.testing.assert_close(ours, truth)
    found, want = (torch.autograd.grad(loss, [hidden, weight]) for loss in (ours, truth))
    torch.testing.assert_close(found, want)


def test_a_plan_prints_its_own_figures() -> None:
    plan = LinearCrossEntropyPlan.make(**LLAMA, slab_dtype=torch.float32, memory_budget=1 << 30)
    head, columns, *rows = str(plan).splitlines()
    assert head == (
        "linear cross-entropy of N=16384 tokens, D=4096, V=128256, bfloat16 (logits float32), at most "
        f"{in_bytes(1 << 30)} beyond inputs and gradients: {plan.mode}, {len(list(plan))} slab(s) of "
        f"{plan.way.rows} rows"
    )
    assert columns.split() == [
        "mode",
        "slab",
        "held",
        "peak",
        "HBM",
        "products",
        "modelled",
        "on",
        *plan.gpu.name.split(),
    ]
    plans = [plan, *plan.alternatives]
    assert len(rows) == len(plans) > 1
    for row, p in zip(rows, plans):
        sizes = " ".join(in_bytes(size) for size in (p.slab_bytes, p.held_bytes, p.peak_bytes, p.hbm_bytes))
        figures = [*sizes.split(), f"{p.products:.2f}", f"{p.seconds * 1e3:.2f}", "ms"]
        assert row.removeprefix(p.mode + " *" * (p is plan)).split() == figures


@pytest.mark.parametrize(
    ("argument", "fields"),
    [
        (
            {"dtype": torch.float32},
            {"dtype": torch.float32, "slab_dtype": torch.float32, "hidden_dtype": torch.float32},
        ),
        ({"slab_dtype": torch.float32}, {"slab_dtype": torch.float32}),
        ({"weight_dtype": torch.float32}, {"weight_dtype": torch.float32}),
        ({"accumulate_dtype": torch.bfloat16}, {"accumulate_dtype": torch.bfloat16}),
        ({"wants": (False, True)}, {"wants": (False, True, False)}),
        ({"reduction": "none"}, {"per_token": True}),
        ({"kernels": False, "filtered": False}, {"kernels": False, "row_width": 1025}),
        ({"filtered": True}, {"filtered": True, "row_width": 1152}),
        ({"device": "cpu"}, {"float32_products": False, "float32_sums": False}),
    ],
    ids=str,
)
def test_what_is_planned_is_what_was_asked_for(argument: dict[str, Any], fields: dict[str, Any]) -> None:
    usual = LinearCrossEntropyPlan.make(256, 64, 1025).call
    call = LinearCrossEntropyPlan.make(256, 64, 1025, **argument).call
    assert {name: getattr(call, name) for name in fields} == fields
    assert all(getattr(usual, name) != value for name, value in fields.items())
    others = {f.name for f in dataclasses.fields(call)} - {*fields, "blocks", "block_bytes", "threads", "row_width"}
    others -= {"plain_row_bytes", "weight_dtype"}  # which follow from other arguments
    assert all(getattr(call, name) == getattr(usual, name) for name in others)


def test_what_a_plan_adds_up() -> None:
    plan = LinearCrossEntropyPlan.make(**LLAMA, memory_budget=200 << 20)
    N, D, V = LLAMA["N"], LLAMA["D"], LLAMA["V"]
    assert plan.gradient_bytes == 2 * (N + V) * D and plan.peak_bytes == plan.held_bytes + plan.gradient_bytes
    for changes, size in (({"into": True}, 2 * N * D), ({"wants": (False, True, False)}, 2 * V * D)):
        assert replace(plan, call=replace(plan.call, **changes)).gradient_bytes == size
    assert all(step.calls > 0 for step in plan.steps)
    assert plan.hbm_bytes == sum(step.bytes for step in plan.steps)
    assert plan.curve and all(each.budget == each.held_bytes for each in plan.curve)
    with pytest.raises(ValueError, match=r"^mode='chunk' cannot compute this call$"):
        LinearCrossEntropyPlan.make(**LLAMA, reduction="none", mode="chunk")


@pytest.mark.parametrize("gpu", [H100, MI300X], ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_modelled_time_is_that_of_all_launches(gpu: Gpu, dtype: torch.dtype) -> None:
    """Take the larger of moving and multiplying, and 2 us between launches, on the GPU that is asked for."""
    plan = LinearCrossEntropyPlan.make(**LLAMA, dtype=dtype, memory_budget=1 << 30, gpu=gpu)
    rate = 0.7 * gpu.tensor_cores if dtype == torch.bfloat16 else gpu.float32
    times = [
        float(step.calls) * 2e-6 + max(float(step.bytes) / (0.9 * gpu.bandwidth), float(step.flops) / rate)
        for step in plan.steps
    ]
    assert plan.seconds == pytest.approx(sum(times), rel=1e-9)
    assert all(other.gpu is gpu for other in (*plan.alternatives, *plan.curve)) and plan.alternatives
    assert f"modelled on {gpu.name}" in str(plan)


NO_SUMS: list[dict[str, Any]] = [
    {"accumulate_dtype": torch.bfloat16},
    {"reduction": "none"},
    {"wants": (True, False)},
    {"wants": (False, False)},
]


@pytest.mark.parametrize("changes", NO_SUMS, ids=str)
def test_the_default_budget_of_a_gpu_has_no_room_for_sums_that_are_not_made(changes: dict[str, Any]) -> None:
    assert LinearCrossEntropyPlan.make(**LLAMA, **changes).budget == 1 << 30


@pytest.mark.parametrize(("changes", "more"), [({}, 4 + 2), *[(changes, 0) for changes in NO_SUMS]], ids=str)
def test_the_default_budget_of_a_cpu_has_room_for_sums(changes: dict[str, Any], more: int) -> None:
    """Count a float32 sum of a bfloat16 gradient, and the product that is added to it, which is rounded there."""
    given: dict[str, Any] = {"N": 1024, "D": 512, "V": 50257, "device": "cpu", "kernels": False}
    plan = LinearCrossEntropyPlan.make(**given, **changes)
    assert plan.budget == (64 << 20) + more * 512 * 50257


@pytest.mark.parametrize(("device", "memory"), [("cpu", None), ("cuda", None), ("cuda", 8 << 30)])
def test_what_the_caller_has_taken_comes_on_top_of_the_default_budget(device: str, memory: int | None) -> None:
    plan = LinearCrossEntropyPlan.make(**LLAMA, device=device, gpu_memory=memory)
    other = planned(replace(plan.call, held=1000), "auto", torch.device(device), gpu_memory=memory)
    assert other.budget == plan.budget + 1000 and other.held_bytes == plan.held_bytes + 1000


def test_a_buffer_may_take_all_of_a_budget_and_no_more() -> None:
    assert [may_hold(size, 100, torch.device("cpu")) for size in (100, 101)] == [True, False]


def test_a_budget_that_is_too_small_is_told_the_sizes_of_the_call() -> None:
    with pytest.raises(ValueError, match=r"^memory_budget must be at least \d+ bytes for N=512, D=64, V=1025; got 1$"):
        LinearCrossEntropyPlan.make(512, 64, 1025, memory_budget=1)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_rank_with_fewer_classes_goes_through_the_same_chunks(reduction: str) -> None:
    """Ranks meet in every chunk. Of what a way sums and keeps, a rank takes as many columns as it has."""
    plan = LinearCrossEntropyPlan.make(64, 32, 300, reduction=reduction, memory_budget=1 << 24)
    ways = plan.call.ways()
    assert {*ways.summed.tolist()} > {0, 300} or {*ways.kept.tolist()} > {0, 300}
    for i in range(0, len(ways.rows), 5):
        way = ways.at(i)
        for V in (1, 100, 299):
            own = replace(plan, way=way).narrowed(V)
            assert (
                own.call == replace(plan.call, V=V) and own.way[:3] == way[:3] and [*own] == [*replace(plan, way=way)]
            )
            assert own.way.summed == (V if way.summed == 300 else min(way.summed, V))
            assert own.way.kept == (V if way.kept == 300 else min(way.kept, V - own.way.summed))
            columns = [c for slab in own.column_slabs() for c in range(slab.start, slab.stop)]
            assert columns == [*range(own.way.summed + own.way.kept, V)]
            assert own.way.columns <= max(V, 1) and own.way.columns == min(way.columns, V)


# What a dtype or an option changes of a single chunk in bfloat16: bytes per number of the products' inputs (e), logits
# (s), sums of the weight's gradient (g) and the gradient itself (w); passes over d_hidden and d_weight that scale.
CHUNKS: list[tuple[dict[str, Any], dict[str, int], tuple[int, int]]] = [
    ({}, {}, (0, 1)),
    ({"dtype": torch.float32}, {"e": 4, "s": 4, "w": 4}, (0, 0)),
    ({"dtype": torch.float16}, {}, (1, 1)),
    ({"dtype": torch.float16, "weight_dtype": torch.float32}, {"w": 4}, (1, 1)),
    ({"slab_dtype": torch.float32}, {"s": 4}, (0, 1)),
    ({"weight_dtype": torch.float32}, {"w": 4}, (0, 0)),
    ({"accumulate_dtype": torch.bfloat16}, {"g": 2}, (0, 0)),
    ({"filtered": True}, {}, (1, 1)),
    ({"wants": (True, False)}, {}, (0, 0)),
    ({"wants": (False, True)}, {}, (0, 1)),
    ({"wants": (False, False)}, {}, (0, 0)),
]


@pytest.mark.parametrize(("changes", "sizes", "scaled"), CHUNKS, ids=str)
def test_a_chunk_moves_each_of_its_matrices_once(
    changes: dict[str, Any], sizes: dict[str, int], scaled: tuple[int, int]
) -> None:
    """Write out what the products, the row kernel and the scaling read and write."""
    N, D, V = 512, 128, 4096
    plan = LinearCrossEntropyPlan.make(N, D, V, **changes)
    hidden, weight = plan.call.wants[:2]
    plan = replace(plan, way=plan.way._replace(in_forward=True, rows=N, finished=N, summed=V * weight, kept=0))
    e, s, g, w = ({"e": 2, "s": 2, "g": 4, "w": 2} | sizes).values()
    H, W, L = N * D, V * D, N * V
    moved = (H + W) * e + L * s
    moved += L * s + L * e * (hidden or weight)
    moved += ((L + W) * e + H * e) * hidden + 2 * H * e * scaled[0]
    moved += ((L + H) * e + W * g) * weight + W * (g + w) * scaled[1]
    assert plan.hbm_bytes == moved and plan.flops == 2 * N * D * V * (1 + hidden + weight)
    assert sum(step.calls for step in plan.steps) == 2 + 2 * (hidden + weight)  # some return at once


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_curve_has_the_plans_of_all_budgets(reduction: str) -> None:
    """Each holds more than the one before, and is faster; a budget of what it holds leads to it, one byte less not."""
    given: dict[str, Any] = {"N": 2048, "D": 512, "V": 50257, "reduction": reduction}
    plans = LinearCrossEntropyPlan.make(**given).curve
    assert len(plans) > 5
    for small, large in pairwise(plans):
        assert small.held_bytes < large.held_bytes and small.seconds > large.seconds
    for small, large in [(plans[0], plans[1]), (plans[-2], plans[-1])]:
        for spare, wanted in ((0, large), (-1, small)):
            found = LinearCrossEntropyPlan.make(**given, memory_budget=large.held_bytes + spare)
            assert (found.held_bytes, found.seconds) == (wanted.held_bytes, wanted.seconds)
    assert LinearCrossEntropyPlan.make(**given, memory_budget=1 << 50).seconds == plans[-1].seconds
