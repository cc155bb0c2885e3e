"""The two stages of a linear cross-entropy: whole rows of logits, then whole columns. `ways.py` describes them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from llmfast.losses import plain
from llmfast.losses.plan import LinearCrossEntropyPlan
from llmfast.losses.products import Products, live_blocks
from llmfast.losses.rows import RowOps
from llmfast_kernels.terms import GROUP, Rows, Softmax, Targets, Terms, Upstream

Record = TypeVar("Record", Softmax, Upstream)


class Matrices(NamedTuple):
    """Hidden states and weight in the compute dtype."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)


class Gradients(NamedTuple):
    """Gradients of the inputs, or buffers for them; None where none is wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D), or fewer rows
    bias: Tensor | None  # (V,) float32


@dataclass(frozen=True)
class Stages:
    """The work of one call, cut as its plan says."""

    plan: LinearCrossEntropyPlan
    matrices: Matrices
    targets: Targets
    terms: Terms
    products: Products
    ops: RowOps
    grad_filter: float | None

    def forward(
        self,
        make: Callable[[], Gradients] | None,
        kept: Tensor | None,
        slab: Tensor,
        *,
        stats: bool,
        logprobs: bool = False,
        places: bool = False,
        grad_scale: Tensor | None = None,
    ) -> Iterator[Rows]:
        """Yield the results of each chunk of rows. The caller drops what it does not keep before it asks for the next.

        Args:
            make: Returns the buffers for the gradients of grad_scale * sum(loss), the same ones at each call; the
                weight's may have fewer rows than V. It is first called after the row operation of the first chunk, so
                that they may take the bytes of its results.
            kept: (N, columns) that logits are copied to, from column `summed` on; None to copy nothing.
            slab: (rows, padded V) for the logits.
            stats: Whether to compute entropy and argmax.
            logprobs: Whether to compute the targets' log-probabilities.
            places: Whether to compute the targets' places.
            grad_scale: () float32, or None for 1.
        """
        call, V, first = self.plan.call, self.plan.call.V, self.plan.way.summed
        low = self._low(slab) if make is not None else slab
        for rows in self.plan:
            n = rows.stop - rows.start
            logits, d_logits = _first(slab, n), None if make is None else _first(low, n)
            targets = self.targets if n == call.N else self.targets[rows]
            self.products.logits(_rows(self.matrices.hidden, rows), self.matrices.weight, out=_first(logits, V, 1))
            if kept is not None:
                kept[rows] = logits[:, first : first + kept.shape[1]]
            alive, filtering = None, {}
            if make is not None and self.grad_filter is not None:
                alive = slab.new_empty(n, call.row_width // GROUP, dtype=torch.int8)
                filtering = {"alive": alive, "threshold": self.grad_filter}
            found = self.ops.cross_entropy(
                logits,
                targets,
                self.terms,
                V=V,
                stats=stats,
                logprobs=logprobs,
                d_logits=d_logits,
                grad_scale=grad_scale,
                **filtering,
            )
            if places:
                found = found._replace(places=self.ops.places(logits, targets, self.terms, V=V))
            yield found
            del found
            if d_logits is not None and make is not None:
                self._add_rows(rows, _first(d_logits, V, 1), alive, make(), add=rows.start > 0)

    def finish_rows(self, softmax: Softmax, upstream: Upstream, out: Gradients, *, add: bool) -> None:
        """Fill the gradients of the rows that the plan finishes, and of its summed columns, from new logits.

        With `add`, the weight's gradient is added to what is there.
        """
        V, finished = self.plan.call.V, self.plan.way.finished
        slab = self._slab(min(self.plan.way.rows, finished), self.plan.padded(V))
        low = self._low(slab)
        for start in range(0, finished, self.plan.way.rows):
            rows = slice(start, min(start + self.plan.way.rows, finished))
            n = rows.stop - rows.start
            self.products.logits(self.matrices.hidden[rows], self.matrices.weight, out=slab[:n, :V])
            own = _of_rows(softmax, rows), _of_rows(upstream, rows)
            self.ops.cross_entropy_backward(slab[:n], self.targets[rows], self.terms, *own, V=V, d_logits=low[:n])
            self._add_rows(rows, low[:n, :V], None, out, add=add or start > 0)

    def _add_rows(self, rows: slice, d_logits: Tensor, alive: Tensor | None, out: Gradients, *, add: bool) -> None:
        """Add what a chunk of rows contributes to the gradients; the filter leaves the bias alone.

        Args:
            rows: The chunk, n rows.
            d_logits: (n, V)
            alive: (n, groups) int8, see `live_blocks`.
            out: The gradients.
            add: Whether to add to the weight's gradient.
        """
        summed = self.plan.way.summed
        if out.bias is not None:
            _add_rows_to(out.bias, d_logits)
        d_logits, blocks = (d_logits, None) if alive is None else live_blocks(d_logits, alive)
        if out.hidden is not None:
            self.products.multiply(d_logits, self.matrices.weight, out=_rows(out.hidden, rows), blocks=blocks)
        if out.weight is not None and summed > 0:
            turned, hidden = None if blocks is None else blocks.T, _rows(self.matrices.hidden, rows)
            columns, weight = _first(d_logits, summed, 1).T, _first(out.weight, summed)
            self.products.multiply(columns, hidden, out=weight, add=add, blocks=turned)

    def finish_columns(
        self,
        softmax: Softmax,
        upstream: Upstream,
        kept: Tensor | None,
        out: Gradients,
        *,
        add: bool,
        factor: Tensor | None = None,
    ) -> None:
        """Fill the gradients of the other columns, and the sum of d_hidden over them.

        Args:
            softmax: Softmax of all columns.
            upstream: Gradients of the rows' results.
            kept: Logits that were kept, which are written over.
            out: Gradients of the rows that are not finished, and of the whole weight and bias.
            add: Whether to add to the weight's gradient.
            factor: Multiplies the weight's gradient, in float32; `upstream` leaves it out then.
        """
        plan, first, finished = self.plan, self.plan.way.summed, self.plan.way.finished
        whole = kept is not None and plan.way.kept >= plan.call.V
        slab = kept if kept is not None and whole else self._slab(plan.call.N, plan.column_width)
        low = self._low(slab)
        for columns in self._column_slabs(whole):
            width, weight = columns.stop - columns.start, _rows(self.matrices.weight, columns)
            if kept is not None and columns.start < first + plan.way.kept:
                block = slab if whole else kept[:, columns.start - first : columns.stop - first]
            else:
                block = _first(slab, plan.padded(width), 1)
                self.products.logits(self.matrices.hidden, weight, out=_first(block, width, 1))
            d_block = block if block.dtype == low.dtype else _first(low, block.shape[1], 1)
            own = self.terms.columns(columns)
            self.ops.cross_entropy_backward(block, self.targets, own, softmax, upstream, V=width, d_logits=d_block)
            d_logits = _first(d_block, width, 1)
            if out.hidden is not None:
                self.products.multiply(d_logits[finished:], weight, out=out.hidden, add=columns.start > first)
            if out.bias is not None:
                _add_rows_to(out.bias[columns], d_logits)
            if out.weight is not None:
                self._put_columns(d_logits, _rows(out.weight, columns), add, factor)

    def _column_slabs(self, whole: bool) -> Iterator[slice]:
        """Yield the columns that are kept, in slabs unless `whole`, and those that are made again."""
        way = self.plan.way
        stop = way.summed + way.kept
        step = way.kept if whole else way.columns
        for start in range(way.summed, stop, max(step, 1)):
            yield slice(start, min(start + step, stop))
        yield from self.plan.column_slabs()

    def _put_columns(self, d_logits: Tensor, out: Tensor, add: bool, factor: Tensor | None) -> None:
        """Put d_logits.T @ hidden into `out`, (columns, D), or add it there."""
        if factor is None:
            self.products.multiply(d_logits.T, self.matrices.hidden, out=out, add=add)
            return
        product = d_logits.new_empty(out.shape, dtype=self.plan.call.wide)
        self.products.multiply(d_logits.T, self.matrices.hidden, out=product)
        put_scaled(self.ops, product, factor, out, add=add)

    def _slab(self, rows: int, columns: int) -> Tensor:
        return self.matrices.hidden.new_empty(rows, columns, dtype=self.plan.call.slab_dtype)

    def _low(self, slab: Tensor) -> Tensor:
        """Return a buffer for the gradients of a slab: itself, if the products can read it."""
        dtype = self.plan.call.dtype
        return slab if slab.dtype == dtype else slab.new_empty(slab.shape, dtype=dtype)


# No view is made of a whole tensor: most calls need one slab, and a view takes the host as long as a small allocation.


def _first(t: Tensor, n: int, axis: int = 0) -> Tensor:
    """Return the first `n` rows, or columns, of `t`: itself, if it has no more."""
    return t if t.shape[axis] <= n else t.narrow(axis, 0, n)


def _rows(t: Tensor, rows: slice) -> Tensor:
    """Return some rows of `t`: itself, if they are all."""
    return t if rows.stop - rows.start == t.shape[0] else t[rows]


def _add_rows_to(total: Tensor, t: Tensor) -> None:
    """Add the rows of `t` to `total`, (columns,): in blocks on a CPU, where torch first casts all that it adds up."""
    step = len(t)
    if t.is_cpu and t.dtype != total.dtype:
        step = plain.BLOCK_BYTES // (total.element_size() * max(1, t.shape[1]))
    for block in t.split(max(1, step)):
        total.add_(block.sum(0, dtype=total.dtype))


def _of_rows(record: Record, rows: slice) -> Record:
    """Return some rows of a record of tensors, (N,) each."""
    return cast(Record, cast(Any, record)._make([None if t is None else t[rows] for t in record]))


def put_scaled(ops: RowOps, t: Tensor, factor: Tensor, out: Tensor | None, *, add: bool) -> None:
    """Put factor * t into `out` (None: over t), or add it there."""
    if out is None or not add:
        ops.scale(t, factor, out=out)
    elif out.is_contiguous():
        ops.scale(t, factor, out=out, add=True)
        increment_version(out)  # a kernel does not
    else:
        out.add_(ops.scale(t, factor))
