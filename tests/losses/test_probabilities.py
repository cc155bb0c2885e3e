"""Probabilities of all classes as targets: both losses and paths against the definition in float64, and torch."""

import re
from collections.abc import Callable
from functools import partial
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
from llmfast.losses import CrossEntropyLoss, LinearCrossEntropyLoss, cross_entropy, linear_cross_entropy, reference
from llmfast.losses.rows import row_ops
from llmfast_kernels.terms import Targets, Terms
from support.launched import unrecorded
from support.layouts import offset, sliced, strided, transposed
from support.numerics import assert_close_in_norm
from support.pairs import Case, covering
from support.plans import SIZES, forced

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
D = 6
FACTORS: dict[str, list[Any]] = {
    "linear": [True, False],
    "dtype": [F32, BF16, F16, F64],
    "targets_dtype": [None, F32, BF16, F64],
    "tokens": [(7,), (), (0,), (1,), (2, 3)],
    "V": [13, 1, 256, 1027],
    "kind": ["softmax", "any", "one-hot", "zero"],
    "layout": [lambda t: t, offset, strided, transposed, sliced],
    "label_smoothing": [0.0, 0.2, 1.0],
    "class_weights": [False, True],
    "token_weights": [False, True],
    "z_loss": [0.0, 0.03],
    "logits": [{}, {"softcap": 0.7}, {"logit_scale": -1.7}, {"softcap": 5.0, "logit_scale": 1.7}],
    "reduction": ["mean", "sum", "none"],
    "num_valid": [None, 7],
    "bias": [False, True],
    "inplace": [False, True],
    "slab_dtype": [None, F32],
    "size": [None, *SIZES],
}


def allowed(case: Case) -> bool:
    linear, f64 = case.get("linear"), case.get("dtype") == F64
    return (
        not (case.get("num_valid") and case.get("reduction", "mean") != "mean")
        and not (linear is False and (case.get("bias") or case.get("slab_dtype") or case.get("size")))
        and not (linear is True and case.get("inplace"))
        and not (f64 and case.get("slab_dtype"))
    )


CASES = covering(FACTORS, allowed)


def draw_targets(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "one-hot":
        return F.one_hot(torch.randint(0, shape[-1], shape[:-1]), shape[-1]).float()
    return torch.randn(shape).softmax(-1) if kind == "softmax" else torch.randn(shape)


def outcome(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype).expand_as(loss))]


@pytest.mark.parametrize("case", range(len(CASES)))
@unrecorded()
def test_any_two_options_match_float64(path: str, case: int) -> None:
    c = CASES[case]
    torch.manual_seed(case)
    tokens, V, dtype = c["tokens"], c["V"], c["dtype"]
    targets = draw_targets(c["kind"], (*tokens, V)).to(c["targets_dtype"] or dtype)
    options = {"label_smoothing": c["label_smoothing"], "z_loss": c["z_loss"], "reduction": c["reduction"]}
    options |= c["logits"] | {"num_valid": c["num_valid"]}
    options["class_weights"] = torch.rand(V) if c["class_weights"] else None
    options["token_weights"] = torch.rand(tokens) if c["token_weights"] else None
    upstream = torch.randn(tokens if c["reduction"] == "none" else ())
    leaves = [torch.randn(*tokens, D), torch.randn(V, D)] if c["linear"] else [torch.randn(*tokens, V) * 3]
    leaves = [t.to(dtype) for t in [*leaves, *([torch.randn(V)] if c["bias"] else [])]]
    ours, plain = (linear_cross_entropy, cross_entropy), (reference.linear_cross_entropy, reference.cross_entropy)

    def run(functions: tuple[Any, Any], dtype: torch.dtype, targets: Tensor, **more: Any) -> list[Tensor]:
        def loss(*leaves: Tensor) -> Tensor:
            if not c["linear"]:
                x = leaves[0] if not more.get("inplace") else leaves[0] * 1.0
                found: Tensor = functions[1](x, targets, **options, **more)
                return found
            h, w, *b = leaves
            found = functions[0](h, w, targets, bias=b[0] if b else None, **options, **more)
            return found

        return outcome(loss, [t.detach().to(dtype).requires_grad_() for t in leaves], upstream)

    more = {"slab_dtype": c["slab_dtype"]} if c["linear"] else {"inplace": c["inplace"]}
    given = c["layout"](targets) if targets.numel() else targets
    if c["size"]:
        with forced(None, c["size"]):
            found = run(ours, dtype, given, **more)
    else:
        found = run(ours, dtype, given, **more)
    theirs, truth = run(plain, dtype, targets), run(plain, F64, targets)
    for a, b, t in zip(found, theirs, truth, strict=True):
        assert a.shape == t.shape
        if t.isnan().any():
            assert 0 in tokens and a.isnan().all()
            continue
        error, limit = (a - t).double().norm(), (b - t).double().norm()
        slack = (32 if dtype == F64 else 8) * torch.finfo(dtype).eps * (t.norm() + 1)
        assert error <= 1.5 * limit + slack, f"error {error:.3g}, torch's {limit:.3g}, slack {slack:.3g}"


@pytest.mark.parametrize(("mode", "rows"), [("chunk", 2), ("recompute", 3)])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "class_weights": True, "z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_a_real_vocabulary(path: str, mode: str, rows: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Take several whole tiles and a tail; these launches are compiled too."""
    V = 50257
    hidden, weight, targets = torch.randn(3, D).to(dtype), torch.randn(V, D).to(dtype), torch.randn(3, V).softmax(-1)
    more = options | {"reduction": "none" if mode == "recompute" else "mean"}
    more |= {"class_weights": torch.rand(V)} if "class_weights" in options else {}
    upstream = torch.randn(3 if mode == "recompute" else ())

    def run(function: Any, dtype: torch.dtype, targets: Tensor) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        return outcome(lambda h, w: function(h, w, targets, **more), leaves, upstream)

    with forced(mode, rows=rows):
        ours = run(linear_cross_entropy, dtype, targets.to(dtype))
    theirs, truth = (run(reference.linear_cross_entropy, t, targets.to(dtype).to(t)) for t in (dtype, F64))
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_close_in_norm(a, b, c, factor=2.5)


def test_logits_of_a_real_vocabulary(path: str) -> None:
    """Take the gradient in both launches, with all terms and with none; these launches are compiled too."""
    V = 9001
    for reduction, options in (("mean", {}), ("none", {"softcap": 5.0, "class_weights": torch.rand(V)})):
        x, t = (torch.randn(2, V) * 3).requires_grad_(), torch.randn(2, V).softmax(-1)
        upstream = torch.ones(2 if reduction == "none" else ())
        ours, want = (
            outcome(partial(f, targets=t, reduction=reduction, **options), [x], upstream)
            for f in (cross_entropy, reference.cross_entropy)
        )
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-6)


def test_one_hot_probabilities_are_class_indices(path: str) -> None:
    x, y = torch.randn(9, 300, requires_grad=True), torch.randint(0, 300, (9,))
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1, "softcap": 3.0}):
        ours, want = (
            outcome(partial(cross_entropy, targets=t, **options), [x], torch.ones(()))
            for t in (F.one_hot(y, 300).float(), y)
        )
        torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-7)


def test_large_logits_keep_small_losses(path: str) -> None:
    """The logsumexp and a logit of 1e4 would each be rounded to 1e-3."""
    x = torch.tensor([[1e4, 1e4 - 4.0, -1e4]], requires_grad=True)
    t = torch.tensor([[1.0, 0.0, 0.0]])
    want = reference.cross_entropy(x.double(), t.double())
    assert isinstance(want, Tensor)
    torch.testing.assert_close(cross_entropy(x, t), want.float(), rtol=1e-5, atol=0.0)


def test_impossible_classes(path: str) -> None:
    """A logit of -inf costs nothing where its probability is 0, where torch has NaN; elsewhere the loss is infinite."""
    x = torch.randn(2, 40)
    x[:, 5:] = -torch.inf
    x.requires_grad_()
    t = torch.zeros(2, 40)
    t[:, :5] = torch.randn(2, 5).softmax(-1)
    ours, want = (
        outcome(lambda x, f=f: f(x, t), [x], torch.ones(())) for f in (cross_entropy, reference.cross_entropy)
    )
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)
    t[:, 7] = 0.1
    assert cross_entropy(x, t).isinf()


def test_statistics_of_the_mean_are_torchs(path: str) -> None:
    """The mean divides by tokens whatever class weights are, or by the sum of token weights."""
    x, t, c, w = torch.randn(5, 30), torch.rand(5, 30), torch.rand(30), torch.rand(5)
    torch.testing.assert_close(cross_entropy(x, t, class_weights=c), F.cross_entropy(x, t, weight=c))
    each = F.cross_entropy(x, t, reduction="none")
    torch.testing.assert_close(cross_entropy(x, t, token_weights=w), (each * w).sum() / w.sum())


def test_a_second_backward_and_a_change_of_the_targets(path: str) -> None:
    h, w = torch.randn(7, D, requires_grad=True), torch.randn(300, D, requires_grad=True)
    t = torch.randn(7, 300).softmax(-1)
    loss = linear_cross_entropy(h, w, t)
    first, again = (torch.autograd.grad(loss, [h, w], retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, again)
    t.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@unrecorded()
def test_whole_graphs(path: str) -> None:
    h, w, t = torch.randn(7, D, requires_grad=True), torch.randn(40, D, requires_grad=True), torch.rand(7, 40)
    x, options = torch.randn(7, 40, requires_grad=True), {"label_smoothing": 0.1, "z_loss": 0.01}
    losses: list[tuple[Callable[..., Tensor], list[Tensor], tuple[int, ...]]] = [
        (lambda x: cross_entropy(x * 1.0, t, **options), [x], ()),  # type: ignore[arg-type]
        (lambda h, w: linear_cross_entropy(h * 1.0, w, t), [h, w], ()),
        (lambda h, w: linear_cross_entropy(h * 1.0, w, t, reduction="none", **options), [h, w], (7,)),  # type: ignore[arg-type]
    ]
    for loss, leaves, shape in losses:
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        upstream = torch.ones(shape)
        torch.testing.assert_close(outcome(compiled, leaves, upstream), outcome(loss, leaves, upstream))


def test_meta_tensors() -> None:
    h, w = (torch.empty(n, D, device="meta", requires_grad=True) for n in (7, 300))
    t = torch.empty(7, 300, device="meta")
    for reduction, shape in (("mean", ()), ("none", (7,))):
        loss = linear_cross_entropy(h, w, t, reduction=reduction)  # type: ignore[arg-type]
        assert loss.is_meta and loss.shape == shape
        assert [g.shape for g in torch.autograd.grad(loss.sum(), [h, w])] == [h.shape, w.shape]


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "softcap": 30.0, "label_smoothing": 0.1, "class_weights": True}], ids=str
)
def test_a_budget_is_kept_on_a_cpu(dtype: torch.dtype, options: dict[str, Any]) -> None:
    N, V = 64, 4096
    h, w = (torch.randn(n, 32).to(dtype).requires_grad_() for n in (N, V))
    targets = torch.randn(N, V).softmax(-1)
    more = options | ({"class_weights": torch.rand(V)} if options else {})

    def held(budget: int) -> int:
        h.grad = w.grad = None
        with counting() as counts:
            loss = linear_cross_entropy(h, w, targets, memory_budget=budget, **more)
            loss.backward(torch.ones_like(loss))
        return counts.peak_bytes - h.nbytes - w.nbytes

    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        held(1)
    found = re.search(r"at least (\d+) bytes", str(error.value))
    assert found is not None
    least = int(found[1])
    assert least < 1 << 19
    for budget in (least, 2 * least, 1 << 20, 4 << 20):
        assert held(budget) <= budget


class Nothing:
    """A kernel that is not run: memory is what launchers and torch take."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


def count(N: int, D: int = 2048, V: int = 128256, **options: Any) -> Counts:
    """Count a call at the size of a real model on a pretended GPU, without computing anything large."""
    h, w = (reserve(n, D, dtype=BF16).requires_grad_() for n in (N, V))
    targets = reserve(N, V, dtype=BF16)
    pair = {"distillation_kernel": Nothing(), "distillation_backward_kernel": Nothing()}
    kernels = mock.patch.multiple(llmfast_kernels.distillation, **pair)
    scale = mock.patch.object(llmfast_kernels.scale, "scale_kernel", Nothing())
    with kernels, scale, pretending_cuda(), counting(dry=True) as counts:
        loss = linear_cross_entropy(h, w, targets, **options)
        loss.backward(torch.ones_like(loss))
    counts.peak_bytes -= h.nbytes + w.nbytes
    return counts


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"slab_dtype": F32}], ids=str)
def test_a_budget_is_kept(options: dict[str, Any]) -> None:
    N = 1024
    with pytest.raises(ValueError, match="memory_budget must be at least") as error:
        count(N, memory_budget=1, **options)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for budget in (least, 32 << 20, 200 << 20, 1 << 30):
        if budget >= least and 8 * N * 128256 / budget < 400:  # launches to count
            assert count(N, memory_budget=budget, **options).peak_bytes <= budget


def test_the_columns_of_a_rank(path: str) -> None:
    """Columns whose logits are all -inf take no part. `test_parallel.py` adds up those of all ranks."""
    x, p = torch.randn(2, 300), torch.rand(2, 600).softmax(-1)
    x[1], p[1, 300:] = -torch.inf, 0
    targets = Targets(torch.zeros(2, 1).long(), token_weights=torch.full((2,), 3.0), probabilities=p)
    found = row_ops(x, dense=True).cross_entropy_partials(x, targets, Terms(600, v_start=300, z_loss=0.5), V=300)
    below = (x[0] - x[0].max()).double()
    torch.testing.assert_close(found.pull.double(), torch.stack([(p[0, 300:] * below).sum(), below[0] * 0]))
    torch.testing.assert_close(found.total.double(), torch.stack([below.exp().sum(), below[0] * 0]))
    torch.testing.assert_close(found.mass, p[:, 300:].sum(1))
    assert found.peak.isfinite().all()


P = torch.full((4, 9), 1 / 9)


@pytest.mark.parametrize(
    ("targets", "options", "error", "message"),
    [
        (P[:, :8], {}, TypeError, r"targets must be int64 or int32 class indices, or .* probabilities \(4, 9\); got"),
        (P.to("meta"), {}, ValueError, "targets must be on cpu"),
        (P.clone().requires_grad_(), {}, ValueError, r"targets get no gradient here; detach them, or use torch\.nn"),
        (
            P,
            {"ignore_index": 3},
            ValueError,
            "ignore_index must be negative, .* where targets are probabilities; got 3",
        ),
        (P, {"shift": 1}, ValueError, "shift needs class indices as targets; got probabilities"),
        (P, {"target_weights": torch.ones(9)}, ValueError, "target_weights needs class indices as targets"),
        (P, {"return_stats": True}, ValueError, "return_stats needs class indices as targets"),
        (P, {"grad_filter": 1e-4}, ValueError, "grad_filter needs class indices as targets"),
    ],
)
def test_refuses(targets: Tensor, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        linear_cross_entropy(torch.zeros(4, 5), torch.zeros(9, 5), targets, **options)
    if "grad_filter" not in options:
        with pytest.raises(error, match=message):
            cross_entropy(torch.zeros(4, 9), targets, **options)


def test_modules_refuse_integers_in_the_shape_of_logits() -> None:
    for module, width in ((CrossEntropyLoss(), 9), (LinearCrossEntropyLoss(5, 9), 5)):
        with pytest.raises(TypeError, match="target must be floating point probabilities where it has the shape"):
            module(torch.zeros(4, width), P.long())
