"""The losses as operators of torch, which is how torch.compile takes them whole.

Imported only while torch.compile traces: outside, the way through torch's dispatcher would cost more host time than the
launches. Operators take and return tensors and numbers, so `pack` and `unpack` stand at their doors. What a call does
not have comes back empty. They write over nothing and alias nothing, so the compiler may plan memory around them;
`inplace=True` therefore means nothing here.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmfast.losses.cross_entropy import contiguous
from llmfast.losses.linear_cross_entropy import Call, Loop
from llmfast.losses.plain import times
from llmfast.losses.rows import RowOps, row_ops
from llmfast.losses.targets import Reduction, RowStats, denominator, per_row, reciprocal, reduced
from llmfast_kernels.terms import Rows, Softmax, Targets, Terms, Upstream, pack, unpack

_TARGETS = "Tensor classes, Tensor? weights, Tensor? token_weights, Tensor? class_weights, Tensor? class_weight_sums"
_NUMBERS = (
    "SymInt V, int ignore_index, int v_start, float? label_smoothing, float? z_loss, float? logit_scale, float? softcap"
)
_ROWS = "Tensor loss, Tensor peak, Tensor total, Tensor entropy, Tensor argmax, Tensor lse"
_T, _N = (schema.count(",") + 1 for schema in (_TARGETS, _NUMBERS))


def _split(call: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """What an operator takes after its first tensors: the tensors and numbers of `pack`, and the rest."""
    return call[:_T], call[_T : _T + _N], call[_T + _N :]


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


# Cross-entropy from logits: the rows. What is reduced and divided, the compiler sees and fuses.


def cross_entropy(
    logits: Tensor,  # (N, V)
    targets: Targets,
    terms: Terms,
    reduction: Reduction,
    num_valid: int | Tensor | None,
    stats: bool,
) -> tuple[Tensor, RowStats | None]:
    tensors, numbers = pack(targets, terms)
    loss, *told = torch.ops.llmfast.cross_entropy(logits, *tensors, *numbers, stats)
    count = denominator(targets, terms, num_valid, loss.dtype) if reduction == "mean" else None
    value = reduced(loss, reduction, count)
    if count is not None:
        value = torch.where(count != 0, loss.sum() * reciprocal(count), value.detach())  # no gradient of 0 / 0
    return value, _stats(loss, told) if stats else None


@torch.library.custom_op(
    "llmfast::cross_entropy",
    mutates_args=(),
    schema=f"(Tensor logits, {_TARGETS}, {_NUMBERS}, bool stats) -> ({_ROWS})",
)
def _cross_entropy(logits: Tensor, *call: Any) -> tuple[Tensor, ...]:
    tensors, numbers, (stats,) = _split(call)
    targets, terms = unpack(tensors, numbers)
    logits = _rows_together(logits)
    ops = row_ops(logits)
    return _filled(ops.cross_entropy(logits, targets, terms, entropy=stats, argmax=stats), ops)


@_cross_entropy.register_fake
def _(logits: Tensor, *call: Any) -> tuple[Tensor, ...]:
    (classes, *_), _, (stats,) = _split(call)
    return _fake_rows(logits, classes.shape[0], stats)


@torch.library.custom_op(
    "llmfast::cross_entropy_backward",
    mutates_args=(),
    schema=(
        "(Tensor logits, Tensor peak, Tensor total, Tensor entropy, Tensor d_loss, Tensor? d_lse, Tensor? d_entropy, "
        f"{_TARGETS}, {_NUMBERS}) -> Tensor"
    ),
)
def _cross_entropy_backward(
    logits: Tensor, peak: Tensor, total: Tensor, entropy: Tensor, d_loss: Tensor, d_lse: Tensor | None,
    d_entropy: Tensor | None, *call: Any,
) -> Tensor:  # fmt: skip
    tensors, numbers, _ = _split(call)
    targets, terms = unpack(tensors, numbers)
    logits = _rows_together(logits)
    d_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    upstream = Upstream(d_loss.contiguous(), contiguous(d_lse), contiguous(d_entropy))
    row_ops(logits).cross_entropy_backward(
        logits, targets, terms, Softmax(peak, total, entropy), upstream, d_logits=d_logits
    )  # fmt: skip
    return d_logits


@_cross_entropy_backward.register_fake
def _(logits: Tensor, *call: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *call = inputs
    _, peak, total, entropy, argmax, _ = output
    tensors, ctx.numbers, _ = _split(call)
    ctx.save_for_backward(logits, peak, total, entropy, *tensors)
    ctx.mark_non_differentiable(peak, total, argmax)
    ctx.set_materialize_grads(False)


def _backward_rows(
    ctx: Any, d_loss: Tensor | None, d_peak: None, d_total: None, d_entropy: Tensor | None, d_argmax: None,
    d_lse: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    logits, peak, total, entropy, *tensors = ctx.saved_tensors
    d_loss = torch.zeros_like(peak) if d_loss is None else d_loss
    d_lse, d_entropy = (None if t is None or entropy.numel() == 0 else t for t in (d_lse, d_entropy))
    arguments = (logits, peak, total, entropy, d_loss, d_lse, d_entropy, *tensors, *ctx.numbers)
    return torch.ops.llmfast.cross_entropy_backward(*arguments), *(None,) * (_T + _N + 1)


_cross_entropy.register_autograd(_backward_rows, setup_context=_setup_rows)


# Linear cross-entropy: forward with whatever gradients can be made there, backward with the others.

_LINEAR = (
    f"Tensor hidden, Tensor weight, Tensor? bias, {_TARGETS}, {_NUMBERS}, Tensor? count, str reduction, bool stats, "
    "int budget, ScalarType dtype, ScalarType slab_dtype, float? grad_filter, bool[] wants"
)


class _Settings(NamedTuple):
    """The last of these."""

    divisor: Tensor | None  # of a mean
    reduction: Reduction
    stats: bool
    budget: int  # -1: "auto"
    dtype: torch.dtype
    slab_dtype: torch.dtype
    grad_filter: float | None
    wants: Sequence[bool]  # gradients of hidden, weight and bias


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: Call
) -> tuple[Tensor, RowStats | None]:
    tensors, numbers = pack(call.targets, call.terms)
    wide = torch.promote_types(call.dtype, torch.float32)
    count = denominator(call.targets, call.terms, call.num_valid, wide) if call.reduction == "mean" else None
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss, by_token, *told, _, _, _ = torch.ops.llmfast.linear_cross_entropy(
        hidden, weight, bias, *tensors, *numbers, count, call.reduction, call.stats,
        -1 if call.budget == "auto" else call.budget, call.dtype, call.slab_dtype, call.grad_filter, wants,
    )  # fmt: skip
    return loss, _stats(by_token, told) if call.stats else None


def _call(flat: Sequence[Any]) -> tuple[Call, _Settings]:
    tensors, numbers, rest = _split(flat)
    targets, terms = unpack(tensors, numbers)
    s = _Settings(*rest)
    call = Call(
        targets, terms, s.reduction, None, s.stats, None, "auto" if s.budget < 0 else s.budget, s.dtype, s.slab_dtype,
        None, s.grad_filter,
    )  # fmt: skip
    return call, s


@torch.library.custom_op(
    "llmfast::linear_cross_entropy",
    mutates_args=(),
    schema=f"({_LINEAR}) -> (Tensor, {_ROWS}, Tensor, Tensor, Tensor)",
)
def _linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
    call, (count, *_, wants) = _call(flat)
    plan = call.plan(hidden, weight, (wants[0], wants[1]))
    now = any(wants) and call.reduction != "none"
    plan = plan.cut("chunk")  # logits kept for backward would have to be copied there, to be written over
    loop = Loop(hidden, weight, bias, call, plan, wants[2])
    rows, made, _ = loop.forward(gradients=now)
    loss = reduced(rows.loss, call.reduction, count)
    filled = _filled(rows, loop.ops)
    d_weight = None if made.weight is None else made.weight.to(plan.accumulate_dtype)
    return (
        loss.clone() if loss is rows.loss else loss,
        *filled,
        *(hidden.new_empty(0) if g is None else g for g in (made.hidden, d_weight, made.bias)),
    )


@_linear_cross_entropy.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
    call, (*_, wants) = _call(flat)
    N = call.targets.classes.shape[0]
    rows = _fake_rows(hidden.new_empty(0, dtype=call.dtype), N, call.stats)
    loss = rows[0].new_empty(N if call.reduction == "none" else ())
    now = call.reduction != "none"
    wide = torch.promote_types(call.dtype, torch.float32)
    return (
        loss,
        *rows,
        hidden.new_empty(hidden.shape, dtype=call.dtype) if now and wants[0] else hidden.new_empty(0),
        weight.new_empty(weight.shape, dtype=wide) if now and wants[1] else hidden.new_empty(0),
        hidden.new_empty(weight.shape[0], dtype=wide) if now and wants[2] else hidden.new_empty(0),
    )  # fmt: skip


@torch.library.custom_op(
    "llmfast::linear_cross_entropy_backward",
    mutates_args=(),
    schema=(
        f"({_LINEAR}, Tensor peak, Tensor total, Tensor entropy, Tensor d_loss, Tensor? d_lse, Tensor? d_entropy) "
        "-> (Tensor, Tensor, Tensor)"
    ),
)
def _linear_cross_entropy_backward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any
) -> tuple[Tensor, ...]:
    *settings, peak, total, entropy, d_loss, d_lse, d_entropy = flat
    call, (*_, wants) = _call(settings)
    plan = call.plan(hidden, weight, (wants[0], wants[1])).cut("recompute")
    made = Loop(hidden, weight, bias, call, plan, wants[2]).backward(
        None,
        Softmax(peak, total, entropy),
        Upstream(d_loss.contiguous(), contiguous(d_lse), contiguous(d_entropy)),
    )
    likes = (hidden, weight, bias)
    return tuple(hidden.new_empty(0) if g is None or t is None else g.to(t.dtype) for g, t in zip(made, likes))


@_linear_cross_entropy_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *flat: Any) -> tuple[Tensor, ...]:
    return tuple(
        t.new_empty(t.shape) if want and t is not None else hidden.new_empty(0)
        for t, want in zip((hidden, weight, bias), _call(flat[:-6])[1].wants)
    )


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *flat = inputs
    _, by_token, peak, total, entropy, argmax, _, *made = output
    tensors, ctx.numbers, (count, *ctx.settings) = _split(flat)
    ctx.save_for_backward(hidden, weight, bias, peak, total, entropy, count, *made, *tensors)
    ctx.mark_non_differentiable(by_token, peak, total, argmax, *made)
    ctx.set_materialize_grads(False)


def _backward_linear(
    ctx: Any, d_loss: Tensor | None, d_by_token: None, d_peak: None, d_total: None, d_entropy: Tensor | None,
    d_argmax: None, d_lse: Tensor | None, *nothing: None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    hidden, weight, bias, peak, total, entropy, count, *rest = ctx.saved_tensors
    made, tensors = rest[:3], rest[3:]
    settings = _Settings(count, *ctx.settings)
    inverse = None if count is None else reciprocal(count)
    d_lse, d_entropy = (None if t is None or entropy.numel() == 0 else t for t in (d_lse, d_entropy))
    likes = (hidden, weight, bias)
    if settings.reduction != "none" and d_lse is None and d_entropy is None and d_loss is not None:
        factor = d_loss if inverse is None else d_loss * inverse
        wide = torch.promote_types(factor.dtype, torch.float32)
        gradients = [
            times(g.to(wide), factor).to(t.dtype) if want and t is not None else None
            for g, t, want in zip(made, likes, settings.wants)
        ]
    else:
        found = torch.ops.llmfast.linear_cross_entropy_backward(
            hidden, weight, bias, *tensors, *ctx.numbers, *settings, peak, total, entropy,
            per_row(d_loss, inverse, peak), d_lse, d_entropy,
        )  # fmt: skip
        gradients = [g if want else None for g, want in zip(found, settings.wants)]
    return *gradients, *(None,) * (_T + _N + len(settings))


_linear_cross_entropy.register_autograd(_backward_linear, setup_context=_setup_linear)


def _filled(rows: Rows, ops: RowOps) -> tuple[Tensor, ...]:
    """Return what `_ROWS` names, empty where it was not asked for."""
    loss, peak, total, entropy, argmax = rows
    if entropy is None or argmax is None:
        return loss, peak, total, loss.new_empty(0), loss.new_empty(0, dtype=torch.int64), loss.new_empty(0)
    return loss, peak, total, entropy, argmax, ops.lse(rows)


def _fake_rows(logits: Tensor, N: Any, stats: bool) -> tuple[Tensor, ...]:
    some = N if stats else 0
    wide = _wide(logits)
    sizes = ((N, wide), (N, wide), (N, wide), (some, wide), (some, torch.int64), (some, wide))
    return tuple(logits.new_empty(size, dtype=dtype) for size, dtype in sizes)


def _stats(loss: Tensor, told: Sequence[Tensor]) -> RowStats:
    _, _, entropy, argmax, lse = told
    return RowStats(loss.detach(), lse, entropy, argmax)


def _rows_together(logits: Tensor) -> Tensor:
    return logits if logits.stride(-1) == 1 else logits.contiguous()
