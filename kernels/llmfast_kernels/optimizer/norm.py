"""The norm of many gradients, for clipping them.

Each program sums the squares of one chunk, and one program adds the chunks up in float64: always in the same order,
so the norm has the same bits every time. `prepare_kernel` takes the root.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, warps
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
    whole = tl.where((address & 15) == 0, count // BLOCK * BLOCK, 0)
    ptr = pointer(address, GRAD_TYPE)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, whole, BLOCK):
        g = tl.load(elements(ptr, start + offset, i, True)).to(tl.float32)
        total += g * g
    for offset in range(whole, count, BLOCK):
        g = tl.load(elements(ptr, start + offset, i, False), mask=offset + i < count, other=0.0)
        total += g.to(tl.float32) * g.to(tl.float32)
    tl.store(squares_ptr + chunk, tl.sum(total))


@triton.jit(do_not_specialize=["C"])
def sum_kernel(
    # in
    squares_ptr,  # (C,) f32
    # out
    sum_ptr,  # () f64
    # sizes
    C,
    # tile
    BLOCK: tl.constexpr,
):
    """Add up the chunks' sums, in one program."""
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, C, BLOCK):
        total += tl.load(squares_ptr + offset + i, mask=offset + i < C, other=0.0).to(tl.float64)
    tl.store(sum_ptr, tl.sum(total))


def tile() -> dict[str, int]:
    """Return 16 elements per thread: four 16-byte loads of float32 in flight."""
    return {"BLOCK": 2048, "num_warps": warps(128)}


def sum_tile() -> dict[str, int]:
    """Return as many threads as one program can have."""
    return {"BLOCK": 1024, "num_warps": warps(1024)}


def sum_of_squares(
    table: Tensor,  # (T, ROW_WIDTH) int64
    grads: Tensor,  # (T,) int64
    chunk_tensor: Tensor,  # (programs,) int32
    squares: Tensor,  # (programs,) f32, scratch
    total: Tensor,  # () f64, written
    *,
    grad_dtype: torch.dtype,
) -> None:
    """Sum the squares of every gradient in the table, in two launches."""
    C = chunk_tensor.shape[0]
    with device_of(table):
        if C > 0:
            grad_type = TRITON_TYPES[grad_dtype]
            norm_kernel[(C,)](table, grads, chunk_tensor, squares, GRAD_TYPE=grad_type, **tile(), **FP_FUSION)
        sum_kernel[(1,)](squares, total, C=C, **sum_tile(), **FP_FUSION)
