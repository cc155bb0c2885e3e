"""Cross-entropy of rows of logits: loss, logsumexp and gradient. See `kernels/README.md` for the axis letters.

Two kernels. `cross_entropy_kernel` makes loss, peak and total in one pass over a row and, if given a place for it, the
gradient in a second pass whose reads the caches serve. `cross_entropy_backward_kernel` makes the gradient later,
from the saved peak and total, when the upstream gradient differs from row to row or the row lies on several devices.

A row's logits are x = softcap(logit_scale * (given + bias)), its targets y_k weigh w_k, and its loss is

    token_weight * (sum_k a_k (lse - x[y_k]) + b sum_v c_v (lse - x_v) + z_loss lse^2)

with a_k = (1 - label_smoothing) w_k c[y_k], b = label_smoothing / V sum_k w_k and class weights c. All of it is linear
in lse and x, so a row needs its peak, the sum of its exponentials, and what pulls the loss down: sum a_k x[y_k] +
b sum c_v x_v. Exponents are base 2, and peaks are those of x log2(e). All that follows is taken from the difference of
x log2(e) and the peak, which one fma makes and rounds once: it is as good for logits of 1e8 as for those of 1. lse
rounds at the size of the logits, and is made only for the z-loss and for those who ask. Arithmetic is float32. What is
not used is a None pointer or scalar, and costs nothing.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, cdiv, expect_contiguous, next_power_of_2, warps
from llmfast_kernels.terms import GROUP, Rows, Softmax, Targets, Terms, Upstream

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite, so that a row (or a lane) of -inf logits makes no inf - inf.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)
PEAK_UNIT = 0.6931471805599453  # of the peaks that the launchers give and take, in that of the logits: ln(2)

# What the kernels need to know of these numbers comes as VECTOR; a binary for each that is 1 or a multiple of 16 would
# be no better.
SIZES = [
    *("V", "row_width", "V_total", "v_start", "logits_stride_n", "d_logits_stride_n", "target_weights_stride_n"),
    "ignore_index",
]
# Of these a row takes a number or a few, which are as quick to come by from any address.
BY_ROW = [
    *("targets_ptr", "target_weights_ptr", "token_weights_ptr", "class_weight_sums_ptr", "grad_scale_ptr"),
    *("loss_ptr", "peak_ptr", "total_ptr", "entropy_ptr", "argmax_ptr", "partials_ptr"),
    *("d_loss_ptr", "d_lse_ptr", "d_entropy_ptr"),
]

PARTIALS = 5  # numbers that a device has to say of a row that others hold a part of


@triton.jit
def tanh(x):
    """Compute tanh to two or three units in the last place, in half of the instructions of the C library's.

    The library's would take longer than memory does: two passes over a logit leave about 34 instructions on an H100.
    """
    square = x * x
    series = tl.fma(square, 62 / 2835, -17 / 315)  # x - x^3 / 3 + ..., where 1 - 2 / (1 + e^2x) cancels
    series = tl.fma(tl.fma(tl.fma(series, square, 2 / 15), square, -1 / 3), square * x, x)
    return tl.where(tl.abs(x) < 0.35, series, 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E))))


@triton.jit
def read_logits(row_ptr, bias_ptr, v, readable, inside, logit_scale, softcap):
    """Read x of columns `v`. The masks are None for whole tiles; the values of lanes they exclude are unspecified."""
    x = tl.load(row_ptr + v, mask=readable).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + v, mask=inside).to(tl.float32)
    if logit_scale is not None:
        x *= logit_scale
    if softcap is not None:
        x = softcap * tanh(x * (1.0 / softcap))
    return x


@triton.jit
def read_class_weights(class_weights_ptr, v, inside, SMOOTH: tl.constexpr):
    """Read c of columns `v`, where smoothing needs them."""
    return tl.load(class_weights_ptr + v, mask=inside) if SMOOTH and class_weights_ptr is not None else 1.0


@triton.jit
def read_targets(n, targets_ptr, V_total, ignore_index, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Row n's targets: classes, -1 for what is none, -2 where ignored. One register each, all the way along the row."""
    k = tl.arange(0, BLOCK_K)
    y = tl.load(targets_ptr + n * K + k, mask=k < K, other=ignore_index).to(tl.int64)
    known = (y >= 0) & (y < V_total)
    tl.device_assert(known | (y == ignore_index), "cross_entropy: target is neither in [0, V) nor ignore_index")
    return tl.where((y == ignore_index) | (k >= K), -2, tl.where(known, y, -1)).to(tl.int32)


@triton.jit
def weigh_targets(
    n, y, target_weights_ptr, target_weights_stride_n, class_weights_ptr, label_smoothing, V_total,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Their a_k, the row's b, and 1 (NaN if a target is no class)."""
    a = tl.where(y != -2, 1.0, 0.0)
    if target_weights_ptr is not None:
        k = tl.arange(0, BLOCK_K)
        a = tl.load(target_weights_ptr + n * target_weights_stride_n + k, mask=y != -2, other=0.0)
    b = 0.0
    if label_smoothing is not None:
        b = tl.sum(a, axis=0) * label_smoothing / V_total
        a *= 1.0 - label_smoothing
    if class_weights_ptr is not None:
        a *= tl.load(class_weights_ptr + y, mask=y >= 0, other=0.0)
    # Without TRITON_DEBUG=1 nothing asserts: the row becomes NaN, which no training loop overlooks.
    sane = tl.where(tl.sum((y == -1).to(tl.int32), axis=0) > 0, float("nan"), 1.0)
    return a, b, sane


@triton.jit
def add_tile(
    x, pulled, start, peak, total, moment, pull, best, SMOOTH: tl.constexpr, ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Fold a tile of logits into each thread's running values.

    peak of x * log2e; total and moment, the sums of 2^t and t 2^t with t = x * log2e - peak; pull, the sum of `pulled`;
    best, where the tile starts that the peak lies in. The reshape follows the order in which a tile lies in the
    threads' registers: every thread folds its own elements and none waits for another inside the loop; rescaling costs
    one exponential a thread, not one an element.
    """
    THREADS: tl.constexpr = peak.shape[0]
    x = tl.reshape(x, (x.shape[0] // (THREADS * VECTOR), THREADS, VECTOR))
    tile_peak = tl.max(tl.max(x, axis=2), axis=0) * LOG2E
    if ARGMAX:
        best = tl.where(tile_peak > peak, start, best)
    new_peak = tl.maximum(peak, tile_peak)
    t = tl.fma(x, LOG2E, -new_peak[None, :, None])
    terms = tl.exp2(t)
    rescale = tl.exp2(peak - new_peak)
    if ENTROPY:
        t = tl.maximum(t, -1000.0)  # 2^-1000 is 0 as 2^-inf is, but 0 * -inf would be NaN
        moment = rescale * tl.fma(peak - new_peak, total, moment) + tl.sum(tl.sum(t * terms, axis=2), axis=0)
    total = total * rescale + tl.sum(tl.sum(terms, axis=2), axis=0)
    if SMOOTH:
        pulled = tl.reshape(pulled, (pulled.shape[0] // (THREADS * VECTOR), THREADS, VECTOR))
        pull += tl.sum(tl.sum(pulled, axis=2), axis=0)
    return new_peak, total, moment, pull, best


@triton.jit
def gradient(x, c, peak, factor, smooth, entropy_factor, entropy_shift, logit_scale, softcap):
    """Compute the gradient of the given logits without the targets' own part.

    (factor e + entropy_factor e (t ln(2) + entropy_shift) - smooth c) x', where e = 2^t and t = x log2(e) - peak.
    """
    t = tl.fma(x, LOG2E, -peak)
    e = tl.exp2(t)
    d = e * factor
    if entropy_factor is not None:
        d += tl.where(e > 0, e * entropy_factor * tl.fma(t, LN2, entropy_shift), 0.0)
    if smooth is not None:
        d -= smooth * c
    return through_softcap(d, x, logit_scale, softcap)


@triton.jit
def through_softcap(d, x, logit_scale, softcap):
    """Compute the gradient of the given logits from `d`, that of x."""
    if softcap is not None:
        u = x * (1.0 / softcap)
        d *= tl.fma(-u, u, 1.0)
    if logit_scale is not None:
        d *= logit_scale
    return d


@triton.jit
def store_targets(d, x_y, a, y, own_y, here, d_row, alive_row, threshold, logit_scale, softcap, GROUP: tl.constexpr):
    """Take the targets' part off their gradients `d`, and write them over what the tiles have stored there."""
    same = y[:, None] == y[None, :]  # a class may be a row's target more than once
    d -= through_softcap(tl.sum(tl.where(same, a[None, :], 0.0), axis=1), x_y, logit_scale, softcap)
    tl.debug_barrier()  # other threads stored those tiles
    tl.store(d_row + own_y, d.to(d_row.dtype.element_ty), mask=here)
    if alive_row is not None:
        tl.store(alive_row + own_y // GROUP, 1, mask=here & (tl.abs(d) >= threshold))


@triton.jit
def alive_groups(d, threshold, GROUP: tl.constexpr):
    """Return as int8 which groups of columns of the tile `d` hold a gradient of at least `threshold`."""
    d = tl.reshape(tl.abs(d), (d.shape[0] // GROUP, GROUP))
    return (tl.max(d, axis=1) >= threshold).to(tl.int8)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BY_ROW)
def cross_entropy_kernel(
    # in
    logits_ptr,  # (N, row_width)
    bias_ptr,  # (V,), or None
    targets_ptr,  # (N, K) int32 or int64
    target_weights_ptr,  # (N, K) f32, or None for 1
    token_weights_ptr,  # (N,) f32, or None for 1
    class_weights_ptr,  # (V_total,) f32, or None for 1
    class_weight_sums_ptr,  # (2,) f32: over the columns here, over all; None as class_weights
    grad_scale_ptr,  # () f32 that the gradient is multiplied by, or None for 1
    # out; loss, peak, entropy are 0, total is 1 and argmax is -1 where a row is ignored
    loss_ptr,  # (N,) f32
    peak_ptr,  # (N,) f32: max(x log2(e))
    total_ptr,  # (N,) f32: sum(2^(x log2(e) - peak))
    entropy_ptr,  # (N,) f32, or None
    argmax_ptr,  # (N,) int64, or None
    partials_ptr,  # (5, N) f32 of the columns here, see `cross_entropy_partials`; or None
    d_logits_ptr,  # (N, row_width) gradient of grad_scale * sum(loss), or None; may be logits_ptr
    alive_ptr,  # (N, row_width // GROUP) int8: groups of columns with a gradient of `threshold` or more; or None
    # sizes
    V,
    row_width,  # columns of the buffers, >= V; those from V on are padding
    V_total,  # of all devices
    v_start,  # number of the first column, where this is a part of the row
    # strides
    logits_stride_n,
    d_logits_stride_n,
    target_weights_stride_n,
    # scalars
    ignore_index,
    label_smoothing,  # or None
    z_loss,  # or None
    logit_scale,  # or None
    softcap,  # or None
    threshold,  # or None
    # flags
    ENTROPY: tl.constexpr,
    # tile
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # elements an access may move at once: the strides are multiples of it
    VECTOR_TAIL: tl.constexpr,  # row_width is one too
    START_VECTOR: tl.constexpr,  # v_start is a multiple of this
    GROUP: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)  # N * V can pass 2**31
    logits_row = logits_ptr + n * (logits_stride_n // VECTOR) * VECTOR  # says to the compiler what the comment says
    if VECTOR_TAIL:
        row_width = row_width // VECTOR * VECTOR
    columns = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V  # tiles below this need no mask, so they load 16 bytes at a time whatever V is
    SMOOTH: tl.constexpr = label_smoothing is not None  # pyright: ignore[reportAssignmentType]
    alive_row = alive_ptr
    if alive_ptr is not None:
        alive_row += n * (row_width // GROUP)
    c_row = class_weights_ptr
    if class_weights_ptr is not None:
        c_row += v_start // START_VECTOR * START_VECTOR
    y = read_targets(n, targets_ptr, V_total, ignore_index, K, BLOCK_K)

    if tl.max(y, axis=0) == -2:
        if loss_ptr is not None:
            tl.store(loss_ptr + n, 0.0)
            tl.store(peak_ptr + n, 0.0)
            tl.store(total_ptr + n, 1.0)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + n, 0.0)
        if argmax_ptr is not None:
            tl.store(argmax_ptr + n, -1)
        if partials_ptr is not None:
            for i in tl.static_range(5):
                tl.store(partials_ptr + i * tl.num_programs(0) + n, 0.0)
        if d_logits_ptr is not None:
            d_logits_row = d_logits_ptr + n * (d_logits_stride_n // VECTOR) * VECTOR
            zeros = tl.zeros((BLOCK_V,), d_logits_ptr.dtype.element_ty)
            for start in range(0, full, BLOCK_V):
                tl.store(d_logits_row + start + columns, zeros)
            tl.store(d_logits_row + full + columns, zeros, mask=full + columns < row_width)
            if alive_ptr is not None:
                for start in range(0, row_width // GROUP, BLOCK_V):
                    g = start + columns
                    tl.store(alive_row + g, 0, mask=g < row_width // GROUP)
        return

    own_y = y - v_start  # of a target that is no class, or ignored: before the first column
    here = (own_y >= 0) & (own_y < V)
    x_y = read_logits(logits_row, bias_ptr, own_y, here, here, logit_scale, softcap)

    peak = tl.full((THREADS,), LOWEST, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    moment = tl.zeros((THREADS,), tl.float32)
    pull = tl.zeros((THREADS,), tl.float32)
    best = tl.zeros((THREADS,), tl.int32)
    for start in range(0, full, BLOCK_V):
        x = read_logits(logits_row, bias_ptr, start + columns, None, None, logit_scale, softcap)
        pulled = x * read_class_weights(c_row, start + columns, None, SMOOTH)
        peak, total, moment, pull, best = add_tile(
            x, pulled, start, peak, total, moment, pull, best, SMOOTH, ENTROPY, argmax_ptr is not None, VECTOR
        )
    if full < V:
        v = full + columns
        x = read_logits(logits_row, bias_ptr, v, v < row_width, v < V, logit_scale, softcap)
        pulled = tl.where(v < V, x * read_class_weights(c_row, v, v < V, SMOOTH), 0.0)
        x = tl.where(v < V, x, float("-inf"))  # after softcap, which would make a logit of it
        peak, total, moment, pull, best = add_tile(
            x, pulled, full, peak, total, moment, pull, best, SMOOTH, ENTROPY, argmax_ptr is not None, VECTOR
        )

    # Not before the loop: what lives through it takes registers.
    a, b, sane = weigh_targets(
        n, y, target_weights_ptr, target_weights_stride_n, class_weights_ptr, label_smoothing, V_total, BLOCK_K
    )
    a_here = tl.where(here, a, 0.0)

    row_peak = tl.max(peak, axis=0)
    rescale = tl.exp2(peak - row_peak)
    row_moment = 0.0
    if ENTROPY:
        row_moment = tl.sum(rescale * tl.fma(peak - row_peak, total, moment), axis=0) * LN2
    row_total = tl.sum(total * rescale, axis=0)

    if argmax_ptr is not None:  # one more tile: the first column of the first tile where the peak was found
        best_start = tl.min(tl.where(peak == row_peak, best, full), axis=0)
        v = best_start + columns
        x = read_logits(logits_row, bias_ptr, v, v < V, v < V, logit_scale, softcap)
        # Its own maximum, not row_peak: the same formula may be rounded otherwise here.
        first = best_start + tl.argmax(tl.where(v < V, x, float("-inf")), axis=0)
        tl.store(argmax_ptr + n, (first + v_start).to(tl.int64))

    # All differences are taken against the peak, so a confident row keeps its small loss to float32's last bits.
    row_pull = tl.sum(tl.where(here, a * tl.fma(x_y, LOG2E, -row_peak), 0.0), axis=0) * LN2
    mass = tl.sum(a_here, axis=0)
    if SMOOTH:
        class_weight = V + 0.0
        if class_weights_ptr is not None:
            class_weight = tl.load(class_weight_sums_ptr)
        row_pull += b * (tl.sum(pull, axis=0) - class_weight * (row_peak * LN2))
        mass += b * class_weight
    t = sane
    if token_weights_ptr is not None:
        t *= tl.load(token_weights_ptr + n)

    if partials_ptr is not None:
        N = tl.num_programs(0)
        tl.store(partials_ptr + n, row_peak)
        tl.store(partials_ptr + N + n, row_total)
        tl.store(partials_ptr + 2 * N + n, row_moment)
        tl.store(partials_ptr + 3 * N + n, row_pull * sane)
        tl.store(partials_ptr + 4 * N + n, mass)
    else:  # a return above would not keep the compiler from what needs loss_ptr
        log_total = tl.log(row_total)
        loss = mass * log_total - row_pull
        slope = mass  # of the loss in lse
        if z_loss is not None:
            lse = tl.fma(row_peak, LN2, log_total)
            loss += z_loss * lse * lse
            slope += 2.0 * z_loss * lse
        tl.store(loss_ptr + n, loss * t)
        tl.store(peak_ptr + n, row_peak)
        tl.store(total_ptr + n, row_total)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + n, log_total - row_moment / row_total)

        if d_logits_ptr is not None:
            d_logits_row = d_logits_ptr + n * (d_logits_stride_n // VECTOR) * VECTOR
            if grad_scale_ptr is not None:
                t *= tl.load(grad_scale_ptr)
            factor = t * slope / row_total
            smooth = t * b if SMOOTH else None
            # Backwards through the row: what was read last is what the caches still hold.
            if full < row_width:
                v = full + columns
                x = read_logits(logits_row, bias_ptr, v, v < row_width, v < V, logit_scale, softcap)
                c = read_class_weights(c_row, v, v < V, SMOOTH)
                d = gradient(x, c, row_peak, factor, smooth, None, None, logit_scale, softcap)
                d = tl.where(v < V, d, 0.0)
                tl.store(d_logits_row + v, d.to(d_logits_ptr.dtype.element_ty), mask=v < row_width)
                if alive_ptr is not None:
                    g = full // GROUP + tl.arange(0, BLOCK_V // GROUP)
                    alive = alive_groups(d, threshold, GROUP)
                    tl.store(alive_row + g, alive, mask=g < row_width // GROUP)
            for done in range(BLOCK_V, full + BLOCK_V, BLOCK_V):
                v = full - done + columns
                x = read_logits(logits_row, bias_ptr, v, None, None, logit_scale, softcap)
                c = read_class_weights(c_row, v, None, SMOOTH)
                d = gradient(x, c, row_peak, factor, smooth, None, None, logit_scale, softcap)
                tl.store(d_logits_row + v, d.to(d_logits_ptr.dtype.element_ty))
                if alive_ptr is not None:
                    g = (full - done) // GROUP + tl.arange(0, BLOCK_V // GROUP)
                    tl.store(alive_row + g, alive_groups(d, threshold, GROUP))

            c_y = read_class_weights(c_row, own_y, here, SMOOTH)
            d_y = gradient(x_y, c_y, row_peak, factor, smooth, None, None, logit_scale, softcap)
            store_targets(
                d_y, x_y, t * a, y, own_y, here, d_logits_row, alive_row, threshold, logit_scale, softcap, GROUP
            )


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BY_ROW)
def cross_entropy_backward_kernel(
    # in
    logits_ptr,  # (N, row_width)
    bias_ptr,  # (V,), or None
    targets_ptr,  # (N, K) int32 or int64
    target_weights_ptr,  # (N, K) f32, or None for 1
    token_weights_ptr,  # (N,) f32, or None for 1
    class_weights_ptr,  # (V_total,) f32, or None for 1
    class_weight_sums_ptr,  # (2,) f32: over the columns here, over all; None as class_weights
    peak_ptr,  # (N,) f32, of all columns
    total_ptr,  # (N,) f32, of all columns
    entropy_ptr,  # (N,) f32, or None
    d_loss_ptr,  # (N,) f32
    d_lse_ptr,  # (N,) f32, or None
    d_entropy_ptr,  # (N,) f32, or None
    # out
    d_logits_ptr,  # (N, row_width); may be logits_ptr
    # sizes
    V,
    row_width,
    V_total,
    v_start,
    # strides
    logits_stride_n,
    d_logits_stride_n,
    target_weights_stride_n,
    # scalars
    ignore_index,
    label_smoothing,
    z_loss,
    logit_scale,
    softcap,
    # tile
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_TAIL: tl.constexpr,
    START_VECTOR: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if VECTOR_TAIL:
        row_width = row_width // VECTOR * VECTOR
    start = tl.program_id(1) * BLOCK_V
    v = start + tl.arange(0, BLOCK_V)
    logits_row = logits_ptr + n * (logits_stride_n // VECTOR) * VECTOR
    d_logits_row = d_logits_ptr + n * (d_logits_stride_n // VECTOR) * VECTOR
    SMOOTH: tl.constexpr = label_smoothing is not None  # pyright: ignore[reportAssignmentType]
    c_row = class_weights_ptr
    if class_weights_ptr is not None:
        c_row += v_start // START_VECTOR * START_VECTOR
    y = read_targets(n, targets_ptr, V_total, ignore_index, K, BLOCK_K)
    if tl.max(y, axis=0) == -2:  # zeros even where the upstream gradient or the logits are not finite
        zeros = tl.zeros((BLOCK_V,), d_logits_ptr.dtype.element_ty)
        if start + BLOCK_V <= V:
            tl.store(d_logits_row + v, zeros)
        else:
            tl.store(d_logits_row + v, zeros, mask=v < row_width)
        return

    a, b, t = weigh_targets(
        n, y, target_weights_ptr, target_weights_stride_n, class_weights_ptr, label_smoothing, V_total, BLOCK_K
    )
    peak = tl.load(peak_ptr + n)
    total = tl.load(total_ptr + n)
    log_total = tl.log(total)
    t *= tl.load(d_loss_ptr + n)
    if token_weights_ptr is not None:
        t *= tl.load(token_weights_ptr + n)
    slope = tl.sum(a, axis=0)
    if SMOOTH:
        class_weight = V_total + 0.0
        if class_weights_ptr is not None:
            class_weight = tl.load(class_weight_sums_ptr + 1)
        slope += b * class_weight
    if z_loss is not None:
        slope += 2.0 * z_loss * tl.fma(peak, LN2, log_total)
    factor = t * slope
    if d_lse_ptr is not None:
        factor += tl.load(d_lse_ptr + n)
    factor /= total
    entropy_factor = None
    entropy_shift = None
    if d_entropy_ptr is not None:
        entropy_factor = -tl.load(d_entropy_ptr + n) / total
        entropy_shift = tl.load(entropy_ptr + n) - log_total
    smooth = t * b if SMOOTH else None

    own_y = y - v_start
    here = (own_y >= start) & (own_y < start + BLOCK_V) & (own_y < V)
    has_targets = tl.sum(here.to(tl.int32), axis=0) > 0
    x_y = read_logits(logits_row, bias_ptr, own_y, here, here, logit_scale, softcap)
    if has_targets:
        tl.debug_barrier()  # before anybody writes over these logits
    if start + BLOCK_V <= V:
        x = read_logits(logits_row, bias_ptr, v, None, None, logit_scale, softcap)
        c = read_class_weights(c_row, v, None, SMOOTH)
        d = gradient(x, c, peak, factor, smooth, entropy_factor, entropy_shift, logit_scale, softcap)
        tl.store(d_logits_row + v, d.to(d_logits_ptr.dtype.element_ty))
    else:
        x = read_logits(logits_row, bias_ptr, v, v < row_width, v < V, logit_scale, softcap)
        c = read_class_weights(c_row, v, v < V, SMOOTH)
        d = gradient(x, c, peak, factor, smooth, entropy_factor, entropy_shift, logit_scale, softcap)
        tl.store(d_logits_row + v, tl.where(v < V, d, 0.0).to(d_logits_ptr.dtype.element_ty), mask=v < row_width)
    if has_targets:
        c_y = read_class_weights(c_row, own_y, here, SMOOTH)
        d_y = gradient(x_y, c_y, peak, factor, smooth, entropy_factor, entropy_shift, logit_scale, softcap)
        store_targets(d_y, x_y, t * a, y, own_y, here, d_logits_row, None, None, logit_scale, softcap, 1)


def tile(V: int, *, many_terms: bool = False) -> dict[str, int]:
    """Block, warps and threads for rows of `V` logits: one program walks a row.

    Long rows get 1024 threads, so that few rows are in flight at once and the gradient's second pass over each finds
    it in the L2 cache; 16 elements a thread keep two 16-byte loads of bfloat16 in the air without spilling. Softcap,
    bias, class weights and smoothing take registers, and leave them for 8.
    """
    elements = 8 if many_terms else 16
    block = min(max(next_power_of_2(V), 1024), 1024 * elements)
    return {"BLOCK_V": block, "THREADS": block // elements, "num_warps": warps(block // elements)}


def backward_tile(V: int) -> dict[str, int]:
    """Block and warps of the separate backward: elementwise, so small programs of 8 elements a thread."""
    block = min(max(next_power_of_2(V), 1024), 2048)
    return {"BLOCK_V": block, "num_warps": warps(block // 8)}


def vectors(row_width: int, logits: Tensor, d_logits: Tensor | None) -> dict[str, int | bool]:
    """Return the widest access, up to 16 bytes, that the rows' addresses allow, in elements."""
    width = 16 // max(t.element_size() for t in (logits, d_logits) if t is not None)
    for t in (logits, d_logits):
        if t is not None:
            width = math.gcd(width, t.stride(0), t.data_ptr() % 16 // t.element_size())
    return {"VECTOR": width, "VECTOR_TAIL": row_width % width == 0}


def arguments(logits: Tensor, targets: Targets, terms: Terms, V: int | None) -> dict[str, Any]:
    """Return the arguments that both kernels take from rows and terms."""
    K, weights = targets.classes.shape[1], targets.weights
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have stride 1 along V; got strides {logits.stride()}")
    expect_contiguous(
        targets=targets.classes, target_weights=weights, token_weights=targets.token_weights, bias=terms.bias,
        class_weights=terms.class_weights, class_weight_sums=terms.class_weight_sums,
    )  # fmt: skip
    return {
        "logits_ptr": logits,
        "bias_ptr": terms.bias,
        "targets_ptr": targets.classes,
        "target_weights_ptr": weights,
        "token_weights_ptr": targets.token_weights,
        "class_weights_ptr": terms.class_weights,
        "class_weight_sums_ptr": terms.class_weight_sums,
        "V": V or logits.shape[1],
        "row_width": logits.shape[1],
        "V_total": terms.V,
        "v_start": terms.v_start,
        "logits_stride_n": logits.stride(0),
        "target_weights_stride_n": 0 if weights is None or len(weights) == 1 else weights.stride(0),
        "ignore_index": terms.ignore_index,
        "label_smoothing": terms.label_smoothing,
        "z_loss": terms.z_loss,
        "logit_scale": terms.logit_scale,
        "softcap": terms.softcap,
        "K": K,
        "BLOCK_K": next_power_of_2(K),
        "START_VECTOR": math.gcd(4, terms.v_start),
        **FP_FUSION,
    }


def cross_entropy(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,
    terms: Terms,
    *,
    V: int | None = None,
    entropy: bool = False,
    argmax: bool = False,
    d_logits: Tensor | None = None,  # (N, row_width), filled; may be `logits`
    grad_scale: Tensor | None = None,  # () f32
    alive: Tensor | None = None,  # (N, row_width // GROUP) int8, filled
    threshold: float | None = None,
) -> Rows:
    """Loss, peak, total and on request more of every row; fills `d_logits` with the gradient of grad_scale * sum(loss).

    Padding is read, ignored, and overwritten with zeros in `d_logits`: where it rounds the rows up to 16 bytes, rows of
    any V are accessed 16 bytes at a time. It ends before the second multiple of 1024 from V on. `alive` says which
    groups of GROUP columns of `d_logits` hold a gradient of `threshold` or more.
    """
    loss = logits.new_empty(logits.shape[0], dtype=torch.float32)
    rows = Rows(
        loss,
        torch.empty_like(loss),
        torch.empty_like(loss),
        torch.empty_like(loss) if entropy else None,
        torch.empty_like(loss, dtype=torch.int64) if argmax else None,
    )
    _launch(logits, targets, terms, V, rows, None, entropy, d_logits, grad_scale, alive, threshold)
    return rows


def cross_entropy_partials(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,
    terms: Terms,
    *,
    V: int | None = None,
    entropy: bool = False,
    argmax: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what the local columns add to each row's loss, (5, N) f32, for rows split over devices; and argmax.

    peak of x log2(e); total = sum(2^t) with t = x log2(e) - peak; moment = sum(t ln(2) 2^t); pull, less mass * peak
    ln(2); mass: the weight of the columns' pull. See the top of this file.
    """
    partials = logits.new_empty(PARTIALS, logits.shape[0], dtype=torch.float32)
    best = torch.empty_like(partials[0], dtype=torch.int64) if argmax else None
    _launch(logits, targets, terms, V, None, partials, entropy, None, None, None, None, best)
    return partials, best


def _launch(
    logits: Tensor,
    targets: Targets,
    terms: Terms,
    V: int | None,
    rows: Rows | None,
    partials: Tensor | None,
    entropy: bool,
    d_logits: Tensor | None,
    grad_scale: Tensor | None,
    alive: Tensor | None,
    threshold: float | None,
    argmax: Tensor | None = None,
) -> None:
    N, row_width = logits.shape
    if N == 0:
        return
    many_terms = any(t is not None for t in (terms.softcap, terms.bias, terms.class_weights, terms.label_smoothing))
    meta = tile(V or row_width, many_terms=many_terms)
    with device_of(logits):
        cross_entropy_kernel[(N,)](
            **arguments(logits, targets, terms, V),
            grad_scale_ptr=grad_scale, loss_ptr=None if rows is None else rows.loss,
            peak_ptr=None if rows is None else rows.peak, total_ptr=None if rows is None else rows.total,
            entropy_ptr=None if rows is None else rows.entropy,
            argmax_ptr=argmax if rows is None else rows.argmax, partials_ptr=partials, d_logits_ptr=d_logits,
            alive_ptr=alive, d_logits_stride_n=0 if d_logits is None else d_logits.stride(0), threshold=threshold,
            ENTROPY=entropy, GROUP=GROUP, **meta, **vectors(row_width, logits, d_logits),
        )  # fmt: skip


def cross_entropy_backward(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,
    terms: Terms,
    softmax: Softmax,  # of all columns
    upstream: Upstream,
    *,
    V: int | None = None,
    d_logits: Tensor,  # (N, row_width), filled; may be `logits`
) -> None:
    """Fill `d_logits` with the gradient of sum(d_loss * loss + d_lse * lse + d_entropy * entropy), padding with 0."""
    N, row_width = logits.shape
    if N == 0:
        return
    (peak, total, entropy), (d_loss, d_lse, d_entropy) = softmax, upstream
    expect_contiguous(peak=peak, total=total, d_loss=d_loss, d_lse=d_lse, entropy=entropy, d_entropy=d_entropy)
    meta = backward_tile(row_width)
    with device_of(logits):
        cross_entropy_backward_kernel[(N, cdiv(row_width, meta["BLOCK_V"]))](
            **arguments(logits, targets, terms, V),
            peak_ptr=peak, total_ptr=total, entropy_ptr=entropy, d_loss_ptr=d_loss, d_lse_ptr=d_lse,
            d_entropy_ptr=d_entropy, d_logits_ptr=d_logits, d_logits_stride_n=d_logits.stride(0),
            **meta, **vectors(row_width, logits, d_logits),
        )  # fmt: skip
