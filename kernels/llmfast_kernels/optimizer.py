"""Optimizer updates for many tensors in one launch. See `kernels/README.md` for how to read it.

The tensors come as a table of addresses on the device, a row of coefficients each; a program updates one chunk of one
tensor. `prepare_kernel` turns step counters and hyperparameters into the coefficients, in float64 and on the device,
so that the update has no powers to take and the host nothing to wait for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, cdiv, warps

# Rows of the table (int64, one column a tensor). The gradient's row is kept apart, because it changes every step.
PARAM, FIRST_STATE, _, _, NUMEL, FIRST_CHUNK, GROUP = range(7)
TABLE_ROWS = 7

# What a parameter group says (float64) ...
HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "sign")
# ... and what the update needs to know of a tensor (float32).
COEFFICIENTS = 9

CHUNK = 8192  # elements a program updates: small models still fill a GPU, and the table stays a rounding error


@triton.jit(do_not_specialize=["T"])
def prepare_kernel(
    # in
    table_ptr,  # (TABLE_ROWS, T) int64
    grads_ptr,  # (T,) int64 addresses, 0 where there is no gradient
    hyper_ptr,  # (G, 6) f64: HYPERPARAMETERS
    grad_scale_ptr,  # () f32 that gradients were multiplied by, or None
    found_inf_ptr,  # () f32, not 0 if the step must change nothing, or None
    # in and out
    steps_ptr,  # (T,) f32
    # out
    coefficients_ptr,  # (T, 9) f32
    # sizes
    T,
    # tile
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < T
    active = tl.load(grads_ptr + t, mask=mask, other=0) != 0
    if found_inf_ptr is not None:
        active = tl.where(tl.load(found_inf_ptr) == 0.0, active, False)
    step = tl.load(steps_ptr + t, mask=mask, other=0.0) + tl.where(active, 1.0, 0.0)
    tl.store(steps_ptr + t, step, mask=mask)

    hyper = hyper_ptr + tl.load(table_ptr + 6 * T + t, mask=mask, other=0) * 6
    lr = tl.load(hyper + 0, mask=mask, other=0.0)
    beta1 = tl.load(hyper + 1, mask=mask, other=0.0)
    beta2 = tl.load(hyper + 2, mask=mask, other=0.0)
    eps = tl.load(hyper + 3, mask=mask, other=0.0)
    weight_decay = tl.load(hyper + 4, mask=mask, other=0.0)
    sign = tl.load(hyper + 5, mask=mask, other=0.0)
    if grad_scale_ptr is not None:
        sign = sign / tl.load(grad_scale_ptr).to(tl.float64)

    step = step.to(tl.float64)
    correction1 = 1.0 - tl.where(beta1 > 0.0, tl.exp2(step * tl.log2(tl.where(beta1 > 0.0, beta1, 1.0))), 0.0)
    correction2 = 1.0 - tl.where(beta2 > 0.0, tl.exp2(step * tl.log2(tl.where(beta2 > 0.0, beta2, 1.0))), 0.0)
    out = coefficients_ptr + t * 9
    tl.store(out + 0, tl.where(active, sign, 0.0).to(tl.float32), mask=mask)  # 0 says: leave this tensor alone
    tl.store(out + 1, (lr * weight_decay).to(tl.float32), mask=mask)
    tl.store(out + 2, (1.0 - beta1).to(tl.float32), mask=mask)
    tl.store(out + 3, beta2.to(tl.float32), mask=mask)
    tl.store(out + 4, (1.0 - beta2).to(tl.float32), mask=mask)
    tl.store(out + 5, (lr / correction1).to(tl.float32), mask=mask)
    tl.store(out + 6, (1.0 / tl.sqrt(correction2)).to(tl.float32), mask=mask)
    tl.store(out + 7, eps.to(tl.float32), mask=mask)
    tl.store(out + 8, beta1.to(tl.float32), mask=mask)


@triton.jit
def adamw_tile(
    p_ptr, g_ptr, m_ptr, v_ptr, vmax_ptr, mask, sign, decay, beta1, rate1, beta2, rate2, step_size, root2, eps
):
    """Decoupled decay, then Adam (Loshchilov & Hutter 2019), with torch's placement of eps; float32 throughout."""
    p = tl.load(p_ptr, mask=mask).to(tl.float32)
    g = tl.load(g_ptr, mask=mask).to(tl.float32) * sign
    m = tl.load(m_ptr, mask=mask).to(tl.float32)
    v = tl.load(v_ptr, mask=mask).to(tl.float32)
    m = beta1 * m + rate1 * g  # not m + rate1 * (g - m), which loses a small g beside a large m
    v = beta2 * v + rate2 * g * g
    tl.store(m_ptr, m.to(m_ptr.dtype.element_ty), mask=mask)
    tl.store(v_ptr, v.to(v_ptr.dtype.element_ty), mask=mask)
    if vmax_ptr is not None:
        v = tl.maximum(v, tl.load(vmax_ptr, mask=mask).to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        tl.store(vmax_ptr, v.to(vmax_ptr.dtype.element_ty), mask=mask)
    p -= decay * p + step_size * tl.div_rn(m, tl.sqrt_rn(v) * root2 + eps)  # one rounding at p's own size
    tl.store(p_ptr, p.to(p_ptr.dtype.element_ty), mask=mask)


@triton.jit
def aligned_pointer(address, TYPE: tl.constexpr):
    """The address as a pointer that the compiler knows to be a multiple of 16 bytes."""
    # Rounding makes it a value of its own: the hint must not reach pointers made from the same address elsewhere.
    return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(TYPE)), 16)


@triton.jit(do_not_specialize=["T"])
def adamw_kernel(
    # in
    table_ptr,  # (TABLE_ROWS, T) int64
    grads_ptr,  # (T,) int64 addresses
    coefficients_ptr,  # (T, 9) f32
    chunk_tensor_ptr,  # (programs,) int32: the column of the table whose tensor a program works on
    # sizes
    T,
    # flags
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
    AMSGRAD: tl.constexpr,
    # tile
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    t = tl.load(chunk_tensor_ptr + chunk)
    c = coefficients_ptr + t * 9
    sign = tl.load(c)
    if sign == 0.0:
        return
    decay, rate1, beta2, rate2 = tl.load(c + 1), tl.load(c + 2), tl.load(c + 3), tl.load(c + 4)
    step_size, root2, eps, beta1 = tl.load(c + 5), tl.load(c + 6), tl.load(c + 7), tl.load(c + 8)

    p = tl.load(table_ptr + t)
    m = tl.load(table_ptr + T + t)
    v = tl.load(table_ptr + 2 * T + t)
    vmax = tl.load(table_ptr + 3 * T + t)  # 0 without amsgrad
    g = tl.load(grads_ptr + t)
    start = (chunk - tl.load(table_ptr + 5 * T + t)) * CHUNK  # int64: a tensor can pass 2**31 elements
    count = tl.minimum(tl.load(table_ptr + 4 * T + t) - start, CHUNK).to(tl.int32)
    # Whole tiles of aligned tensors go 16 bytes at a time; a tensor's end, and views at odd addresses, go masked.
    aligned = ((p | g | m | v | vmax) & 15) == 0
    whole = tl.where(aligned, count // BLOCK * BLOCK, 0)
    i = tl.arange(0, BLOCK)
    for offset in range(0, whole, BLOCK):
        adamw_tile(
            aligned_pointer(p, PARAM_TYPE) + start + offset + i,
            aligned_pointer(g, GRAD_TYPE) + start + offset + i,
            aligned_pointer(m, STATE_TYPE) + start + offset + i,
            aligned_pointer(v, STATE_TYPE) + start + offset + i,
            aligned_pointer(vmax, STATE_TYPE) + start + offset + i if AMSGRAD else None,
            None,
            sign, decay, beta1, rate1, beta2, rate2, step_size, root2, eps,
        )  # fmt: skip
    for offset in range(whole, count, BLOCK):
        adamw_tile(
            p.to(tl.pointer_type(PARAM_TYPE)) + start + offset + i,
            g.to(tl.pointer_type(GRAD_TYPE)) + start + offset + i,
            m.to(tl.pointer_type(STATE_TYPE)) + start + offset + i,
            v.to(tl.pointer_type(STATE_TYPE)) + start + offset + i,
            vmax.to(tl.pointer_type(STATE_TYPE)) + start + offset + i if AMSGRAD else None,
            offset + i < count,
            sign, decay, beta1, rate1, beta2, rate2, step_size, root2, eps,
        )  # fmt: skip


TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def tile() -> dict[str, int]:
    """8 elements a thread: two 16-byte loads of each float32 tensor in the air, four tensors at a time."""
    return {"CHUNK": CHUNK, "BLOCK": 1024, "num_warps": warps(128)}


def prepare_tile() -> dict[str, int]:
    """One tensor a thread."""
    return {"BLOCK": 128, "num_warps": warps(128)}


def adamw(
    table: Tensor,  # (TABLE_ROWS, T) int64
    grads: Tensor,  # (T,) int64
    hyper: Tensor,  # (G, 6) f64
    steps: Tensor,  # (T,) f32, counted up where there is a gradient
    coefficients: Tensor,  # (T, 9) f32, scratch
    chunk_tensor: Tensor,  # (programs,) int32
    *,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_dtype: torch.dtype,
    amsgrad: bool,
    grad_scale: Tensor | None = None,  # () f32
    found_inf: Tensor | None = None,  # () f32
) -> None:
    """One AdamW step of every tensor in the table: two launches, whatever T is. All tensors share these dtypes."""
    T = table.shape[1]
    with device_of(table):
        prepare_kernel[(cdiv(T, prepare_tile()["BLOCK"]),)](
            table, grads, hyper, grad_scale, found_inf, steps, coefficients,
            T=T, **prepare_tile(), **FP_FUSION,
        )  # fmt: skip
        if chunk_tensor.shape[0] > 0:
            adamw_kernel[(chunk_tensor.shape[0],)](
                table, grads, coefficients, chunk_tensor, T=T,
                PARAM_TYPE=TRITON_TYPES[param_dtype], GRAD_TYPE=TRITON_TYPES[grad_dtype],
                STATE_TYPE=TRITON_TYPES[state_dtype], AMSGRAD=amsgrad, **tile(), **FP_FUSION,
            )  # fmt: skip
