"""Backward head by head, so that only one head's activations exist at a time (Gloeckle 2024, section 2)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llmfast._checks import expect


def sequential_backward(
    trunk_out: Tensor,  # (B, T, D)
    heads: Iterable[Callable[..., Tensor]],
    loss: Callable[[int, Tensor], Tensor],
    *args: Any,
) -> Tensor:
    """Run forward and backward of `sum_k loss(k, head_k(trunk_out, *args))` head by head, then backward of the trunk.

    The gradients are those of one graph. Peak memory is the trunk's activations and those of the largest head; one
    graph keeps those of all heads. That pays for large heads, or losses that keep their logits. `mtp_cross_entropy`
    never holds all logits of a head: with it, one graph is simpler and needs no more memory for logits.

    Args:
        trunk_out: What all heads read. It needs a graph only if the trunk is trained.
        heads: Modules or functions, e.g. `ParallelHeads(...).blocks`.
        loss: Called with the number and the output of a head. Returns a scalar with head weight and loss scale applied.
        args: Passed to every head.

    Returns:
        The losses of the heads, (K,), detached.
    """
    inputs = trunk_out.detach().requires_grad_(trunk_out.requires_grad)
    losses: list[Tensor] = []
    for k, head in enumerate(heads):
        value = loss(k, head(inputs, *args))
        expect(value.dim() == 0, f"loss must return a scalar; got {tuple(value.shape)} for head {k}")
        value.backward()
        losses.append(value.detach())
    expect(bool(losses), "heads must hold at least one")
    if inputs.grad is not None:
        trunk_out.backward(inputs.grad)
    return torch.stack(losses)
