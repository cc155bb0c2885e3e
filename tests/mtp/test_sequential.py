"""Backward head by head: the gradients of one graph, the memory of one head."""

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.mtp import ParallelHeads, sequential_backward


def models() -> tuple[nn.Module, ParallelHeads, Tensor]:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh()).double()
    heads = ParallelHeads(lambda: nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5)), 3).double()
    return trunk, heads, torch.randn(2, 7, 4, dtype=torch.float64)


def loss(k: int, logits: Tensor) -> Tensor:
    targets = torch.arange(14).view(2, 7).roll(-k, 1) % 5
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / (k + 1)


class Kept:
    """A tensor that autograd keeps for backward."""

    alive: "weakref.WeakSet[Kept]"

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        Kept.alive.add(self)


def test_gradients_are_those_of_one_graph() -> None:
    trunk, heads, x = models()
    again = copy.deepcopy(nn.ModuleList([trunk, heads]))
    losses = sequential_backward(trunk(x), heads.blocks, loss)
    want = [loss(k, head) for k, head in enumerate(again[1](again[0](x)))]
    torch.stack(want).sum().backward()
    torch.testing.assert_close(losses, torch.stack(want).detach(), rtol=0, atol=0)
    assert not losses.requires_grad  # else it would keep the heads' graphs
    for p, q in zip([*trunk.parameters(), *heads.parameters()], again.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-15)


def test_one_head_is_alive_at_a_time() -> None:
    trunk, heads, x = models()
    Kept.alive = weakref.WeakSet()
    peaks = []

    def count(k: int, logits: Tensor) -> Tensor:
        value = loss(k, logits)
        peaks.append(len(Kept.alive))
        return value

    hooks: Any = torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor)
    with hooks:
        sequential_backward(trunk(x), heads.blocks, count)
    assert peaks[0] == peaks[1] == peaks[2]
    with hooks:
        total = sum(count(k, head) for k, head in enumerate(heads(trunk(x))))
    assert peaks[-1] > 2 * peaks[0]  # what it would be
    del total


def test_a_frozen_trunk() -> None:
    trunk, heads, x = models()
    trunk.requires_grad_(False)
    sequential_backward(trunk(x), heads.blocks, loss)
    assert all(p.grad is None for p in trunk.parameters())
    assert all(p.grad is not None for p in heads.parameters())


def test_refuses() -> None:
    trunk, heads, x = models()
    with pytest.raises(ValueError, match=r"loss must return a scalar; got \(2, 7, 5\) for head 0"):
        sequential_backward(trunk(x), heads.blocks, lambda k, out: out)
    with pytest.raises(ValueError, match="heads must hold at least one"):
        sequential_backward(trunk(x), [], loss)


def test_every_head_receives_the_further_arguments_and_its_number() -> None:
    trunk, _, x = models()
    seen: list[Any] = []

    def head(k: int) -> Any:
        def run(hidden: Tensor, scale: float, name: str) -> Tensor:
            assert hidden.is_leaf and hidden.requires_grad
            seen.append((k, scale, name))
            return scale * hidden.sum() + k

        return run

    out = trunk(x)
    losses = sequential_backward(out, map(head, range(3)), lambda k, y: (k + 1) * y, 0.5, "text")
    assert seen == [(k, 0.5, "text") for k in range(3)]
    torch.testing.assert_close(losses, torch.stack([(k + 1) * (0.5 * out.sum() + k) for k in range(3)]).detach())
    wanted = torch.autograd.grad(3.0 * trunk(x).sum(), list(trunk.parameters()))
    for p, want in zip(trunk.parameters(), wanted):
        torch.testing.assert_close(p.grad, want)


def test_a_trunk_that_no_head_reads() -> None:
    trunk, _, x = models()
    bias = nn.Parameter(torch.ones(()))
    sequential_backward(trunk(x), [lambda hidden: bias], lambda k, out: out)
    assert bias.grad == 1 and all(p.grad is None for p in trunk.parameters())
