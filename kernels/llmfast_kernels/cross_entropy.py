"""Cross-entropy of rows of logits: loss, logsumexp and gradient. See `kernels/README.md` for the axis letters.

Two kernels. `cross_entropy_kernel` makes loss and lse in one pass over a row and, if given a place for it, the
gradient in a second pass whose reads the caches serve. `cross_entropy_backward_kernel` makes the gradient later,
from the saved lse, when the upstream gradient differs from row to row. Exponents are base 2, arithmetic is float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, cdiv, next_power_of_2, warps

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite, so that a row (or a lane) of -inf logits makes no inf - inf.
LOWEST: tl.constexpr = tl.constexpr(-3.0e38)

# What the kernels need to know of these numbers comes as VECTOR; a binary for each that is 1 or a multiple of 16 would
# be no better.
SIZES = ["V", "row_width", "logits_stride_n", "d_logits_stride_n", "ignore_index"]


@triton.jit
def add_tile(x, peak, total, VECTOR: tl.constexpr):
    """Fold a tile of logits into each thread's running (peak of x * log2e, sum of 2^(x * log2e - peak)).

    The reshape follows the order in which a tile lies in the threads' registers: every thread folds its own elements
    and none waits for another inside the loop; rescaling costs one exponential a thread, not one an element.
    """
    THREADS: tl.constexpr = peak.shape[0]
    x = tl.reshape(x, (x.shape[0] // (THREADS * VECTOR), THREADS, VECTOR))
    new_peak = tl.maximum(peak, tl.max(tl.max(x, axis=2), axis=0) * LOG2E)
    terms = tl.exp2(tl.fma(x, LOG2E, -new_peak[None, :, None]))
    return new_peak, total * tl.exp2(peak - new_peak) + tl.sum(tl.sum(terms, axis=2), axis=0)


@triton.jit
def probabilities_tile(x, peak, factor):
    """factor * 2^(x * log2e - peak): softmax of a tile, times whatever the caller folded into `factor`."""
    return tl.exp2(tl.fma(x, LOG2E, -peak)) * factor


@triton.jit(do_not_specialize=SIZES)
def cross_entropy_kernel(
    # in
    logits_ptr,  # (N, row_width)
    targets_ptr,  # (N,) int32 or int64
    grad_scale_ptr,  # () f32 that the gradient is multiplied by, or None for 1
    # out
    loss_ptr,  # (N,) f32, 0 where ignored
    lse_ptr,  # (N,) f32, 0 where ignored
    d_logits_ptr,  # (N, row_width) gradient of grad_scale * sum(loss), or None; may be logits_ptr
    # sizes
    V,
    row_width,  # columns of the buffers, >= V; those from V on are padding
    # strides
    logits_stride_n,
    d_logits_stride_n,
    # scalars
    ignore_index,
    # tile
    BLOCK_V: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,  # elements an access may move at once: the strides are multiples of it
    VECTOR_TAIL: tl.constexpr,  # row_width is one too
):
    n = tl.program_id(0).to(tl.int64)  # N * V can pass 2**31
    logits_row = logits_ptr + n * (logits_stride_n // VECTOR) * VECTOR  # says to the compiler what the comment says
    if VECTOR_TAIL:
        row_width = row_width // VECTOR * VECTOR
    y = tl.load(targets_ptr + n)
    columns = tl.arange(0, BLOCK_V)
    full = V // BLOCK_V * BLOCK_V  # tiles below this need no mask, so they load 16 bytes at a time whatever V is

    if y == ignore_index:
        tl.store(loss_ptr + n, 0.0)
        tl.store(lse_ptr + n, 0.0)
        if d_logits_ptr is not None:
            d_logits_row = d_logits_ptr + n * (d_logits_stride_n // VECTOR) * VECTOR
            zeros = tl.zeros((BLOCK_V,), d_logits_ptr.dtype.element_ty)
            for start in range(0, full, BLOCK_V):
                tl.store(d_logits_row + start + columns, zeros)
            tl.store(d_logits_row + full + columns, zeros, mask=full + columns < row_width)
        return

    in_range = (y >= 0) & (y < V)
    tl.device_assert(in_range, "cross_entropy: target is neither in [0, V) nor ignore_index")
    # Without TRITON_DEBUG=1 nothing asserts: the row becomes NaN, which no training loop overlooks.
    y_logit = tl.load(logits_row + y, mask=in_range, other=float("nan")).to(tl.float32)

    peak = tl.full((THREADS,), LOWEST, tl.float32)
    total = tl.zeros((THREADS,), tl.float32)
    for start in range(0, full, BLOCK_V):
        x = tl.load(logits_row + start + columns).to(tl.float32)
        peak, total = add_tile(x, peak, total, VECTOR)
    if full < V:
        v = full + columns
        x = tl.load(logits_row + v, mask=v < row_width, other=float("-inf")).to(tl.float32)
        peak, total = add_tile(tl.where(v < V, x, float("-inf")), peak, total, VECTOR)

    row_peak = tl.max(peak, axis=0)
    row_total = tl.sum(total * tl.exp2(peak - row_peak), axis=0)
    log_total = tl.log(row_total)
    # Both differences are taken against row_peak, so a confident row keeps its small loss to float32's last bits.
    tl.store(loss_ptr + n, log_total - tl.fma(y_logit, LOG2E, -row_peak) * LN2)
    tl.store(lse_ptr + n, tl.fma(row_peak, LN2, log_total))

    if d_logits_ptr is not None:
        d_logits_row = d_logits_ptr + n * (d_logits_stride_n // VECTOR) * VECTOR
        scale = tl.where(in_range, 1.0, float("nan"))
        if grad_scale_ptr is not None:
            scale *= tl.load(grad_scale_ptr)
        factor = scale / row_total
        # Backwards through the row: what was read last is what the caches still hold.
        if full < V:
            v = full + columns
            x = tl.load(logits_row + v, mask=v < row_width, other=0.0).to(tl.float32)
            d = tl.where(v < V, probabilities_tile(x, row_peak, factor), 0.0)
            d = tl.where(v == y, d - scale, d)
            tl.store(d_logits_row + v, d.to(d_logits_ptr.dtype.element_ty), mask=v < row_width)
        for done in range(BLOCK_V, full + BLOCK_V, BLOCK_V):
            v = full - done + columns
            d = probabilities_tile(tl.load(logits_row + v).to(tl.float32), row_peak, factor)
            if (y >= full - done) & (y < full - done + BLOCK_V):  # one tile of the row pays for the comparison
                d = tl.where(v == y, d - scale, d)
            tl.store(d_logits_row + v, d.to(d_logits_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def cross_entropy_backward_kernel(
    # in
    logits_ptr,  # (N, row_width)
    targets_ptr,  # (N,) int32 or int64
    lse_ptr,  # (N,) f32
    d_loss_ptr,  # (N,) f32
    # out
    d_logits_ptr,  # (N, row_width); may be logits_ptr
    # sizes
    V,
    row_width,
    # strides
    logits_stride_n,
    d_logits_stride_n,
    # scalars
    ignore_index,
    # tile
    BLOCK_V: tl.constexpr,
    VECTOR: tl.constexpr,
    VECTOR_TAIL: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    if VECTOR_TAIL:
        row_width = row_width // VECTOR * VECTOR
    start = tl.program_id(1) * BLOCK_V
    v = start + tl.arange(0, BLOCK_V)
    logits_row = logits_ptr + n * (logits_stride_n // VECTOR) * VECTOR
    d_logits_row = d_logits_ptr + n * (d_logits_stride_n // VECTOR) * VECTOR
    y = tl.load(targets_ptr + n)
    if y == ignore_index:  # zeros even where the upstream gradient or the logits are not finite
        zeros = tl.zeros((BLOCK_V,), d_logits_ptr.dtype.element_ty)
        if start + BLOCK_V <= V:
            tl.store(d_logits_row + v, zeros)
        else:
            tl.store(d_logits_row + v, zeros, mask=v < row_width)
        return
    peak = tl.load(lse_ptr + n) * LOG2E
    scale = tl.where((y >= 0) & (y < V), tl.load(d_loss_ptr + n), float("nan"))
    if start + BLOCK_V <= V:
        d = probabilities_tile(tl.load(logits_row + v).to(tl.float32), peak, scale)
        if (y >= start) & (y < start + BLOCK_V):
            d = tl.where(v == y, d - scale, d)
        tl.store(d_logits_row + v, d.to(d_logits_ptr.dtype.element_ty))
    else:
        x = tl.load(logits_row + v, mask=v < row_width, other=0.0).to(tl.float32)
        d = tl.where(v < V, probabilities_tile(x, peak, scale), 0.0)
        d = tl.where(v == y, d - scale, d)
        tl.store(d_logits_row + v, d.to(d_logits_ptr.dtype.element_ty), mask=v < row_width)


def tile(V: int) -> dict[str, int]:
    """Block, warps and threads for rows of `V` logits: one program walks a row.

    Long rows get 1024 threads, so that few rows are in flight at once and the gradient's second pass over each finds
    it in the L2 cache; 16 elements a thread keep two 16-byte loads of bfloat16 in the air without spilling.
    """
    block = min(max(next_power_of_2(V), 1024), 16384)
    return {"BLOCK_V": block, "THREADS": block // 16, "num_warps": warps(block // 16)}


def backward_tile(V: int) -> dict[str, int]:
    """Block and warps of the separate backward: elementwise, so small programs of 8 elements a thread."""
    block = min(max(next_power_of_2(V), 1024), 2048)
    return {"BLOCK_V": block, "num_warps": warps(block // 8)}


def vectors(row_width: int, logits: Tensor, d_logits: Tensor | None) -> dict[str, int | bool]:
    """The widest access, up to 16 bytes, that the rows' addresses allow, in elements."""
    width = 16 // logits.element_size()
    for t in (logits, d_logits):
        if t is not None:
            width = math.gcd(width, t.stride(0), t.data_ptr() % 16 // t.element_size())
    return {"VECTOR": width, "VECTOR_TAIL": row_width % width == 0}


def cross_entropy(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Tensor,  # (N,) int32 or int64
    *,
    V: int | None = None,
    ignore_index: int,
    d_logits: Tensor | None = None,  # like `logits`, filled; may be `logits`
    grad_scale: Tensor | None = None,  # () f32
) -> tuple[Tensor, Tensor]:
    """Loss and lse of every row, both (N,) float32; fills `d_logits` with the gradient of grad_scale * sum(loss).

    Padding is read, ignored, and overwritten with zeros in `d_logits`: where it rounds the rows up to 16 bytes, rows of
    any V are accessed 16 bytes at a time.
    """
    N, row_width = logits.shape
    V = V or row_width
    loss = logits.new_empty(N, dtype=torch.float32)
    lse = torch.empty_like(loss)
    if N > 0:
        with device_of(logits):
            cross_entropy_kernel[(N,)](
                logits, targets, grad_scale, loss, lse, d_logits,
                V=V, row_width=row_width, logits_stride_n=logits.stride(0),
                d_logits_stride_n=0 if d_logits is None else d_logits.stride(0),
                ignore_index=ignore_index, **tile(V), **vectors(row_width, logits, d_logits), **FP_FUSION,
            )  # fmt: skip
    return loss, lse


def cross_entropy_backward(
    logits: Tensor,  # (N, V), or (N, row_width) with padding from V on
    targets: Tensor,  # (N,) int32 or int64
    lse: Tensor,  # (N,) f32
    d_loss: Tensor,  # (N,) f32
    *,
    V: int | None = None,
    ignore_index: int,
    d_logits: Tensor,  # like `logits`, filled; may be `logits`
) -> None:
    """Fill `d_logits` with d_loss[n] * (softmax(logits[n]) - onehot(targets[n])), its padding with zeros."""
    N, row_width = logits.shape
    V = V or row_width
    if N > 0:
        meta = backward_tile(V)
        with device_of(logits):
            cross_entropy_backward_kernel[(N, cdiv(V, meta["BLOCK_V"]))](
                logits, targets, lse, d_loss, d_logits,
                V=V, row_width=row_width, logits_stride_n=logits.stride(0), d_logits_stride_n=d_logits.stride(0),
                ignore_index=ignore_index, **meta, **vectors(row_width, logits, d_logits), **FP_FUSION,
            )  # fmt: skip
