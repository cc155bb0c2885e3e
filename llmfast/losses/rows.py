"""The row operations behind every loss, wherever the tensor lives. A row is the V logits of one token."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from llmfast._dispatch import use_kernels
from llmfast.losses import plain
from llmfast_kernels.terms import Partials, Rows


class RowOps(NamedTuple):
    cross_entropy: Callable[..., Rows]
    cross_entropy_partials: Callable[..., Partials]
    cross_entropy_backward: Callable[..., None]
    scale: Callable[..., Tensor]
    peak_unit: float  # of `Rows.peak`, in that of the logits

    def lse(self, rows: Rows) -> Tensor:
        """Return (N,) logsumexp of the logits."""
        return rows.peak * self.peak_unit + rows.total.log()


def row_ops(t: Tensor) -> RowOps:
    """The Triton launchers or their plain-torch twins, for tensors like `t`."""
    if not use_kernels(t):
        return RowOps(plain.cross_entropy, plain.cross_entropy_partials, plain.cross_entropy_backward, plain.scale, 1.0)
    # Imported here, so that everything else works on a machine without Triton.
    from llmfast_kernels import cross_entropy as rows
    from llmfast_kernels.scale import scale

    return RowOps(
        rows.cross_entropy, rows.cross_entropy_partials, rows.cross_entropy_backward, scale, rows.PEAK_UNIT
    )  # fmt: skip
