"""Cross-entropy from logits."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from llmfast._checks import describe, expect
from llmfast._dispatch import eager, use_kernels
from llmfast.losses.rows import row_ops
from llmfast.losses.targets import (
    Reduction,
    check_reduction,
    check_targets,
    denominator,
    reciprocal,
    reduced,
    refuse_second_derivative,
    torch_cross_entropy,
)


def cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_valid: int | Tensor | None = None,
    inplace: bool = False,
) -> Tensor:
    """Cross-entropy of `logits` against class indices `targets`.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64; any leading dimensions. `-inf` entries are legal.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`.
        ignore_index: target value of tokens that count in neither the sum nor the mean.
        reduction: "mean" over the tokens that are not ignored, "sum", or "none" for one loss per token.
        num_valid: what the mean divides by instead, as an int or a one-element tensor: the number of valid tokens
            of the whole step under gradient accumulation or data parallelism.
        inplace: write the gradient over `logits` in the forward pass: one read and one write of them in all, and no
            second buffer. Their values are gone afterwards, their version counter says so, and whatever shares their
            memory must be left alone until backward, which runs once.

    Returns:
        float32 (float64 for float64 logits): a scalar, or (...) for "none". With nothing to average the mean is NaN
        and the gradient zero, as in `torch.nn.functional.cross_entropy`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or (CPU tensors) a target is out of range. On a
            GPU looking at targets would stall the device: an out-of-range target makes that token's loss and
            gradient NaN, and with `TRITON_DEBUG=1` in the environment it is a device-side assert.
    """
    expect(logits.dim() >= 1 and logits.shape[-1] > 0, f"logits must be (..., V) with V > 0; got {describe(logits)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point; got {describe(logits)}")
    check_targets(targets, logits.shape[:-1], logits.shape[-1], logits.device, ignore_index)
    check_reduction(reduction, num_valid)
    if inplace:
        expect(logits.is_contiguous(), f"inplace=True needs contiguous logits; got strides {logits.stride()}")
        owner = logits if logits._base is None else logits._base
        expect(
            not (owner.requires_grad and owner.is_leaf and torch.is_grad_enabled()),
            "inplace=True would overwrite logits that are a leaf of the graph; pass the result of an operation",
        )
    if torch.compiler.is_compiling() and not inplace and not use_kernels(logits):
        return torch_cross_entropy(logits, targets, ignore_index, reduction, num_valid)
    return _fused(logits, targets, ignore_index, reduction, num_valid, inplace)


@eager
def _fused(logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
    loss: Tensor = _CrossEntropy.apply(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), *options, torch.is_grad_enabled()
    )
    return loss.view(targets.shape) if loss.dim() else loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (N, V)
        targets: Tensor,  # (N,)
        ignore_index: int,
        reduction: Reduction,
        num_valid: int | Tensor | None,
        inplace: bool,
        grad_enabled: bool,  # in here it never is
    ) -> Tensor:
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        targets = targets.contiguous()
        ops = row_ops(logits)
        ctx.ops, ctx.ignore_index, ctx.reduction = ops, ignore_index, reduction
        ctx.holds_gradient = False
        wants_gradient = grad_enabled and ctx.needs_input_grad[0]
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        count = denominator(targets, ignore_index, num_valid, accumulate) if reduction == "mean" else None
        inverse = None if count is None else reciprocal(count)

        if inplace and reduction != "none" and wants_gradient:
            # 1 / count goes into the gradient as it is written, so that an upstream gradient of 1 leaves nothing to
            # do; but float16 would underflow, and waits for the loss scale to come down from upstream.
            folds = logits.dtype != torch.float16
            loss, _ = ops.cross_entropy(
                logits, targets, ignore_index=ignore_index, d_logits=logits, grad_scale=inverse if folds else None
            )
            increment_version(logits)
            ctx.save_for_backward(logits, None if folds else inverse)  # who writes to them before backward is told so
            ctx.holds_gradient, ctx.consumed = True, False
        else:
            loss, lse = ops.cross_entropy(logits, targets, ignore_index=ignore_index)
            if wants_gradient:
                ctx.inplace = inplace
                ctx.save_for_backward(logits, targets, lse, inverse)
        return reduced(loss, reduction, count)

    @staticmethod
    def backward(ctx: Any, *d_losses: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (d_loss,) = d_losses
        if ctx.holds_gradient:
            if ctx.consumed:
                raise RuntimeError("cross_entropy(inplace=True): backward ran already and its gradient is used up")
            ctx.consumed = True
            gradient, factor = ctx.saved_tensors
            d_logits = ctx.ops.scale(gradient.detach(), d_loss if factor is None else d_loss * factor)
            return d_logits, None, None, None, None, None, None

        logits, targets, lse, inverse = ctx.saved_tensors
        per_row = d_loss if inverse is None else d_loss * inverse
        d_logits = logits.detach() if ctx.inplace else torch.empty_like(logits)
        ctx.ops.cross_entropy_backward(
            logits, targets, lse, per_row.to(lse.dtype).expand_as(lse).contiguous(),
            ignore_index=ctx.ignore_index, d_logits=d_logits,
        )  # fmt: skip
        if ctx.inplace:
            increment_version(logits)
        return d_logits, None, None, None, None, None, None
