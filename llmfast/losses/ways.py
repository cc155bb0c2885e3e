"""The ways to compute a linear cross-entropy, and what each costs: bytes held, bytes moved, FLOPs.

The gradient of `hidden` needs whole rows of logits, and that of `weight` whole columns. So there are two stages:

*Rows.* One slab is reused for chunks of rows. A chunk's softmax is final, so its part of d_hidden is finished at once.
The weight's gradient of the first `summed` columns is summed over the chunks in float32, and the logits of `kept`
columns are kept. For a mean or sum this stage is the forward pass, which makes the logits anyway. Its slab may take the
bytes of a gradient of the weight that is not made yet.

*Columns.* In backward, the logits of all other columns are made again, a slab of columns at a time. Peak and total of
each row turn them into gradients, and one product over all rows finishes their part of the weight's gradient.

Losses per token get their upstream gradients in backward, where the row stage has to make the logits again. Rows that
it does not finish get their d_hidden from the column stage instead, which takes a float32 sum of the size of d_hidden.

All formulas work on numbers and on numpy arrays, so that thousands of ways are compared at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from llmfast_kernels.terms import GROUP

Mode = Literal["materialise", "chunk", "two-stage", "recompute"]

SHARES = 32  # steps from none to all of the columns that are summed or kept, and of the rows that are finished
ALIGNED = 64  # every share of the columns but the whole is a multiple of this
RANKS_NUMBERS = 16  # per row, while ranks add up what they found of its columns
SCALARS = 64  # bytes of the loss, the count and a few more numbers
NARROWEST = 16  # columns of the narrowest slab, whose rows still start at multiples of 16 bytes


class Way(NamedTuple):
    """A cut of a call. Each field is a number, or an array with one element per way."""

    in_forward: Any  # whether the row stage is part of the forward pass
    rows: Any  # rows of its slab
    finished: Any  # rows whose d_hidden it finishes
    summed: Any  # columns whose weight gradient it sums, from the first column on
    kept: Any  # columns, after the summed ones, whose logits it keeps
    columns: Any  # columns of a slab in the column stage

    def chosen(self, which: Any) -> "Way":
        """Return some of the ways of arrays."""
        return Way(*(field[which] for field in self))

    def at(self, i: int) -> "Way":
        """Return one of the ways of arrays."""
        return Way(bool(self.in_forward[i]), *(int(field[i]) for field in self[1:]))


class Step(NamedTuple):
    """A kind of launch. Bytes of DRAM and FLOPs are those of all its calls."""

    name: str
    bytes: Any
    flops: Any = 0.0
    calls: Any = 1


@dataclass(frozen=True, kw_only=True)
class Call:
    """Sizes, dtypes and abilities of a device that decide what a linear cross-entropy costs."""

    N: int  # tokens
    D: int  # width
    V: int  # classes of this rank
    dtype: torch.dtype  # of the matrix products
    slab_dtype: torch.dtype  # of the logits
    hidden_dtype: torch.dtype  # of the gradient of hidden
    weight_dtype: torch.dtype  # of the gradient of weight
    accumulate_dtype: torch.dtype  # of sums of the weight's gradient over chunks
    wants: tuple[bool, bool, bool]  # gradients of hidden, weight, bias
    row_width: int  # columns of a slab of whole rows, padded so that rows start aligned
    per_token: bool  # upstream gradients are not known in the forward pass
    kernels: bool  # the Triton kernels run
    filtered: bool = False  # there is a `grad_filter`
    ranks: bool = False  # the classes are split over ranks, which add up d_hidden in float32
    into: bool = False  # the weight's gradient is added to a buffer of the caller's
    functional: bool = False  # an operator of torch: only what it returns lives on until backward
    stats: bool = False  # statistics are returned
    ids: int = 0  # ids per row whose log-probabilities are returned
    places: bool = False  # their places among the classes are returned too
    float32_products: bool = True  # low precision can be multiplied into float32
    float32_sums: bool = True  # and added there
    blocks: int = 0  # buffers of plain torch for each block of rows, in float32
    block_bytes: int = 0  # their size, where that is at least a row per thread
    threads: int = 1
    plain_row_bytes: int = 0  # what plain torch takes for each row besides
    held: int = 0  # bytes of the call's own copies of its inputs
    keeps: bool = True  # logits may be kept until backward
    taught: int = 0  # numbers per row that backward reads besides, with a teacher
    teacher_width: int = 0  # of a teacher's hidden states, whose logits are made next to the others
    teacher_bytes: int = 0  # per logit that is made so
    teacher_cast: int = 0  # per number of the teacher's matrices, where they are cast for a product

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums and of numbers per row."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def logit_bytes(self) -> int:
        """Bytes per logit of a slab and the teacher's, plus those of its gradient if that has a buffer of its own."""
        gradient = self.dtype.itemsize if self.slab_dtype != self.dtype and any(self.wants) else 0
        filtered = self.dtype.itemsize + 2 if self.filtered and not self.kernels else 0
        return self.slab_dtype.itemsize + gradient + filtered + self.teacher_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of numbers per row: loss, peak and total, and an upstream gradient; and what is returned besides.

        The losses of a mean or sum are gone when there is an upstream gradient. Log-probabilities have upstream
        gradients of their own, which become weights. Ranks hold more of them while they add them up.
        """
        each = (7 if self.ranks else 3) * self.ids
        numbers = (10 if self.stats else self._numbers) + each + self.taught
        numbers = numbers * self.wide.itemsize + 40 * self.ids * self.places
        return numbers + (24 if self.stats else 0) + self.plain_row_bytes

    @property
    def _numbers(self) -> int:
        return 4 if self.per_token or self.functional else 3

    def forgets(self, way: Way) -> Any:
        """Return whether a chunk of rows, one of several, leaves nothing but the sum of its losses.

        Its gradients are final then, and a second backward pass makes the rest again. Ranks keep it, because theirs
        would have to make it at once, and a rank without classes has nothing to make.
        """
        needed = bool(self.stats or self.ids or self.functional or self.per_token or self.ranks)
        several = way.rows < self.N
        return way.in_forward & several & (self.column_share(way) == 0) & (not needed)

    def _row_numbers(self, way: Way) -> tuple[Any, Any]:
        """Return the bytes of the rows' numbers: of those that are kept, and of a chunk's before they are added."""
        few, rows = self.forgets(way), np.minimum(way.rows, self.N)
        sums = self.wide.itemsize * _ceil(self.N, way.rows) + self.plain_row_bytes * self.N
        kept = np.where(few, sums, self.row_bytes * self.N)
        numbers = (3 + self.taught) * self.wide.itemsize
        added_up = RANKS_NUMBERS * self.wide.itemsize * self.ranks
        return kept, rows * (np.where(few, numbers, self.row_bytes * (way.rows < self.N)) + added_up)

    def modes(self, way: Way) -> Any:
        """Return the name of each way's mode."""
        chunk = (way.summed >= self.V) if self.wants[1] else np.full_like(way.in_forward, True)
        in_forward = np.where(chunk, "chunk", "two-stage")
        return np.where(way.kept >= max(self.V, 1), "materialise", np.where(way.in_forward, in_forward, "recompute"))

    def ways(self, mode: Mode | None = None) -> Way:
        """Return all ways that are considered, or those of one mode.

        They do not depend on the budget, so that a larger budget never leads to a slower one.
        """
        rows, shares = self._rows(), np.unique(self._share(np.arange(SHARES + 1)))
        none, every, all_rows = np.zeros(1, int), np.full(1, self.V), np.full(1, self.N)
        finished = np.unique(np.arange(SHARES) * self.N // SHARES)
        inner = shares[(shares > 0) & (shares < self.V)]
        weight = self.wants[1]
        keep = self.may_keep or (mode is not None and self.keeps)
        in_forward = not self.per_token or not any(self.wants)
        in_backward = any(self.wants) and (self.per_token or mode == "recompute")
        families = []
        if in_forward:
            whole = self.filtered or self.functional
            families.append((True, rows, all_rows, (every if whole else shares) if weight else none, none))
            if weight and keep and not whole:
                families.append((True, rows, all_rows, none, inner))
        if any(self.wants) and keep:
            families.append((False, np.maximum(all_rows, 1), none, none, every))
        if in_backward:
            families.append((False, rows, all_rows, shares if weight else none, none))
            if self.wants[0]:
                families.append((False, rows, finished, none, none))
            if weight and keep:
                families.append((False, rows, none, none, inner))
        parts = []
        for when, *axes in families:
            grid = [axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]
            parts.append((np.full(grid[0].shape, when), *grid))
        cut = [np.concatenate(column) for column in zip(*parts)]
        _, slab_rows, _, summed, kept = cut
        found = Way._make([*cut, self._columns(slab_rows, self.V - summed - kept)])
        found = Way._make(np.concatenate(pair) for pair in zip(found, self._roomy(found)))
        return found if mode is None else found.chosen(self.modes(found) == mode)

    @property
    def may_keep(self) -> bool:
        """Return whether logits may be kept for backward.

        Plain torch makes a softmax of rows faster than of columns. And float16 gradients must not be divided by a
        count before they are summed.
        """
        return self.keeps and not self.filtered and (self.per_token or (self.kernels and not self.is_half))

    @property
    def is_half(self) -> bool:
        return self.dtype == torch.float16

    @property
    def divides_late(self) -> bool:
        """True if gradients of the forward pass are divided by the count once they are complete, in one more pass.

        Otherwise that launch returns at once, as long as the upstream gradient is 1.
        """
        return self.is_half or self.filtered or not (self.kernels or self.dtype == torch.bfloat16)

    def _rows(self) -> Any:
        """Return the numbers of rows per slab: of every cut into nearly equal chunks, many rows in multiples of 8."""
        N = max(self.N, 1)
        few = np.arange(1, math.isqrt(N) + 1)  # chunks, or rows: no cut has more than so many of both
        rows = -(-N // np.concatenate([few, -(-N // few)]))
        return np.unique(np.minimum(N, np.where(rows > 128, -(-rows // 8) * 8, rows)))

    def _roomy(self, way: Way) -> Way:
        """Return ways with more rows per slab, in the bytes of the weight's gradient, which is not made yet."""
        row = self.row_width * self.logit_bytes
        sums = way.summed * self._sum_bytes(way)
        room = np.where(self.separate(way), self.V * self.weight_dtype.itemsize - sums, 0) * self.D
        rows = room * (self.wants[1] and not self.into) // max(row, 1) // 8 * 8
        some = (rows > way.rows) & (way.columns < self.V)
        chunks = _ceil(self.N, np.minimum(rows, self.N))
        return way._replace(rows=-(-self.N // np.maximum(chunks, 1))).chosen(some)

    def _share(self, i: Any) -> Any:
        """Return i / SHARES of the columns, in multiples of ALIGNED."""
        return np.where(i >= SHARES, self.V, self.V * i // SHARES // ALIGNED * ALIGNED)

    def _columns(self, rows: Any, left: Any) -> Any:
        """Return the columns of a slab that takes the bytes of a slab of `rows`, and no more than are left."""
        columns = rows * self.row_width // max(self.N, 1) // NARROWEST * NARROWEST
        most = np.where(left >= self.V, self.V, -(-left // NARROWEST) * NARROWEST)
        return np.clip(columns, min(NARROWEST, max(self.V, 1)), np.clip(most, NARROWEST, max(self.V, 1)))

    def column_share(self, way: Way) -> Any:
        """Return the share of the columns that the column stage goes through."""
        hidden = self.wants[0] or self.wants[2]
        for_weight = 1.0 - way.summed / max(self.V, 1) if self.wants[1] else 0.0
        for_hidden = np.where(way.in_forward | (way.finished >= self.N), 0.0, 1.0) if hidden else 0.0
        return np.maximum(for_weight, for_hidden)

    def separate(self, way: Way) -> Any:
        """Return whether sums over chunks have a buffer that is not the gradient itself."""
        same = self.single(way) | (self.weight_dtype == self.accumulate_dtype and not self.functional)
        return (way.summed == 0) | np.where(way.in_forward, ~same | self.into, ~(same | self.into))

    def single(self, way: Way) -> Any:
        """Return whether the row stage makes the weight's gradient by one product in its dtype: there is no sum.

        Only plain torch does, which cannot keep logits. The product is rounded before the upstream gradient is known.
        """
        able = self.weight_dtype == self.dtype and not (self.kernels or self.is_half or self.functional or self.into)
        return (np.where(way.in_forward, self.N, way.finished) <= way.rows) & able

    def _sum_bytes(self, way: Way) -> Any:
        return np.where(self.single(way), self.weight_dtype.itemsize, self.accumulate_dtype.itemsize)

    def steps(self, way: Way) -> Iterator[Step]:
        """Yield the launches of forward and backward."""
        e, s, w = (t.itemsize for t in (self.dtype, self.slab_dtype, self.weight_dtype))
        g, h, wide = self._sum_bytes(way), self.hidden_dtype.itemsize, self.wide.itemsize
        W, H, L = self.V * self.D, self.N * self.D, self.N * self.V
        product = 2.0 * self.N * self.D * self.V
        chunks = _ceil(self.N, way.rows)
        now = np.where(way.in_forward, 1.0, 0.0) * any(self.wants)
        yield Step("logits", chunks * W * e + H * e + L * s, product, chunks)
        yield Step("rows", L * s + L * e * now, 0, chunks)
        teachers = self.teacher_width / self.D  # its product, as a share of one
        if self.teacher_width:
            moved = (chunks * W * teachers + H * teachers) * e + 2 * L * self.teacher_bytes
            yield Step("logits of the teacher", moved, product * teachers, chunks)
        if not any(self.wants):
            return
        summed, kept = way.summed / max(self.V, 1), way.kept / max(self.V, 1)
        copied = np.where(way.kept < self.V, kept, 0.0)  # a slab of all logits is kept as it is
        yield Step("keep logits", 2 * L * s * copied, 0, chunks * (copied > 0))

        later = np.where(way.in_forward, 0.0, way.finished / max(self.N, 1))  # share of rows that are made again
        done = now + later
        yield Step("logits of rows again", (chunks * W * e + H * e + L * s) * later, product * later, chunks * later)
        yield Step("rows backward", L * (s + e) * later, 0, chunks * later)
        if self.wants[0]:
            moved = (L * e + chunks * W * e + H * h) * done
            yield Step("d_hidden of rows", moved, product * done, chunks * done)
            wider = self.ranks and h < wide
            moved = H * (h + wide) if wider else 2 * H * h * self.divides_late
            yield Step("scale d_hidden", moved * now, 0, now)
        if self.wants[1]:
            some = summed > 0
            moved = L * e * summed + H * e * some + (2 * chunks - 1) * W * g * summed
            yield Step("sum d_weight", moved, product * summed, chunks * some)
            separate = self.separate(way) * 1.0
            moved = W * (g + w) * summed * np.where(way.in_forward & self.divides_late, 1.0, separate)
            yield Step("scale d_weight", moved, 0, some * np.where(way.in_forward, 1.0, separate))

        share = self.column_share(way)
        new, slabs = share - kept, self.column_slabs(way)
        parts = slabs + self.kept_slabs(way)
        if self.teacher_width:
            times = later + share
            moved = (chunks * W * later + W * share + H * times) * teachers * e + 2 * L * times * self.teacher_bytes
            yield Step("logits of the teacher again", moved, product * times * teachers, chunks * later + slabs)
        yield Step("logits of columns again", W * e * new + slabs * H * e + L * s * new, product * new, slabs)
        yield Step("columns backward", L * (s + e) * share, 0, parts)
        if self.wants[1]:
            moved = L * e * share + parts * H * e + W * share * (2 * g if self.into else w)
            yield Step("d_weight of columns", moved, product * share, parts)
        if self.wants[0]:
            rest = np.where(way.in_forward, 0.0, 1.0 - way.finished / max(self.N, 1))
            summing = rest * (self.hidden_sums(way) > 0)
            moved = L * e * rest + parts * W / np.maximum(parts, 1) * e * (rest > 0) + H * h * (rest - summing)
            moved = moved + (2 * parts - 1) * H * wide * summing
            yield Step("d_hidden of columns", moved, product * rest, parts * (rest > 0))
            yield Step("cast d_hidden", H * (wide + h) * summing, 0, summing > 0)

    def column_slabs(self, way: Way) -> Any:
        """Return the number of slabs that the column stage makes again."""
        new = np.where(self.column_share(way) > 0, self.V - way.summed * self.wants[1] - way.kept, 0)
        return _ceil(new, way.columns)

    def kept_slabs(self, way: Way) -> Any:
        """Return the number of slabs in which the column stage goes through logits that were kept."""
        return np.where(way.kept >= self.V, way.kept > 0, _ceil(way.kept, way.columns))

    def hidden_sums(self, way: Way) -> Any:
        """Return the bytes of the float32 sum of d_hidden that the column stage fills."""
        rest = np.where(way.in_forward, 0, self.N - way.finished) * self.wants[0]
        once = self.column_slabs(way) + self.kept_slabs(way) <= 1
        needed = ~once & (self.hidden_dtype != self.wide)
        return np.where(needed, rest * self.D * self.wide.itemsize, 0)

    def slab_bytes(self, way: Way) -> tuple[Any, Any]:
        """Return the bytes of the row stage's slab, and of the column stage's."""
        rows = np.minimum(way.rows, self.N) * self.row_width * self.logit_bytes
        width = np.where(way.columns >= self.V, self.row_width, way.columns)
        return rows, np.where(self.column_slabs(way) > 0, self.N * width * self.logit_bytes, 0)

    def held_bytes(self, way: Way) -> Any:
        """Return the most bytes held at a time, less those of the inputs and of the gradients that are returned.

        A gradient that is returned but not made yet leaves its bytes to others.
        """
        rows_slab, columns_slab = self.slab_bytes(way)
        rows_of_slab = np.minimum(way.rows, self.N)
        rows_scratch = self._scratch(rows_of_slab, self.V)
        numbers, of_chunk = self._row_numbers(way)
        # The bias has a gradient and a chunk's part of it.
        numbers = numbers + self.held + 2 * self.V * self.wide.itemsize * self.wants[2] + SCALARS
        numbers = numbers + self._flags(rows_of_slab)
        rows_scratch = rows_scratch + of_chunk
        casts = self._casts(rows_of_slab, self.V)
        if not any(self.wants):
            return numbers + rows_slab + np.maximum(rows_scratch, casts)
        h, g = self.hidden_dtype.itemsize, self._sum_bytes(way)
        whole, separate = way.kept >= self.V, self.separate(way)
        kept = np.where(whole, 0, self.N * way.kept * self.slab_dtype.itemsize)
        sums = way.summed * self.D * g * self.wants[1]
        own_sums = np.where(separate, sums, 0)
        d_hidden = self.N * self.D * h * self.wants[0]
        d_weight = self.V * self.D * self.weight_dtype.itemsize * (self.wants[1] and not self.into)
        room = np.where(separate, d_weight, 0)
        ranks = self.N * self.D * self.wide.itemsize * (self.ranks and self.wants[0] and self.hidden_dtype != self.wide)
        unrounded = ranks - d_hidden * (ranks > 0)  # instead of what is returned, until both are there for the cast
        hidden_sums = 0 if ranks else self.hidden_sums(way)
        finishing = way.in_forward | (way.finished > 0)
        working = kept + rows_scratch
        looking = rows_slab // self.logit_bytes * (self.slab_dtype.itemsize + self.teacher_bytes)
        looking = looking + np.maximum(casts - rows_scratch, 0) - room - d_hidden  # for peak and total
        making = rows_slab + own_sums - room + self._rows_product(way)
        at_once = way.in_forward & (way.rows >= self.N)  # no gradient is made before the only chunk's results
        forward = np.where(at_once, kept + making, working + np.where(way.in_forward, making, looking))
        forward = np.maximum(forward, np.where(at_once, working + rows_slab + casts - d_hidden - d_weight, 0))
        finished_slab = np.minimum(way.rows, way.finished) * self.row_width * self.logit_bytes
        again = working + finished_slab + own_sums - room + hidden_sums + self._rows_product(way)
        again = np.where(~way.in_forward & finishing, again, 0)
        columns = columns_slab + np.where(whole, rows_slab, kept) + hidden_sums + self._columns_product(way)
        columns = columns - np.where(finishing, 0, d_hidden * (hidden_sums > 0))
        columns = columns + self._scratch(self.N, np.where(whole, self.V, np.minimum(way.columns, self.V)))
        columns = np.where(self.column_share(way) > 0, columns, 0)
        most = own_sums + kept  # while the sums are scaled
        for held in (again, columns, hidden_sums):
            most = np.maximum(most, held)
        casting = np.where(way.in_forward, kept + own_sums - room, 0) + ranks
        early = np.maximum(forward + unrounded, most)
        late = np.maximum(forward, most + unrounded)
        return numbers + np.maximum(np.where(way.in_forward, early, late), casting)

    def _rows_product(self, way: Way) -> Any:
        """Return the bytes of products that cannot be written where they belong, in the row stage."""
        e, low = self.dtype.itemsize, self.dtype != self.wide
        several = way.rows < self.N
        took = 0 * way.rows
        if low and self.accumulate_dtype == self.wide and self.wants[1]:
            if not self.float32_products:
                took = way.summed * self.D * e * ~self.single(way)
            elif not self.float32_sums:
                took = several * way.summed * self.D * self.wide.itemsize
        if low and not self.float32_products and self.hidden_dtype != self.dtype and self.wants[0]:
            took = np.maximum(took, way.rows * self.D * e)
        return np.maximum(took, self._casts(way.rows, self.V))

    def _columns_product(self, way: Way) -> Any:
        """Return the bytes of products that cannot be written where they belong, in the column stage."""
        e, wide, low = self.dtype.itemsize, self.wide.itemsize, self.dtype != self.wide
        width = np.where(way.kept >= self.V, self.V, way.columns)
        width = np.minimum(width, self.V - way.summed)
        took = 0 * way.rows
        if self.wants[1] and self.is_half and not self.per_token:
            rounded = 0 if self.float32_products else e
            took = np.where(way.in_forward, width * self.D * (wide + rounded), took)
        direct = self.weight_dtype == self.dtype and not self.into
        if low and not self.float32_products:
            took = np.maximum(took, 0 if direct or not self.wants[1] else width * self.D * e)
            took = np.maximum(took, np.where(self.hidden_sums(way) > 0, self.N * self.D * e, 0))
        elif low and not self.float32_sums:
            took = np.maximum(took, width * self.D * wide if self.into and self.wants[1] else 0)
            took = np.maximum(took, np.where(self.hidden_sums(way) > 0, self.N * self.D * wide, 0))
        return np.maximum(took, self._casts(self.N, width))

    def _casts(self, rows: Any, columns: Any) -> Any:
        """Return the bytes of float32 copies for logits that a device cannot make of low precision."""
        teachers = (rows + columns) * self.teacher_width * self.teacher_cast
        if self.slab_dtype == self.dtype or self.float32_products:
            return teachers
        return np.maximum(teachers, (rows + columns) * self.D * self.slab_dtype.itemsize)

    def _flags(self, rows: Any) -> Any:
        """Return the bytes that say which groups of columns a filter keeps: as written, padded, and by blocks."""
        blocks = _ceil(rows, GROUP)
        return (rows + blocks * GROUP + blocks) * (self.row_width // GROUP) * (self.filtered and self.kernels)

    def _scratch(self, rows: Any, width: Any) -> Any:
        """Return the bytes that plain torch takes for a block of rows."""
        row = self.wide.itemsize * np.maximum(width, 1)
        return self.blocks * np.minimum(rows, np.maximum(self.threads, self.threads * self.block_bytes // row)) * row


def _ceil(n: Any, parts: Any) -> Any:
    return -(-n // np.maximum(parts, 1))
