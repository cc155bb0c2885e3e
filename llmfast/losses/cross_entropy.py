"""Cross-entropy from logits."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from llmfast._checks import describe, expect
from llmfast._dispatch import eager, expect_data, has_no_data, use_kernels
from llmfast.losses.parallel import ProcessGroup, own_columns, parallel_rows
from llmfast.losses.rows import row_ops
from llmfast.losses.targets import (
    NO_STATS,
    SMALL,
    LossStats,
    Options,
    OptionsGiven,
    Reduction,
    RowStats,
    accuracy,
    denominator,
    per_row,
    reciprocal,
    reduced,
    refuse_second_derivative,
    restore,
)
from llmfast_kernels.terms import Softmax, Targets, Terms, Upstream, pack, unpack

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CrossEntropyOptions(OptionsGiven, total=False):
    """Keyword arguments, for type checkers."""

    inplace: bool


@overload
def cross_entropy(
    logits: Tensor, targets: Tensor, *, return_stats: Literal[False] = False, **options: "Unpack[CrossEntropyOptions]"
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor, targets: Tensor, *, return_stats: Literal[True], **options: "Unpack[CrossEntropyOptions]"
) -> tuple[Tensor, LossStats]: ...
def cross_entropy(
    logits: Tensor,  # (..., V)
    targets: Tensor,  # (...) or (..., K)
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
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
    process_group: "ProcessGroup | None" = None,
    vocab_size: int | None = None,
    inplace: bool = False,
) -> Tensor | tuple[Tensor, LossStats]:
    """Cross-entropy of `logits` against class indices `targets`.

    The loss of a token with logits z is, with x = softcap * tanh(logit_scale * z / softcap),

        token_weight * (sum_k target_weight_k * CE(x, target_k) + z_loss * logsumexp(x)^2)

    where CE has torch's class weights and label smoothing. The mean divides by the sum of all weights of what is not
    ignored (class x target x token), which is the number of valid targets where nothing is weighted.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64; any leading dimensions. `-inf` entries are legal.
        targets: (...), int64 or int32, in [0, V) or `ignore_index`; or (..., K), K targets for each token's logits.
        ignore_index: target value that counts in neither the sum nor the mean.
        reduction: "mean", "sum", or "none" for one loss per token.
        num_valid: what the mean divides by instead, as an int or a one-element tensor: the number of valid tokens
            of the whole step under gradient accumulation or data parallelism.
        label_smoothing: share of each target spread evenly over the classes, in [0, 1].
        z_loss: coefficient of logsumexp^2, which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5).
            Once per token that has a valid target, and not scaled by class or target weights. A mean divides it by
            the same number as all else, the sum of weights (Liger-Kernel divides it by the count of tokens).
        softcap: bounds logits to (-softcap, softcap) (Gemma 2, arXiv:2408.00118, section 2.1).
        logit_scale: factor on the logits, before softcap: 1 / temperature.
        class_weights: (V,), as `weight` of torch's.
        token_weights: (...), of each row's loss.
        target_weights: (K,) or (..., K), with K targets: sparse soft labels, or the weights of several heads.
        shift: the target of token t is `targets[..., t + shift]` of the same sequence (the last leading dimension);
            the last `shift` tokens are ignored. With shift=1, labels may be the input tokens themselves.
        document_ids: (...), integers; with `shift`, tokens whose target lies in another document are ignored.
        return_stats: also return `LossStats`: per-token loss, lse, entropy, argmax and accuracy.
        process_group: logits hold only this rank's classes, in rank order, split as by `torch.chunk` (vocab-parallel);
            everything else is the same on all ranks, and so is what comes back. Two all-reduces of a few numbers a
            token; `class_weights` are those of all classes.
        vocab_size: with `process_group`, the number of all classes, if it does not divide evenly.
        inplace: write the gradient over `logits` in the forward pass: one read and one write of them in all, and no
            second buffer. Their values are gone afterwards, their version counter says so, and whatever shares their
            memory must be left alone until backward, which runs once. Inside `torch.compile`, which plans memory
            itself, and for tensors without data it does nothing.

    Returns:
        A scalar, or (...) for "none", in float32 (float64 for float64 logits); with `return_stats` a pair of that and
        `LossStats`. With nothing to average the mean is NaN and the gradient zero, as in
        `torch.nn.functional.cross_entropy`. Gradients of ignored tokens are zero, also where the upstream gradient is
        infinite or NaN. Meta and fake tensors give meta and fake results.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit, or (CPU tensors) a target is out of range. On a
            GPU looking at targets would stall the device: an out-of-range target makes that token's loss and
            gradient NaN, and with `TRITON_DEBUG=1` in the environment it is a device-side assert.
    """
    expect(logits.dim() >= 1, f"logits must be (..., V) with V > 0; got {describe(logits)}")
    expect(logits.shape[-1] > 0 or process_group is not None, f"logits must have V > 0; got {describe(logits)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point; got {describe(logits)}")
    V, columns = logits.shape[-1], slice(0, logits.shape[-1])
    if process_group is not None:
        expect_data(logits, "process_group")
        V, columns = own_columns(process_group, V, vocab_size)
    elif vocab_size not in (None, V):
        raise ValueError(f"vocab_size={vocab_size} needs a process_group")
    options = Options(
        ignore_index, reduction, num_valid, label_smoothing, z_loss, softcap, logit_scale, class_weights, token_weights,
        target_weights, shift, document_ids,
    )  # fmt: skip
    shape = logits.shape[:-1]
    options.check(targets, shape, V, logits.device)
    if inplace:
        expect(logits.is_contiguous(), f"inplace=True needs contiguous logits; got strides {logits.stride()}")
        owner = logits if logits._base is None else logits._base
        expect(
            not (owner.requires_grad and owner.is_leaf and torch.is_grad_enabled()),
            "inplace=True would overwrite logits that are a leaf of the graph; pass the result of an operation",
        )

    if (
        not has_no_data(logits) and not use_kernels(logits) and logits.dtype == torch.float32
        and not (inplace or return_stats or process_group is not None)
        and logits.numel() <= SMALL["logits"] and options.are_torchs(targets, shape)
    ):  # fmt: skip
        return options.torch_cross_entropy(logits, targets)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    resolved = options.resolve(targets, shape, dtype)
    terms = options.terms(V, columns, dtype)
    flat = logits.reshape(shape.numel(), logits.shape[-1])
    if has_no_data(logits) and process_group is None:
        from llmfast.losses import operators

        loss, stats = operators.cross_entropy(flat, resolved, terms, reduction, num_valid, return_stats)
    else:
        loss, stats = _fused(flat, resolved, terms, reduction, num_valid, return_stats, process_group, inplace)
    return finish(loss, stats, resolved, ignore_index, shape, squeeze=targets.dim() == len(shape))


def finish(
    loss: Tensor, stats: RowStats | None, targets: Targets, ignore_index: int, shape: torch.Size, squeeze: bool
) -> Tensor | tuple[Tensor, LossStats]:
    """Return the loss, and the statistics if there are any, in the user's shape."""
    loss = restore(loss, shape)
    if stats is None:
        return loss
    hits = accuracy(stats.argmax, targets, ignore_index)
    token_loss, lse, entropy, argmax = (t.view(shape) for t in stats)
    return loss, LossStats(token_loss, lse, entropy, argmax, hits[0] if squeeze else hits)


@eager
def _fused(logits: Tensor, *call: Any) -> tuple[Tensor, RowStats | None]:
    return with_stats(_CrossEntropy.apply(logits, *call, torch.is_grad_enabled()))


def with_stats(result: tuple[Tensor, ...]) -> tuple[Tensor, RowStats | None]:
    """Name what an autograd function returns: the loss, then `RowStats` or `NO_STATS`."""
    loss, *stats = result
    return loss, None if stats[0] is None else RowStats(*stats)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # (N, V)
        targets: Targets,
        terms: Terms,
        reduction: Reduction,
        num_valid: int | Tensor | None,
        stats: bool,
        group: Any,
        inplace: bool,
        grad_enabled: bool,  # in here it never is
    ) -> tuple[Tensor | None, ...]:
        logits = logits if logits.stride(-1) == 1 else logits.contiguous()
        ops = row_ops(logits)
        ctx.ops, ctx.reduction, ctx.holds_gradient, ctx.inplace = ops, reduction, False, inplace
        ctx.set_materialize_grads(False)
        wants_gradient = grad_enabled and ctx.needs_input_grad[0]
        accumulate = torch.promote_types(logits.dtype, torch.float32)
        count = denominator(targets, terms, num_valid, accumulate) if reduction == "mean" else None
        inverse = None if count is None else reciprocal(count)
        tensors, ctx.numbers = pack(targets, terms)

        if inplace and reduction != "none" and wants_gradient and not stats and group is None:
            # 1 / count goes into the gradient as it is written, so that an upstream gradient of 1 leaves nothing to
            # do; but float16 would underflow, and waits for the loss scale to come down from upstream.
            folds = logits.dtype != torch.float16
            rows = ops.cross_entropy(logits, targets, terms, d_logits=logits, grad_scale=inverse if folds else None)
            increment_version(logits)
            ctx.save_for_backward(logits, None if folds else inverse)  # who writes to them before backward is told so
            ctx.holds_gradient, ctx.consumed = True, False
            return reduced(rows.loss, reduction, count), *NO_STATS

        if group is None:
            rows = ops.cross_entropy(logits, targets, terms, entropy=stats, argmax=stats)
        else:
            rows = parallel_rows(
                ops, logits, targets, terms, group, V=logits.shape[1], entropy=stats, argmax=stats
            )  # fmt: skip
        if wants_gradient:
            ctx.save_for_backward(logits, rows.peak, rows.total, rows.entropy, inverse, *tensors)
        loss = reduced(rows.loss, reduction, count)
        if not stats:
            return loss, *NO_STATS
        told = RowStats.of(rows, ops.lse(rows), loss)
        ctx.mark_non_differentiable(told.token_loss, told.argmax)
        return loss, *told

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        d_loss, _, d_lse, d_entropy, _ = upstream
        nothing = (None,) * 8
        if ctx.holds_gradient:
            if ctx.consumed:
                raise RuntimeError("cross_entropy(inplace=True): backward ran already and its gradient is used up")
            ctx.consumed = True
            gradient, factor = ctx.saved_tensors
            d_logits = ctx.ops.scale(gradient.detach(), d_loss if factor is None else d_loss * factor)
            return d_logits, *nothing

        logits, peak, total, entropy, inverse, *tensors = ctx.saved_tensors
        if logits.numel() == 0:
            return torch.zeros_like(logits), *nothing
        targets, terms = unpack(tensors, ctx.numbers)
        d_logits = logits.detach() if ctx.inplace else torch.empty_like(logits)
        found = Upstream(per_row(d_loss, inverse, peak), contiguous(d_lse), contiguous(d_entropy))
        ctx.ops.cross_entropy_backward(
            logits, targets, terms, Softmax(peak, total, entropy), found, d_logits=d_logits
        )  # fmt: skip
        if ctx.inplace:
            increment_version(logits)
        return d_logits, *nothing


def contiguous(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()
