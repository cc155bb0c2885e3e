"""The losses as autograd functions outside `torch.compile`. `operators.py` has those for use inside it."""

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from llmfast._dispatch import has_no_data, in_transform
from llmfast.losses.loss import Loss, Returned
from llmfast.losses.targets import NO_STATS, RowStats
from llmfast_kernels.terms import Softmax

Adapter = Callable[..., tuple[Tensor | None, ...]]


class EagerLoss(torch.autograd.Function):
    """A loss outside `torch.compile`. Arguments: the loss, whether gradients are enabled, and the loss's inputs.

    It returns the loss's value and its `RowStats`, or `NO_STATS`.
    """

    @staticmethod
    def forward(ctx: Any, loss: Loss, grad_enabled: bool, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
        # Inside `forward` autograd has disabled gradients, so the caller has to say whether they are enabled.
        wants = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[2:])
        rows, lse, kept = loss.forward(inputs, wants)
        ctx.set_materialize_grads(False)
        if any(wants):
            # Backward reads targets, terms and count from `loss`. They are saved too, so that torch raises an error if
            # anything overwrites them in the meantime.
            ctx.save_for_backward(*inputs, *rows.softmax, loss.count, *_tensors(loss.targets), *_tensors(loss.terms))
            ctx.loss, ctx.wants, ctx.kept = loss, wants, kept
        value = loss.value(rows)
        if lse is None:
            return value, *NO_STATS
        stats = RowStats.of(rows, lse, value)
        ctx.mark_non_differentiable(*(t for t in (stats.token_loss, stats.argmax, stats.places) if t is not None))
        return value, *stats

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        if in_transform():
            raise TypeError(
                "gradients of this loss must be made outside of torch.func's transforms; "
                "those of llmfast.losses.reference may be made inside"
            )
        if torch.is_grad_enabled():  # True only with create_graph=True
            raise RuntimeError(
                "this loss cannot be differentiated twice; use torch.nn.functional.cross_entropy for that"
            )
        d_loss, _, d_lse, d_entropy, *_ = upstream
        saved, n = ctx.saved_tensors, len(ctx.wants)
        inputs, softmax = saved[:n], Softmax(*saved[n : n + len(Softmax._fields)])
        loss, returned = ctx.loss.weighted(Returned(d_loss, d_lse, d_entropy))
        return None, None, *loss.backward(inputs, ctx.wants, softmax, returned, ctx.kept)


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
    """Return the tensors of a dataclass, and of dataclasses within it."""
    found = []
    for value in vars(record).values():
        if value is None or isinstance(value, int | float):
            continue
        found += [value] if isinstance(value, Tensor) else _tensors(value) if is_dataclass(value) else []
    return found
