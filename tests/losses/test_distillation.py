"""`linear_distillation` on both paths against its definition in float64, and against torch's own `kl_div`."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import llmfast_kernels.distillation
import llmfast_kernels.scale
from evidence.dry_run import reserve
from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import Counts, counting
from llmfast.losses import (
    TeacherLogits,
    TeacherProbabilities,
    TeacherStates,
    TeacherTopK,
    linear_cross_entropy,
    linear_distillation,
    reference,
)
from llmfast.losses.distillation import made_ready
from support.code_blocks import ROOT
from support.launched import unrecorded
from support.numerics import assert_close_in_norm
from support.pairs import Case, covering
from support.plans import SIZES, forced

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
D, TEACHER_D = 6, 10
KINDS = ["forward_kl", "reverse_kl", "jsd"]
TEACHERS = ["states", "capped states", "logits", "probabilities", "top K", "top K in a bucket"]


def draw_teacher(name: str, tokens: tuple[int, ...], V: int, K: int, dtype: torch.dtype) -> Any:
    """Draw a teacher; some of its K ids are none."""
    if name == "states":
        return TeacherStates(torch.randn(*tokens, TEACHER_D).to(dtype), torch.randn(V, TEACHER_D).to(dtype))
    if name == "capped states":
        hidden, weight = torch.randn(*tokens, TEACHER_D).to(dtype), torch.randn(V, TEACHER_D).to(dtype)
        return TeacherStates(hidden, weight, torch.randn(V), softcap=3.0, logit_scale=0.7)
    logits = (torch.randn(*tokens, V) * 2).to(dtype)
    if name == "logits":
        return TeacherLogits(logits)
    p = logits.double().softmax(-1)
    if name == "probabilities":
        return TeacherProbabilities(p.to(dtype))
    values, ids = p.log().topk(min(K, V), -1)
    ids[..., 1:][torch.rand(ids[..., 1:].shape) < 0.2] = -100
    return TeacherTopK(ids, values.to(dtype), "drop" if name == "top K" else "bucket")


def in_dtype(teacher: Any, dtype: torch.dtype, *, learns: bool = False) -> Any:
    """Return a teacher whose products have this dtype; one that `learns` has all tensors in it, as leaves."""
    wide = torch.promote_types(dtype, F32)
    if learns:
        floats = {name: t for name, t in vars(teacher).items() if isinstance(t, Tensor) and t.is_floating_point()}
        leaves = {name: t.to(wide if name == "bias" else dtype) for name, t in floats.items()}
        return replace(teacher, **{name: t.detach().clone().requires_grad_() for name, t in leaves.items()})
    if not isinstance(teacher, TeacherStates):
        return teacher
    return replace(teacher, hidden=teacher.hidden.to(dtype), weight=teacher.weight.to(dtype))


def outcome(function: Callable[..., Tensor], inputs: list[Tensor], upstream: Tensor, *given: Any, **o: Any) -> Any:
    """Return the loss, and the gradients of its sum weighted by what is upstream; of a teacher that learns too."""
    h, w, *b = leaves = [t.detach().clone().requires_grad_() for t in inputs]
    loss = function(h, w, *given, bias=b[0] if b else None, **o)
    leaves += [t for t in (vars(given[0]).values() if given else ()) if isinstance(t, Tensor) and t.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype).expand_as(loss))]


def compare(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], eps: float) -> None:
    """Compare, allowing some roundings with which torch can be lucky."""
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert a.shape == c.shape and a.dtype == b.dtype
        error, allowed = (a - c).double().norm(), (b - c).double().norm()
        slack = 8 * eps * (c.norm() + 1)
        assert error <= 1.5 * allowed + slack, f"error {error:.3g}, torch's {allowed:.3g}, slack {slack:.3g}"


FACTORS: dict[str, list[Any]] = {
    "teacher": TEACHERS,
    "learns": [False, True],
    "kind": KINDS,
    "beta": [None, 0.0, 0.1, 0.9, 1.0],
    "temperature": [1.0, 0.6, 2.5, "of each token"],
    "hard_weight": [0.0, 0.4],
    "logits": [{}, {"softcap": 0.7}, {"logit_scale": -1.3}, {"softcap": 5.0, "logit_scale": 1.7}],
    "reduction": ["mean", "sum", "none"],
    "num_valid": [None, 5],
    "weights": [False, True],
    "bias": [False, True],
    "ignored": [None, 0.0, 0.3, 1.0],
    "tokens": [(9,), (3, 4), (2, 1, 3), (1,), (), (0,)],
    "K": [1, 3, 64],
    "V": [5, 1, 127, 1000, 1025],
    "dtype": [F32, BF16, F64],
    "slab_dtype": [None, F32],
    "size": [*SIZES],
}


def possible(case: Case) -> bool:
    """Return False for a divisor of what is no mean."""
    return case.get("num_valid") is None or case.get("reduction", "mean") == "mean"


# Several times, in other combinations of three and more.
CASES = [case for seed in range(3) for case in covering(FACTORS, possible, seed)]


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@unrecorded()
def test_any_two_arguments_together_match_float64(path: str, case: Case) -> None:
    tokens, V, dtype, kind, ignored = (case[name] for name in ("tokens", "V", "dtype", "kind", "ignored"))
    teacher = draw_teacher(case["teacher"], tokens, V, case["K"], dtype)
    beta = case["beta"] if kind == "jsd" else None
    if case["teacher"] == "top K" and (kind == "reverse_kl" or beta == 1):
        kind, beta = "jsd", 0.4
    inputs = [torch.randn(*tokens, D).to(dtype), torch.randn(V, D).to(dtype)]
    inputs += [torch.randn(V).to(dtype)] if case["bias"] else []
    targets = None
    if ignored is not None:
        targets = torch.randint(0, V, tokens).masked_fill(torch.rand(tokens) < ignored, -100)
    options = {name: case[name] for name in ("reduction", "temperature", "num_valid")} | {"kind": kind, "beta": beta}
    options |= {"soft_weight": 0.7, "hard_weight": 0.0 if targets is None else case["hard_weight"], **case["logits"]}
    options["token_weights"] = torch.rand(tokens) if case["weights"] else None
    if case["temperature"] == "of each token":
        options["temperature"] = torch.rand(tokens) + 0.5
    upstream = torch.randn(tokens if case["reduction"] == "none" else ())
    # Where the bucket is empty but for a rounding error, the gradient of its probability is one too.
    learns = case["learns"] and (case["teacher"] != "top K in a bucket" or case["K"] < V)

    def run(function: Any, dtype: torch.dtype, **more: Any) -> list[Tensor]:
        own = [t.to(dtype) for t in inputs]
        return outcome(function, own, upstream, in_dtype(teacher, dtype, learns=learns), targets, **options, **more)

    with forced(None, case["size"]):
        ours = run(linear_distillation, dtype, slab_dtype=None if dtype == F64 else case["slab_dtype"])
    truth = run(reference.linear_distillation, F64)
    nothing = 0 in tokens or (targets is not None and bool((targets == -100).all()))
    if nothing and case["reduction"] == "mean" and case["num_valid"] is None:
        assert ours[0].isnan() and truth[0].isnan() and all(not g.any() for g in ours[1:])
        return
    compare(
        ours, run(reference.linear_distillation, dtype), truth, torch.finfo(dtype).eps * (1 if dtype == BF16 else 8)
    )


@pytest.mark.parametrize("teacher", ["states", "top K in a bucket"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("mode", ["chunk", "two-stage", "recompute"])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16])
@unrecorded()
def test_weighted_tokens(path: str, dtype: torch.dtype, mode: str, reduction: str, teacher: str) -> None:
    """Gradients are divided by the sum of the weights early or late, and multiplied by each token's."""
    inputs, said = [torch.randn(9, D), torch.randn(300, D)], draw_teacher(teacher, (9,), 300, 5, dtype)
    targets = torch.randint(0, 300, (9,)).index_fill(0, torch.tensor([4]), -100)
    options = {"token_weights": torch.rand(9) + 0.5, "hard_weight": 0.5, "temperature": 1.6, "reduction": reduction}

    def run(function: Any, t: torch.dtype) -> list[Tensor]:
        own = [x.to(dtype).to(t) for x in inputs]
        return outcome(function, own, torch.tensor(0.7), in_dtype(said, t), targets, **options)

    with forced(mode):
        ours = run(linear_distillation, dtype)
    theirs, truth = (run(reference.linear_distillation, t) for t in (dtype, F64))
    compare(ours, theirs, truth, torch.finfo(dtype).eps)


# Any three of mode, teacher, kind and hard targets meet.
WHOLE_TILES = [
    (mode, teacher, kind, bool((i + j + k) % 2))
    for i, mode in enumerate([("chunk", 2), ("recompute", 3)])
    for j, teacher in enumerate([("states", BF16), ("states", F32), ("probabilities", F32)])
    for k, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("mode", "teacher", "kind", "hard"), WHOLE_TILES, ids=str)
def test_a_real_vocabulary(
    path: str, mode: tuple[str, int], teacher: tuple[str, torch.dtype], kind: str, hard: bool
) -> None:
    """Take several whole tiles and a tail; these launches are compiled too."""
    (way, rows), (name, dtype) = mode, teacher
    V, temperature = 2 * 4096 + 17, 1.6 if hard else 1.0  # tiles have at most 4096 columns
    hidden, weight = torch.randn(3, D).to(dtype), torch.randn(V, D).to(dtype)
    said, targets = draw_teacher(name, (3,), V, 0, dtype), torch.tensor([0, 4096, V - 1])
    more: dict[str, Any] = {"targets": targets, "hard_weight": 0.5, "temperature": temperature} if hard else {}
    upstream = torch.randn(3 if way == "recompute" else ())
    more |= {"kind": kind, "reduction": "none" if way == "recompute" else "mean"}

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        own = [hidden.to(dtype), weight.to(dtype)]
        return outcome(function, own, upstream, in_dtype(said, dtype), **more)

    with forced(way, rows=rows):
        ours = run(linear_distillation, dtype)
    theirs, truth = run(reference.linear_distillation, dtype), run(reference.linear_distillation, F64)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_close_in_norm(a, b, c, factor=2.5)


def test_capped_rows_with_a_bias(path: str) -> None:
    """Take all terms of the logits, on both sides; these launches are compiled too."""
    h, w, b, y = torch.randn(3, D), torch.randn(9000, D), torch.randn(9000), torch.tensor([1, -100, 8999])
    said = draw_teacher("capped states", (3,), 9000, 0, F32)
    options = {"kind": "jsd", "softcap": 5.0, "logit_scale": 1.3, "hard_weight": 0.5, "temperature": 1.6}
    for reduction, upstream in (("mean", torch.ones(())), ("none", torch.randn(3))):
        ours, want = (
            outcome(f, [h, w, b], upstream, said, y, reduction=reduction, **options)
            for f in (linear_distillation, reference.linear_distillation)
        )
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("V", "dtype", "said", "kind"),
    [
        *((9001, F32, BF16, "jsd"), (9001, BF16, F32, "reverse_kl")),
        *((9002, BF16, F32, "forward_kl"), (9008, F32, BF16, "jsd")),
    ],
    ids=str,
)
def test_rows_of_two_dtypes(path: str, V: int, dtype: torch.dtype, said: torch.dtype, kind: str) -> None:
    """Take a teacher whose rows allow accesses of another width than the student's; these launches are compiled too."""
    h, w, y = torch.randn(3, D).to(dtype), torch.randn(V, D).to(dtype), torch.tensor([V - 1, -100, 0])
    for name in ("logits", "probabilities"):
        teacher = draw_teacher(name, (3,), V, 0, said)
        ours, plain, truth = (
            outcome(f, [h.to(t), w.to(t)], torch.ones(()), teacher, y, kind=kind, hard_weight=0.5)
            for f, t in (
                (linear_distillation, dtype),
                (reference.linear_distillation, dtype),
                (reference.linear_distillation, F64),
            )
        )
        compare(ours, plain, truth, torch.finfo(dtype).eps * (1 if dtype == BF16 else 8))


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_need_not_add_up_to_1(path: str, kind: str) -> None:
    """Take half of each: what is meant is in the definition of the divergence."""
    h, w, p = torch.randn(3, D), torch.randn(90, D), torch.rand(3, 90).softmax(-1) / 2
    ours, want = (
        outcome(f, [h, w], torch.ones(()), TeacherProbabilities(p), kind=kind)
        for f in (linear_distillation, reference.linear_distillation)
    )
    torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)


def test_reference_is_what_torch_means() -> None:
    h, w = torch.randn(7, D, dtype=F64), torch.randn(50, D, dtype=F64)
    t = torch.randn(7, 50, dtype=F64)
    q, p = (h @ w.T / 2).log_softmax(-1), (t / 2).log_softmax(-1)

    def ours(kind: str, teacher: Any = None, **more: Any) -> Tensor:
        teacher = teacher or TeacherLogits(t)
        return reference.linear_distillation(h, w, teacher, kind=kind, temperature=2.0, **more)  # type: ignore[arg-type]

    forward, reverse = (F.kl_div(a, b, reduction="batchmean", log_target=True) for a, b in ((q, p), (p, q)))
    torch.testing.assert_close(ours("forward_kl"), forward)
    torch.testing.assert_close(ours("reverse_kl"), reverse)
    torch.testing.assert_close(ours("forward_kl", TeacherProbabilities(p.exp())), forward)
    m = (0.3 * p.exp() + 0.7 * q.exp()).log()
    a, b = (F.kl_div(m, x, reduction="batchmean", log_target=True) for x in (p, q))
    torch.testing.assert_close(ours("jsd", beta=0.3), 0.3 * a + 0.7 * b)
    # All classes but the last, which is the bucket then.
    values, ids = p.topk(49, -1)
    for kind in KINDS:
        torch.testing.assert_close(ours(kind, TeacherTopK(ids, values, "bucket")), ours(kind))
    values = values.log_softmax(-1)
    dropped = (values.exp() * (values - q.gather(-1, ids))).sum(-1).mean()
    torch.testing.assert_close(ours("forward_kl", TeacherTopK(ids, values)), dropped)


def test_the_student_of_itself_has_nothing_to_learn(path: str) -> None:
    h, w = torch.randn(9, D), torch.randn(300, D)
    for kind in KINDS:
        loss, *gradients = outcome(linear_distillation, [h, w], torch.ones(()), TeacherStates(h, w), kind=kind)
        assert abs(loss) < 1e-6 and all(g.abs().max() < 1e-6 for g in gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_temperature_per_token(path: str, kind: str, reduction: str) -> None:
    """Compare with a call for each token; these launches are compiled too."""
    h, w, T, y = torch.randn(5, D), torch.randn(9000, D), torch.rand(5) + 0.5, torch.tensor([0, 8999, -100, 7, 9])
    said = draw_teacher("capped states", (5,), 9000, 0, F32)
    options: dict[str, Any] = {"kind": kind, "hard_weight": 0.5, "token_weights": T**2}
    upstream = torch.ones(()) if reduction == "mean" else torch.randn(5)

    def each(h: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        one = {**options, "reduction": "none"}
        losses = torch.cat(
            [
                reference.linear_distillation(
                    h[n : n + 1],
                    w,
                    replace(said, hidden=said.hidden[n : n + 1]),
                    y[n : n + 1],
                    **{**one, "temperature": float(T[n]), "token_weights": T[n : n + 1] ** 2},
                )
                for n in range(5)
            ]
        )
        return losses if reduction == "none" else losses.sum() / (T**2)[y >= 0].sum()

    ours = outcome(linear_distillation, [h, w], upstream, said, y, temperature=T, reduction=reduction, **options)
    torch.testing.assert_close(ours, outcome(each, [h, w], upstream), rtol=1e-4, atol=1e-5)


def test_the_hard_loss_alone_is_the_cross_entropy(path: str) -> None:
    h, w, y = torch.randn(9, D), torch.randn(300, D), torch.randint(0, 300, (9,))
    teacher, one = TeacherLogits(torch.randn(9, 300)), torch.ones(())
    options = {"soft_weight": 0.0, "hard_weight": 1.0, "temperature": 3.0}
    ours = outcome(linear_distillation, [h, w], one, teacher, y, **options)

    def theirs(h: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(h, w, y)

    torch.testing.assert_close(ours, outcome(theirs, [h, w], one), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("teacher", ["states", "top K in a bucket"])
def test_ignored_tokens_add_nothing(path: str, reduction: str, teacher: str, upstream: float) -> None:
    """Let their hidden states be NaN, and what is upstream infinite or NaN."""
    h, w, y = torch.randn(8, D), torch.randn(300, D), torch.randint(0, 300, (8,))
    said = draw_teacher(teacher, (8,), 300, 5, F32)
    y[3:] = -100
    options: dict[str, Any] = {"reduction": reduction, "hard_weight": 0.5}
    above = torch.ones(8) if reduction == "none" else torch.ones(())
    want = outcome(linear_distillation, [h, w], above, said, y, **options)
    if reduction == "none":
        above[3:] = upstream
        h[3:] = 1e4
        got = outcome(linear_distillation, [h, w], above, said, y, **options)
    else:
        y[:] = -100
        got = outcome(linear_distillation, [h, w], torch.tensor(upstream), said, y, **options)
        want = [torch.zeros_like(t) for t in want]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("teacher", ["states", "probabilities", "top K in a bucket"])
@unrecorded()
def test_weights_of_ignored_tokens_may_be_nan(path: str, teacher: str, reduction: str, learns: bool) -> None:
    """Compute mask / mask.sum() of a sequence without labels, which is 0 / 0."""
    h, w, y = torch.randn(4, D), torch.randn(40, D), torch.tensor([7, -100, 39, -100])
    said = in_dtype(draw_teacher(teacher, (4,), 40, 5, F32), F32, learns=learns)
    options: dict[str, Any] = {"reduction": reduction, "hard_weight": 0.5}
    upstream = torch.ones(4 if reduction == "none" else ())
    found = [
        outcome(
            linear_distillation,
            [h, w],
            upstream,
            said,
            y,
            token_weights=torch.tensor([0.5, none, 2.0, none]),
            **options,
        )
        for none in (torch.nan, 0.0)
    ]
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


@pytest.mark.parametrize("tail", ["drop", "bucket"])
@pytest.mark.parametrize("ignore_index", [0, 8, 299, -1, 300])
def test_ids_to_ignore_may_be_a_class(path: str, ignore_index: int, tail: Any) -> None:
    h, w, values = torch.randn(4, D), torch.randn(300, D), torch.rand(4, 3).log_softmax(-1) - 0.5
    ids = torch.tensor([[7, ignore_index, 2], [ignore_index, 5, ignore_index], [1, 2, 3], [4, 298, ignore_index]])
    targets = torch.tensor([9, ignore_index, 40, 298])
    found, want = (
        outcome(
            f,
            [h, w],
            torch.ones(()),
            TeacherTopK(ids.masked_fill(ids == ignore_index, none), values, tail),
            targets.masked_fill(targets == ignore_index, none),
            ignore_index=none,
            hard_weight=0.5,
        )
        for f, none in ((linear_distillation, ignore_index), (reference.linear_distillation, -100))
    )
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ignore_index", [0, 1, 89])
@unrecorded()
def test_without_targets_no_token_is_ignored(path: str, ignore_index: int) -> None:
    h, w, teacher = torch.randn(4, D), torch.randn(90, D), TeacherLogits(torch.randn(4, 90))
    want = outcome(reference.linear_distillation, [h, w], torch.ones(()), teacher)
    found = outcome(linear_distillation, [h, w], torch.ones(()), teacher, ignore_index=ignore_index)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_classes_of_the_teacher(path: str, kind: str) -> None:
    h, w, t = torch.randn(4, D), torch.randn(40, D), torch.randn(4, 40)
    t[:, 5:] = -torch.inf
    ours, want = (
        outcome(f, [h, w], torch.ones(()), TeacherLogits(t), kind=kind)
        for f in (linear_distillation, reference.linear_distillation)
    )
    if kind == "reverse_kl":
        assert ours[0] == want[0] == torch.inf
    else:
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-5)


def test_gradients_go_where_the_options_say(path: str) -> None:
    h, w = torch.randn(7, D), torch.randn(300, D).requires_grad_()
    th, tw = torch.randn(7, TEACHER_D), torch.randn(300, TEACHER_D)
    (want,) = torch.autograd.grad(linear_distillation(h, w, TeacherStates(th, tw)), w)
    main = torch.ones(300, D)
    linear_distillation(h, w, TeacherStates(th, tw.requires_grad_()), accumulate_into=main).backward()
    assert w.grad is th.grad is None and tw.grad is not None
    torch.testing.assert_close(main, want + 1, rtol=1e-5, atol=1e-5)
    alone = torch.autograd.grad(linear_distillation(h, w.detach(), TeacherStates(th, tw)), tw)[0]
    torch.testing.assert_close(alone, tw.grad)
    with torch.no_grad():
        assert not linear_distillation(h, w, TeacherStates(th, tw)).requires_grad
    half = torch.autograd.grad(linear_distillation(h, w, TeacherStates(th, tw), num_valid=14), w)[0]
    torch.testing.assert_close(half, want / 2, rtol=1e-5, atol=1e-7)


def test_a_teacher_learns_by_the_same_function(path: str) -> None:
    """Let both sides be one network with two output layers, and backward run twice, under autocast too."""
    x, a, b = torch.randn(7, D), torch.randn(D, D, requires_grad=True), torch.randn(300, D, requires_grad=True)
    c = torch.randn(300, D, requires_grad=True)

    def loss(function: Callable[..., Tensor]) -> Tensor:
        return function(x @ a, b, TeacherStates(x @ a, c), kind="jsd", beta=0.2)

    ours = loss(linear_distillation)
    want = torch.autograd.grad(loss(reference.linear_distillation), [a, b, c])
    for retained in (True, False):
        torch.testing.assert_close(
            torch.autograd.grad(ours, [a, b, c], retain_graph=retained), want, rtol=1e-4, atol=1e-6
        )
    with torch.autocast("cpu", BF16):
        low = torch.autograd.grad(loss(linear_distillation), [a, b, c])
    assert all(g.dtype == F32 and (g - t).norm() < 0.05 * t.norm() for g, t in zip(low, want))


@pytest.mark.parametrize("beta", [1e-20, 1e-9])
@unrecorded()
def test_a_mixture_with_almost_nothing_of_the_teacher_teaches_it_almost_nothing(path: str, beta: float) -> None:
    """The sides are exchanged for it, and the share of the other one must not become all."""
    h, w, t = torch.randn(4, D), torch.randn(40, D), torch.randn(4, 40)
    for said in (TeacherLogits(t.requires_grad_()), TeacherStates(torch.randn(4, D).requires_grad_(), w)):
        (leaf,) = (t for t in vars(said).values() if isinstance(t, Tensor) and t.requires_grad)
        (found,) = torch.autograd.grad(linear_distillation(h, w, said, kind="jsd", beta=beta), leaf)
        assert found.isfinite().all() and found.abs().max() < 1e-6


@pytest.mark.parametrize("tail", ["drop", "bucket"])
def test_nothing_is_learned_where_a_teachers_probability_is_0(path: str, tail: Any) -> None:
    h, w = torch.randn(2, D, requires_grad=True), torch.randn(9, D)
    p = torch.tensor([[0.5, 0.5, *[0.0] * 7], [1.0, *[0.0] * 8]], requires_grad=True)
    ids = torch.tensor([[3, -100], [4, 5]])
    logprobs = torch.tensor([[0.0, -1.0], [-1.0, -2.0]], requires_grad=True)
    for kind in ("forward_kl", "jsd"):
        loss = linear_distillation(h, w, TeacherProbabilities(p), kind=kind)  # type: ignore[arg-type]
        (d,) = torch.autograd.grad(loss, p)
        assert d.isfinite().all() and d[p > 0].all() and not d[p == 0].any()
        loss = linear_distillation(h, w, TeacherTopK(ids, logprobs, tail), kind=kind)  # type: ignore[arg-type]
        (d,) = torch.autograd.grad(loss, logprobs)
        assert d.isfinite().all() and not d[ids == -100].any()


@pytest.mark.parametrize("tail", ["drop", "bucket"])
@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_probabilities_of_the_top_may_add_up_to_a_little_more_than_1(path: str, kind: Any, tail: Any) -> None:
    """Rounded log-probabilities do, and the bucket of all others would have less than none."""
    h, w, ids = torch.randn(2, D, requires_grad=True), torch.randn(9, D), torch.tensor([[3, 5], [4, 0]])
    found = []
    for more in (0.0, 1e-6):
        logprobs = torch.tensor([[0.6, 0.4 + more], [0.5, 0.5 + more]]).log()
        loss = linear_distillation(h, w, TeacherTopK(ids, logprobs, tail), kind=kind)
        found.append((loss.detach(), *torch.autograd.grad(loss, h)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("more", [0.0, 1e-6, -1e-6])
def test_the_top_may_be_all_classes(path: str, kind: Any, more: float) -> None:
    """The bucket of all others is empty then, also where the probabilities add up to a little less than 1."""
    leaves = [torch.randn(2, D), torch.randn(4, D), torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25] * 4]).log() + more]
    ids, found = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]]), []
    for function, dtype in ((linear_distillation, F32), (reference.linear_distillation, F64)):
        h, w, said = (t.to(dtype).requires_grad_() for t in leaves)
        p = torch.zeros(2, 4, dtype=dtype).scatter(1, ids, said.exp())
        teacher = TeacherTopK(ids, said, "bucket") if dtype == F32 else TeacherProbabilities(p)
        loss = function(h, w, teacher, kind=kind)
        found.append([t.float() for t in (loss.detach(), *torch.autograd.grad(loss, (h, w, said)))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_second_backward_and_a_change_of_the_teacher() -> None:
    h, w = torch.randn(7, D, requires_grad=True), torch.randn(300, D, requires_grad=True)
    teacher = TeacherStates(torch.randn(7, TEACHER_D), torch.randn(300, TEACHER_D))
    loss = linear_distillation(h, w, teacher)
    first, again = (torch.autograd.grad(loss, [h, w], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, again)
    teacher.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_autocast_casts_both_sides_once() -> None:
    h, w = torch.randn(7, D, requires_grad=True), torch.randn(300, D, requires_grad=True)
    teacher = TeacherStates(torch.randn(7, TEACHER_D), torch.randn(300, TEACHER_D))
    low = TeacherStates(teacher.hidden.bfloat16(), teacher.weight.bfloat16())
    want = linear_distillation(h.bfloat16(), w.bfloat16(), low)
    with torch.autocast("cpu", BF16):
        got = linear_distillation(h, w, teacher)
    assert got.dtype == F32 and torch.equal(got, want)
    assert [g.dtype for g in torch.autograd.grad(got, [h, w])] == [F32, F32]


def test_meta_tensors() -> None:
    h, w = (torch.empty(n, D, device="meta", requires_grad=True) for n in (7, 300))
    teacher = TeacherStates(*(torch.empty(n, TEACHER_D, device="meta") for n in (7, 300)))
    for reduction, shape in (("mean", ()), ("none", (7,))):
        loss = linear_distillation(h, w, teacher, reduction=reduction)  # type: ignore[arg-type]
        assert loss.is_meta and loss.shape == shape
        assert [g.shape for g in torch.autograd.grad(loss.sum(), [h, w])] == [h.shape, w.shape]


def test_compiled_the_graph_breaks() -> None:
    h, w = torch.randn(7, D, requires_grad=True), torch.randn(300, D, requires_grad=True)
    teacher = TeacherStates(torch.randn(7, TEACHER_D), torch.randn(300, TEACHER_D))

    def step(h: Tensor, w: Tensor) -> Tensor:
        return linear_distillation(h * 2, w, teacher, kind="jsd") * 3

    ours, want = (torch.autograd.grad(f(h, w), [h, w]) for f in (torch.compile(step, backend="aot_eager"), step))
    torch.testing.assert_close(ours, want)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="aot_eager", fullgraph=True)(h, w)


ON_A_CPU: list[tuple[str, dict[str, Any]]] = [
    ("capped states", {"kind": "jsd", "temperature": 2.0, "hard_weight": 0.5, "softcap": 30.0}),
    ("states", {"kind": "reverse_kl", "slab_dtype": F32}),
    ("logits", {"kind": "forward_kl", "reduction": "none"}),
    ("probabilities", {"kind": "jsd", "reduction": "none", "temperature": 2.0}),
    ("top K", {"hard_weight": 0.5}),
    ("top K in a bucket", {"kind": "jsd", "temperature": 2.0, "hard_weight": 0.5, "softcap": 30.0}),
    ("top K in a bucket", {"kind": "reverse_kl", "reduction": "none"}),
]


@pytest.mark.parametrize(
    ("name", "options", "dtype", "learns"),
    [
        *((name, options, dtype, False) for name, options in ON_A_CPU for dtype in (F32, BF16)),
        *((name, options, BF16, True) for name, options in ON_A_CPU if len(options) == 2 or name == "probabilities"),
    ],
    ids=str,
)
def test_a_budget_is_kept_on_a_cpu(name: str, options: dict[str, Any], dtype: torch.dtype, learns: bool) -> None:
    N, V = 16, 4096
    hidden, weight = (torch.randn(n, 32).to(dtype).requires_grad_() for n in (N, V))
    teacher, targets = draw_teacher(name, (N,), V, 16, dtype), torch.randint(0, V, (N,))
    teacher = in_dtype(teacher, dtype, learns=learns)
    leaves = [hidden, weight, *(t for t in vars(teacher).values() if isinstance(t, Tensor) and t.requires_grad)]

    def held(budget: int) -> int:
        for t in leaves:
            t.grad = None
        with counting() as counts:
            loss = linear_distillation(hidden, weight, teacher, targets, memory_budget=budget, **options)
            loss.backward(torch.ones_like(loss))
        return counts.peak_bytes - sum(t.nbytes for t in leaves)

    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        held(1)
    found = re.search(r"at least (\d+) bytes", str(error.value))
    assert found is not None
    least = int(found[1])
    assert least < (1 << 19) + V * 32 * 4 * learns  # a float32 copy of the student's weight, for `slab_dtype`
    for budget in (least, 1 << 20) if learns else (least, 2 * least, 1 << 20, 4 << 20):
        assert held(budget) <= budget


class Nothing:
    """A kernel that is not run: memory is what launchers and torch take."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


def count(
    N: int, function: Callable[..., Tensor], D: int = 2048, V: int = 128256, *, learns: bool = False, **options: Any
) -> Counts:
    """Count a call at the size of a real model on a pretended GPU, without computing anything large."""
    hidden, weight = (reserve(n, D, dtype=BF16).requires_grad_() for n in (N, V))
    teacher = TeacherStates(*(reserve(n, 2 * D, dtype=BF16).requires_grad_(learns) for n in (N, V)))
    pair = {"distillation_kernel": Nothing(), "distillation_backward_kernel": Nothing()}
    kernels = mock.patch.multiple(llmfast_kernels.distillation, **pair)
    scale = mock.patch.object(llmfast_kernels.scale, "scale_kernel", Nothing())
    with kernels, scale, pretending_cuda(), counting(dry=True) as counts:
        loss = function(hidden, weight, teacher, **options)
        loss.backward(torch.ones_like(loss))
    counts.peak_bytes -= (hidden.nbytes + weight.nbytes) * (3 if learns else 1)
    return counts


@pytest.mark.parametrize(
    ("N", "slab_dtype", "reduction", "learns"),
    [
        *(
            (N, dtype, reduction, False)
            for N in (1024, 8192)
            for dtype in (None, F32)
            for reduction in ("mean", "none")
        ),
        *((8192, dtype, reduction, True) for dtype, reduction in ((None, "mean"), (F32, "none"))),
    ],
)
def test_a_budget_is_kept(N: int, slab_dtype: torch.dtype | None, reduction: str, learns: bool) -> None:
    options = {"slab_dtype": slab_dtype, "reduction": reduction, "learns": learns}
    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        count(N, linear_distillation, memory_budget=1, **options)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (least, 32 << 20, 200 << 20, 1 << 30, 3 << 30):
        if budget >= least and 8 * N * 128256 / budget < 400:  # launches to count
            assert count(N, linear_distillation, memory_budget=budget, **options).peak_bytes <= budget


def plain_kl(h: Tensor, w: Tensor, teacher: TeacherStates, kind: str = "forward_kl") -> Tensor:
    t = F.linear(teacher.hidden, teacher.weight)
    q, p = (x.float().log_softmax(-1) for x in (F.linear(h, w), t))
    del t
    if kind == "forward_kl":
        return F.kl_div(q, p, reduction="batchmean", log_target=True)
    m = torch.logsumexp(torch.stack([x - math.log(2) for x in (p, q)]), 0)
    return sum((F.kl_div(m, x, reduction="batchmean", log_target=True) for x in (p, q)), m.new_zeros(())) / 2


def test_the_table_in_the_documentation() -> None:
    page = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    both = [{"kind": "forward_kl"}, {"kind": "jsd"}]
    tight = [{"memory_budget": 16 << 20, **options} for options in both]
    calls: dict[str, tuple[Any, list[dict[str, Any]]]] = {
        "`F.kl_div` of `log_softmax` in float32, forward KL": (plain_kl, both[:1]),
        "the same with a mixture, JSD": (plain_kl, both[1:]),
        "`linear_distillation`, either": (linear_distillation, both),
        "`memory_budget=16 << 20`, either": (linear_distillation, tight),
        "the teacher learns: `F.kl_div`, forward KL": (plain_kl, both[:1]),
        "the teacher learns: `linear_distillation`, either": (linear_distillation, both),
        "the teacher learns: `memory_budget=16 << 20`, either": (linear_distillation, tight),
    }
    for name, (function, ways) in calls.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} |")]
        for options in ways:
            counts = count(8192, function, learns=name.startswith("the teacher learns"), **options)
            products = counts.total().dot_flops.total() / (2 * 8192 * 2048 * 128256)
            assert row.endswith(f"| {counts.peak_bytes / (1 << 30):.2f} | {products:.2f} |")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": torch.zeros(4, 9)}, TypeError, "teacher must be a TeacherStates, .*; got a tensor"),
        ({"teacher": TeacherLogits(torch.zeros(4, 8))}, ValueError, r"teacher\.logits must be \(4, 9\) on cpu"),
        ({"teacher": TeacherLogits(torch.zeros(4, 9).int())}, TypeError, r"teacher\.logits must be floating point"),
        ({"teacher": TeacherStates(torch.zeros(3, 5), torch.zeros(9, 5))}, ValueError, r"teacher\.hidden must be \(4"),
        ({"teacher": TeacherStates(torch.zeros(4, 5), torch.zeros(9, 6))}, ValueError, r"weight must be \(9, 5\)"),
        ({"teacher": TeacherStates(torch.zeros(4, 5), torch.zeros(9, 5).double())}, TypeError, "must share a dtype"),
        ({"teacher": TeacherTopK(torch.zeros(4, 2).long(), torch.zeros(4, 2))}, ValueError, "ids must differ within"),
        ({"teacher": TeacherTopK(torch.full((4, 1), 9), torch.zeros(4, 1))}, ValueError, r"ids must be in \[0, 9\)"),
        ({"teacher": TeacherTopK(torch.zeros(4, 1), torch.zeros(4, 1))}, TypeError, "ids must be int64 or int32"),
        ({"teacher": TeacherTopK(torch.zeros(4, 1).long(), torch.zeros(4, 2))}, ValueError, r"logprobs must be \(4, 1"),
        (
            {"teacher": TeacherTopK(torch.zeros(4, 1).long(), torch.zeros(4, 1)), "kind": "reverse_kl"},
            ValueError,
            r"teacher\.tail must be 'bucket' for reverse_kl",
        ),
        ({"teacher": TeacherTopK(torch.zeros(4, 1).long(), torch.zeros(4, 1), "x")}, ValueError, "tail must be 'drop'"),  # type: ignore[arg-type]
        ({"kind": "kl"}, ValueError, "kind must be 'forward_kl', 'reverse_kl' or 'jsd'; got 'kl'"),
        ({"beta": 0.5}, ValueError, "beta needs kind='jsd'; got kind='forward_kl'"),
        ({"kind": "jsd", "beta": 1.5}, ValueError, r"beta must be in \[0, 1\]; got 1.5"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number, or one for each token; got 0.0"),
        ({"temperature": torch.ones(3)}, ValueError, r"temperature must be \(4,\)"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0, 1.0])}, ValueError, "positive for each token; found"),
        ({"temperature": torch.ones(4, requires_grad=True)}, ValueError, "temperature gets no gradient here"),
        ({"hard_weight": 0.5}, ValueError, "hard_weight needs targets; got targets=None"),
        ({"targets": torch.zeros(4, 2).long()}, ValueError, r"targets must be \(4,\)"),
        ({"targets": torch.full((4,), 9)}, ValueError, r"targets must be in \[0, 9\).*found 9"),
        ({"token_weights": torch.zeros(3)}, ValueError, r"token_weights must be \(4,\)"),
        ({"label_smoothing": 0.1}, TypeError, "unexpected keyword argument 'label_smoothing'"),
    ],
)
def test_refuses(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"teacher": TeacherLogits(torch.zeros(4, 9)), **change}
    with pytest.raises(error, match=message):
        linear_distillation(torch.zeros(4, 5), torch.zeros(9, 5), **given)


def test_copies_of_arguments_count_towards_the_budget() -> None:
    """Count what is made of arguments whose layout or dtype the loss does not take as it is."""
    N, V, D, K = 6, 20, 4, 3
    ids, said = torch.arange(K).expand(N, K).contiguous(), torch.rand(N, K).log_softmax(-1) - 1

    def held(teacher: Any = None, *, hidden: Tensor | None = None, targets: Any = "none", **options: Any) -> int:
        own = torch.zeros(N, D) if hidden is None else hidden
        y = torch.zeros(N, dtype=torch.int64) if isinstance(targets, str) else targets
        said = TeacherLogits(torch.zeros(N, V)) if teacher is None else teacher
        loss = made_ready(own, torch.zeros(V, D), said, y, options).arguments[0]
        return int(loss.held)

    def turned(*shape: int) -> Tensor:
        return torch.zeros(*reversed(shape)).T

    assert held() == held(TeacherProbabilities(torch.ones(N, V))) == 0
    assert held(targets=None) == N * 8
    assert held(targets=torch.zeros(N, 2, dtype=torch.int64)[:, 0]) == N * 8
    assert held(token_weights=torch.ones(N, dtype=BF16)) == N * 4
    assert held(temperature=torch.ones(N)) == 0
    assert held(temperature=torch.ones(N, dtype=BF16)) == N * 4
    assert (
        held(
            hidden=torch.zeros(3, 2, D).transpose(0, 1),
            targets=torch.zeros(2, 3).long(),
            teacher=TeacherLogits(torch.zeros(2, 3, V)),
        )
        == N * D * 4
    )
    assert held(TeacherLogits(turned(N, V))) == held(TeacherProbabilities(turned(N, V))) == N * V * 4
    states = torch.zeros(N, D), torch.zeros(V, D)
    assert held(TeacherStates(*states, torch.zeros(V))) == 0
    assert held(TeacherStates(turned(N, D), states[1])) == N * D * 4
    assert held(TeacherStates(*states, torch.zeros(V, 2)[:, 0])) == V * 4
    assert held(TeacherTopK(ids, said)) == N * K * (8 + 4)
    batch = {"hidden": torch.zeros(2, 3, D), "targets": torch.zeros(2, 3).long()}
    for learns in (False, True):  # what it learns by is one more copy
        logits = torch.zeros(3, 2, V).requires_grad_(learns).transpose(0, 1)
        assert held(TeacherLogits(logits), **batch) == (1 + learns) * N * V * 4
