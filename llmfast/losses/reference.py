"""What the losses mean, in as little torch as it takes. Slow, and right: the tests hold every path against these.

Same names and arguments as `llmfast.losses`, less those that only say how to compute. Arithmetic in at least float32;
float64 stays float64.
"""

import torch
from torch import Tensor

from llmfast.losses.targets import LossStats


def cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...) or (..., K)
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    class_weights: Tensor | None = None,  # (V,)
    token_weights: Tensor | None = None,  # (...)
    target_weights: Tensor | None = None,  # (K,) or (..., K)
    shift: int = 0,
    document_ids: Tensor | None = None,  # (...)
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    V, shape = x.shape[-1], x.shape[:-1]
    y = targets if targets.dim() > len(shape) else targets[..., None]
    if shift:
        y = _shifted(y, shift, document_ids, ignore_index)
    if logit_scale is not None:
        x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    c = torch.ones(V, dtype=x.dtype, device=x.device) if class_weights is None else class_weights.to(x.dtype)
    keep = y != ignore_index
    y = y.masked_fill(~keep, 0).long()
    w = keep.to(x.dtype) if target_weights is None else torch.where(keep, target_weights.to(x.dtype), 0.0)
    t = torch.ones(shape, dtype=x.dtype, device=x.device) if token_weights is None else token_weights.to(x.dtype)

    lse = x.logsumexp(-1)
    surprise = lse[..., None] - x
    losses = (1 - label_smoothing) * c[y] * surprise.gather(-1, y)
    if label_smoothing:
        losses = losses + label_smoothing / V * (c * surprise).sum(-1, keepdim=True)
    loss = torch.where(keep, w * losses, 0.0).sum(-1)
    if z_loss:
        loss = loss + z_loss * lse**2
    valid = keep.any(-1)
    loss = torch.where(valid, t * loss, 0.0)
    total = torch.where(keep, t[..., None] * w * c[y], 0.0).sum() if num_valid is None else num_valid
    result = {"none": loss, "sum": loss.sum(), "mean": loss.sum() / total}[reduction]
    if not return_stats:
        return result
    p = x.softmax(-1)
    entropy = lse - (p * torch.where(p > 0, x, 0.0)).sum(-1)
    argmax = torch.where(valid, x.argmax(-1), -1)
    hits = (keep & (y == argmax[..., None])).flatten(0, -2).sum(0).float() / keep.flatten(0, -2).sum(0)
    accuracy = hits if targets.dim() > len(shape) else hits[0]
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return result, LossStats(
        loss.detach(), torch.where(valid, lse, zero), torch.where(valid, entropy, zero), argmax, accuracy
    )


def linear_cross_entropy(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (...) or (..., K)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    reduction: str = "mean",
    num_valid: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    class_weights: Tensor | None = None,  # (V,)
    token_weights: Tensor | None = None,  # (...)
    target_weights: Tensor | None = None,  # (K,) or (..., K)
    shift: int = 0,
    document_ids: Tensor | None = None,  # (...)
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    logits = hidden @ weight.T
    return cross_entropy(
        logits if bias is None else logits + bias, targets, ignore_index=ignore_index, reduction=reduction,
        num_valid=num_valid, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale,
        class_weights=class_weights, token_weights=token_weights, target_weights=target_weights, shift=shift,
        document_ids=document_ids, return_stats=return_stats,
    )  # fmt: skip


def _shifted(targets: Tensor, shift: int, document_ids: Tensor | None, ignore_index: int) -> Tensor:
    """(..., T, K) targets `shift` tokens on, one token at a time."""
    moved = torch.full_like(targets, ignore_index)
    T = targets.shape[-2]
    for t in range(T - shift):
        target = targets[..., t + shift, :]
        if document_ids is not None:
            same = document_ids[..., t] == document_ids[..., t + shift]
            target = torch.where(same[..., None], target, ignore_index)
        moved[..., t, :] = target
    return moved
