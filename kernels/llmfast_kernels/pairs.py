"""The parts of the kernels over pairs of rows, a student's and a teacher's: reading, running sums, and gradient.

Exponents and log-probabilities are base 2. What `row.py` says of peaks holds for both rows. u is the student's logit
less the peak, over the temperature, s its log-probability and q its probability. w is the same of the teacher's logit
while rows are folded, later its log-probability, and p its probability.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from llmfast_kernels import row as parts
from llmfast_kernels.teaching import TAUGHT

FORWARD_KL: tl.constexpr = tl.constexpr(0)
REVERSE_KL: tl.constexpr = tl.constexpr(1)
MIXED: tl.constexpr = tl.constexpr(2)
CROSS_ENTROPY: tl.constexpr = tl.constexpr(3)  # forward KL without the entropy of p; p may be any numbers
NUMBERS: tl.constexpr = tl.constexpr(TAUGHT)


class Weights(NamedTuple):
    """The numbers of `Divergence`, for kernels."""

    soft: Any
    hard: Any  # or None
    beta: Any  # None unless MIXED
    inverse: Any  # 1 / temperature, or None for 1
    temperature: Any  # or None for 1
    temperatures: Any = None  # (N,) f32, one for each row instead; or None


class Given(NamedTuple):
    """A teacher's rows, and what is applied to them: three terms to logits, and three others to probabilities."""

    ptr: Any  # (N, V) logits or probabilities
    bias: Any  # (V,), or None
    logit_scale: Any  # or None
    softcap: Any  # or None
    class_weights: Any  # (V,) f32 of the columns here, or None
    share: Any  # 1 - label_smoothing, or None for 1
    spread: Any  # label_smoothing / V, or None for 0


class Pair(NamedTuple):
    """Each thread's folded part of two rows, (THREADS,) each."""

    peak: Any  # of the student
    total: Any
    untempered: Any  # sum of its exponentials without temperature
    teacher_peak: Any
    teacher_total: Any
    moment: Any  # sum of probability times difference of logits: the divergence, but for the totals


class Frame(NamedTuple):
    """Numbers that turn the logits of two rows into log-probabilities in base 2."""

    peak: Any
    log_total: Any  # base 2
    teacher_peak: Any
    teacher_log_total: Any  # base 2


class Slopes(NamedTuple):
    """Coefficients of a row's gradient, see `gradient`."""

    centre: Any
    factor: Any
    hard_factor: Any  # or None
    hard_log_total: Any  # base 2


class Target(NamedTuple):
    """The target of one row, (1,) each."""

    column: Any  # outside of the row if it is not to be written
    x: Any  # its logit
    t: Any  # the teacher's logit or probability of it


@triton.jit
def of_row(weights, n):
    """Return the weights of row `n`, whose temperature may be its own."""
    if weights.temperatures is not None:
        temperature = tl.load(weights.temperatures + n)
        weights = Weights(weights.soft, weights.hard, weights.beta, 1.0 / temperature, temperature, None)
    return weights


@triton.jit
def exponent_scale(weights):
    """Return what turns a logit into an exponent of base 2."""
    scale = parts.LOG2E
    if weights.inverse is not None:
        scale *= weights.inverse
    return scale


@triton.jit
def fall(before, after, scale):
    """Return the change, 0 or less, of the exponents of sums whose peak rises from `before` to `after`.

    Divergences add it up, so it is finite: threads that have folded nothing multiply it by 0.
    """
    return tl.maximum((before - after) * scale, -1.0e35)  # finite also times the sum of a thread


@triton.jit
def soft_factor(weights, KIND: tl.constexpr):
    """Return what multiplies the gradient of the divergence."""
    factor = weights.soft
    if weights.inverse is not None:
        factor *= weights.inverse
    if KIND == MIXED:
        factor *= 1.0 - weights.beta
    return factor


@triton.jit
def read_teacher(taught, v, inside, PROBABILITIES: tl.constexpr):
    """Return the teacher's logits or probabilities of columns `v`; lanes that the mask leaves out are undefined."""
    if PROBABILITIES:
        t = tl.load(taught.logits + v, mask=inside).to(tl.float32)
        if taught.terms.share is not None:
            t = tl.fma(t, taught.terms.share, taught.terms.spread)
        if taught.terms.class_weights is not None:
            t *= tl.load(taught.terms.class_weights + v, mask=inside)
    else:
        t = parts.read_logits(taught, v, inside, inside)
    return t


@triton.jit
def fold_pair(
    row,
    taught,
    start,
    running,
    weights,
    KIND: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return `running` with the tiles of both rows at `start` folded in, as `parts.fold_tile` does for one."""
    v = start + tl.arange(0, BLOCK_V)
    readable = v < row.width if TAIL else None
    inside = v < row.V if TAIL else None
    x = parts.read_logits(row, v, readable, inside)
    t = read_teacher(taught, v, inside, PROBABILITIES)
    if TAIL:
        x = tl.where(inside, x, float("-inf"))
        t = tl.where(inside, t, 0.0 if PROBABILITIES else float("-inf"))
    THREADS: tl.constexpr = running.peak.shape[0]
    ROUNDS: tl.constexpr = BLOCK_V // (THREADS * VECTOR)
    x = tl.reshape(x, (ROUNDS, THREADS, VECTOR))
    t = tl.reshape(t, (ROUNDS, THREADS, VECTOR))

    scale = exponent_scale(weights)
    peak = tl.maximum(running.peak, tl.max(tl.max(x, axis=2), axis=0))
    u = parts.exponent(x, peak[None, :, None], scale)
    e = tl.exp2(u)
    shift = fall(running.peak, peak, scale)
    rescale = tl.exp2(shift)
    total = running.total * rescale + tl.sum(tl.sum(e, axis=2), axis=0)
    untempered = running.untempered
    if weights.hard is not None and weights.temperature is not None:
        more = tl.sum(tl.sum(tl.exp2(u * weights.temperature), axis=2), axis=0)
        untempered = untempered * tl.exp2(shift * weights.temperature) + more
    teacher_peak = running.teacher_peak
    if PROBABILITIES:
        p = t
        w = tl.log2(t)
    else:
        teacher_peak = tl.maximum(teacher_peak, tl.max(tl.max(t, axis=2), axis=0))
        w = parts.exponent(t, teacher_peak[None, :, None], scale)
        p = tl.exp2(w)
    teacher_shift = fall(running.teacher_peak, teacher_peak, scale)
    teacher_rescale = tl.exp2(teacher_shift)
    teacher_total = running.teacher_total * teacher_rescale + tl.sum(tl.sum(p, axis=2), axis=0)
    moment = running.moment
    if KIND == FORWARD_KL:
        more = tl.sum(tl.sum(tl.where(p > 0, p * (w - u), 0.0), axis=2), axis=0)
        moment = teacher_rescale * tl.fma(teacher_shift - shift, running.teacher_total, moment) + more
    if KIND == CROSS_ENTROPY:
        more = tl.sum(tl.sum(tl.where(p != 0, p * -u, 0.0), axis=2), axis=0)
        moment = tl.fma(-shift, running.teacher_total, moment) + more
    if KIND == REVERSE_KL:
        more = tl.sum(tl.sum(tl.where(e > 0, e * (u - w), 0.0), axis=2), axis=0)
        moment = rescale * tl.fma(shift - teacher_shift, running.total, moment) + more
    return Pair(peak, total, untempered, teacher_peak, teacher_total, moment)


@triton.jit
def log_probabilities(x, t, frame, weights, PROBABILITIES: tl.constexpr):
    """Return the log-probabilities of both in base 2, and the teacher's probabilities."""
    scale = exponent_scale(weights)
    s = parts.exponent(x, frame.peak, scale) - frame.log_total
    if PROBABILITIES:
        w = tl.log2(t)
        p = t
    else:
        w = parts.exponent(t, frame.teacher_peak, scale) - frame.teacher_log_total
        p = tl.exp2(w)
    return s, w, p


@triton.jit
def fold_mixture(
    row,
    taught,
    start,
    theirs,
    own,
    frame,
    weights,
    PROBABILITIES: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return the sums of p log2(p / m) and q log2(q / m) with those of the tiles at `start`."""
    v = start + tl.arange(0, BLOCK_V)
    readable = v < row.width if TAIL else None
    inside = v < row.V if TAIL else None
    x = parts.read_logits(row, v, readable, inside)
    t = read_teacher(taught, v, inside, PROBABILITIES)
    if TAIL:
        x = tl.where(inside, x, float("-inf"))
        t = tl.where(inside, t, 0.0 if PROBABILITIES else float("-inf"))
    s, w, p = log_probabilities(x, t, frame, weights, PROBABILITIES)
    q = tl.exp2(s)
    m = tl.fma(weights.beta, p, (1.0 - weights.beta) * q)
    log_m = tl.log2(m)
    THREADS: tl.constexpr = own.shape[0]
    ROUNDS: tl.constexpr = BLOCK_V // (THREADS * VECTOR)
    one = tl.reshape(tl.where((p > 0) & (m > 0), p * (w - log_m), 0.0), (ROUNDS, THREADS, VECTOR))
    other = tl.reshape(tl.where((q > 0) & (m > 0), q * (s - log_m), 0.0), (ROUNDS, THREADS, VECTOR))
    return theirs + tl.sum(tl.sum(one, axis=2), axis=0), own + tl.sum(tl.sum(other, axis=2), axis=0)


@triton.jit
def gradient(x, t, frame, slopes, weights, terms, KIND: tl.constexpr, PROBABILITIES: tl.constexpr):
    """Return the gradient of the given logits without the target's own part.

    That of the divergence is q centre - p, q (log(q / p) - centre) or, but for a factor, q (log(q / m) - centre).
    """
    s, w, p = log_probabilities(x, t, frame, weights, PROBABILITIES)
    q = tl.exp2(s)
    if KIND == REVERSE_KL:
        d = tl.where(q > 0, q * tl.fma(s - w, parts.LN2, -slopes.centre), 0.0)
    elif KIND == MIXED:
        m = tl.fma(weights.beta, p, (1.0 - weights.beta) * q)
        d = tl.where((q > 0) & (m > 0), q * tl.fma(s - tl.log2(m), parts.LN2, -slopes.centre), 0.0)
    else:
        d = q * slopes.centre - p
    d *= slopes.factor
    if slopes.hard_factor is not None:
        if weights.temperature is not None:
            q = tl.exp2(tl.fma(s + frame.log_total, weights.temperature, -slopes.hard_log_total))
        d += slopes.hard_factor * q
    return parts.through_softcap(d, x, terms)


@triton.jit
def store_gradient(
    row,
    taught,
    start,
    d_logits,
    frame,
    slopes,
    weights,
    KIND: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the gradient of the tile at `start`, without the target's own part; zeros from V on."""
    v = start + tl.arange(0, BLOCK_V)
    readable = v < row.width if TAIL else None
    inside = v < row.V if TAIL else None
    x = parts.read_logits(row, v, readable, inside)
    t = read_teacher(taught, v, inside, PROBABILITIES)
    d = gradient(x, t, frame, slopes, weights, row.terms, KIND=KIND, PROBABILITIES=PROBABILITIES)
    if TAIL:
        d = tl.where(inside, d, 0.0)
    tl.store(d_logits + v, d.to(d_logits.dtype.element_ty), mask=readable)


@triton.jit
def store_gradients(
    row,
    taught,
    d_logits,
    frame,
    slopes,
    weights,
    KIND: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the gradient of a row, without the target's own part."""
    full = row.V // BLOCK_V * BLOCK_V
    # Go through the rows backwards, because the caches still hold what was read last.
    if full < row.width:
        store_gradient(
            row,
            taught,
            full,
            d_logits,
            frame,
            slopes,
            weights,
            KIND=KIND,
            PROBABILITIES=PROBABILITIES,
            TAIL=True,
            BLOCK_V=BLOCK_V,
        )
    for done in range(BLOCK_V, full + BLOCK_V, BLOCK_V):
        store_gradient(
            row,
            taught,
            full - done,
            d_logits,
            frame,
            slopes,
            weights,
            KIND=KIND,
            PROBABILITIES=PROBABILITIES,
            TAIL=False,
            BLOCK_V=BLOCK_V,
        )


@triton.jit
def store_target_gradient(
    row, target, d_logits, frame, slopes, weights, KIND: tl.constexpr, PROBABILITIES: tl.constexpr
):
    """Write the target's gradient, with its own part, over what the tiles have stored there."""
    d = gradient(target.x, target.t, frame, slopes, weights, row.terms, KIND=KIND, PROBABILITIES=PROBABILITIES)
    d -= parts.through_softcap(tl.zeros_like(target.x) + slopes.hard_factor, target.x, row.terms)
    tl.debug_barrier()  # other threads stored that tile
    here = (target.column >= 0) & (target.column < row.V)
    tl.store(d_logits + target.column, d.to(d_logits.dtype.element_ty), mask=here)


@triton.jit
def fold_pairs(
    row,
    taught,
    weights,
    THREADS: tl.constexpr,
    KIND: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return each thread's part of both rows."""
    full = row.V // BLOCK_V * BLOCK_V  # the whole tiles end here
    zeros = tl.zeros((THREADS,), tl.float32)
    lowest = tl.full((THREADS,), parts.LOWEST, tl.float32)
    running = Pair(lowest, zeros, zeros, zeros if PROBABILITIES else lowest, zeros, zeros)
    for start in range(0, full, BLOCK_V):
        running = fold_pair(
            row,
            taught,
            start,
            running,
            weights,
            KIND=KIND,
            PROBABILITIES=PROBABILITIES,
            TAIL=False,
            BLOCK_V=BLOCK_V,
            VECTOR=VECTOR,
        )
    if full < row.V:
        running = fold_pair(
            row,
            taught,
            full,
            running,
            weights,
            KIND=KIND,
            PROBABILITIES=PROBABILITIES,
            TAIL=True,
            BLOCK_V=BLOCK_V,
            VECTOR=VECTOR,
        )
    return running


@triton.jit
def joined(running, weights, PROBABILITIES: tl.constexpr):
    """Return the two rows' numbers from those of all threads, as a Pair of scalars but for the moments.

    The moments are relative to the rows' peaks, and still one per thread. The teacher's total is 1 for probabilities.
    """
    scale = exponent_scale(weights)
    peak = tl.max(running.peak, axis=0)
    shift = fall(running.peak, peak, scale)
    total = tl.sum(running.total * tl.exp2(shift), axis=0)
    untempered = total
    if weights.hard is not None and weights.temperature is not None:
        untempered = tl.sum(running.untempered * tl.exp2(shift * weights.temperature), axis=0)
    teacher_peak = tl.max(running.teacher_peak, axis=0)
    teacher_shift = fall(running.teacher_peak, teacher_peak, scale)
    teacher_total = tl.sum(running.teacher_total * tl.exp2(teacher_shift), axis=0)
    return Pair(peak, total, untempered, teacher_peak, teacher_total, running.moment)


@triton.jit
def kl_divergence(running, both, weights, KIND: tl.constexpr, PROBABILITIES: tl.constexpr):
    """Return a Kullback-Leibler divergence or a cross-entropy, and what its gradient subtracts."""
    scale = exponent_scale(weights)
    shift = fall(running.peak, both.peak, scale)
    teacher_shift = fall(running.teacher_peak, both.teacher_peak, scale)
    log_total = tl.log2(both.total)
    if KIND != REVERSE_KL:
        moment = tl.fma(teacher_shift - shift, running.teacher_total, running.moment)
        moment = tl.sum(tl.exp2(teacher_shift) * moment, axis=0)
        if PROBABILITIES:  # which need not add up to 1
            centre = both.teacher_total
            soft = tl.fma(centre, log_total, moment) * parts.LN2
        else:
            centre = 1.0
            soft = (moment / both.teacher_total + (log_total - tl.log2(both.teacher_total))) * parts.LN2
    else:
        moment = tl.sum(tl.exp2(shift) * tl.fma(shift - teacher_shift, running.total, running.moment), axis=0)
        soft = moment / both.total - log_total
        if not PROBABILITIES:
            soft += tl.log2(both.teacher_total)
        soft *= parts.LN2
        centre = soft
    return soft, centre


@triton.jit
def mixed_divergence(
    row,
    taught,
    frame,
    weights,
    THREADS: tl.constexpr,
    PROBABILITIES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return the divergence of both rows from their mixture, and what its gradient subtracts."""
    full = row.V // BLOCK_V * BLOCK_V
    theirs = tl.zeros((THREADS,), tl.float32)
    own = tl.zeros((THREADS,), tl.float32)
    for start in range(0, full, BLOCK_V):
        theirs, own = fold_mixture(
            row,
            taught,
            start,
            theirs,
            own,
            frame,
            weights,
            PROBABILITIES=PROBABILITIES,
            TAIL=False,
            BLOCK_V=BLOCK_V,
            VECTOR=VECTOR,
        )
    if full < row.V:
        theirs, own = fold_mixture(
            row,
            taught,
            full,
            theirs,
            own,
            frame,
            weights,
            PROBABILITIES=PROBABILITIES,
            TAIL=True,
            BLOCK_V=BLOCK_V,
            VECTOR=VECTOR,
        )
    centre = tl.sum(own, axis=0) * parts.LN2
    return weights.beta * (tl.sum(theirs, axis=0) * parts.LN2) + (1.0 - weights.beta) * centre, centre


@triton.jit
def store_ignored(row, n, rows, d_logits_ptr, d_logits, BLOCK_V: tl.constexpr):
    """Write the results of an ignored row: a total of 1, all else 0."""
    tl.store(rows.loss + n, 0.0)
    tl.store(rows.peak + n, 0.0)
    tl.store(rows.total + n, 1.0)
    tl.store(rows.taught + n * NUMBERS + tl.arange(0, NUMBERS), tl.zeros((NUMBERS,), tl.float32))
    if d_logits_ptr is not None:
        out = parts.Gradient(d_logits, None, None)
        full = row.V // BLOCK_V * BLOCK_V
        for start in range(0, full, BLOCK_V):
            parts.store_zeros(row, start, out, TAIL=False, BLOCK_V=BLOCK_V)
        parts.store_zeros(row, full, out, TAIL=True, BLOCK_V=BLOCK_V)
