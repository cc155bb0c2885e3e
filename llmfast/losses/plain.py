"""Cross-entropy of rows in plain torch, for CPU tensors and any device without Triton.

It is built on softmax, by far the fastest row operation that torch has on a CPU: 13 ms for 1024 x 50257 float32, where
one `exp_` takes 20 and `logsumexp` 27 (two cores, torch 2.13). The functions have the signatures of the Triton
launchers, where `llmfast_kernels.cross_entropy` says what they compute.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast_kernels.terms import GROUP, Partials, Rows, Softmax, Targets, Terms, Upstream

BLOCK_BYTES = 1 << 20  # per thread: several passes over a block of rows stay in its cache


def space(terms: Terms, stats: bool, K: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """Return the memory that the functions take for a block of rows, as fields of `llmfast.losses.ways.Call`.

    Numbers per row have `dtype`.
    """
    smoothed_weights = terms.class_weights is not None and terms.label_smoothing is not None
    buffers = 5 if stats else 1 + (terms.softcap is not None) + smoothed_weights
    per_row = (12 + 7 * dtype.itemsize) * K  # columns and masks of the targets, and numbers of backward
    return {
        "blocks": buffers,
        "block_bytes": BLOCK_BYTES,
        "threads": torch.get_num_threads(),
        "plain_row_bytes": per_row,
    }


class _Weights:
    """The weights a, b and c of `llmfast_kernels.row`, and t per token. None stands for 1, or for no smoothing."""

    def __init__(self, targets: Targets, terms: Terms, V: int, dtype: torch.dtype) -> None:
        classes = targets.classes
        self.counts = classes != terms.ignore_index  # (N, K)
        self.ignored = ~self.counts.any(1)  # (N,)
        self.here = self.counts & (classes >= terms.v_start) & (classes < terms.v_start + V)
        self.columns = torch.where(self.here, classes - terms.v_start, 0).long()  # (N, K)
        # Each row's weights add up to 1, however they are smoothed.
        self.whole = classes.shape[1] == 1 and targets.weights is None and terms.class_weights is None
        self.a = None  # (N, K)
        self.b = None  # (N,)
        if not self.whole or terms.label_smoothing is not None:
            weights = self.counts.to(dtype)
            if targets.weights is not None:
                weights = torch.where(self.counts, targets.weights, 0)  # the weight of an ignored target may be NaN
            if terms.label_smoothing is not None:
                self.b = weights.sum(1) * (terms.label_smoothing / terms.V)
                weights = weights * (1 - terms.label_smoothing)
            if terms.class_weights is not None:
                weights = weights * terms.class_weights[torch.where(self.counts, classes, 0).long()]
            self.a = weights
        self.c = None if terms.class_weights is None else terms.class_weights[terms.v_start : terms.v_start + V]
        self.t = targets.token_weights
        self.terms = terms
        self.V = V

    def mass(self, *, everywhere: bool) -> Tensor | None:
        """Return the weight of logsumexp in the loss, (N,): of the columns here, or of all."""
        if self.whole and (everywhere or self.V == self.terms.V):
            return None
        if self.a is None:
            return self.here[:, 0].to(torch.float32)
        mass = self.a.sum(1) if everywhere else torch.where(self.here, self.a, 0).sum(1)
        if self.b is not None:
            sums = self.terms.class_weight_sums
            mass = mass + self.b * ((self.terms.V if everywhere else self.V) if sums is None else sums[int(everywhere)])
        return mass

    def pull(self, y_below: Tensor, below: Tensor | None, rows: slice) -> Tensor:
        """Return the sum of a x[y] + b sum(c x), (rows,), minus the same sum for the peak.

        `y_below`, (rows, K), and `below`, (rows, V), are x[y] and x minus the peak: a sum of logits would round at
        their size. Only smoothing needs `below`.
        """
        y_below = torch.where(self.here[rows], y_below, 0)
        pull = (y_below if self.a is None else y_below * self.a[rows]).sum(1)
        if self.b is not None and below is not None:
            # In autocast `below @ c` would be rounded; products with `out` are not.
            smoothed = below.sum(1) if self.c is None else torch.mv(below, self.c, out=below.new_empty(len(below)))
            pull = pull + self.b[rows] * smoothed
        return pull

    def subtract(self, d: Tensor, rows: slice) -> None:
        """Subtract the pull's gradient from `d`."""
        if self.b is not None:
            d -= self.b[rows, None] if self.c is None else self.b[rows, None] * self.c
        if self.a is None and self.V == self.terms.V:
            d.scatter_add_(1, self.columns[rows], d.new_full((), -1.0).expand_as(self.columns[rows]))
        else:
            weights = self.here if self.a is None else torch.where(self.here, self.a, 0)
            d.scatter_add_(1, self.columns[rows], -weights[rows].to(d.dtype))


def cross_entropy(
    logits: Tensor,  # (N, V or more)
    targets: Targets,
    terms: Terms,
    *,
    V: int | None = None,  # columns from V on are padding
    stats: bool = False,
    logprobs: bool = False,
    d_logits: Tensor | None = None,  # like `logits`, filled; may be `logits`
    grad_scale: Tensor | None = None,  # ()
    alive: Tensor | None = None,  # (N, columns // GROUP) int8, filled
    threshold: float | None = None,
) -> Rows:
    logits, d_logits = logits[:, :V], None if d_logits is None else d_logits[:, :V]
    N, width = logits.shape
    loss = logits.new_empty(N, dtype=torch.promote_types(logits.dtype, torch.float32))
    peaks, totals = torch.empty_like(loss), torch.empty_like(loss)
    H = torch.empty_like(loss) if stats else None
    best = torch.empty_like(loss, dtype=torch.int64) if stats else None
    each = loss.new_empty(targets.classes.shape) if logprobs else None
    weights = _Weights(targets, terms, width, loss.dtype)
    mass = weights.mass(everywhere=True)
    scaled = [t for t in (weights.t, grad_scale) if t is not None]
    for rows, space in row_blocks(logits, loss.dtype):
        given, own = logits[rows], _of_rows(terms, targets, rows)
        x = read_logits(given, own, space)
        peak = x.amax(1)
        y_below = x.gather(1, weights.columns[rows]) - peak[:, None]
        if best is not None:
            best[rows] = x.argmax(1)
        needs_x = stats or (d_logits is not None and terms.softcap is not None)
        below = None
        if weights.b is not None:
            below = torch.sub(x, peak[:, None], out=None if needs_x else space if x is given else x)
            x = x if needs_x else below  # has the same softmax
        pull = weights.pull(y_below, below, rows)
        del below  # or it would be held during the softmax
        p = torch.softmax(x, 1) if needs_x else _softmax(x, given, None if d_logits is None else d_logits[rows], space)
        largest = p.amax(1)  # 1 / sum(exp(x - peak))
        log_total = -largest.log()
        lse = peak + log_total
        if each is not None:  # not x[y] - lse, which rounds at the size of the logits
            each[rows] = torch.where(weights.here[rows], y_below - log_total[:, None], 0)
        peaks[rows], totals[rows] = peak, largest.reciprocal()
        loss[rows] = add_terms((log_total if mass is None else mass[rows] * log_total) - pull, lse, terms)
        if H is not None:
            H[rows] = log_total - times_where_positive(x - peak[:, None], p).sum(1)
        if d_logits is not None:
            slope = slope_of_lse(None if mass is None else mass[rows], terms, lse)
            if slope is not None:
                p *= slope[:, None]
            weights.subtract(p, rows)
            for factor in scaled:
                p *= factor if factor.dim() == 0 else factor[rows, None]
            through_softcap(p, x, own)
            store_gradient(p, weights.ignored[rows], d_logits[rows])
            if alive is not None and threshold is not None:
                groups = _groups(p) >= threshold
                alive[rows] = F.pad(groups, (0, alive.shape[1] - groups.shape[1]))
        del p  # before the next block's is made
    if weights.t is not None:
        loss *= weights.t
    return empty_where(weights.ignored, Rows(loss, peaks, totals, H, best, each))


def cross_entropy_partials(
    logits: Tensor,  # (N, V or more)
    targets: Targets,
    terms: Terms,
    *,
    V: int | None = None,
    stats: bool = False,
    logprobs: bool = False,
) -> Partials:
    logits = logits[:, :V]
    N, width = logits.shape
    dtype = torch.promote_types(logits.dtype, torch.float32)
    peaks = logits.new_zeros(N, dtype=dtype)
    totals, pulls = torch.zeros_like(peaks), torch.zeros_like(peaks)
    moments = torch.zeros_like(peaks) if stats else None
    best = torch.zeros_like(peaks, dtype=torch.int64) if stats else None
    each = peaks.new_zeros(targets.classes.shape) if logprobs else None
    weights = _Weights(targets, terms, width, dtype)
    for rows, space in row_blocks(logits, dtype):
        given = logits[rows]
        x = read_logits(given, _of_rows(terms, targets, rows), space)
        peak, where = x.max(1)
        finite = peak.clamp(min=torch.finfo(dtype).min)
        below = torch.sub(x, finite[:, None], out=space if x is given else x)
        y_below = below.gather(1, weights.columns[rows])
        pulls[rows] = weights.pull(y_below, below, rows)
        peaks[rows] = finite
        exponentials = below.exp_() if moments is None else below.exp()
        totals[rows] = exponentials.sum(1)
        if moments is not None:
            moments[rows] = times_where_positive(below, exponentials).sum(1)
        if each is not None:
            each[rows] = torch.where(weights.here[rows], y_below, 0)
        if best is not None:
            best[rows] = where + terms.v_start
    mass = weights.mass(everywhere=False)
    mass = torch.ones_like(peaks) if mass is None else mass.to(dtype)
    for t in (peaks, totals, moments, pulls, mass):
        if t is not None:
            t.masked_fill_(weights.ignored, 0.0)
    return Partials(peaks, totals, moments, pulls, mass, best, each)


def cross_entropy_backward(
    logits: Tensor,  # (N, V or more)
    targets: Targets,
    terms: Terms,
    softmax: Softmax,
    upstream: Upstream,
    *,
    V: int | None = None,
    d_logits: Tensor,  # like `logits`, filled; may be `logits`
) -> None:
    (peak, total, entropy, _), (d_loss, d_lse, d_entropy) = softmax, upstream
    logits, d_logits = logits[:, :V], d_logits[:, :V]
    weights = _Weights(targets, terms, logits.shape[1], peak.dtype)
    mass = weights.mass(everywhere=True)
    log_total = total.log()
    d_row = d_loss if weights.t is None else d_loss * weights.t
    for rows, space in row_blocks(logits, peak.dtype):
        given, own = logits[rows], _of_rows(terms, targets, rows)
        x = read_logits(given, own, space)
        needs_x = d_entropy is not None or terms.softcap is not None
        if logits.shape[1] == terms.V:
            # Again: faster than exp(x - peak) / total.
            p = torch.softmax(x, 1) if needs_x else _softmax(x, given, d_logits[rows], space)
        else:
            p = torch.sub(x, peak[rows, None], out=None if needs_x else space).sub_(log_total[rows, None]).exp_()
        extra = None
        if d_entropy is not None and entropy is not None:
            extra = (x - peak[rows, None]).add_((entropy - log_total)[rows, None])
            extra = times_where_positive(extra, p).mul_(-d_entropy[rows, None])
        slope = slope_of_lse(None if mass is None else mass[rows], terms, (peak + log_total)[rows])
        if d_lse is None:
            if slope is not None:
                p *= slope[:, None]
            weights.subtract(p, rows)
            p *= d_row[rows, None]
        else:
            pulls = torch.zeros_like(p)
            weights.subtract(pulls, rows)
            factor = d_row[rows] if slope is None else d_row[rows] * slope
            p *= (factor + d_lse[rows])[:, None]
            p += pulls.mul_(d_row[rows, None])
            del pulls
        if extra is not None:
            p += extra
        through_softcap(p, x, own)
        store_gradient(p, weights.ignored[rows], d_logits[rows])
        del p, extra  # before the next block's are made


def count_above(logits: Tensor, keys: Tensor, terms: Terms, *, V: int) -> Tensor:
    logits, terms = logits[:, :V], replace(terms, softcap=None)
    counts = torch.empty(keys.shape, dtype=torch.int64, device=keys.device)
    for rows, space in row_blocks(logits, keys.dtype):
        x = read_logits(logits[rows], terms, space)
        for k in range(keys.shape[1]):
            counts[rows, k] = (x > keys[rows, k, None]).sum(1)
    return counts


def add_terms(loss: Tensor, lse: Tensor, terms: Terms) -> Tensor:
    """Add the terms that depend on logsumexp alone; `slope_of_lse` has their derivative."""
    return loss if terms.z_loss is None else loss + terms.z_loss * lse * lse


def empty_where(ignored: Tensor, rows: Rows) -> Rows:
    """Set the results of ignored rows to what `Rows` says, in place."""
    for t, value in ((rows.loss, 0), (rows.peak, 0), (rows.total, 1), (rows.entropy, 0), (rows.argmax, -1)):
        if t is not None:
            t.masked_fill_(ignored, value)
    return rows


def scale(x: Tensor, factor: Tensor, *, out: Tensor | None = None, add: bool = False) -> Tensor:
    """Put factor * x into `out` (or add it there), or over `x`. Zeros stay zeros: see `times`.

    `x` may be written over in any case.
    """
    if x.is_cpu and math.isfinite(number := factor.item()):  # on a CPU looking is cheaper than two more passes
        if number != 1:
            x.mul_(number)
        if out is None:
            return x
        return out.add_(x) if add else out.copy_(x)  # faster than a product into another dtype
    product = times(x, factor)
    if out is None:
        return x.copy_(product)
    return out.add_(product) if add else out.copy_(product)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """Return x * factor. Zeros stay zeros: an ignored row has no gradient, even if upstream is infinite or NaN."""
    return torch.where(x == 0, x, x * factor)


def row_blocks(logits: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Cut rows into blocks, each with space for itself in `dtype`.

    All share the space: new memory costs more than the arithmetic.
    """
    N, V = logits.shape
    threads = torch.get_num_threads()
    step = max(threads, threads * BLOCK_BYTES // (dtype.itemsize * max(V, 1)))  # each row is one thread's
    space = logits.new_empty(min(step, N), V, dtype=dtype)
    return ((slice(start, min(start + step, N)), space[: N - start]) for start in range(0, N, step))


def _of_rows(terms: Terms, targets: Targets, rows: slice) -> Terms:
    """Return the terms of some rows, whose temperatures, (rows, 1), are part of scale and cap."""
    if targets.temperatures is None:
        return terms
    factor: Any = targets.temperatures[rows, None].reciprocal()
    scale, cap = (None if value is None else value * factor for value in (terms.logit_scale, terms.softcap))
    return replace(terms, logit_scale=factor if scale is None else scale, softcap=cap)


def read_logits(given: Tensor, terms: Terms, space: Tensor) -> Tensor:
    """Return the final logits of a block, or `given` itself if nothing changes it."""
    return final_logits(given if given.dtype == space.dtype else space.copy_(given), terms.bias, terms, out=space)


def final_logits(x: Tensor, bias: Tensor | None, terms: Terms, *, out: Tensor | None = None) -> Tensor:
    """Return softcap(logit_scale * (x + bias)), in `out` or new, or `x` itself if nothing changes it."""
    if bias is not None:
        x = torch.add(x, bias, out=out)
    if terms.logit_scale is not None:
        x = torch.mul(x, terms.logit_scale, out=out)
    return x if terms.softcap is None else torch.div(x, terms.softcap, out=out).tanh_().mul_(terms.softcap)


def through_softcap(d: Tensor, x: Tensor, terms: Terms) -> None:
    """Turn the gradient of the final logits `x` into that of the given ones, in place. `x` is written over."""
    if terms.softcap is not None:
        d *= x.div_(terms.softcap).square_().neg_().add_(1)
    if terms.logit_scale is not None:
        d *= terms.logit_scale


def times_where_positive(x: Tensor, p: Tensor) -> Tensor:
    """Multiply `x` by `p` in place. Where `p` is 0, where `x` may be infinite, the product is 0."""
    return x.mul_(p).masked_fill_((p > 0).logical_not_(), 0.0)


def slope_of_lse(mass: Tensor | None, terms: Terms, lse: Tensor) -> Tensor | None:
    """Return the derivative of the loss with respect to logsumexp, (rows,); None for 1."""
    if terms.z_loss is None:
        return mass
    return (1.0 if mass is None else mass) + 2.0 * terms.z_loss * lse


def _softmax(x: Tensor, given: Tensor, d_logits: Tensor | None, space: Tensor) -> Tensor:
    """Compute the softmax of the block `x`, in the gradient's buffer if it has the same dtype; else over `x`."""
    if d_logits is not None and d_logits.dtype == x.dtype:
        return torch.softmax(x, 1, out=d_logits)
    return torch.softmax(x, 1, out=space if x is given else x)


def _groups(d: Tensor) -> Tensor:
    """Return the largest absolute value of each group of GROUP columns."""
    whole = d.shape[1] // GROUP * GROUP
    parts = d[:, :whole].unflatten(1, (-1, GROUP)), d[:, None, whole:]
    return torch.cat([torch.maximum(t.amax(2), -t.amin(2)) for t in parts if t.numel() > 0], 1)


def store_gradient(p: Tensor, ignored: Tensor, d_logits: Tensor) -> None:
    """Copy the gradient `p` of a block to where it belongs, with zeros for ignored rows."""
    if not p.is_cpu or ignored.any():  # on a CPU looking is cheaper than a pass over all of p
        p.masked_fill_(ignored[:, None], 0.0)
    if p.data_ptr() != d_logits.data_ptr():
        d_logits.copy_(p)
