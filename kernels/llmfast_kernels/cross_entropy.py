"""Cross-entropy of rows of logits: loss, logsumexp and gradient. `row.py` defines the loss of a row.

There are two kernels. `cross_entropy_kernel` computes loss, peak and total in one pass over a row. If the caller passes
a buffer for the gradient, a second pass fills it; the caches serve that pass's reads.
`cross_entropy_backward_kernel` computes the gradient later, from the saved peak and total. It is needed when the
upstream gradient differs from row to row, or when a row's columns are split over several devices.
"""

import math
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels import row as parts
from llmfast_kernels.launch import FP_FUSION, Choice, Tile, cdiv, expect_contiguous, next_power_of_2, warps
from llmfast_kernels.terms import Partials, Rows, Softmax, Targets, Terms, Upstream

# Before Triton 3.7 a kernel cannot ask whether a tuple is None, only whether its members are.
NO_ROWS, NO_PARTIALS, NO_GRADIENT = (
    kind._make([None] * len(kind._fields)) for kind in (Rows, Partials, parts.Gradient)
)
row_terms = attrgetter(*parts.RowTerms._fields[2:])
LEAST_BLOCK = 1024  # columns of the smallest tile
FEW_TERMS = Choice(Tile(16, 1024), Tile(16, 512), Tile(8, 512), Tile(16, 256), Tile(8, 256))
MANY_TERMS = Choice(Tile(8, 1024), Tile(8, 512), Tile(8, 256))
# Entropy, argmax and log-probabilities together spill in 64 registers, which 1024 threads leave to each.
MANY_RESULTS = Tile(8, 512)
BACKWARD = Choice(Tile(8, 256), Tile(16, 256), Tile(8, 512), Tile(8, 128))

# Triton would compile a separate binary for each of these that is 1 or a multiple of 16. That would gain nothing,
# because VECTOR already tells the kernels which multiples they can rely on.
SIZES = [
    *("V", "row_width", "V_total", "v_start", "logits_stride_n", "d_logits_stride_n", "target_weights_stride_n"),
    "ignore_index",
]
# A row reads only one number or a few from each of these, so that their alignment makes no difference. They are
# separate arguments because Triton specialises on the addresses of a tuple's members in any case.
BY_ROW = [
    *("targets_ptr", "target_weights_ptr", "token_weights_ptr", "grad_scale_ptr", "d_loss_ptr", "d_lse_ptr"),
    "d_entropy_ptr",
]


@triton.jit
def store_partials(n, partials, peak, total, moment, pull, mass):
    """Write a row's contributions, except those that need another look at its columns or targets."""
    tl.store(partials.peak + n, peak)
    tl.store(partials.total + n, total)
    tl.store(partials.pull + n, pull)
    tl.store(partials.mass + n, mass)
    parts.put(partials.moment, n, moment)


@triton.jit
def store_ignored(n, y, rows, partials, K: tl.constexpr):
    """Write the results of an ignored row: an argmax of -1, a total of 1 in `rows` (0 in `partials`), all else 0."""
    if rows.loss is not None:
        tl.store(rows.loss + n, 0.0)
        tl.store(rows.peak + n, 0.0)
        tl.store(rows.total + n, 1.0)
        parts.put(rows.entropy, n, 0.0)
        parts.put(rows.argmax, n, -1)
        parts.put_targets(rows.logprobs, n, y, y * 0.0, K)
    else:
        store_partials(n, partials, 0.0, 0.0, 0.0, 0.0, 0.0)
        parts.put(partials.argmax, n, -1)
        parts.put_targets(partials.below, n, y, y * 0.0, K)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BY_ROW)
def cross_entropy_kernel(
    # in
    logits_ptr,  # (N, row_width)
    targets_ptr,  # (N, K) int32 or int64
    target_weights_ptr,  # (N, K) f32, or None for 1
    token_weights_ptr,  # (N,) f32, or None for 1
    terms,  # RowTerms
    grad_scale_ptr,  # () f32 that multiplies the gradient, or None for 1
    # out
    rows,  # Rows; NO_ROWS if partials are wanted
    partials,  # Partials of this device's columns; NO_PARTIALS if rows are wanted
    gradient,  # Gradient of grad_scale * sum(loss); NO_GRADIENT if it is not wanted
    # sizes
    V,  # classes in the buffers
    row_width,  # columns of the buffers, >= V; those from V on are padding
    V_total,  # classes of all devices
    v_start,  # class of the buffers' first column; 0 unless classes are split over devices
    # strides
    logits_stride_n,
    d_logits_stride_n,
    target_weights_stride_n,
    # scalars
    ignore_index,
    # tile
    K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # elements that one access may move; the row strides are multiples of it
    VECTOR_TAIL: tl.constexpr,  # whether row_width is a multiple of VECTOR too
):
    n = tl.program_id(0).to(tl.int64)  # N * V can pass 2**31
    if VECTOR_TAIL:
        row_width = parts.known_multiple(row_width, VECTOR)
    terms = parts.terms_of_row(terms, n)
    row = parts.Row(logits_ptr + n * parts.known_multiple(logits_stride_n, VECTOR), terms, V, row_width)
    alive = gradient.alive
    if gradient.alive is not None:
        alive += n * (row_width // parts.GROUP)
    argmax_ptr = partials.argmax if rows.loss is None else rows.argmax
    ARGMAX: tl.constexpr = argmax_ptr is not None  # pyright: ignore[reportAssignmentType]
    ENTROPY: tl.constexpr = (partials.moment if rows.loss is None else rows.entropy) is not None
    full = V // BLOCK_V * BLOCK_V  # the whole tiles end here

    y = parts.read_targets(n, targets_ptr, V_total, ignore_index, K)
    if tl.max(y, axis=0) == parts.IGNORED:
        store_ignored(n, y, rows, partials, K)
        if gradient.d_logits is not None:
            d_logits = gradient.d_logits + n * parts.known_multiple(d_logits_stride_n, VECTOR)
            out = parts.Gradient(d_logits, alive, gradient.threshold)
            for start in range(0, full, BLOCK_V):
                parts.store_zeros(row, start, out, TAIL=False, BLOCK_V=BLOCK_V)
            parts.store_zeros(row, full, out, TAIL=True, BLOCK_V=BLOCK_V)
            if gradient.alive is not None:
                for start in range(0, row_width // parts.GROUP, BLOCK_V):
                    g = start + tl.arange(0, BLOCK_V)
                    tl.store(out.alive + g, 0, mask=g < row_width // parts.GROUP)
        return

    column = y - v_start  # negative for a target that is unknown or ignored
    here = (column >= 0) & (column < V)
    targets = parts.OwnTargets(y, column, here, parts.read_logits(row, column, here, here))

    zeros = tl.zeros((THREADS,), tl.float32)
    start_of_peak = tl.zeros((THREADS,), tl.int32)
    running = parts.Running(tl.full((THREADS,), parts.LOWEST, tl.float32), zeros, zeros, zeros, start_of_peak)
    for start in range(0, full, BLOCK_V):
        running = parts.fold_tile(
            row, start, running, TAIL=False, ENTROPY=ENTROPY, ARGMAX=ARGMAX, BLOCK_V=BLOCK_V, VECTOR=VECTOR
        )
    if full < V:
        running = parts.fold_tile(
            row, full, running, TAIL=True, ENTROPY=ENTROPY, ARGMAX=ARGMAX, BLOCK_V=BLOCK_V, VECTOR=VECTOR
        )

    # Read after the loop, because values that stay alive during the loop would take registers from it.
    a, b, t = parts.weigh_targets(n, y, target_weights_ptr, target_weights_stride_n, terms, V_total)
    peak = tl.max(running.peak, axis=0)
    shift = parts.fall(running.peak, peak)
    rescale = tl.exp2(shift)
    moment = tl.sum(rescale * tl.fma(shift, running.total, running.moment), axis=0) * parts.LN2 if ENTROPY else 0.0
    total = tl.sum(running.total * rescale, axis=0)
    if ARGMAX:
        tl.store(argmax_ptr + n, (parts.find_peak(row, running, peak, full, BLOCK_V) + v_start).to(tl.int64))

    # Only differences from the peak are used. A confident row thus keeps its small loss to float32's last bits.
    below = targets.x - peak
    pull = tl.sum(tl.where(here, a * below, 0.0), axis=0)
    mass = tl.sum(tl.where(here, a, 0.0), axis=0)
    if terms.label_smoothing is not None:
        class_weight = parts.sum_of_class_weights(terms, V, 0)
        pull += b * (tl.sum(running.pull, axis=0) - class_weight * peak)
        mass += b * class_weight

    if rows.loss is None:
        store_partials(n, partials, peak, total, moment, pull * t, mass)
        parts.put_targets(partials.below, n, y, tl.where(here, below, 0.0), K)
    else:  # not a `return` above: the compiler would still compile this part, where members of `rows` are None
        log_total = tl.log(total)
        if token_weights_ptr is not None:
            t *= tl.load(token_weights_ptr + n)
        loss, slope = parts.add_terms_of_lse(mass * log_total - pull, mass, peak, log_total, terms)
        tl.store(rows.loss + n, loss * t)
        tl.store(rows.peak + n, peak)
        tl.store(rows.total + n, total)
        parts.put(rows.entropy, n, log_total - moment / total)
        parts.put_targets(rows.logprobs, n, y, tl.where(here, below - log_total, 0.0), K)

        if gradient.d_logits is not None:
            d_logits = gradient.d_logits + n * parts.known_multiple(d_logits_stride_n, VECTOR)
            out = parts.Gradient(d_logits, alive, gradient.threshold)
            if grad_scale_ptr is not None:
                t *= tl.load(grad_scale_ptr)
            smooth = t * b if terms.label_smoothing is not None else None
            slopes = parts.Slopes(peak, t * slope / total, smooth, None, None)
            # Go through the row backwards, because the caches still hold what was read last.
            if full < row_width:
                parts.store_gradient(row, full, out, slopes, TAIL=True, BLOCK_V=BLOCK_V)
            for done in range(BLOCK_V, full + BLOCK_V, BLOCK_V):
                parts.store_gradient(row, full - done, out, slopes, TAIL=False, BLOCK_V=BLOCK_V)
            parts.store_target_gradients(row, targets, t * a, out, slopes)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=BY_ROW)
def cross_entropy_backward_kernel(
    # in
    logits_ptr,  # (N, row_width)
    targets_ptr,  # (N, K) int32 or int64
    target_weights_ptr,  # (N, K) f32, or None for 1
    token_weights_ptr,  # (N,) f32, or None for 1
    terms,  # RowTerms
    softmax,  # Softmax of all columns
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
    # tile
    K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_TAIL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if VECTOR_TAIL:
        row_width = parts.known_multiple(row_width, VECTOR)
    terms = parts.terms_of_row(terms, n)
    row = parts.Row(logits_ptr + n * parts.known_multiple(logits_stride_n, VECTOR), terms, V, row_width)
    out = parts.Gradient(d_logits_ptr + n * parts.known_multiple(d_logits_stride_n, VECTOR), None, None)
    start = tl.program_id(1) * BLOCK_V
    y = parts.read_targets(n, targets_ptr, V_total, ignore_index, K)
    if tl.max(y, axis=0) == parts.IGNORED:  # zeros, even if the upstream gradient or logits are not finite
        if start + BLOCK_V <= V:
            parts.store_zeros(row, start, out, TAIL=False, BLOCK_V=BLOCK_V)
        else:
            parts.store_zeros(row, start, out, TAIL=True, BLOCK_V=BLOCK_V)
        return

    a, b, t = parts.weigh_targets(n, y, target_weights_ptr, target_weights_stride_n, terms, V_total)
    peak = tl.load(softmax.peak + n)
    total = tl.load(softmax.total + n)
    log_total = tl.log(total)
    t *= tl.load(d_loss_ptr + n)
    if token_weights_ptr is not None:
        t *= tl.load(token_weights_ptr + n)
    slope = tl.sum(a, axis=0)
    smooth = None
    if terms.label_smoothing is not None:
        slope += b * parts.sum_of_class_weights(terms, V_total, 1)
        smooth = t * b
    _, slope = parts.add_terms_of_lse(0.0, slope, peak, log_total, terms)
    factor = t * slope
    if d_lse_ptr is not None:
        factor += tl.load(d_lse_ptr + n)
    entropy_factor = None
    entropy_shift = None
    if d_entropy_ptr is not None:
        entropy_factor = -tl.load(d_entropy_ptr + n) / total
        entropy_shift = tl.load(softmax.entropy + n) - log_total
    slopes = parts.Slopes(peak, factor / total, smooth, entropy_factor, entropy_shift)

    column = y - v_start
    here = (column >= start) & (column < start + BLOCK_V) & (column < V)
    has_targets = tl.sum(here.to(tl.int32), axis=0) > 0
    targets = parts.OwnTargets(y, column, here, parts.read_logits(row, column, here, here))
    if has_targets:
        tl.debug_barrier()  # d_logits may be logits: read the targets' before any thread overwrites them
    if start + BLOCK_V <= V:
        parts.store_gradient(row, start, out, slopes, TAIL=False, BLOCK_V=BLOCK_V)
    else:
        parts.store_gradient(row, start, out, slopes, TAIL=True, BLOCK_V=BLOCK_V)
    if has_targets:
        parts.store_target_gradients(row, targets, t * a, out, slopes)


def tile(V: int, *, many_terms: bool = False, many_results: bool = False) -> dict[str, int]:
    """Choose block, threads and warps for rows of `V` logits. One program processes one row.

    Long rows get 1024 threads. Few rows are then in flight at once, and the gradient's second pass over a row finds it
    in the L2 cache. With 16 elements per thread, two 16-byte loads of bfloat16 are in flight without spilling.
    Softcap, bias, class weights and smoothing take registers, so that only 8 elements per thread fit.
    """
    elements, threads = MANY_RESULTS if many_results else (MANY_TERMS if many_terms else FEW_TERMS).chosen
    block = min(max(next_power_of_2(V), LEAST_BLOCK), threads * elements)
    return {"BLOCK_V": block, "THREADS": block // elements, "num_warps": warps(block // elements)}


def backward_tile(V: int) -> dict[str, int]:
    """Choose block and warps for the backward kernel. It is elementwise, so that 8 elements per thread suffice."""
    elements, threads = BACKWARD.chosen
    block = min(max(next_power_of_2(V), LEAST_BLOCK), threads * elements)
    return {"BLOCK_V": block, "num_warps": warps(block // elements)}


def vectors(row_width: int, logits: Tensor, d_logits: Tensor | None) -> dict[str, int | bool]:
    """Return the widest access that the rows' addresses allow, in elements (16 bytes at most), as VECTOR.

    VECTOR_TAIL says whether `row_width` is a multiple of it.
    """
    width = 16 // max(t.element_size() for t in (logits, d_logits) if t is not None)
    for t in (logits, d_logits):
        if t is not None:
            width = math.gcd(width, t.stride(0), t.data_ptr() % 16 // t.element_size())
    return {"VECTOR": width, "VECTOR_TAIL": row_width % width == 0}


def arguments(logits: Tensor, targets: Targets, terms: Terms, V: int | None, d_logits: Tensor | None) -> dict[str, Any]:
    """Return the arguments that both kernels take."""
    if logits.stride(1) != 1:
        raise ValueError(f"logits must have stride 1 along V; got strides {logits.stride()}")
    classes, weights, token_weights = targets.classes, targets.weights, targets.token_weights
    row_width, class_weights = logits.shape[1], terms.class_weights
    V = V or row_width
    if row_width > (most := (V // LEAST_BLOCK + 1) * LEAST_BLOCK):
        raise ValueError(f"logits must have at most {most} columns for V={V}; got {row_width}")
    expect_contiguous(
        targets=classes,
        target_weights=weights,
        token_weights=token_weights,
        temperatures=targets.temperatures,
        bias=terms.bias,
        class_weights=class_weights,
        class_weight_sums=terms.class_weight_sums,
    )
    column_weights = None
    if class_weights is not None and terms.label_smoothing is not None:
        column_weights = class_weights[terms.v_start :]
    return {
        "logits_ptr": logits,
        "targets_ptr": classes,
        "target_weights_ptr": weights,
        "token_weights_ptr": token_weights,
        "terms": parts.RowTerms(column_weights, targets.temperatures, *row_terms(terms)),
        "V": V,
        "row_width": row_width,
        "V_total": terms.V,
        "v_start": terms.v_start,
        "logits_stride_n": logits.stride(0),
        "d_logits_stride_n": 0 if d_logits is None else d_logits.stride(0),
        "target_weights_stride_n": 0 if weights is None or len(weights) == 1 else weights.stride(0),
        "ignore_index": terms.ignore_index,
        "K": classes.shape[1],
        **vectors(row_width, logits, d_logits),
        **FP_FUSION,
    }


def cross_entropy(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,
    terms: Terms,
    *,
    V: int | None = None,
    stats: bool = False,
    logprobs: bool = False,
    d_logits: Tensor | None = None,  # (N, row_width), filled; may be `logits`
    grad_scale: Tensor | None = None,  # () f32
    alive: Tensor | None = None,  # (N, row_width // GROUP) int8, filled
    threshold: float | None = None,
) -> Rows:
    """Return the loss, peak and total of every row, and on request entropy and argmax, or targets' log-probabilities.

    Fills `d_logits` with the gradient of grad_scale * sum(loss). The padding is read and ignored, and is zero in
    `d_logits`. If it rounds rows up to multiples of 16 bytes, they can be accessed 16 bytes at a time for any V.
    `row_width` must not exceed the first multiple of LEAST_BLOCK above V: one masked tile follows the whole ones.
    `alive` says which groups of GROUP columns of `d_logits` hold a gradient of `threshold` or more.
    """
    new, (N, K) = partial(logits.new_empty, dtype=torch.float32), targets.classes.shape
    best = logits.new_empty((N,), dtype=torch.int64) if stats else None
    more = new((N,)) if stats else None, best, new((N, K)) if logprobs else None
    rows = Rows(new((N,)), new((N,)), new((N,)), *more)
    gradient = parts.Gradient(d_logits, alive, threshold)
    results = {"rows": rows, "partials": NO_PARTIALS, "gradient": gradient, "grad_scale_ptr": grad_scale}
    if N > 0:
        with device_of(logits):
            given = _forward_arguments(logits, targets, terms, V, d_logits, many_results=stats and logprobs)
            cross_entropy_kernel[(N,)](**results, **given)
    return rows


def cross_entropy_partials(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Targets,
    terms: Terms,
    *,
    V: int | None = None,
    stats: bool = False,
    logprobs: bool = False,
) -> Partials:
    """Return the contributions of this device's columns to each row's loss, for classes that are split over devices."""
    new, (N, K) = partial(logits.new_empty, dtype=torch.float32), targets.classes.shape
    best = logits.new_empty((N,), dtype=torch.int64) if stats else None
    more = new((N,)), new((N,)), best, new((N, K)) if logprobs else None
    partials = Partials(new((N,)), new((N,)), new((N,)) if stats else None, *more)
    results = {"rows": NO_ROWS, "partials": partials, "gradient": NO_GRADIENT, "grad_scale_ptr": None}
    if N > 0:
        with device_of(logits):
            cross_entropy_kernel[(N,)](**results, **_forward_arguments(logits, targets, terms, V, None))
    return partials


def _forward_arguments(
    logits: Tensor,
    targets: Targets,
    terms: Terms,
    V: int | None,
    d_logits: Tensor | None,
    *,
    many_results: bool = False,
) -> dict[str, Any]:
    """Return all arguments of the forward kernel except its results and `grad_scale_ptr`."""
    given = arguments(logits, targets, terms, V, d_logits)
    few_terms = terms.softcap is None and terms.bias is None and terms.class_weights is None
    many_terms = not few_terms or terms.label_smoothing is not None
    return given | tile(given["V"], many_terms=many_terms, many_results=many_results)


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
    """Fill `d_logits` with the gradient of sum(upstream.loss * loss + upstream.lse * lse + upstream.entropy * entropy).

    The padding of `d_logits` is filled with zeros.
    """
    N, row_width = logits.shape
    if N == 0:
        return
    d_loss, d_lse, d_entropy = upstream
    expect_contiguous(**softmax._asdict(), d_loss=d_loss, d_lse=d_lse, d_entropy=d_entropy)
    if d_entropy is None:
        softmax = Softmax(softmax.peak, softmax.total)
    given = arguments(logits, targets, terms, V, d_logits)
    upstreams = {"d_loss_ptr": d_loss, "d_lse_ptr": d_lse, "d_entropy_ptr": d_entropy}
    meta = backward_tile(row_width)
    with device_of(logits):
        grid = N, cdiv(row_width, meta["BLOCK_V"])
        cross_entropy_backward_kernel[grid](**given, **upstreams, softmax=softmax, d_logits_ptr=d_logits, **meta)
