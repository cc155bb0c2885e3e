"""A step in a CUDA graph: what was captured is played again, and steps outside the graph do not disturb it."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.pretend_cuda import pretending_cuda
from llmfast.optim import FusedAdamW, FusedOptimizer, FusedSGD
from llmfast_kernels import optimizer


class Graph(TorchDispatchMode):
    """Recorder of copies between tensors and of launches, which run immediately and can be replayed."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "copy_":
            self.work.append(lambda: args[0].copy_(args[1]))
        elif name in ("stack", "sum", "cat", "abs", "lt", "logical_not", "sqrt", "mul", "_to_copy"):
            self.work.append(lambda: made.copy_(func(*args, **(kwargs or {}))))
        elif not name.startswith("_record_function"):
            assert name in (
                "empty",
                "empty_like",
                "slice",
                "select",
                "view",
                "detach",
                "alias",
                "reshape",
                *("eq", "ne", "bitwise_not", "add", "reciprocal", "clamp"),  # of a factor that is not used
            ), name
        return made

    def replay(self) -> None:
        for again in self.work:
            again()


@contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Graph]:
    graph = Graph()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(torch.Tensor, "item", None)
        for name in ("prepare", "update", "sum_of_squares"):
            launch = getattr(optimizer, name)

            def recorded(*args: Any, launch: Any = launch, **kwargs: Any) -> None:
                graph.work.append(lambda: launch(*args, **kwargs))
                launch(*args, **kwargs)

            patch.setattr(optimizer, name, recorded)
        with graph:
            yield graph


def make(**options: Any) -> tuple[FusedOptimizer, list[Tensor]]:
    params = [torch.linspace(-1, 1, 300).requires_grad_(), torch.ones(5, 7, requires_grad=True)]
    for p in params:
        p.grad = torch.zeros_like(p)
    return FusedAdamW(params, **options), params


def in_groups(**options: Any) -> tuple[FusedOptimizer, list[Tensor]]:
    """Put tensors in groups with separate options."""
    _, params = make()
    groups = [{"params": params[:1], "max_grad_norm": 0.1, "state_dtype": "8bit"}, {"params": params[1:]}]
    return FusedAdamW(groups, **options), params


def fill(grads: list[Tensor | None], value: float) -> None:
    for g in grads:
        assert g is not None
        g.copy_(torch.cos(value * torch.arange(g.numel())).view(g.shape))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make, {}),
        (make, {"max_grad_norm": 0.1}),
        (make, {"lr": 0.01, "ema_decay": 0.9}),
        (in_groups, {"max_grad_norm": 0.5}),
        (in_groups, {}),
    ],
)
def test_replays_step_as_steps_do(
    monkeypatch: pytest.MonkeyPatch, make: Callable[..., Any], options: dict[str, Any]
) -> None:
    with pretending_cuda():
        a, ours = make(**options)
        b, theirs = make(**options)
        for step in range(6):
            fill([p.grad for p in theirs], step)
            b.step()
        static = [p.grad for p in ours]
        fill(static, 0)
        a.step()
        fill(static, 1)
        with capturing(monkeypatch) as graph:
            a.step()
        fill(static, 2)
        graph.replay()
        norm = None if a.grad_norm is None else a.grad_norm.clone()
        # A step outside, with other gradients, which then are gone.
        for p in ours:
            p.grad = torch.empty_like(p)
        fill([p.grad for p in ours], 3)
        a.step()
        for p in ours:
            p.grad = None
        for step in (4, 5):
            fill(static, step)
            graph.replay()
        for p, q in zip(ours, theirs):
            assert torch.equal(p, q)
            assert all(torch.equal(t, b.state[q][name]) for name, t in a.state[p].items())
        if norm is not None:
            assert norm.isfinite() and norm != a.grad_norm  # each replay measures


def test_a_learning_rate_on_the_device_is_read_at_every_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending_cuda():
        p = torch.ones(4, requires_grad=True)
        p.grad = torch.ones(4)
        lr = torch.tensor(0.5)
        optimizer = FusedSGD([p], lr=lr)
        optimizer.step()
        with capturing(monkeypatch) as graph:
            optimizer.step()
        lr.fill_(0.25)
        graph.replay()
        torch.testing.assert_close(p.detach(), torch.full((4,), 1 - 0.5 - 0.5 - 0.25))


def test_what_a_graph_copies_at_every_replay_stays_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[weakref.ref[Tensor]] = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default and args[0].dtype == torch.int64:
                copied.extend(map(weakref.ref, args[:2]))
            return func(*args, **(kwargs or {}))

    with pretending_cuda():
        a, params = make()
        a.step()
        with monkeypatch.context() as patch, Copies():
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            a.step()
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)  # elsewhere, so that addresses are copied again
            a.step()
    assert len(copied) == 2 and all(t() is not None for t in copied)


def test_the_first_step_cannot_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending_cuda():
        a, params = make()
        before = params[0].detach().clone()
        with pytest.raises(RuntimeError, match="take one step before"), capturing(monkeypatch):
            a.step()
        assert torch.equal(params[0], before)


def test_two_captures_need_a_step_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending_cuda():
        a, _ = make()
        a.step()
        with capturing(monkeypatch):
            a.step()
        with pytest.raises(RuntimeError, match="one step between"), capturing(monkeypatch):
            a.step()
        a.step()
        with capturing(monkeypatch):
            a.step()
