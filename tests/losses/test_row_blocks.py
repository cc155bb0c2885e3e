"""Rows in several blocks and columns in several tiles, on inputs that are small: what a part leaves for the next one.

Plain torch computes a mebibyte of rows at a time, and a row kernel thousands of columns, which few inputs here have.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.losses import (
    TeacherLogits,
    TeacherProbabilities,
    TeacherStates,
    TeacherTopK,
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_logprobs,
    logprobs,
    plain,
    reference,
)
from llmfast_kernels import cross_entropy as rows
from llmfast_kernels.launch import Tile
from support.launched import unrecorded
from support.plans import forced

N, D, V = 5, 4, 37
Y, SEVERAL = torch.tensor([3, 0, -100, 36, 7]), torch.tensor([[3, 1], [0, 0], [-100, -100], [36, -100], [7, 8]])


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def options() -> dict[str, Any]:
    terms = {"label_smoothing": 0.2, "z_loss": 0.03, "softcap": 5.0, "logit_scale": 1.7}
    return terms | {"class_weights": drawn(V).exp(), "token_weights": drawn(N).exp()}


# Calls of logits, or of hidden states, a weight and a bias.
OF_LOGITS: dict[str, Callable[..., Any]] = {
    "loss": lambda f, x: f(x, Y),
    "in place": lambda f, x: f(x * 1.0, Y, **({"inplace": True} if f is cross_entropy else {}), **options()),
    "everything": lambda f, x: f(x, Y, return_stats=True, reduction="none", **options()),
    "several targets": lambda f, x: f(x, SEVERAL, return_stats=True, target_weights=drawn(N, 2).exp(), **options()),
    "probabilities": lambda f, x: f(x, drawn(N, V).softmax(1).to(x.dtype), reduction="none", **options()),
    "probabilities, in place": lambda f, x: f(
        x * 1.0, drawn(N, V).softmax(1).to(x.dtype), **({"inplace": True} if f is cross_entropy else {}), **options()
    ),
}
TEMPERATURES = torch.tensor([0.5, 1.0, 2.0, 1.5, 0.7])
STATED: dict[str, Any] = {"return_stats": True, "return_rank": True, "temperature": TEMPERATURES}
TEACHERS: dict[str, Callable[[], Any]] = {
    "states": lambda: TeacherStates(drawn(N, 3), drawn(V, 3), drawn(V), softcap=4.0, logit_scale=0.7),
    "logits": lambda: TeacherLogits(drawn(N, V).mul(2)),
    "probabilities": lambda: TeacherProbabilities(drawn(N, V).softmax(1)),
    "top K": lambda: TeacherTopK(torch.arange(3).expand(N, 3) + Y.clamp(0, 30)[:, None], drawn(N, 3) - 3),
    "bucket": lambda: TeacherTopK(torch.arange(3).expand(N, 3) + Y.clamp(0, 30)[:, None], drawn(N, 3) - 3, "bucket"),
}
DISTILLED = [
    (teacher, kind)
    for teacher in TEACHERS
    for kind in ("forward_kl", "reverse_kl", "jsd")
    if kind + teacher != "reverse_kltop K"
]


def outcome(function: Callable[..., Any], *inputs: Tensor) -> list[Tensor]:
    """Return all results of a loss, and the gradients of a weighted sum of those that have one."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    found = function(*leaves)
    results = [found] if isinstance(found, Tensor) else [found[0], *(t for t in found[1] if t is not None)]
    total = sum((t * torch.linspace(0.5, 2.0, t.numel()).view(t.shape)).sum() for t in results if t.requires_grad)
    gradients = torch.autograd.grad(total, leaves)  # type: ignore[arg-type]
    return [t.detach().double() for t in (*results, *gradients)]


def expect_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@contextmanager
def one_row_at_a_time() -> Iterator[None]:
    with mock.patch.object(plain, "BLOCK_BYTES", 1):
        yield


on_plain_torch = pytest.mark.parametrize("path", ["plain"], indirect=True)


@on_plain_torch
@pytest.mark.parametrize("name", OF_LOGITS)
def test_each_block_of_rows_has_its_own_results(path: str, name: str) -> None:
    x = drawn(N, V) * 3
    with one_row_at_a_time():
        found = outcome(lambda x: OF_LOGITS[name](cross_entropy, x), x)
    expect_same(found, outcome(lambda x: OF_LOGITS[name](reference.cross_entropy, x), x.double()))


@on_plain_torch
@pytest.mark.parametrize("mode", ["chunk", "two-stage", "recompute"])
def test_each_block_of_rows_has_its_own_log_probabilities(path: str, mode: str) -> None:
    h, w, b = drawn(N, D), drawn(V, D), drawn(V)
    truth = outcome(lambda h, w, b: reference.linear_logprobs(h, w, SEVERAL, bias=b, softcap=5.0, **STATED), h, w, b)
    with one_row_at_a_time(), forced(mode, rows=3):
        found = outcome(lambda h, w, b: linear_logprobs(h, w, SEVERAL, bias=b, softcap=5.0, **STATED), h, w, b)
    expect_same(found, truth)


@on_plain_torch
@pytest.mark.parametrize(("teacher", "kind"), DISTILLED)
def test_each_block_of_rows_has_its_own_teacher(path: str, teacher: str, kind: Any) -> None:
    """Take temperatures and weights of tokens, in both passes, with a teacher that learns and one that does not."""
    said, h, w, b = TEACHERS[teacher](), drawn(N, D), drawn(V, D), drawn(V)
    floats = {name: t for name, t in vars(said).items() if isinstance(t, Tensor) and t.is_floating_point()}
    given = {"kind": kind, "hard_weight": 0.4, "softcap": 5.0, "logit_scale": 1.3, "token_weights": drawn(N).exp()}

    def of(function: Callable[..., Tensor], learns: bool, reduction: str) -> Callable[..., Tensor]:
        def loss(h: Tensor, w: Tensor, b: Tensor, *own: Tensor) -> Tensor:
            mine = type(said)(**{**vars(said), **(dict(zip(floats, own)) if learns else {})})
            return function(h, w, mine, Y, bias=b, temperature=TEMPERATURES, reduction=reduction, **given)

        return loss

    for reduction, learns, mode in (("mean", True, "chunk"), ("none", False, "recompute")):
        leaves = [h, w, b, *(floats.values() if learns else ())]
        with one_row_at_a_time(), forced(mode, rows=3):
            found = outcome(of(linear_distillation, learns, reduction), *leaves)
        expect_same(found, outcome(of(reference.linear_distillation, learns, reduction), *leaves))


# Columns.

WIDE = 2 * 1024 + 17  # two whole tiles and a tail of the smallest that there are
TERMS = ("label_smoothing", "z_loss", "softcap", "logit_scale", "class_weights", "token_weights", "target_weights")


@contextmanager
def smallest_tiles() -> Iterator[None]:
    tile = Tile(8, 128)
    results = mock.patch.object(rows, "MANY_RESULTS", tile)
    with rows.FEW_TERMS.trying(tile), rows.MANY_TERMS.trying(tile), rows.BACKWARD.trying(tile), results:
        yield


@pytest.mark.parametrize(
    "names", [*((name,) for name in TERMS), TERMS], ids=lambda names: names[0] if len(names) == 1 else "all"
)
@unrecorded()
def test_each_term_goes_through_all_tiles_of_a_row(kernels: None, names: tuple[str, ...]) -> None:
    """Let targets lie in the first, the second and the last tile, with statistics and without."""
    y = torch.tensor([[3, WIDE - 1], [1024, 1024]]) if "target_weights" in names else torch.tensor([WIDE - 1, 1030])
    values = options() | {"class_weights": drawn(WIDE).exp(), "token_weights": torch.tensor([0.5, 2.0])}
    values["target_weights"] = torch.tensor([0.3, 1.2])
    given, logits = {name: values[name] for name in names}, drawn(2, WIDE) * 2
    kinds: list[dict[str, Any]] = [{}, {"return_stats": True}, {"reduction": "none", "return_stats": True}]
    for more in kinds:
        with smallest_tiles():
            found = outcome(partial(cross_entropy, targets=y, **given, **more), logits)
        expect_same(found, outcome(partial(reference.cross_entropy, targets=y, **given, **more), logits.double()))
    leaves = [drawn(2, D), drawn(WIDE, D), drawn(WIDE)]
    with smallest_tiles():
        found = outcome(lambda h, w, b: linear_cross_entropy(h, w, y, bias=b, **given), *leaves)
    expect_same(found, outcome(lambda h, w, b: reference.linear_cross_entropy(h, w, y, bias=b, **given), *leaves))


@unrecorded()
def test_log_probabilities_go_through_all_tiles_of_a_row(kernels: None) -> None:
    ids, x = torch.tensor([[3, 2064, -100], [1024, 1023, 2048]]), drawn(2, WIDE) * 2
    given: dict[str, Any] = {**STATED, "temperature": torch.tensor([0.5, 2.0]), "softcap": 5.0}
    with smallest_tiles():
        found = outcome(lambda x: logprobs(x, ids, **given), x)
    expect_same(found, outcome(lambda x: reference.logprobs(x, ids, **given), x.double()))


@unrecorded()
def test_a_filter_looks_at_all_tiles_of_a_row(kernels: None) -> None:
    """Let the first token rule out all classes but the first 128, the second all but the last; one is ignored."""
    hidden, weight = torch.tensor([[1.0], [-1.0], [1.0]]), torch.full((WIDE, 1), -9.0)
    weight[:128], weight[2000:], y, threshold = 9.0, -12.0, torch.tensor([5, 2050, -100]), 1e-3
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    with smallest_tiles():
        loss = linear_cross_entropy(*leaves, y, reduction="sum", grad_filter=threshold)
        found = torch.autograd.grad(loss, leaves)
    logits = (hidden @ weight.T).detach().double().requires_grad_()
    (d,) = torch.autograd.grad(F.cross_entropy(logits, y, reduction="sum"), logits)
    blocks = [x if x.abs().max() >= threshold else 0 * x for x in d.split(128, 1)]
    assert [bool(x.any()) for x in blocks] == [True] + 14 * [False] + 2 * [True]
    kept = torch.cat(blocks, 1)
    for a, b in zip(found, (kept @ weight.detach().double(), kept.T @ hidden.detach().double()), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
