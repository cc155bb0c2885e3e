"""Matrix products of the linear loss, in whatever dtypes a device can multiply."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast._dispatch import adds_into_float32, use_kernels
from llmfast_kernels.terms import GROUP


class Products(NamedTuple):
    """Products that are written where the caller says: autocast leaves those alone, and would round the others."""

    float32: bool  # low precision can be multiplied into float32, see `multiplies_into_float32`

    def logits(self, hidden: Tensor, weight: Tensor, *, out: Tensor) -> None:
        """Put hidden @ weight.T into `out`, unrounded where that is float32."""
        if out.dtype != hidden.dtype and not self.float32:
            # Slow, but the caller asked for unrounded logits.
            torch.mm(hidden.to(out.dtype), weight.T.to(out.dtype), out=out)
        else:
            self.multiply(hidden, weight.T, out=out)

    def multiply(self, a: Tensor, b: Tensor, *, out: Tensor, add: bool = False, blocks: Tensor | None = None) -> None:
        """Put a @ b into `out`, or add it there, accumulated in its dtype.

        `blocks` says which GROUP x GROUP blocks of `a` to use, see `live_blocks`; the kernels alone can skip some.
        """
        if blocks is not None:
            from llmfast_kernels.filtered_matmul import filtered_matmul

            filtered_matmul(a, b, blocks, out=out, add=add)
        elif a.dtype == out.dtype:
            out.addmm_(a, b) if add else torch.mm(a, b, out=out)
        elif not self.float32:
            # Casting the matrices would make the product several times slower, so it is rounded once, and only the sum
            # over chunks is float32.
            product = torch.mm(a, b, out=a.new_empty(out.shape))
            out.add_(product) if add else out.copy_(product)
        elif not add:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif adds_into_float32(out.device, a.dtype):
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out.add_(torch.mm(a, b, out_dtype=out.dtype, out=torch.empty_like(out)))


def live_blocks(d_logits: Tensor, alive: Tensor) -> tuple[Tensor, Tensor | None]:
    """Apply the gradient filter: return `d_logits`, and which blocks of it a product may use.

    Without the kernels the other blocks are zeroed in a copy, and all can be used.

    Args:
        d_logits: (n, V)
        alive: (n, groups) int8, which groups of GROUP columns of a row hold a gradient that passes the filter.
    """
    n, groups = alive.shape
    blocks = F.pad(alive, (0, 0, 0, -n % GROUP)).view(-1, GROUP, groups).amax(1)
    if use_kernels(d_logits):
        return d_logits, blocks
    keep = blocks.repeat_interleave(GROUP, 0)[:n].repeat_interleave(GROUP, 1)[:, : d_logits.shape[1]]
    return d_logits * keep, None
