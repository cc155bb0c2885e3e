"""Conditions that have tests of their own, two and more at a time."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmfast.losses import (
    TeacherStates,
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_logprobs,
    reference,
)
from support.numerics import assert_close_in_norm
from support.pairs import covering
from support.plans import SIZES, forced

START = 2.0**-10  # of a main_grad: too much to be overlooked, too little to round the gradient away

# A filter, chunks of rows and a gradient that is added to.


def peaked(N: int, V: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw 128 rows that rule out all classes but the first 128, then rows that rule out these."""
    hidden, weight = torch.randn(N, D) * 0.3, torch.randn(V, D)
    first = torch.arange(N) < 128
    hidden[:, 0] = torch.where(first, 30.0, -30.0)
    weight[:, 0] = torch.where(torch.arange(V) < 128, 0.5, -0.5)
    targets = torch.where(first, torch.randint(0, 128, (N,)), torch.randint(128, V, (N,)))
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def filtered(d_logits: Tensor, threshold: float, rows: int) -> Tensor:
    """Keep only the 128 x 128 blocks that hold an element of `threshold` or more, in chunks of `rows`."""

    def of_chunk(d: Tensor) -> Tensor:
        kept = [[x if x.abs().max() >= threshold else 0 * x for x in row.split(128, 1)] for row in d.split(128)]
        return torch.cat([torch.cat(row, 1) for row in kept])

    return torch.cat([of_chunk(d) for d in d_logits.split(rows)])


@pytest.mark.parametrize(("rows", "added"), [(192, True), (144, False), (64, True)])
def test_a_filtered_gradient_adds_up_over_chunks(path: str, rows: int, added: bool) -> None:
    N, V, D, threshold = 192, 260, 8, 1e-3
    hidden, weight, targets = peaked(N, V, D)
    bias = torch.randn(V).mul(0.1).requires_grad_()
    main_grad = torch.full((V, D), 2.0) if added else None
    with forced("chunk", rows=rows):
        loss = linear_cross_entropy(
            hidden, weight, targets, bias=bias, reduction="sum", grad_filter=threshold, accumulate_into=main_grad
        )
    loss.backward()
    found = weight.grad if main_grad is None else main_grad - 2.0
    assert hidden.grad is not None and bias.grad is not None and found is not None
    logits = (hidden @ weight.T + bias).detach().double().requires_grad_()
    (d_logits,) = torch.autograd.grad(F.cross_entropy(logits, targets, reduction="sum"), logits)
    kept = filtered(d_logits, threshold, rows)
    assert kept.count_nonzero() < 0.8 * d_logits.count_nonzero()
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.double(), kept.T @ hidden.double(), **close)
    torch.testing.assert_close(hidden.grad.double(), kept @ weight.double(), **close)
    torch.testing.assert_close(bias.grad.double(), d_logits.sum(0), **close)  # never filtered
    assert (weight.grad is None) == added


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)
@given(
    N=st.integers(1, 40),
    V=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    chunks=st.integers(1, 5),
    filtering=st.booleans(),
    added=st.booleans(),
    biased=st.booleans(),
    reduction=st.sampled_from(["mean", "sum"]),
    options=st.fixed_dictionaries(
        {},
        optional={"softcap": st.just(2.0), "label_smoothing": st.just(0.1), "z_loss": st.just(0.05)},
    ),
)
def test_whatever_is_asked_for_together(
    path: str,
    N: int,
    V: int,
    dtype: torch.dtype,
    chunks: int,
    filtering: bool,
    added: bool,
    biased: bool,
    reduction: str,
    options: dict[str, Any],
) -> None:
    """Compare gradients with a filter that drops nothing to those without a filter."""
    hidden, weight = torch.randn(N, 8).to(dtype), torch.randn(V, 8).to(dtype)
    targets = torch.randint(0, V, (N,))
    targets[1::5] = -100
    bias = torch.randn(V).to(dtype) if biased else None
    main_grad = torch.full((V, 8), START) if added else None
    more: dict[str, Any] = {"reduction": reduction, **options}

    def run(loss: Any, cast: torch.dtype, **more: Any) -> list[Tensor]:
        leaves = [None if t is None else t.detach().to(cast).requires_grad_() for t in (hidden, weight, bias)]
        value = loss(leaves[0], leaves[1], targets, bias=leaves[2], **more)
        value.backward()
        return [value.detach(), *(t.grad for t in leaves if t is not None)]

    with forced(None if more.get("reduction") == "none" else "chunk", rows=-(-N // chunks)):
        ours = run(
            linear_cross_entropy, dtype, accumulate_into=main_grad, grad_filter=1e-30 if filtering else None, **more
        )
    if main_grad is not None:
        assert ours[2] is None
        ours[2] = main_grad - START
    torchs, truth = (run(reference.linear_cross_entropy, cast, **more) for cast in (dtype, torch.float64))
    # A sum over few tokens is near the truth by luck.
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-5 if dtype == torch.float32 else 2e-3, atol=1e-5)
    for a, b, c in zip(ours[1:], torchs[1:], truth[1:], strict=True):
        if dtype == torch.float32:
            assert_close_in_norm(a, b, c)
        else:  # a few hundred elements: torch may be near the truth by luck, but we round once
            assert (a - c).norm() <= (b - c).norm() + 2**-8 * c.norm()


WRITTEN = covering({"size": [*SIZES], "reduction": ["mean", "sum", "none"], "dtype": [torch.float32, torch.bfloat16]})


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: "-".join(map(str, case.values())))
def test_what_is_written_to_says_so(path: str, case: dict[str, Any]) -> None:
    """Let torch notice if a caller saved it for backward."""
    size, reduction, dtype = case.values()
    hidden, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (9, 300))
    main_grad, scale = torch.ones(300, 8), torch.ones((), requires_grad=True)
    held = (main_grad * scale).sum()
    with forced(None, size):
        loss = linear_cross_entropy(
            hidden, weight, torch.arange(9), reduction=reduction, accumulate_into=main_grad, memory_budget=1 << 30
        )
    assert main_grad._version == 0
    loss.sum().backward()
    assert main_grad._version > 0 and bool(main_grad.ne(1.0).any())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


# Equal logits, which need not lie in one tile.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"softcap": 5.0}], ids=["plain", "smooth", "capped"])
def test_the_first_of_equals_is_the_argmax_wherever_they_lie(
    path: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    V = 40_000  # two whole tiles and a part, or four
    places = [
        *([0], [16_384, 32_768], [5, 16_389, 32_773], [16_383, 16_384], [8_191, 8_192, 39_999]),
        *([32_768, 39_999], [100, 32_900], [24_575, 24_576], [39_998, 39_999]),
    ]
    logits = torch.zeros(len(places) + 2, V)
    for row, columns in enumerate(places):
        logits[row, columns] = 1.0
    logits[-1] = -3.5
    targets = torch.arange(len(logits)) + 17
    _, stats = cross_entropy(logits.to(dtype), targets, return_stats=True, **options)
    assert stats.argmax.tolist() == [*(min(columns) for columns in places), 0, 0]


@pytest.mark.parametrize("cut", [16_384, 100, 39_999])
def test_the_first_of_equals_through_the_linear_loss(path: str, cut: int) -> None:
    hidden, weight = torch.ones(3, 2), torch.zeros(40_000, 2)
    weight[cut:, 0] = 1.0
    hidden[1, 0] = 0.0
    _, stats = linear_cross_entropy(hidden, weight, torch.tensor([3, 4, 39_999]), return_stats=True)
    assert stats.argmax.tolist() == [cut, 0, cut]
    assert stats.accuracy == (1 / 3 if cut == 39_999 else 0)


# A class that is a row's target more than once.


TWICE = covering(
    {
        "V": [4, 5, 60, 3000],
        "targets": [[[3, 3]], [[3, 3], [0, 2]], [[2, 2, 2], [1, 2, 1], [-100, 0, 0]], [[1, -100, 1, 1, 0]]],
        "weighted": [False, True],
        "options": [{}, {"softcap": 2.0, "label_smoothing": 0.1}],
        "reduction": ["mean", "none"],
    }
)


@pytest.mark.parametrize("case", TWICE, ids=str)
def test_a_class_may_be_a_target_twice(path: str, case: dict[str, Any]) -> None:
    y, V = torch.tensor(case["targets"]), case["V"]
    hidden, weight = torch.randn(len(y), 6), torch.randn(V, 6)
    more: dict[str, Any] = {"reduction": case["reduction"], **case["options"]}
    if case["weighted"]:
        more["target_weights"] = torch.rand(y.shape) + 0.5

    def run(loss: Any, *leaves: Tensor, **more: Any) -> list[Tensor]:
        leaves = tuple(t.detach().clone().requires_grad_() for t in leaves)
        value = loss(*leaves, y, **more)
        value.sum().backward()
        return [value.detach(), *(t.grad for t in leaves if t.grad is not None)]

    exact = {**more, "target_weights": more["target_weights"].double()} if case["weighted"] else more
    logits = hidden @ weight.T
    ours = run(cross_entropy, logits, **more) + run(linear_cross_entropy, hidden, weight, **more)
    truth = run(reference.cross_entropy, logits.double(), **exact)
    truth += run(reference.linear_cross_entropy, hidden.double(), weight.double(), **exact)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


# Each argument that backward reads, and the calls that have it.
READ = {
    linear_cross_entropy: ("hidden", "weight", "targets", "bias", "class_weights", "token_weights", "num_valid"),
    cross_entropy: ("logits", "targets", "class_weights", "token_weights", "num_valid"),
    linear_logprobs: ("hidden", "weight", "ids", "bias", "temperature"),
    linear_distillation: ("hidden", "weight", "bias", "token_weights", "teacher.hidden", "teacher.weight"),
}


@pytest.mark.parametrize(
    ("function", "name"),
    [(function, name) for function, names in READ.items() for name in names],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_what_backward_reads_must_stay_as_it_was(path: str, function: Any, name: str) -> None:
    """A change in place would change the gradients silently, so torch is told what is read."""
    N, V = 5, 30
    ids = torch.randint(1, V, (N,))
    tensors = {"hidden": torch.randn(N, 4), "weight": torch.randn(V, 4), "logits": torch.randn(N, V), "targets": ids}
    tensors |= {"ids": ids, "bias": torch.randn(V), "class_weights": torch.rand(V), "token_weights": torch.rand(N)}
    tensors |= {"num_valid": torch.tensor(3.0), "temperature": torch.rand(N) + 0.5}
    teacher = {"teacher.hidden": torch.randn(N, 3), "teacher.weight": torch.randn(V, 3)}
    given = {n: t for n, t in tensors.items() if n in READ[function]}
    for leaf in ("hidden", "logits"):
        if leaf in given:
            given[leaf].requires_grad_()
    more: dict[str, Any] = {"label_smoothing": 0.1} if "class_weights" in given else {}
    if function is linear_distillation:
        more["teacher"] = TeacherStates(*teacher.values())
    if function is not linear_logprobs and name != "num_valid":
        more["reduction"] = "none"
        given.pop("num_valid", None)
    loss = function(**given, **more).sum()
    changed = (given | teacher)[name]
    with torch.no_grad():
        changed.mul_(2) if changed.is_floating_point() else changed.sub_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
