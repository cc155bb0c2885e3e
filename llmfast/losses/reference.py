"""What the losses mean, in as little torch as it takes. Slow, and right: the tests hold every path against these.

Same names and arguments as `llmfast.losses`, less those that only say how to compute. Arithmetic in at least float32;
float64 stays float64.
"""

import torch
from torch import Tensor


def cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: int | Tensor | None = None,
) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    keep = targets != ignore_index
    y = targets.masked_fill(~keep, 0).long()
    loss = logits.logsumexp(-1) - logits.gather(-1, y[..., None])[..., 0]
    loss = torch.where(keep, loss, 0.0)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / (keep.sum() if num_valid is None else num_valid)


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: int | Tensor | None = None,
) -> Tensor:
    return cross_entropy(
        hidden @ weight.T, targets, ignore_index=ignore_index, reduction=reduction, num_valid=num_valid
    )
