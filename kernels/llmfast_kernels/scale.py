"""Multiply a buffer by a scalar that lives on the device: in place, into another dtype, or added to a buffer.

Zeros stay zeros even if the scalar is infinite or NaN: gradients of ignored rows are zero whatever comes from upstream.
"""

import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, cdiv, expect_contiguous, warps


@triton.jit
def times(x, factor):
    return tl.where(x == 0.0, x, x * factor)


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
        if factor == 1.0:  # the usual upstream gradient: nothing to do, and the host need not know
            return
    start = tl.program_id(0).to(tl.int64) * BLOCK  # numel can pass 2**31
    i = start + tl.arange(0, BLOCK)
    if start + BLOCK <= numel:
        x = times(tl.load(x_ptr + i).to(tl.float32), factor)
        if out_ptr is None:
            tl.store(x_ptr + i, x.to(x_ptr.dtype.element_ty))
        else:
            if ADD:
                x += tl.load(out_ptr + i).to(tl.float32)
            tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty))
    else:
        x = times(tl.load(x_ptr + i, mask=i < numel, other=0.0).to(tl.float32), factor)
        if out_ptr is None:
            tl.store(x_ptr + i, x.to(x_ptr.dtype.element_ty), mask=i < numel)
        else:
            if ADD:
                x += tl.load(out_ptr + i, mask=i < numel, other=0.0).to(tl.float32)
            tl.store(out_ptr + i, x.to(out_ptr.dtype.element_ty), mask=i < numel)


def tile() -> dict[str, int]:
    """Choose 16 elements per thread: two 16-byte loads of bfloat16 in flight."""
    return {"BLOCK": 4096, "num_warps": warps(256)}


def scale(
    x: Tensor,  # any shape, contiguous
    factor: Tensor,  # () f32
    *,
    out: Tensor | None = None,  # like x, contiguous, any float dtype
    add: bool = False,
) -> Tensor:
    """Write factor * x into `out` (or add it), or over `x` (which costs nothing when the factor is 1)."""
    expect_contiguous(x=x, out=out)
    if x.numel() > 0:
        meta = tile()
        with device_of(x):
            scale_kernel[(cdiv(x.numel(), meta["BLOCK"]),)](
                x, factor, out, numel=x.numel(), ADD=add, **meta, **FP_FUSION
            )
    return x if out is None else out
