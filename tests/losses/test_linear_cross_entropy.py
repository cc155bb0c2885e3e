"""`linear_cross_entropy` on both paths."""

import inspect
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmfast.losses import LinearCrossEntropyPlan, cross_entropy, linear_cross_entropy, reference
from support.devices import DEVICE, TARGETS_CHECKED
from support.numerics import assert_close_in_norm
from support.plans import SIZES, forced, least_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
PARALLEL = ("process_group", "vocab_size")
LINEAR = ["memory_budget", "slab_dtype", "accumulate_dtype", "accumulate_into", "grad_filter"]


def draw(N: int, V: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(N, D).to(dtype), (torch.randn(V, D) * D**-0.5 * 2).to(dtype)
    targets = torch.randint(0, V, (N,))
    targets[torch.rand(N) < 0.2] = -100
    targets[:1] = V - 1
    return hidden, weight, targets


def tolerance(dtype: torch.dtype) -> float:
    """Allow more in 16 bits, where a CPU has no GEMM into float32 and rounds a chunk's product before it is summed."""
    return 1.1 if dtype == torch.float32 else 1.5


def run(
    loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, weight: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    value = loss(h, w)
    value.backward(upstream.to(value.dtype).expand_as(value))
    assert h.grad is not None and w.grad is not None
    return value.detach(), h.grad, w.grad


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 40),
    V=st.one_of(st.integers(1, 200), st.sampled_from([1025, 2000])),
    D=st.integers(1, 24),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(REDUCTIONS),
    size=st.sampled_from([*SIZES]),
)
def test_matches_float64(path: str, N: int, V: int, D: int, dtype: torch.dtype, reduction: str, size: str) -> None:
    hidden, weight, targets = draw(N, V, D, dtype)
    upstream = torch.randn(N) if reduction == "none" else torch.tensor(1.5)
    with forced(None, size):
        ours = run(
            lambda h, w: linear_cross_entropy(h, w, targets, reduction=reduction, memory_budget=1 << 30),
            hidden,
            weight,
            upstream,
        )
    torchs = run(lambda h, w: F.cross_entropy(h @ w.T, targets, reduction=reduction), hidden, weight, upstream)
    truth = run(
        lambda h, w: reference.linear_cross_entropy(h, w, targets, reduction=reduction),
        hidden.double(),
        weight.double(),
        upstream,
    )
    assert ours[0].dtype == torch.float32
    for a, b, c in zip(ours, torchs, truth):
        assert_close_in_norm(a, b, c, factor=tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_real_vocabulary_in_chunks(path: str, dtype: torch.dtype) -> None:
    hidden, weight, targets = draw(7, 50257, 16, dtype)
    one = torch.tensor(1.0)
    with forced("chunk", rows=3):
        ours = run(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight, one)
    valid = (targets != -100).sum()

    def in_chunks(h: Tensor, w: Tensor) -> Tensor:
        """Compute in float32 in chunks of the same rows: a BLAS's order of summation depends on it."""
        rows = 3 if dtype == torch.float32 else 7
        cut = ((h[i : i + rows], targets[i : i + rows]) for i in range(0, 7, rows))
        return sum(F.cross_entropy(x @ w.T, y, reduction="sum") for x, y in cut) / valid

    torchs = run(in_chunks, hidden, weight, one)
    truth = run(lambda h, w: F.cross_entropy(h @ w.T, targets), hidden.double(), weight.double(), one)
    for a, b, c in zip(ours, torchs, truth):
        assert_close_in_norm(a, b, c, factor=max(2.5, tolerance(dtype)))


def test_weight_gradient_accumulates_in_float32(path: str) -> None:
    # Summing chunks in bfloat16 loses small contributions (Liger-Kernel#827): 64 chunks must not differ from one.
    hidden, weight, targets = draw(64, 50, 8, torch.bfloat16)
    one = torch.tensor(1.0)
    whole = run(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight, one)
    with forced("chunk", rows=1):
        split = run(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight, one)
    truth = run(lambda h, w: F.cross_entropy(h @ w.T, targets), hidden.double(), weight.double(), one)
    for a, b, c in zip(split, whole, truth):
        assert_close_in_norm(a, b, c, factor=tolerance(torch.bfloat16))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_the_gradients_that_are_wanted(path: str, frozen: str, reduction: str) -> None:
    # A frozen hidden must not cost the weight its gradient, as it does in Liger-Kernel.
    hidden, weight, targets = draw(9, 30, 8, torch.float32)
    want = run(
        lambda h, w: reference.linear_cross_entropy(h, w, targets, reduction=reduction),
        hidden,
        weight,
        torch.tensor(1.0),
    )
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    torch.testing.assert_close(loss.detach(), want[0])
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward(torch.ones_like(loss))
    for t, gradient in ((hidden, want[1]), (weight, want[2])):
        if t.requires_grad:
            torch.testing.assert_close(t.grad, gradient)
        else:
            assert t.grad is None


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice(path: str, reduction: str) -> None:
    hidden, weight, targets = draw(9, 30, 8, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum()
    first = torch.autograd.grad(3 * loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(first, kept, second):
        assert torch.equal(a, b), "the second backward changed what the first returned"
        torch.testing.assert_close(a, 3 * c)


@pytest.mark.parametrize("dense", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("mode", ["materialise", "chunk", "two-stage", "recompute"])
def test_every_mode_makes_what_a_second_backward_pass_needs(path: str, mode: str, dense: bool) -> None:
    """Cut the rows into chunks, which keep only the sum of their losses where their gradients are final."""
    hidden, weight, targets = draw(30, 300, 8, torch.float32)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "bias": torch.randn(300).requires_grad_()}
    inputs = hidden.requires_grad_(), weight.requires_grad_(), options["bias"]
    if dense:
        targets = torch.rand(30, 300)
    want = torch.autograd.grad(reference.linear_cross_entropy(hidden, weight, targets, **options), inputs)
    with forced(mode, rows=30 if mode == "materialise" else 7) as plans:
        loss = linear_cross_entropy(hidden, weight, targets, **options)
        assert plans[0].mode == mode or (mode == "materialise" and path == "plain")
        assert plans[0].forgets == (plans[0].mode == "chunk")
        for _ in range(3):
            found = torch.autograd.grad(loss, inputs, retain_graph=True)
            torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


def test_a_second_derivative_is_refused(path: str) -> None:
    hidden, weight, targets = draw(200, 3000, 8, torch.float32)
    loss = linear_cross_entropy(hidden.requires_grad_(), weight, targets)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("num_valid", [torch.tensor(0), 0.25])
def test_few_and_many_logits_agree_on_odd_counts(path: str, num_valid: float | Tensor) -> None:
    hidden, weight, targets = draw(9, 30, 8, torch.float32)
    ways = [
        run(
            lambda h, w, b=budget: linear_cross_entropy(h, w, targets, num_valid=num_valid, memory_budget=b),
            hidden,
            weight,
            torch.tensor(1.0),
        )
        for budget in ("auto", 1000)
    ]
    torch.testing.assert_close(ways[0], ways[1])


def test_autocast_casts_float32_parameters(path: str) -> None:
    hidden, weight, targets = draw(9, 300, 16, torch.float32)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32
    torch.testing.assert_close(
        loss.detach(), F.cross_entropy(hidden @ weight.T, targets).detach(), rtol=1e-2, atol=1e-2
    )


def test_matches_cross_entropy_of_the_logits(path: str) -> None:
    hidden, weight, targets = draw(6, 90, 12, torch.float32)
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, targets, reduction="none"),
        cross_entropy(hidden @ weight.T, targets, reduction="none"),
    )


@pytest.mark.parametrize("num_valid", [100, torch.tensor(100), torch.tensor([100])])
def test_leading_dimensions_and_num_valid(path: str, num_valid: int | Tensor) -> None:
    hidden, weight, targets = draw(12, 40, 8, torch.float32)
    loss = linear_cross_entropy(hidden.view(3, 4, 8), weight, targets.view(3, 4), num_valid=num_valid)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.T, targets, reduction="sum") / 100)
    assert linear_cross_entropy(hidden.view(3, 4, 8), weight, targets.view(3, 4), reduction="none").shape == (3, 4)


@pytest.mark.parametrize("N", [0, 3])
def test_nothing_to_average(path: str, N: int) -> None:
    hidden, weight, _ = draw(N, 20, 8, torch.float32)
    loss, *gradients = run(
        lambda h, w: linear_cross_entropy(h, w, torch.full((N,), -100)), hidden, weight, torch.tensor(1.0)
    )
    assert loss.isnan()
    assert all(g.eq(0).all() for g in gradients)


def test_chunking_does_not_change_the_loss(path: str) -> None:
    hidden, weight, targets = draw(37, 100, 8, torch.float32)
    truth = F.cross_entropy(hidden.double() @ weight.double().T, targets).item()
    for size in SIZES:
        with forced(None, size):
            loss = linear_cross_entropy(hidden, weight, targets, memory_budget=1 << 20).item()
        assert abs(loss - truth) < 2e-7 * truth


@given(
    N=st.integers(0, 5000),
    V=st.integers(1, 10**6),
    spare=st.integers(0, 1 << 31),
    reduction=st.sampled_from(["mean", "none"]),
)
def test_a_plan_covers_every_row_and_column_once_within_the_budget(N: int, V: int, spare: int, reduction: str) -> None:
    budget = least_budget(N, 8, V, reduction=reduction) + spare
    plan = LinearCrossEntropyPlan.make(N, 8, V, memory_budget=budget, reduction=reduction)
    assert [i for rows in plan for i in range(rows.start, rows.stop)] == list(range(N))
    assert plan.held_bytes <= budget
    assert 0 <= plan.way.summed <= V and 0 <= plan.way.kept <= V - plan.way.summed and 0 <= plan.way.finished <= N
    slabs, first = [*plan.column_slabs()], plan.way.summed + plan.way.kept
    assert [s.start for s in slabs] + [V] == [first, *(s.stop for s in slabs)] if first < V else not slabs


def test_reference_has_the_same_arguments() -> None:
    for function, ours_only in (
        (
            linear_cross_entropy,
            {*LINEAR, *PARALLEL},
        ),
        (cross_entropy, {"inplace", *PARALLEL}),
    ):
        ours = set(inspect.signature(function).parameters) - ours_only
        assert ours == set(inspect.signature(getattr(reference, function.__name__)).parameters)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(9, 4)}, ValueError, r"weight must be \(V, 5\)"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must be \(V, 5\)"),
        ({"weight": torch.zeros(9, 5, dtype=torch.bfloat16)}, TypeError, "must share a dtype"),
        ({"weight": torch.zeros(9, 5, device="meta")}, ValueError, f"weight must be on {DEVICE}"),
        ({"hidden": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "hidden must be floating point"),
        pytest.param({"targets": torch.tensor([0, 1, 2, 9])}, ValueError, "found 9", marks=TARGETS_CHECKED),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"targets must have shape \(4,\)"),
        ({"hidden": torch.zeros(4, 0), "weight": torch.zeros(9, 0)}, ValueError, "D > 0"),
        ({"memory_budget": 0}, ValueError, "memory_budget must be positive"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
    ],
)
def test_refuses(change: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {
        "hidden": torch.zeros(4, 5),
        "weight": torch.zeros(9, 5),
        "targets": torch.zeros(4, dtype=torch.int64),
    } | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**arguments)  # type: ignore[arg-type]
