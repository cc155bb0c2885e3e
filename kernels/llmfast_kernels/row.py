"""The parts of the row kernels: reading a row, its targets, the running sums over it, and its gradient.

A row's logits are x = softcap(logit_scale * (given + bias)), its targets y_k weigh w_k, and its loss is

    token_weight * (sum_k a_k (lse - x[y_k]) + b sum_v c_v (lse - x_v) + z_loss lse^2)

with a_k = (1 - label_smoothing) w_k c[y_k], b = label_smoothing / V sum_k w_k and class weights c. All of it is linear
in lse and x, so a row needs its peak, the sum of its exponentials, and what pulls the loss down: sum a_k x[y_k] +
b sum c_v x_v. Everything that follows comes from the difference of x and the peak, which is exact where it is small, so
that no logit is too large. lse rounds at the size of the logits, and is made only for the z-loss and for callers that
ask for it. Arithmetic is float32. An option that is not used is a None pointer or scalar, and costs nothing.

Passes over a row work on one tile at a time. Whole tiles carry no mask, so that they load 16 bytes at a time whatever V
is; a tile where the row ends is a TAIL, which does.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from llmfast_kernels import terms as shared

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite, so that a row (or a lane) of -inf logits makes no inf - inf.
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
# Its exponential is 0 as that of -inf is, but 0 * -inf would be NaN.
LOWEST_EXPONENT: tl.constexpr = tl.constexpr(-1000.0)
# Targets that are not classes.
IGNORED: tl.constexpr = tl.constexpr(-2)
UNKNOWN: tl.constexpr = tl.constexpr(-1)
GROUP: tl.constexpr = tl.constexpr(shared.GROUP)


# Arguments of the kernels. The members are pointers or floats: Triton would specialise on an integer in a tuple.


class RowTerms(NamedTuple):
    """Two members of its own, then those of `Terms` that kernels take as they are. What is not used is None."""

    column_weights: Any  # (V,) f32: the class weights of the columns here; None without label smoothing
    temperatures: Any  # (N,) f32
    bias: Any  # (V,)
    class_weights: Any  # (V_total,) f32
    class_weight_sums: Any  # (2,) f32: over the columns here, over all
    label_smoothing: Any
    z_loss: Any
    logit_scale: Any
    softcap: Any


class Gradient(NamedTuple):
    """A place for the gradient of the logits: of all rows in a kernel's argument, of one row within the kernel."""

    d_logits: Any  # (N, row_width); may be the logits
    alive: Any  # (N, row_width // GROUP) int8: groups of columns with a gradient of `threshold` or more; or None
    threshold: Any  # or None


# Records that live within a kernel.


class Row(NamedTuple):
    """One row of logits."""

    logits: Any  # pointer to the first
    terms: Any  # RowTerms
    V: Any  # columns
    width: Any  # columns of the buffer, >= V; those from V on are padding


class OwnTargets(NamedTuple):
    """The targets of one row, (BLOCK_K,) each."""

    y: Any  # classes, UNKNOWN or IGNORED
    column: Any  # where they are in the row; anything outside of it for those that lie elsewhere
    here: Any  # whether they lie in the columns that this program owns
    x: Any  # their logits


class Running(NamedTuple):
    """Each thread's folded part of a row, (THREADS,) each."""

    peak: Any  # max of x
    total: Any  # sum of 2^t with t = (x - peak) log2(e)
    moment: Any  # sum of t 2^t
    pull: Any  # sum of c x
    best: Any  # start of the tile that the peak lies in


class Slopes(NamedTuple):
    """Coefficients of a row's gradient, see `gradient`."""

    peak: Any
    factor: Any
    smooth: Any  # or None
    entropy_factor: Any  # or None
    entropy_shift: Any  # or None


@triton.jit
def known_multiple(x, VECTOR: tl.constexpr):
    """Return x, a multiple of VECTOR, in a form that tells the compiler so."""
    return x // VECTOR * VECTOR


@triton.jit
def put(ptr, n, value):
    """Store row n's number, if there is a place for it."""
    if ptr is not None:
        tl.store(ptr + n, value)


@triton.jit
def put_targets(ptr, n, y, values, K: tl.constexpr):
    """Store a number for each target of row n, NaN for an unknown one, if there is a place for them."""
    if ptr is not None:
        k = tl.arange(0, y.shape[0])
        tl.store(ptr + n * K + k, tl.where(y == UNKNOWN, float("nan"), values), mask=k < K)


@triton.jit
def product(x, factor):
    """Return x * factor, rounded wherever it is computed.

    Compilers join a plain product with a sum that follows, which then sees an unrounded product in one place and a
    rounded one in another. They do not do so with a fused multiply-add, which costs the same.
    """
    return tl.fma(x, factor, 0.0)


@triton.jit
def exponent(x, peak, scale):
    """Return the exponent of x in base 2, where `scale` is log2(e) over the temperature."""
    return (x + -peak) * scale  # with `x - peak`, NVIDIA's assembler spills where many options meet


@triton.jit
def fall(before, after):
    """Return the change, 0 or less, of the exponents of sums whose peak rises from `before` to `after`."""
    return tl.maximum((before - after) * LOG2E, LOWEST_EXPONENT)


@triton.jit
def tanh(x):
    """Return tanh to two or three units in the last place, in half of the instructions of the C library's."""
    square = x * x
    series = tl.fma(square, 62 / 2835, -17 / 315)  # x - x^3 / 3 + ..., where 1 - 2 / (1 + e^2x) cancels
    series = tl.fma(tl.fma(tl.fma(series, square, 2 / 15), square, -1 / 3), square * x, x)
    return tl.where(tl.abs(x) < 0.35, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E))))


@triton.jit
def capped(x, cap, EXACT: tl.constexpr):
    """Return cap * tanh(x / cap), to 1e-6 of it unless EXACT.

    On an H100, the two passes over a logit of 16 bits take memory the time of about 34 instructions, of which 4 can be
    special functions. So here a ratio of polynomials takes one special function where tanh takes two. The ratio
    was fitted to |x / cap| < 8 and is off by 1.5e-7 of its value; the rest is rounding. A logit of 16 bits is known to
    5e-4 of itself at best. Logits of 32 bits take twice the time to move, which is enough for tanh.
    """
    if EXACT:
        y = product(tanh(x * (1.0 / cap)), cap)
    else:
        u = tl.clamp(x * (1.0 / cap), -8.0, 8.0, propagate_nan=tl.PropagateNan.ALL)
        t = u * u
        above = tl.fma(t, 1.14284720e-5, 2.95102875e-3)
        above = tl.fma(tl.fma(above, t, 0.129256678), t, 0.999999855)
        below = tl.fma(tl.fma(t, 2.45922542e-7, 2.38669840e-4), t, 0.0238155751)
        below = tl.fma(tl.fma(below, t, 0.462588835), t, 1.0)
        root = tl.rsqrt(below)  # whose square is cheaper than a quotient
        y = product((u * cap) * above * root, root)
    return y


@triton.jit
def read_logits(row, v, readable, inside):
    """Return x of columns `v`. The masks are None for whole tiles; lanes that they leave out are undefined."""
    x = tl.load(row.logits + v, mask=readable).to(tl.float32)
    if row.terms.bias is not None:
        x += tl.load(row.terms.bias + v, mask=inside).to(tl.float32)
    if row.terms.logit_scale is not None:
        x = product(x, row.terms.logit_scale)
    if row.terms.softcap is not None:
        x = capped(x, row.terms.softcap, EXACT=row.logits.dtype.element_ty.primitive_bitwidth > 16)
    return x


@triton.jit
def terms_of_row(terms, n):
    """Return the terms of row n, whose temperature is part of its scale and cap."""
    logit_scale = terms.logit_scale
    softcap = terms.softcap
    if terms.temperatures is not None:
        factor = 1.0 / tl.load(terms.temperatures + n)
        logit_scale = factor if logit_scale is None else logit_scale * factor
        if softcap is not None:
            softcap *= factor
    return RowTerms(
        column_weights=terms.column_weights,
        temperatures=None,
        bias=terms.bias,
        class_weights=terms.class_weights,
        class_weight_sums=terms.class_weight_sums,
        label_smoothing=terms.label_smoothing,
        z_loss=terms.z_loss,
        logit_scale=logit_scale,
        softcap=softcap,
    )


@triton.jit
def read_column_weights(row, v, inside):
    """Return c of columns `v`, where smoothing needs them."""
    return tl.load(row.terms.column_weights + v, mask=inside) if row.terms.column_weights is not None else 1.0


@triton.jit
def read_targets(n, targets_ptr, V_total, ignore_index, K: tl.constexpr):
    """Return row n's classes, UNKNOWN or IGNORED. Each takes a register for as long as the row does."""
    k = tl.arange(0, triton.next_power_of_2(K))
    y = tl.load(targets_ptr + n * K + k, mask=k < K, other=ignore_index).to(tl.int64)
    known = (y >= 0) & (y < V_total)
    tl.device_assert(known | (y == ignore_index), "cross_entropy: target is neither in [0, V) nor ignore_index")
    return tl.where((y == ignore_index) | (k >= K), IGNORED, tl.where(known, y, UNKNOWN)).to(tl.int32)


@triton.jit
def weigh_targets(n, y, weights_ptr, weights_stride_n, terms, V_total):
    """Return the targets' a_k, the row's b, and 1 (NaN if a target is unknown)."""
    a = tl.where(y != IGNORED, 1.0, 0.0)
    if weights_ptr is not None:
        k = tl.arange(0, y.shape[0])
        a = tl.load(weights_ptr + n * weights_stride_n + k, mask=y != IGNORED, other=0.0)
    b = 0.0
    if terms.label_smoothing is not None:
        b = tl.sum(a, axis=0) * terms.label_smoothing / V_total
        a *= 1.0 - terms.label_smoothing
    if terms.class_weights is not None:
        a *= tl.load(terms.class_weights + y, mask=y >= 0, other=0.0)
    # Without TRITON_DEBUG=1 nothing asserts: the row becomes NaN, which no training loop overlooks.
    sane = tl.where(tl.sum((y == UNKNOWN).to(tl.int32), axis=0) > 0, float("nan"), 1.0)
    return a, b, sane


@triton.jit
def sum_of_class_weights(terms, columns, PLACE: tl.constexpr):
    """Return the sum of c over `columns` classes: those here (PLACE 0) or all (1)."""
    if terms.class_weight_sums is not None:
        return tl.load(terms.class_weight_sums + PLACE)
    else:
        return columns + 0.0


@triton.jit
def add_terms_of_lse(loss, slope, peak, log_total, terms):
    """Add to a row's loss what depends on lse alone, and its derivative to the slope of the loss in lse."""
    if terms.z_loss is not None:
        lse = peak + log_total
        loss += terms.z_loss * lse * lse
        slope += 2.0 * terms.z_loss * lse
    return loss, slope


@triton.jit
def fold_tile(
    row,
    start,
    running,
    TAIL: tl.constexpr,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return `running` with the tile of logits at `start` folded in.

    The reshape follows the order in which a tile lies in the threads' registers: every thread folds its own elements
    and none waits for another inside the loop. Rescaling costs one exponential per thread, not one per element.
    """
    v = start + tl.arange(0, BLOCK_V)
    readable = v < row.width if TAIL else None
    inside = v < row.V if TAIL else None
    x = read_logits(row, v, readable, inside)
    pulled = x * read_column_weights(row, v, inside)
    if TAIL:
        pulled = tl.where(inside, pulled, 0.0)
        x = tl.where(inside, x, float("-inf"))  # after softcap, which would make it finite

    SMOOTH: tl.constexpr = row.terms.label_smoothing is not None  # pyright: ignore[reportAssignmentType]
    THREADS: tl.constexpr = running.peak.shape[0]
    ROUNDS: tl.constexpr = BLOCK_V // (THREADS * VECTOR)
    x = tl.reshape(x, (ROUNDS, THREADS, VECTOR))
    pull = running.pull
    if SMOOTH and not ENTROPY:  # added up first, which takes fewer registers; with the entropy, last
        pull += tl.sum(tl.sum(tl.reshape(pulled, (ROUNDS, THREADS, VECTOR)), axis=2), axis=0)
    tile_peak = tl.max(tl.max(x, axis=0), axis=1)
    best = running.best
    if ARGMAX:
        best = tl.where(tile_peak > running.peak, start, best)
    peak = tl.maximum(running.peak, tile_peak)
    t = exponent(x, peak[None, :, None], LOG2E)
    exponentials = tl.exp2(t)
    shift = fall(running.peak, peak)
    rescale = tl.exp2(shift)
    moment = running.moment
    if ENTROPY:
        t = tl.maximum(t, LOWEST_EXPONENT)
        moment = rescale * tl.fma(shift, running.total, moment) + tl.sum(tl.sum(t * exponentials, axis=2), axis=0)
    total = running.total * rescale + tl.sum(tl.sum(exponentials, axis=2), axis=0)
    if SMOOTH and ENTROPY:
        pull += tl.sum(tl.sum(tl.reshape(pulled, (ROUNDS, THREADS, VECTOR)), axis=2), axis=0)
    return Running(peak, total, moment, pull, best)


@triton.jit
def find_peak(row, running, peak, full, BLOCK_V: tl.constexpr):
    """Return the first column of the largest logit, from one more look at the first tile with that peak."""
    start = tl.min(tl.where(running.peak == peak, running.best, full), axis=0)
    v = start + tl.arange(0, BLOCK_V)
    inside = v < row.V
    x = read_logits(row, v, inside, inside)
    # The tile's own maximum, not `peak`: the same formula may be rounded otherwise here.
    return start + tl.argmax(tl.where(inside, x, float("-inf")), axis=0)


@triton.jit
def through_softcap(d, x, terms):
    """Return the gradient of the given logits from `d`, that of x."""
    if terms.softcap is not None:
        u = x * (1.0 / terms.softcap)
        d *= tl.fma(-u, u, 1.0)
    if terms.logit_scale is not None:
        d *= terms.logit_scale
    return d


@triton.jit
def gradient(x, c, slopes, terms):
    """Return the gradient of the given logits without the targets' own part.

    (factor e + entropy_factor e (t ln(2) + entropy_shift) - smooth c) x', where e = 2^t and t is x's exponent.
    """
    t = exponent(x, slopes.peak, LOG2E)
    e = tl.exp2(t)
    d = e * slopes.factor
    if slopes.entropy_factor is not None:
        d += tl.where(e > 0, e * slopes.entropy_factor * tl.fma(t, LN2, slopes.entropy_shift), 0.0)
    if slopes.smooth is not None:
        d -= slopes.smooth * c
    return through_softcap(d, x, terms)


@triton.jit
def store_gradient(row, start, out, slopes, TAIL: tl.constexpr, BLOCK_V: tl.constexpr):
    """Write the gradient of the tile at `start`, without the targets' own part; zeros from V on."""
    v = start + tl.arange(0, BLOCK_V)
    readable = v < row.width if TAIL else None
    inside = v < row.V if TAIL else None
    x = read_logits(row, v, readable, inside)
    d = gradient(x, read_column_weights(row, v, inside), slopes, row.terms)
    if TAIL:
        d = tl.where(inside, d, 0.0)
    tl.store(out.d_logits + v, d.to(out.d_logits.dtype.element_ty), mask=readable)
    if out.alive is not None:
        GROUPS: tl.constexpr = BLOCK_V // GROUP
        g = tl.arange(0, GROUPS) + start // GROUP
        alive = tl.max(tl.reshape(tl.abs(d), (GROUPS, GROUP)), axis=1) >= out.threshold
        tl.store(out.alive + g, alive.to(tl.int8), mask=g < row.width // GROUP if TAIL else None)


@triton.jit
def store_zeros(row, start, out, TAIL: tl.constexpr, BLOCK_V: tl.constexpr):
    """Write zeros into the gradient of the tile at `start`."""
    v = start + tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), out.d_logits.dtype.element_ty)
    tl.store(out.d_logits + v, zeros, mask=v < row.width if TAIL else None)


@triton.jit
def store_target_gradients(row, targets, a, out, slopes):
    """Write the targets' gradients, with their own part, over what the tiles have stored there."""
    c = read_column_weights(row, targets.column, targets.here)
    d = gradient(targets.x, c, slopes, row.terms)
    same = targets.y[:, None] == targets.y[None, :]  # a class may be a row's target more than once
    d -= through_softcap(tl.sum(tl.where(same, a[None, :], 0.0), axis=1), targets.x, row.terms)
    tl.debug_barrier()  # other threads stored those tiles
    tl.store(out.d_logits + targets.column, d.to(out.d_logits.dtype.element_ty), mask=targets.here)
    if out.alive is not None:
        tl.store(out.alive + targets.column // GROUP, 1, mask=targets.here & (tl.abs(d) >= out.threshold))
