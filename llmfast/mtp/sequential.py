"""Backward one head at a time, so that only one head's activations exist at a time (Gloeckle 2024, section 2)."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from llmfast._checks import expect
from llmfast._kinds import expect_tensors


def sequential_backward(
    trunk_out: Tensor,  # (B, T, D)
    heads: Iterable[Callable[..., Tensor]],
    loss: Callable[[int, Tensor], Tensor],
    *args: Any,
) -> Tensor:
    """Run forward and backward of `sum_k loss(k, head_k(trunk_out, *args))` head by head, then the trunk's backward.

    The gradients equal those of one graph. Peak memory is the trunk's activations and those of the largest head, while
    one graph keeps those of all heads. This helps with large heads, or with losses that keep their logits. With
    `mtp_cross_entropy` no head's logits exist at once, so one graph is simpler and equally small.

    Args:
        trunk_out: Input of all heads. It needs a graph only if the trunk is trained.
        heads: Modules or functions, e.g. `ParallelHeads(...).blocks`.
        loss: Maps a head's number and output to a scalar, including its weight and any loss scaling.
        args: Passed to every head.

    Returns:
        The losses of the heads, (K,), detached.
    """
    expect_tensors(trunk_out=trunk_out)
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
