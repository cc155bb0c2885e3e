"""Both losses inside torch.compile, and what no loss may do on a GPU: wait for it."""

import ast
import secrets
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import counting
from llmfast import losses
from llmfast.losses import cross_entropy, linear_cross_entropy, linear_logprobs, logprobs
from llmfast.losses.from_hidden import LinearCrossEntropy
from llmfast.losses.from_logits import CrossEntropy
from llmfast_kernels.terms import Targets, Terms
from support.launched import unrecorded

# Dynamo looks torch's functions up in a table that it makes once: before tests put others in their places.
torch._dynamo.trace_rules.get_torch_obj_rule_map()

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "stats": {"return_stats": True},
    "everything": {
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "softcap": 5.0,
        "logit_scale": 1.3,
        "shift": 1,
        "token_weights": torch.rand(16),
        "num_valid": 8,
        "class_weights": torch.rand(300),
    },
}


def tensors(N: int = 16, V: int = 300, D: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    targets = torch.randint(0, V, (N,))
    targets[1:8] = -100
    return torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), targets


def outcome(loss: Callable[..., Any], *leaves: Tensor) -> list[Tensor]:
    result = loss(*leaves)
    value, stats = result if isinstance(result, tuple) else (result, None)
    total = value.sum() if stats is None else value.sum() + stats.lse.sum() + 0.5 * stats.entropy.sum()
    return [value.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("chosen", [(0, 1), (0, 2), (1,)], ids=str)
@unrecorded()
def test_the_gradient_of_each_result_arrives_where_others_are_not_used(path: str, chosen: tuple[int, ...]) -> None:
    """Add results up within the graph, where those that are not used have no gradient at all."""
    hidden, weight, targets = tensors()
    logits = (hidden @ weight.T).detach().requires_grad_()

    def total(found: Any) -> Tensor:
        value, stats = found
        results = value, stats.lse.sum(), 0.5 * stats.entropy.sum()
        return torch.stack([results[i] for i in chosen]).sum()

    losses: tuple[tuple[Callable[..., Tensor], list[Tensor]], ...] = (
        (lambda x: total(cross_entropy(x * 1.0, targets, return_stats=True)), [logits]),
        (lambda h, w: total(linear_cross_entropy(h * 1.0, w, targets, return_stats=True)), [hidden, weight]),
    )
    for loss, leaves in losses:
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for a, b in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, loss))):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@unrecorded()
def test_whole_graphs(path: str, name: str) -> None:
    hidden, weight, targets = tensors()
    logits = (hidden @ weight.T).detach().requires_grad_()
    options = OPTIONS[name]

    def from_logits(x: Tensor) -> Any:
        return cross_entropy(x * 1.0, targets, **options)

    def linear(h: Tensor, w: Tensor) -> Any:
        return linear_cross_entropy(h * 1.0, w, targets, memory_budget=10000, **options)

    for loss, leaves in ((from_logits, [logits]), (linear, [hidden, weight])):
        torch._dynamo.reset()
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        for a, b in zip(outcome(compiled, *leaves), outcome(loss, *leaves)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_inductor(kernels: None) -> None:
    hidden, weight, targets = tensors()
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w: linear_cross_entropy(h, w, targets), fullgraph=True)
    for a, b in zip(
        outcome(compiled, hidden, weight), outcome(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [None, "auto", 10000])
def test_upstream_gradients_of_any_layout(path: str, budget: Any) -> None:
    """The graph's own sum sends back one number, expanded to all rows."""
    hidden, weight, targets = tensors()

    def total(h: Tensor, w: Tensor) -> Tensor:
        if budget is None:
            loss, stats = cross_entropy(h @ w.T, targets, reduction="none", return_stats=True)
        else:
            options: dict[str, Any] = {"reduction": "none", "return_stats": True, "memory_budget": budget}
            loss, stats = linear_cross_entropy(h, w, targets, **options)
        return loss.sum() + stats.lse.sum() + stats.entropy.sum()

    torch._dynamo.reset()
    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    for a, b in zip(outcome(compiled, hidden, weight), outcome(total, hidden, weight)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"num_valid": torch.zeros(())}, {"token_weights": torch.zeros(16)}])
def test_a_mean_divided_by_nothing_has_gradients_of_zero(path: str, options: dict[str, Any]) -> None:
    """Give rows losses but no number to divide their sum by, as outside of compile."""
    hidden, weight, targets = tensors()
    logits = (hidden @ weight.T).detach().requires_grad_()

    def from_logits(x: Tensor) -> Tensor:
        return cross_entropy(x, targets, **options)

    def linear(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, targets, **options)

    for loss, leaves in ((from_logits, [logits]), (linear, [hidden, weight])):
        torch._dynamo.reset()
        for way in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
            value, *gradients = outcome(way, *leaves)
            assert not value.isfinite()
            assert all(gradient.eq(0).all() for gradient in gradients)


@pytest.mark.parametrize("budget", ["auto", 10000])
def test_a_gradient_is_accumulated_as_it_is_outside(path: str, budget: Any) -> None:
    """The graph breaks at `accumulate_into`; results are the same."""
    hidden, weight, targets = tensors()
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        main, h = torch.ones_like(weight), hidden.detach().requires_grad_()

        def loss(h: Tensor, w: Tensor, main: Tensor) -> Tensor:
            return linear_cross_entropy(h * 1.0, w, targets, accumulate_into=main, memory_budget=budget)

        value = (torch.compile(loss, backend="aot_eager") if compiled else loss)(h, weight, main)
        value.backward()
        assert weight.grad is None
        found.append((value.detach(), h.grad, main.detach()))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_no_recompilation_when_the_number_of_tokens_changes() -> None:
    _, weight, _ = tensors()
    torch._dynamo.reset()
    graphs = 0

    def count(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    compiled = torch.compile(
        lambda h, w, y, x: linear_cross_entropy(h, w, y) + cross_entropy(x, y),
        backend=count,
        dynamic=True,
        fullgraph=True,
    )
    for N in (40, 41, 77, 1000):
        hidden, _, targets = tensors(N)
        compiled(hidden, weight, targets, torch.randn(N, 300))
    assert graphs == 1


@pytest.mark.parametrize(
    ("path", "reduction"), [("plain", "mean"), ("plain", "none"), ("kernels", "none")], indirect=["path"]
)
@unrecorded()
def test_operators_keep_their_promises(path: str, reduction: str) -> None:
    """Run torch's own checks: schema, fakes, autograd registration, and tracing with static and dynamic shapes."""
    from llmfast.losses.operators import OPERATORS

    hidden, weight, targets = tensors(12, 30)
    rows = Targets(targets[:, None].contiguous(), token_weights=torch.rand(12))
    given: dict[str, Any] = {"targets": rows, "terms": Terms(30, z_loss=0.1), "stats": True, "dtype": torch.float32}
    given |= {"reduction": reduction, "count": torch.tensor(9.0)}
    softmax = [torch.randn(12), torch.rand(12) + 1, torch.randn(12), torch.empty(0)]  # peak, total, entropy, taught
    upstream = [torch.randn(12 if reduction == "none" else ()), torch.randn(12), torch.randn(12)]
    dtypes = dict.fromkeys(("slab_dtype", "weight_dtype", "accumulate_dtype"), torch.float32)
    more: dict[str, Any] = {"budget": None, "held": 0, "grad_filter": None, **dtypes}
    calls = [
        (CrossEntropy(**given), [torch.randn(12, 30, requires_grad=True)], [True]),
        (
            LinearCrossEntropy(**given, **more),
            [hidden, weight, torch.randn(30, requires_grad=True)],
            [True, True, True],
        ),
        (LinearCrossEntropy(**given, **more), [hidden.detach(), weight, None], [False, True, False]),
    ]
    calls += [(replace(loss, logprobs=True, places=True), *rest) for loss, *rest in calls if reduction == "none"]
    dense = replace(rows, classes=torch.zeros(12, 1, dtype=torch.int64), probabilities=torch.rand(12, 30))
    calls += [(replace(loss, targets=dense, stats=False), *rest) for loss, *rest in calls[:2]]
    for loss, inputs, wants in calls:
        upstream[0] = upstream[0].reshape((12, 1) if loss.logprobs else (12,) if reduction == "none" else ())
        operators = OPERATORS[type(loss)]
        flat = [*operators.flatten(loss), wants]
        torch.library.opcheck(operators.forward, (*inputs, *flat))
        detached = [None if t is None else t.detach() for t in inputs]
        taught = softmax[3] if loss.targets.probabilities is None else torch.rand(12, 4)
        torch.library.opcheck(operators.backward, (*detached, *flat, *softmax[:3], taught, *upstream))


def test_operators_take_every_field_by_its_name() -> None:
    """A field that a loss or a record within it gets reaches the operators without being listed anywhere."""
    from llmfast.losses.operators import OPERATORS

    schema = str(torch.ops.llmfast.cross_entropy.default._schema)
    for field in (*fields(Targets), *fields(Terms)):
        assert field.name == "bias" or f"_{field.name}" in schema
    terms = Terms(30, 29, 0, None, torch.rand(30), torch.rand(2), 0.1, 0.2, 1.3, 5.0)
    loss = CrossEntropy(
        targets=Targets(torch.zeros(3, 1), torch.rand(3, 1), torch.rand(3)),
        terms=terms,
        reduction="sum",
        count=None,
        stats=True,
        dtype=torch.float16,
    )
    operators = OPERATORS[CrossEntropy]
    logits = torch.rand(3, 30)
    inputs, built, wants = operators._split([logits, *operators.flatten(loss), [True]])
    assert inputs == (logits,) and built == loss and wants == (True,)


def test_a_cached_graph_is_used_for_the_same_code_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile caches an operator's backward pass on disk; another revision of the code is compiled again."""
    from llmfast.losses import operators

    hidden, weight, targets = tensors()

    def found() -> list[Tensor]:
        torch._dynamo.reset()
        compiled = torch.compile(lambda h, w: linear_cross_entropy(h, w, targets), fullgraph=True)
        return outcome(compiled, hidden, weight)

    before = found()
    times = operators.times
    monkeypatch.setattr(operators, "times", lambda x, factor: 2 * times(x, factor))
    monkeypatch.setattr(operators, "REVISION", secrets.token_hex())
    _, d_hidden, _ = found()
    torch.testing.assert_close(d_hidden, 2 * before[1])


class NoSyncs(TorchDispatchMode):
    """A mode that rejects operators for which the host waits for a GPU, or whose shapes depend on data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique"), name
        if name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise AssertionError("a mask as an index has a shape made of data")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("budget", ["auto", 10000])
def test_nothing_waits_for_the_device(kernels: None, name: str, budget: Any) -> None:
    hidden, weight, targets = tensors()
    logits = torch.randn(16, 300, requires_grad=True)
    with pretending_cuda(), counting() as counts, NoSyncs():
        outcome(lambda x: cross_entropy(x, targets, **OPTIONS[name]), logits)
        outcome(lambda h, w: linear_cross_entropy(h, w, targets, memory_budget=budget, **OPTIONS[name]), hidden, weight)
        outcome(lambda x: logprobs(x, targets, return_stats="stats" in name, return_rank="stats" in name), logits)
        outcome(lambda h, w: linear_logprobs(h, w, targets[:, None], memory_budget=budget), hidden, weight)
        if "none" not in name:
            outcome(lambda h, w: linear_cross_entropy(h, w, targets, grad_filter=1e-3, **OPTIONS[name]), hidden, weight)
    assert counts.total().syncs == 0, "copies to the host, besides"


def test_nothing_is_used_that_an_older_dynamo_cannot_trace() -> None:
    """Read the sources, because tests run with one torch; what is listed failed with torch 2.8 to 2.12."""
    for file in Path(losses.__file__).parent.glob("*.py"):
        source = file.read_text(encoding="utf-8")
        assert "is_autocast_available" not in source and ".__contains__" not in source, file
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
        for outer, inner in ((a, b) for a in functions for b in ast.walk(a) if a is not b):
            if isinstance(inner, ast.FunctionDef):  # its annotations are evaluated while it is traced, unless quoted
                notes = [argument.annotation for argument in inner.args.args] + [inner.returns]
                unions = [n for note in notes if note for n in ast.walk(note) if isinstance(n, ast.BinOp)]
                assert not unions, f"{file.name}: {outer.name}.{inner.name} has an annotation with |, not quoted"


def test_a_wait_would_be_noticed() -> None:
    with NoSyncs():
        for wait in (
            lambda: torch.ones(1).item(),
            lambda: torch.ones(3).nonzero(),
            lambda: torch.ones(3)[torch.ones(3) > 0],
        ):
            with pytest.raises(AssertionError):
                wait()
