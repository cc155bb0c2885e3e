"""Multiply a buffer by a scalar that lives on the device: in place, into another dtype, or added to a buffer.

Zeros stay zeros even if the scalar is infinite or NaN, because the gradient of an ignored row is zero whatever comes
from upstream.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, Choice, Tile, cdiv, expect_contiguous, warps


@triton.jit
def scale_tile(x_ptr, factor, out_ptr, i, inside, ADD: tl.constexpr):
    """Scale the elements `i`; the mask `inside` is None for whole tiles."""
    x = tl.load(x_ptr + i, mask=inside).to(tl.float32)
    x = tl.where(x == 0.0, x, x * factor)
    if ADD:
        x += tl.load(out_ptr + i, mask=inside).to(tl.float32)
    tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["numel"])
def scale_kernel(
    # in
    x_ptr,  # (numel,)
    factor_ptr,  # () f32
    # out
    out_ptr,  # (numel,), or None to write over x
    # sizes
    numel,
    # flags
    ADD: tl.constexpr,  # to what is in out
    # tile
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if out_ptr is None:
        out_ptr = x_ptr
        if factor == 1.0:  # the usual upstream gradient: nothing to do, and the host need not know
            return
    start = tl.program_id(0).to(tl.int64) * BLOCK  # numel can pass 2**31
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        scale_tile(x_ptr, factor, out_ptr, i, None, ADD)
    else:
        scale_tile(x_ptr, factor, out_ptr, i, i < numel, ADD)


# 16 elements per thread keep two 16-byte loads of bfloat16 in flight.
TILE = Choice(Tile(16, 256), Tile(8, 256), Tile(16, 512), Tile(16, 128))


def tile() -> dict[str, int]:
    """Return block and warps."""
    elements, threads = TILE.chosen
    return {"BLOCK": elements * threads, "num_warps": warps(threads)}


def scale(
    x: Tensor,  # any shape, contiguous
    factor: Tensor,  # () f32
    *,
    out: Tensor | None = None,  # like x, contiguous, any float dtype
    add: bool = False,  # add to `out` instead
) -> Tensor:
    """Write factor * x into `out`, or over `x` (which costs nothing when the factor is 1), and return that tensor."""
    expect_contiguous(x=x, out=out)
    if x.numel() > 0:
        meta = tile()
        with device_of(x):
            scale_kernel[(cdiv(x.numel(), meta["BLOCK"]),)](
                x, factor, out, numel=x.numel(), ADD=add, **meta, **FP_FUSION
            )
    return x if out is None else out
