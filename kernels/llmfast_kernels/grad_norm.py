"""The norm of many gradients, for clipping them. See `kernels/README.md` for how to read it.

Each program sums the squares of one chunk, and one program adds the chunks up in float64: always in the same order,
so the norm has the same bits every time. `optimizer.prepare_kernel` takes the root.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, warps
from llmfast_kernels.optimizer import CHUNK, COLUMNS, FIRST_CHUNK, NUMEL, TRITON_TYPES, elements


@triton.jit
def norm_kernel(
    # in
    table_ptr,  # (T, COLUMNS) int64
    grads_ptr,  # (T,) int64 addresses, 0 where there is no gradient
    chunk_tensor_ptr,  # (programs,) int32
    # out
    squares_ptr,  # (programs,) f32
    # flags
    GRAD_TYPE: tl.constexpr,
    # tile
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    t = tl.load(chunk_tensor_ptr + chunk)
    row = table_ptr + t * COLUMNS
    address = tl.load(grads_ptr + t)
    start = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK
    count = tl.where(address == 0, 0, tl.minimum(tl.load(row + NUMEL) - start, CHUNK)).to(tl.int32)
    whole = tl.where((address & 15) == 0, count // BLOCK * BLOCK, 0)
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for offset in range(0, whole, BLOCK):
        g = tl.load(elements(address, start + offset, i, GRAD_TYPE, True)).to(tl.float32)
        total += g * g
    for offset in range(whole, count, BLOCK):
        g = tl.load(elements(address, start + offset, i, GRAD_TYPE, False), mask=offset + i < count, other=0.0)
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
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for offset in range(0, C, BLOCK):
        total += tl.load(squares_ptr + offset + i, mask=offset + i < C, other=0.0).to(tl.float64)
    tl.store(sum_ptr, tl.sum(total))


def tile() -> dict[str, int]:
    """16 elements a thread: four 16-byte loads of float32 in the air."""
    return {"BLOCK": 2048, "num_warps": warps(128)}


def sum_tile() -> dict[str, int]:
    """One program: as many threads as it may have."""
    return {"BLOCK": 1024, "num_warps": warps(1024)}


def sum_of_squares(
    table: Tensor,  # (T, COLUMNS) int64
    grads: Tensor,  # (T,) int64
    chunk_tensor: Tensor,  # (programs,) int32
    squares: Tensor,  # (programs,) f32, scratch
    total: Tensor,  # () f64, written
    *,
    grad_dtype: torch.dtype,
) -> None:
    """The sum of the squares of every gradient in the table: two launches."""
    C = chunk_tensor.shape[0]
    with device_of(table):
        if C > 0:
            norm_kernel[(C,)](
                table, grads, chunk_tensor, squares,
                GRAD_TYPE=TRITON_TYPES[grad_dtype], CHUNK=CHUNK, **tile(), **FP_FUSION,
            )  # fmt: skip
        sum_kernel[(1,)](squares, total, C=C, **sum_tile(), **FP_FUSION)
