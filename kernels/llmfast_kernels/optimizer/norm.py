"""The norm of many gradients, for clipping them.

Each program sums the squares of one chunk. The chunks are added up in float64, always in the same order, so the norm
has the same bits every time. `prepare_kernel` takes the root.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, Choice, Tile, cdiv, warps
from llmfast_kernels.optimizer.table import CHUNK, FIRST_CHUNK, NUMEL, ROW_WIDTH, TRITON_TYPES, elements, pointer


@triton.jit
def norm_kernel(
    # in
    table_ptr,  # (T, ROW_WIDTH) int64
    grads_ptr,  # (T,) int64 addresses, 0 where there is no gradient
    chunk_tensor_ptr,  # (programs,) int32
    # out
    squares_ptr,  # (programs,) f32
    # flags
    GRAD_TYPE: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
):
    """Sum the squares of each chunk of every gradient."""
    chunk = tl.program_id(0)
    t = tl.load(chunk_tensor_ptr + chunk)
    row = table_ptr + t * ROW_WIDTH
    address = tl.load(grads_ptr + t)
    start = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    count = tl.where(address == 0, 0, tl.minimum(tl.load(row + NUMEL) - start, CHUNK)).to(tl.int32)
    ptr = pointer(address, GRAD_TYPE)
    # A gradient may start anywhere: elements before the first address on 16 bytes go alone. All chunks begin alike.
    BYTES: tl.constexpr = GRAD_TYPE.primitive_bitwidth // 8
    head = tl.minimum(((-address & 15) // BYTES).to(tl.int32), count)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if head > 0:
        g = tl.load(elements(ptr, start, i, False), mask=i < head, other=0.0)
        total += g.to(tl.float32) * g.to(tl.float32)
    whole = head + (count - head) // BLOCK * BLOCK
    aligned = pointer(address + head * BYTES, GRAD_TYPE)
    for offset in range(0, whole - head, BLOCK):
        g = tl.load(elements(aligned, start + offset, i, True)).to(tl.float32)
        total += g * g
    if whole < count:
        g = tl.load(elements(ptr, start + whole, i, False), mask=whole + i < count, other=0.0)
        total += g.to(tl.float32) * g.to(tl.float32)
    tl.store(squares_ptr + chunk, tl.sum(total))


@triton.jit(do_not_specialize=["C", "rounds"])
def sum_kernel(
    # in
    numbers_ptr,  # (C,) f32 or f64
    # out
    sums_ptr,  # (programs,) f64
    # sizes
    C,
    rounds,  # blocks that each program adds up
    # tile
    BLOCK: tl.constexpr,
):
    """Add up each program's share of the numbers."""
    start = tl.program_id(0) * rounds * BLOCK
    count = tl.minimum(C - start, rounds * BLOCK)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    whole = count // BLOCK * BLOCK
    for offset in range(0, whole, BLOCK):
        total += tl.load(numbers_ptr + start + offset + i).to(tl.float64)
    if whole < count:
        total += tl.load(numbers_ptr + start + whole + i, mask=whole + i < count, other=0.0).to(tl.float64)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(total))


# 16 elements per thread keep four 16-byte loads of float32 in flight.
TILE = Choice(Tile(16, 128), Tile(16, 256))


def tile() -> dict[str, int]:
    """Return block and warps."""
    elements, threads = TILE.chosen
    return {"BLOCK": elements * threads, "num_warps": warps(threads)}


def sum_tile() -> dict[str, int]:
    """Return 8 elements per thread: two 16-byte loads of float32 in flight."""
    return {"BLOCK": 2048, "num_warps": warps(256)}


ROUNDS = 4  # blocks of one program, where there are several: 1B parameters make 30 programs


def add_up(numbers: Tensor, total: Tensor) -> None:
    """Add up (C,) numbers into `total`, () f64: in one launch if they are few, else in two."""
    C, block = numbers.shape[0], sum_tile()["BLOCK"]
    with device_of(numbers):
        if ROUNDS * block < C:
            sums = numbers.new_empty(cdiv(C, ROUNDS * block), dtype=torch.float64)
            sum_kernel[(len(sums),)](numbers, sums, C=C, rounds=ROUNDS, **sum_tile(), **FP_FUSION)
            numbers, C = sums, len(sums)
        sum_kernel[(1,)](numbers, total, C=C, rounds=cdiv(C, block), **sum_tile(), **FP_FUSION)


def sum_of_squares(
    table: Tensor,  # (T, ROW_WIDTH) int64
    grads: Tensor,  # (T,) int64
    chunk_tensor: Tensor,  # (programs,) int32
    squares: Tensor,  # (programs,) f32, scratch
    total: Tensor,  # () f64, written
    *,
    grad_dtype: torch.dtype,
) -> None:
    """Sum the squares of every gradient in the table, in two launches, or three if they are many."""
    C = chunk_tensor.shape[0]
    with device_of(table):
        if C > 0:
            grad_type = TRITON_TYPES[grad_dtype]
            norm_kernel[(C,)](table, grads, chunk_tensor, squares, GRAD_TYPE=grad_type, **tile(), **FP_FUSION)
        add_up(squares, total)
