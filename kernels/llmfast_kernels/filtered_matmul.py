"""A matrix product that skips blocks of its left factor: the gradient filter of the linear loss.

Most of the gradient of the logits is too small to count. `alive` says which blocks of it, 128 by 128, do count; the
others are taken as zeros and never read. A program owns one tile of the result, adds up the living blocks of its
block-row from left to right, and writes once. Nothing is atomic, so the same input gives the same bits.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, cdiv, warps
from llmfast_kernels.terms import GROUP

BLOCK = GROUP  # rows and columns of `a` that are kept or dropped together


class Factor(NamedTuple):
    """The slices of a factor that one program multiplies, all at the same offsets from a pointer that moves along K."""

    tile: Any  # where the program's tile starts
    offsets: Any  # (BLOCK, BLOCK_K), or (BLOCK_K, BLOCK_D) for b
    stride_k: Any
    inside: Any  # mask of the axis that is not K


@triton.jit
def add_slices(total, begin, end, blocks_row, a, b, k_end, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Add the products of slices `begin` to `end`, BLOCK_K wide, counted over living blocks alone.

    One loop over slices, not one over blocks and one inside: Triton overlaps loads with products within a loop only.
    If k_end is None, tiles and blocks are whole, and nothing is masked.
    """
    SLICES: tl.constexpr = BLOCK // BLOCK_K
    k = tl.arange(0, BLOCK_K)
    # One turn ahead, so that no address waits for its block's number. The last number read belongs to no block.
    block = tl.load(blocks_row + begin // SLICES)
    for i in range(begin, end):
        # K * D can pass 2**31.
        k_start = (block * BLOCK + i % SLICES * BLOCK_K).to(tl.int64)  # pyright: ignore[reportOperatorIssue]
        block = tl.load(blocks_row + (i + 1) // SLICES)
        a_slice = a.tile + k_start * a.stride_k + a.offsets
        b_slice = b.tile + k_start * b.stride_k + b.offsets
        if k_end is None:
            total = tl.dot(tl.load(a_slice), tl.load(b_slice), total, input_precision="ieee")
        else:
            k_inside = k_start + k < k_end
            a_values = tl.load(a_slice, mask=a.inside & k_inside[None, :], other=0.0)
            b_values = tl.load(b_slice, mask=k_inside[:, None] & b.inside, other=0.0)
            total = tl.dot(a_values, b_values, total, input_precision="ieee")
    return total


@triton.jit
def put(out, total, inside, ADD: tl.constexpr):
    """Store `total`, or add it to what is there, in the type of `out`."""
    if ADD:
        total += tl.load(out, mask=inside).to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "K", "D", "a_stride", "b_stride_k", "out_stride_m"])
def filtered_matmul_kernel(
    # in
    a_ptr,  # (M, K)
    b_ptr,  # (K, D)
    blocks_ptr,  # (M / BLOCK, K / BLOCK + 1) int32: per row living blocks, ascending; dead ones; how many live
    # out
    out_ptr,  # (M, D)
    # sizes
    M,
    K,
    D,
    # strides
    a_stride,  # from row to row, or where TRANSPOSED from column to column; the other one is 1
    b_stride_k,
    out_stride_m,
    # flags
    ADD: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    VECTOR: tl.constexpr,  # elements an access may move at once: D and the strides are multiples of it
    VECTOR_TAIL: tl.constexpr,  # so is the length of a's rows, or where TRANSPOSED of its columns
):
    a_stride = a_stride // VECTOR * VECTOR  # tells the compiler what the comment on VECTOR says
    b_stride_k = b_stride_k // VECTOR * VECTOR
    out_stride_m = out_stride_m // VECTOR * VECTOR
    D = D // VECTOR * VECTOR
    # Programs that run at the same time share rows of a and columns of b: the L2 cache serves all but the first.
    m_tile, d_tile = tl.swizzle2d(  # pyright: ignore[reportGeneralTypeIssues]
        tl.program_id(1), tl.program_id(0), tl.num_programs(1), tl.num_programs(0), 8
    )
    m_start, d_start = m_tile.to(tl.int64) * BLOCK, d_tile * BLOCK_D
    K_blocks = tl.cdiv(K, BLOCK)
    blocks_row = blocks_ptr + m_tile.to(tl.int64) * (K_blocks + 1)
    count = tl.load(blocks_row + K_blocks)
    if ADD:
        if count == 0:
            return

    # Within a tile offsets fit in 32 bits and stay the same; 64-bit scalars move on.
    m, k, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    a_stride_m = 1 if TRANSPOSED else a_stride
    a_stride_k = a_stride if TRANSPOSED else 1
    m_end, k_end = M - m_start, K
    if VECTOR_TAIL:
        if TRANSPOSED:
            m_end = M // VECTOR * VECTOR - m_start
        else:
            k_end = K // VECTOR * VECTOR
    m_inside, d_inside = (m < m_end)[:, None], (d_start + d < D)[None, :]
    a_offsets = m[:, None] * a_stride_m + k[None, :] * a_stride_k
    a = Factor(a_ptr + m_start * a_stride_m, a_offsets, a_stride_k, m_inside)
    b = Factor(b_ptr + d_start, k[:, None] * b_stride_k + d[None, :], b_stride_k, d_inside)

    # Slices that need no mask come first: none where the tile is cut off, and not the block that K cuts off.
    SLICES: tl.constexpr = BLOCK // BLOCK_K
    whole = count
    if count > 0:
        if tl.load(blocks_row + count - 1) == K // BLOCK:
            whole -= 1
    if (m_start + BLOCK > M) | (d_start + BLOCK_D > D):
        whole = 0
    total = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    end = whole * SLICES
    total = add_slices(total, 0, end, blocks_row, a, b, None, BLOCK=BLOCK, BLOCK_K=BLOCK_K)
    total = add_slices(total, end, count * SLICES, blocks_row, a, b, k_end, BLOCK=BLOCK, BLOCK_K=BLOCK_K)

    # In two halves: with all of the old `out` in registers too, only one program would fit on a multiprocessor.
    HALF: tl.constexpr = BLOCK_D // 2
    left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK, 2, HALF)), (0, 2, 1)))
    d = d_start + tl.arange(0, HALF)
    out = out_ptr + m_start * out_stride_m + m[:, None] * out_stride_m + d[None, :]
    put(out, left, m_inside & (d < D)[None, :], ADD)
    put(out + HALF, right, m_inside & (d + HALF < D)[None, :], ADD)


def tile(dtype: torch.dtype, vector: int) -> dict[str, int]:
    """Return blocks, warps and stages: four slices, of 8 KiB for each factor, are in flight or being multiplied.

    That is 64 KiB of shared memory on an H100, which then holds two programs: one multiplies while the other starts or
    ends. AMD's GPUs keep three slices, in 48 of the 64 KiB they have. Accesses of less than 16 bytes are more accesses,
    and their addresses take the registers of half of the tile.
    """
    whole = vector * dtype.itemsize == 16
    return {"BLOCK_K": 64 // dtype.itemsize, "BLOCK_D": 128 if whole else 64, "num_warps": warps(256), "num_stages": 4}


def vectors(a: Tensor, b: Tensor, out: Tensor) -> dict[str, int]:
    """Return the widest access, up to 16 bytes of `a`, that D, strides and addresses allow, in elements."""
    transposed = a.stride(1) != 1
    width = math.gcd(16 // a.element_size(), b.shape[1], a.stride(1 if transposed else 0), b.stride(0), out.stride(0))
    if any(t.data_ptr() % 16 for t in (a, b, out)):
        width = 1  # all that Triton asks of an address is whether it is a multiple of 16 bytes
    return {"VECTOR": width, "VECTOR_TAIL": a.shape[0 if transposed else 1] % width == 0}


def filtered_matmul(
    a: Tensor,  # (M, K), one of its strides 1
    b: Tensor,  # (K, D) in a's dtype, stride(1) == 1
    alive: Tensor,  # (M / BLOCK, K / BLOCK), rounded up; bool, or int8 of 0 and 1: blocks of `a` that count
    *,
    out: Tensor,  # (M, D) f32 or in a's dtype, stride(1) == 1; filled
    add: bool = False,  # add to `out` instead
) -> None:
    """Fill `out` with a @ b, where blocks of `a` that are not alive count as zeros.

    The product is summed in float32 and rounded once.
    """
    (M, K), D = a.shape, b.shape[1]
    if M == 0 or D == 0:
        return
    for name, t, either in (("a", a, a.stride()), ("b", b, b.stride()[1:]), ("out", out, out.stride()[1:])):
        if 1 not in either:
            raise ValueError(f"{name} must have stride 1 along its rows; got strides {t.stride()}")
    transposed = a.stride(1) != 1
    access = vectors(a, b, out)
    meta = tile(a.dtype, access["VECTOR"])
    # Sorted and counted on the device: the host waits for nothing.
    alive = alive.to(torch.int8)
    order = alive.argsort(dim=1, descending=True, stable=True)
    blocks = torch.cat([order, alive.sum(1, keepdim=True)], 1).to(torch.int32)
    strides = {"a_stride": a.stride(1 if transposed else 0), "b_stride_k": b.stride(0), "out_stride_m": out.stride(0)}
    constants = {"ADD": add, "TRANSPOSED": transposed, "BLOCK": BLOCK, **access, **meta, **FP_FUSION}
    with device_of(a):
        grid = cdiv(D, meta["BLOCK_D"]), cdiv(M, BLOCK)
        filtered_matmul_kernel[grid](a, b, blocks, out, M, K, D, **strides, **constants)
