"""`cross_entropy` on both paths: what it computes, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmfast.losses import cross_entropy, reference
from support.devices import DEVICE, TARGETS_CHECKED
from support.numerics import assert_no_worse

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]


def draw(N: int, V: int, dtype: torch.dtype, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Draw logits and targets; about a fifth of the targets are ignored, but not the first."""
    logits = (torch.randn(N, V) * spread).to(dtype)
    targets = torch.randint(0, V, (N,))
    targets[torch.rand(N) < 0.2] = -100
    if N:
        targets[0] = V - 1
    return logits, targets


def run(loss: Callable[..., Tensor], logits: Tensor, upstream: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """Loss and gradient for the given upstream gradient."""
    leaf = logits.clone().requires_grad_()
    value = loss(leaf * 1.0 if options.get("inplace") else leaf, **options)
    value.backward(upstream.to(value.dtype).expand_as(value))
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def check(logits: Tensor, targets: Tensor, reduction: str, upstream: Tensor, **options: object) -> None:
    ours = run(lambda x, **o: cross_entropy(x, targets, reduction=reduction, **o), logits, upstream, **options)
    torchs = run(lambda x: F.cross_entropy(x, targets, reduction=reduction), logits, upstream)
    truth = run(lambda x: F.cross_entropy(x, targets, reduction=reduction), logits.double(), upstream)
    scale = max(1.0, logits.float().abs().nan_to_num(posinf=0).max().item()) if logits.numel() else 1.0
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == logits.dtype
    assert_no_worse(ours[0], torchs[0], truth[0], scale=scale * (max(1, len(targets)) if reduction == "sum" else 1))
    rows = max(1, (targets != -100).sum().item()) if reduction == "mean" else 1
    assert_no_worse(ours[1], torchs[1], truth[1], scale=upstream.abs().max().item() / rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 9),
    V=st.one_of(st.integers(1, 300), st.sampled_from([1000, 1024, 1025, 3000])),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    inplace=st.booleans(),
)
def test_matches_float64(path: str, N: int, V: int, dtype: torch.dtype, reduction: str, inplace: bool) -> None:
    logits, targets = draw(N, V, dtype)
    upstream = torch.randn(N) if reduction == "none" else torch.tensor(1.5)
    check(logits, targets, reduction, upstream, inplace=inplace)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_real_vocabulary(path: str, dtype: torch.dtype, inplace: bool) -> None:
    logits, targets = draw(3, 50257, dtype)  # three whole tiles and a tail; rows that start unaligned
    targets[1] = 16384  # the first column of the second tile
    check(logits, targets, "mean", torch.tensor(1.0), inplace=inplace)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_logits(path: str, offset: float) -> None:
    logits, targets = draw(5, 200, torch.float32)
    check(logits + offset, targets, "mean", torch.tensor(1.0))


def test_confident_rows_keep_their_gradient(path: str) -> None:
    # p(target) -> 1: a gradient made by subtracting 1 from a rounded p would be 100 % wrong (Liger-Kernel#1329).
    logits = torch.zeros(4, 1000)
    logits[torch.arange(4), torch.arange(4)] = torch.tensor([12.0, 14.0, 16.0, 18.0])
    for dtype in DTYPES:
        check(logits.to(dtype), torch.arange(4), "sum", torch.tensor(1.0))
        check(logits.to(dtype), torch.arange(4), "sum", torch.tensor(1.0), inplace=True)


def test_minus_infinity_masks_the_vocabulary(path: str) -> None:
    logits, targets = draw(6, 3000, torch.float32)
    logits[:, 100:2900] = -torch.inf  # whole vectors of a thread see nothing else
    targets[:] = torch.tensor([0, 99, 2900, 2999, -100, 5])
    check(logits, targets, "mean", torch.tensor(1.0))
    check(logits, targets, "none", torch.randn(6), inplace=True)


def test_a_target_of_minus_infinity_costs_infinity(path: str) -> None:
    logits, targets = draw(2, 50, torch.float32)
    logits[0, targets[0]] = -torch.inf
    check(logits, targets, "none", torch.ones(2))


def test_rows_without_any_finite_logit_are_nan(path: str) -> None:
    logits = torch.full((2, 10), -torch.inf)
    loss = cross_entropy(logits, torch.tensor([3, -100]), reduction="none")
    assert loss[0].isnan() and loss[1] == 0


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_nan_spreads_through_its_row_only(path: str, poison: float) -> None:
    logits, _ = draw(3, 40, torch.float32)
    logits[1, 7] = poison
    loss, gradient = run(lambda x: cross_entropy(x, torch.tensor([1, 2, 3]), reduction="none"), logits, torch.ones(3))
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_get_zeros_whatever_is_in_them(path: str, inplace: bool) -> None:
    logits, _ = draw(2, 40, torch.float32)
    logits[0] = torch.nan
    loss, gradient = run(
        lambda x, **o: cross_entropy(x, torch.tensor([-100, 3]), **o), logits, torch.tensor(1.0), inplace=inplace
    )
    assert loss.isfinite() and gradient[0].eq(0).all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_average(path: str, reduction: str) -> None:
    logits, _ = draw(3, 8, torch.float32)
    ignored = torch.full((3,), -100)
    loss, gradient = run(lambda x: cross_entropy(x, ignored, reduction=reduction), logits, torch.tensor(1.0))
    torch.testing.assert_close(loss, F.cross_entropy(logits, ignored, reduction=reduction), equal_nan=True)
    assert gradient.eq(0).all()


@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(path: str, inplace: bool) -> None:
    logits = torch.empty(0, 5)
    loss, gradient = run(
        lambda x, **o: cross_entropy(x, torch.empty(0, dtype=torch.int64), reduction="sum", **o),
        logits,
        torch.tensor(1.0),
        inplace=inplace,
    )
    assert loss == 0 and gradient.shape == (0, 5)


def test_leading_dimensions_and_int32_targets(path: str) -> None:
    logits, targets = draw(12, 33, torch.float32)
    flat = cross_entropy(logits, targets, reduction="none")
    shaped = cross_entropy(logits.view(3, 4, 33), targets.view(3, 4).int(), reduction="none")
    assert shaped.shape == (3, 4)
    assert torch.equal(shaped.view(-1), flat)
    assert torch.equal(cross_entropy(logits[1], targets[1], reduction="none"), flat[1])


def test_strided_logits(path: str) -> None:
    logits, targets = draw(6, 70, torch.float32)
    want = cross_entropy(logits, targets)
    wide = torch.zeros(6, 200)
    wide[:, 13:83] = logits
    assert torch.equal(cross_entropy(wide[:, 13:83], targets), want)
    assert torch.equal(cross_entropy(logits.T.contiguous().T, targets), want)
    tall = torch.zeros(12, 70)
    tall[::2] = logits
    assert torch.equal(cross_entropy(tall[::2], targets), want)


@pytest.mark.parametrize("num_valid", [7, torch.tensor(7), torch.tensor([7.0]), 0.25])
def test_num_valid_replaces_the_count(path: str, num_valid: int | Tensor) -> None:
    logits, targets = draw(6, 20, torch.float32)
    loss, gradient = run(lambda x: cross_entropy(x, targets, num_valid=num_valid), logits, torch.tensor(1.0))
    truth = run(lambda x: F.cross_entropy(x, targets, reduction="sum") / float(num_valid), logits, torch.tensor(1.0))
    torch.testing.assert_close((loss, gradient), truth)


def test_ignore_index_can_be_a_class(path: str) -> None:
    logits, targets = draw(6, 20, torch.float32)
    targets[targets < 0] = 3
    torch.testing.assert_close(
        cross_entropy(logits, targets, ignore_index=3), F.cross_entropy(logits, targets, ignore_index=3)
    )


def test_float16_under_loss_scaling(path: str) -> None:
    # A mean over many rows times p ~ 1/V is below float16's smallest number; the scale must come first.
    N, V, scale = 5000, 60, 65536.0  # powers of two would be exact however small
    logits = torch.zeros(8, V, dtype=torch.float16)
    targets = torch.arange(8)
    for inplace in (False, True):
        _, gradient = run(
            lambda x, **o: cross_entropy(x, targets, num_valid=N, **o), logits, torch.tensor(scale), inplace=inplace
        )
        want = (torch.full((8, V), 1 / V) - F.one_hot(targets, V)) * scale / N
        torch.testing.assert_close(gradient.float(), want, rtol=1e-3, atol=0)


def test_inplace_overwrites_and_says_so(path: str) -> None:
    leaf, targets = draw(4, 30, torch.float32)
    leaf.requires_grad_()
    logits = leaf * 1.0
    version = logits._version
    loss = cross_entropy(logits, targets, inplace=True)
    assert logits._version > version
    loss.backward()
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() == logits.data_ptr() or torch.equal(leaf.grad, logits.detach())


def test_inplace_spoils_what_others_saved_and_torch_notices(path: str) -> None:
    leaf, targets = draw(4, 30, torch.float32)
    logits = leaf.requires_grad_().tanh()  # keeps its output for backward
    loss = cross_entropy(logits, targets, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_gradient_spoilt_before_backward_is_noticed(path: str) -> None:
    leaf, targets = draw(4, 30, torch.float32)
    logits = leaf.requires_grad_() * 1.0
    loss = cross_entropy(logits, targets, inplace=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inplace_does_not_overwrite_a_parameter_through_a_view(path: str) -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    with pytest.raises(ValueError, match="leaf of the graph"):
        cross_entropy(weight.view(2, 2, 6), torch.zeros(2, 2, dtype=torch.int64), inplace=True)


def test_a_second_derivative_is_refused(path: str) -> None:
    leaf, targets = draw(4, 3000, torch.float32)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(cross_entropy(leaf.requires_grad_(), targets), leaf, create_graph=True)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_inplace_runs_backward_once(path: str, reduction: str) -> None:
    leaf, targets = draw(4, 30, torch.float32)
    loss = cross_entropy(leaf.requires_grad_() * 1.0, targets, reduction=reduction, inplace=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"used up|modified by an inplace operation"):
        loss.backward()


def test_inplace_leaves_logits_alone_where_no_gradient_is_wanted(path: str) -> None:
    logits, targets = draw(4, 30, torch.float32)
    before = logits.clone()
    cross_entropy(logits, targets, inplace=True)
    assert torch.equal(logits, before)


def test_backward_twice(path: str) -> None:
    leaf, targets = draw(4, 30, torch.float32)
    loss = cross_entropy(leaf.requires_grad_(), targets)
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss + loss, leaf)
    torch.testing.assert_close(second, 2 * first)


def test_same_bits_every_time(path: str) -> None:
    logits, targets = draw(5, 3000, torch.bfloat16)
    one, two = (run(lambda x: cross_entropy(x, targets), logits, torch.tensor(1.0)) for _ in range(2))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])


@pytest.mark.parametrize("inplace", [False, True])
def test_inside_torch_compile(path: str, inplace: bool) -> None:
    logits, targets = draw(5, 40, torch.float32)
    compiled = torch.compile(
        lambda x: cross_entropy(x * 1.0, targets, inplace=inplace),
        backend="aot_eager",
        fullgraph=True,
    )
    one = torch.tensor(1.0)
    torch.testing.assert_close(run(compiled, logits, one), run(lambda x: F.cross_entropy(x, targets), logits, one))


@pytest.mark.cpu("compares with torch on a CPU")
def test_small_logits_on_a_cpu_are_torchs() -> None:
    logits, targets = draw(5, 40, torch.float32)
    leaf = logits.requires_grad_()
    for reduction in REDUCTIONS:
        loss = cross_entropy(leaf, targets, reduction=reduction)
        assert torch.equal(loss, F.cross_entropy(leaf, targets, reduction=reduction))
    shaped = cross_entropy(leaf.view(5, 1, 40), targets.view(5, 1).int(), reduction="none")
    assert shaped.shape == (5, 1)


def test_float64_stays_float64() -> None:
    logits, targets = draw(5, 40, torch.float64)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets), rtol=1e-14, atol=0)


def test_reference_is_what_torch_means() -> None:
    logits, targets = draw(9, 40, torch.float64)
    for reduction in REDUCTIONS:
        torch.testing.assert_close(
            reference.cross_entropy(logits, targets, reduction=reduction),
            F.cross_entropy(logits, targets, reduction=reduction),
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.int64)}, ValueError, r"targets must have shape \(4,\), .*; got \(3,\)"),
        ({"targets": torch.zeros(4)}, TypeError, "targets must be int64 or int32"),
        ({"targets": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, f"targets must be on {DEVICE}"),
        pytest.param(
            {"targets": torch.tensor([0, 1, 2, 9])}, ValueError, r"in \[0, 9\).*found 9", marks=TARGETS_CHECKED
        ),
        pytest.param({"targets": torch.tensor([0, 1, -7, 3])}, ValueError, "found -7", marks=TARGETS_CHECKED),
        ({"logits": torch.zeros(4, 9, dtype=torch.int64)}, TypeError, "logits must be floating point"),
        ({"logits": torch.zeros(4, 0)}, ValueError, "V > 0"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits must be \(..., V\)"),
        ({"reduction": "avg"}, ValueError, "reduction must be 'mean', 'sum' or 'none'; got 'avg'"),
        ({"reduction": "sum", "num_valid": 3}, ValueError, "num_valid needs reduction='mean'"),
        ({"num_valid": -1}, ValueError, "num_valid must not be negative"),
        ({"num_valid": torch.ones(2)}, ValueError, "num_valid must hold one number"),
        ({"logits": torch.zeros(9, 4).T, "inplace": True}, ValueError, "inplace=True needs contiguous"),
        ({"logits": torch.zeros(4, 9, requires_grad=True), "inplace": True}, ValueError, "leaf of the graph"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.zeros(4, 9), "targets": torch.zeros(4, dtype=torch.int64)} | change
    with pytest.raises(error, match=message):
        cross_entropy(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [0.0, 30.0, 1e3, 1e5, 1e8, -1e8])
@pytest.mark.parametrize("terms", [{}, {"return_stats": True}, {"inplace": True}, {"label_smoothing": 0.1}], ids=str)
def test_logits_that_share_a_large_offset(path: str, offset: float, terms: dict[str, Any]) -> None:
    """Differences of logits are exact, however large they are, and a softmax depends on nothing else."""
    logits, targets = torch.randn(24, 1100) * 2 + offset, torch.randint(0, 1100, (24,))

    def of(loss: Callable[..., Any], dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        reduction = "sum" if options.get("inplace") else "none"
        found = loss(leaf * 1.0, targets, reduction=reduction, **options)
        value, stats = found if isinstance(found, tuple) else (found, None)
        total = value.sum() if stats is None else value.sum() + 0.5 * stats.entropy.sum()
        gradient = torch.autograd.grad(total, leaf)
        return [*([value.detach()] if value.dim() else []), *([] if stats is None else [stats.entropy]), *gradient]

    ours = of(cross_entropy, torch.float32, **terms)
    if "return_stats" in terms:
        for a, b in zip(ours, of(reference.cross_entropy, torch.float64, **terms)):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5 if a.dim() == 1 else 1e-7)
        return
    options = {k: v for k, v in terms.items() if k != "inplace"}
    torchs, truth = (of(F.cross_entropy, dtype, **options)[-len(ours) :] for dtype in (torch.float32, torch.float64))
    for a, b, c in zip(ours, torchs, truth):
        # A sum of logits, which smoothing takes, rounds at their size; no gradient does.
        scale = 0.1 if a.dim() == 2 else max(3.0, abs(offset) if terms.get("label_smoothing") else 0.0)
        assert_no_worse(a, b, c, scale=scale)


def test_logits_that_differ_by_a_billion(path: str) -> None:
    logits, targets = torch.randn(8, 1100) * 1e8, torch.randint(0, 1100, (8,))
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf, targets, reduction="none")
    loss.sum().backward()
    truth = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    assert leaf.grad is not None
    want = F.one_hot(logits.argmax(1), 1100) - F.one_hot(targets, 1100)
    torch.testing.assert_close(leaf.grad, want.float(), rtol=1e-6, atol=0)
