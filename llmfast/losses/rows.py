"""The row operations behind every loss, for any device. A row is the V logits of one token."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

from torch import Tensor

from llmfast._dispatch import use_kernels
from llmfast.losses import plain
from llmfast_kernels.terms import Partials, Rows


class RowOps(NamedTuple):
    """Operations on rows, as `llmfast_kernels.cross_entropy` describes them."""

    cross_entropy: Callable[..., Rows]
    cross_entropy_partials: Callable[..., Partials]
    cross_entropy_backward: Callable[..., None]
    scale: Callable[..., Tensor]
    peak_unit: float  # times `Rows.peak` is the largest logit

    def lse(self, rows: Rows) -> Tensor:
        """Return (N,) logsumexp of the logits."""
        return rows.peak * self.peak_unit + rows.total.log()


_PLAIN = RowOps(plain.cross_entropy, plain.cross_entropy_partials, plain.cross_entropy_backward, plain.scale, 1.0)


def row_ops(t: Tensor) -> RowOps:
    """Return the Triton launchers or their plain-torch twins, whichever tensors like `t` take."""
    return _launchers() if use_kernels(t) else _PLAIN


@cache
def _launchers() -> RowOps:
    # Imported here, so that everything else works on a machine without Triton.
    from llmfast_kernels import cross_entropy as rows
    from llmfast_kernels.scale import scale

    backward, unit = rows.cross_entropy_backward, rows.PEAK_UNIT
    return RowOps(rows.cross_entropy, rows.cross_entropy_partials, backward, scale, unit)
