"""The losses as functions that autograd knows: outside `torch.compile` here, inside it in `operators.py`."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from llmfast._dispatch import has_no_data
from llmfast.losses.loss import Loss, Returned
from llmfast.losses.targets import NO_STATS, RowStats, reduced
from llmfast_kernels.terms import Softmax

Adapter = Callable[..., tuple[Tensor | None, ...]]


class EagerLoss(torch.autograd.Function):
    """A loss outside `torch.compile`: (loss, gradients enabled, *inputs) to the reduced loss and its `RowStats`."""

    @staticmethod
    def forward(ctx: Any, loss: Loss, grad_enabled: bool, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        wants = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[2:])  # in here it never is enabled
        rows, lse, kept = loss.forward(inputs, wants)
        ctx.set_materialize_grads(False)
        if any(wants):
            # Targets and terms stay with the loss; saving them lets torch notice if they are written to.
            ctx.save_for_backward(*inputs, *rows.softmax, loss.count, *_tensors(loss.targets), *_tensors(loss.terms))
            ctx.loss, ctx.wants, ctx.kept = loss, wants, kept
        value = reduced(rows.loss, loss.reduction, loss.count)
        if lse is None:
            return value, *NO_STATS
        stats = RowStats.of(rows, lse, value)
        ctx.mark_non_differentiable(stats.token_loss, stats.argmax)
        return value, *stats

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # only under create_graph=True
            raise RuntimeError(
                "this loss cannot be differentiated twice; use torch.nn.functional.cross_entropy for that"
            )
        d_loss, _, d_lse, d_entropy, _ = upstream
        saved, n = ctx.saved_tensors, len(ctx.wants)
        inputs, softmax = saved[:n], Softmax(*saved[n : n + 3])
        return None, None, *ctx.loss.backward(inputs, ctx.wants, softmax, Returned(d_loss, d_lse, d_entropy), ctx.kept)


def adapter(loss: Loss, t: Tensor) -> Adapter:
    """Return the function that computes `loss` from inputs like `t`."""
    if not has_no_data(t):
        return EagerLoss.apply
    if loss.traceable:
        from llmfast.losses import operators

        return operators.apply
    from llmfast._untraced import call

    return cast(Adapter, partial(call, _apply))


def _apply(*arguments: Any) -> Any:
    return EagerLoss.apply(*arguments)


def _tensors(record: Any) -> list[Tensor]:
    return [value for value in vars(record).values() if isinstance(value, Tensor)]
