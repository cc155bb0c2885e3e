"""The row operations behind every loss, for any device. A row is the V logits of one token."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmfast._dispatch import use_kernels
from llmfast.losses import plain, plain_dense
from llmfast_kernels.terms import Partials, Rows, Targets, Terms


class RowOps(NamedTuple):
    """Operations on rows, as `llmfast_kernels.cross_entropy` describes them."""

    cross_entropy: Callable[..., Rows]
    cross_entropy_partials: Callable[..., Partials]
    cross_entropy_backward: Callable[..., None]
    scale: Callable[..., Tensor]
    count_above: Callable[..., Tensor]

    def places(self, logits: Tensor, targets: Targets, terms: Terms, *, V: int) -> Tensor:
        """Return how many of all classes have a larger logit than each target, as in `Rows`."""
        classes = targets.classes
        counts = classes != terms.ignore_index
        column = classes - terms.v_start
        here = counts & (column >= 0) & (column < V)
        keys = torch.zeros(classes.shape, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
        if V > 0:
            at = torch.where(here, column, 0).long()
            bias = None if terms.bias is None else terms.bias[at]
            own = plain.final_logits(logits.gather(1, at).to(keys.dtype), bias, replace(terms, softcap=None))
            keys = torch.where(here, own, keys)
        found = self.count_above(logits, keys, terms, V=V)
        return torch.where(counts & (classes >= 0) & (classes < terms.V), found, -1)


_PLAIN = RowOps(
    plain.cross_entropy,
    plain.cross_entropy_partials,
    plain.cross_entropy_backward,
    plain.scale,
    plain.count_above,
)


def row_ops(t: Tensor, *, dense: bool = False) -> RowOps:
    """Return the Triton launchers or their plain-torch twins, whichever tensors like `t` take.

    `dense` says whether targets are probabilities of all classes, whose rows have no statistics.
    """
    ops = _launchers() if use_kernels(t) else _PLAIN
    if not dense:
        return ops
    functions: Any = plain_dense
    if use_kernels(t):
        from llmfast_kernels import distillation as functions  # not everyone has Triton

    def cross_entropy(*args: Any, stats: bool = False, logprobs: bool = False, **more: Any) -> Rows:
        assert not (stats or logprobs)
        rows: Rows = functions.dense_cross_entropy(*args, **more)
        return rows

    def partials(logits: Tensor, targets: Targets, terms: Terms, *, V: int, **more: Any) -> Partials:
        assert not any(more.values())
        unweighted = replace(targets, token_weights=None), terms.without_lse
        rows: Rows = functions.dense_cross_entropy(logits, *unweighted, V=V)
        assert rows.taught is not None
        mass = rows.taught[:, 2]
        # `rows.loss` is of these columns alone; if all their logits are -inf, they have no part in the whole loss.
        pull = torch.where(rows.total > 0, mass * rows.total.log() - rows.loss, 0.0)
        return Partials(rows.peak, rows.total, None, pull, mass, None)

    return ops._replace(
        cross_entropy=cross_entropy,
        cross_entropy_partials=partials,
        cross_entropy_backward=functions.dense_cross_entropy_backward,
    )


@cache
def _launchers() -> RowOps:
    # Imported here, so that everything else works on a machine without Triton.
    from llmfast_kernels import cross_entropy as rows
    from llmfast_kernels.places import count_above
    from llmfast_kernels.scale import scale

    return RowOps(rows.cross_entropy, rows.cross_entropy_partials, rows.cross_entropy_backward, scale, count_above)
