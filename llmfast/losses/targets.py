"""What both losses do with targets, reductions and counts."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast._checks import describe, expect

Reduction = Literal["mean", "sum", "none"]


def check_targets(targets: Tensor, shape: torch.Size, V: int, device: torch.device, ignore_index: int) -> None:
    """Raise ValueError or TypeError unless `targets` are class indices for rows of shape `shape`."""
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32 class indices; got {describe(targets)}")
    expect(targets.shape == shape, f"targets must have shape {tuple(shape)}; got {describe(targets)}")
    expect(targets.device == device, f"targets must be on {device}; got {describe(targets)}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere looking would be a host sync
        wrong = (targets != ignore_index) & ((targets < 0) | (targets >= V))
        if wrong.any():
            value = targets[wrong][0].item()
            raise ValueError(f"targets must be in [0, {V}) or ignore_index={ignore_index}; found {value}")


def check_reduction(reduction: str, num_valid: int | Tensor | None) -> None:
    expect(reduction in ("mean", "sum", "none"), f"reduction must be 'mean', 'sum' or 'none'; got {reduction!r}")
    expect(num_valid is None or reduction == "mean", f"num_valid divides a mean; reduction is {reduction!r}")
    if isinstance(num_valid, Tensor):
        expect(num_valid.numel() == 1, f"num_valid must hold one number; got {describe(num_valid)}")
    elif num_valid is not None:
        expect(num_valid >= 0, f"num_valid must not be negative; got {num_valid}")


def denominator(targets: Tensor, ignore_index: int, num_valid: int | Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a mean divides by, a 0-d tensor beside `targets`; counting stays on the device."""
    if num_valid is None:
        return (targets != ignore_index).sum().to(dtype)
    if isinstance(num_valid, Tensor):
        return num_valid.detach().to(targets.device, dtype, non_blocking=targets.device.type != "cpu").reshape(())
    return torch.full((), num_valid, dtype=dtype, device=targets.device)


def reciprocal(count: Tensor) -> Tensor:
    """1 / count for gradients, which are zero and not NaN when nothing counts."""
    return torch.where(count > 0, 1.0 / count, 0.0)


def reduced(loss: Tensor, reduction: Reduction, count: Tensor | None) -> Tensor:
    """The losses of all rows, (N,), as the caller asked for them."""
    if reduction == "none":
        return loss
    return loss.sum() if count is None else loss.sum() / count


def refuse_second_derivative() -> None:
    """Called in a backward: the gradients made there are no functions that autograd could differentiate again."""
    if torch.is_grad_enabled():  # only under create_graph=True
        raise RuntimeError("this loss cannot be differentiated twice; use torch.nn.functional.cross_entropy for that")


def torch_cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    ignore_index: int,
    reduction: Reduction,
    num_valid: int | Tensor | None,
) -> Tensor:
    """torch's own, for where there is nothing to win: few logits on a CPU, or a compiler that fuses by itself."""
    logits = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    y = targets.reshape(-1).long()
    if num_valid is None:
        loss = F.cross_entropy(logits, y, ignore_index=ignore_index, reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss
    total = F.cross_entropy(logits, y, ignore_index=ignore_index, reduction="sum")
    count = denominator(targets, ignore_index, num_valid, total.dtype)
    return torch.where(count > 0, total * reciprocal(count), total.detach() / count)
