"""The coefficients of a step: what the update needs to know of each tensor, computed on the device in float64."""

import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.launch import FP_FUSION, cdiv, warps
from llmfast_kernels.optimizer.formats import noise_keys
from llmfast_kernels.optimizer.rules import Rule
from llmfast_kernels.optimizer.table import (
    COEFFICIENTS,
    COEFFICIENTS_WIDTH,
    GROUP,
    GROUP_WIDTH,
    ROW,
    ROW_WIDTH,
    column,
    load_columns,
)

IN_GROUP, IDENTITY = column(ROW, "group"), column(ROW, "identity")
LR, SIGN, L2, EMA_RATE = (column(GROUP, name) for name in ("lr", "sign", "l2", "ema_rate"))
DECAY_BY_LR, DECAY = column(GROUP, "decay_by_lr"), column(GROUP, "decay")
MAX_NORM, SEED = column(GROUP, "max_norm"), column(GROUP, "seed")
ACTIVE_OUT, GRAD_FACTOR_OUT = column(COEFFICIENTS, "active"), column(COEFFICIENTS, "grad_factor")
DECAY_OUT, L2_OUT = column(COEFFICIENTS, "decay"), column(COEFFICIENTS, "l2")
EMA_RATE_OUT = column(COEFFICIENTS, "ema_rate")
KEY0_OUT, KEY1_OUT = column(COEFFICIENTS, "key0"), column(COEFFICIENTS, "key1")


@triton.jit(do_not_specialize=["T", "SUMS"], do_not_specialize_on_alignment=["hyper_ptr"])
def prepare_kernel(
    # in
    table_ptr,  # (T, ROW_WIDTH) int64
    grads_ptr,  # (T,) int64 addresses, 0 where there is no gradient
    hyper_ptr,  # (G, GROUP_WIDTH + NUMBERS) f64
    grad_scale_ptr,  # () f32 that gradients were multiplied by, or None
    found_inf_ptr,  # () f32, not 0 if the step must change nothing, or None
    sums_ptr,  # (SUMS,) f64, partial sums of the gradients' squares, or None without clipping
    # in and out
    steps_ptr,  # (T,) f32
    # out
    coefficients_ptr,  # (T, COEFFICIENTS_WIDTH + OWN_COEFFICIENTS) f32
    norm_ptr,  # () f32, of the gradients before clipping
    # sizes
    T,
    SUMS,
    # flags
    PREPARE: tl.constexpr,  # the rule's function
    NUMBERS: tl.constexpr,  # how many numbers the rule has of its own
    OWN_COEFFICIENTS: tl.constexpr,  # how many coefficients it makes of them
    # tile
    BLOCK: tl.constexpr,
):
    """Count the steps, and turn hyperparameters into coefficients."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < T
    row = table_ptr + t * ROW_WIDTH
    hyper = hyper_ptr + tl.load(row + IN_GROUP, mask=mask, other=0) * (GROUP_WIDTH + NUMBERS)
    lr = tl.load(hyper + LR, mask=mask, other=0.0)
    factor = tl.load(hyper + SIGN, mask=mask, other=0.0)
    active = tl.load(grads_ptr + t, mask=mask, other=0) != 0
    if found_inf_ptr is not None:
        active = tl.where(tl.load(found_inf_ptr) == 0.0, active, False)
    inverse_scale = 1.0
    if grad_scale_ptr is not None:
        inverse_scale = tl.div_rn(1.0, tl.load(grad_scale_ptr)).to(tl.float64)
    factor *= inverse_scale
    if sums_ptr is not None:
        total = tl.load(sums_ptr)
        for i in range(1, SUMS):
            total += tl.load(sums_ptr + i)
        norm = tl.sqrt(total) * inverse_scale
        if tl.program_id(0) == 0:
            tl.store(norm_ptr, norm.to(tl.float32))
        active = tl.where(norm < float("inf"), active, False)  # false for NaN as well
        factor *= tl.minimum(tl.load(hyper + MAX_NORM, mask=mask, other=0.0) / (norm + 1e-6), 1.0)
    step = tl.load(steps_ptr + t, mask=mask, other=0.0) + tl.where(active, 1.0, 0.0)
    tl.store(steps_ptr + t, step, mask=mask)

    out = coefficients_ptr + t * (COEFFICIENTS_WIDTH + OWN_COEFFICIENTS)
    tl.store(out + ACTIVE_OUT, tl.where(active, 1.0, 0.0), mask=mask)
    tl.store(out + GRAD_FACTOR_OUT, factor.to(tl.float32), mask=mask)
    decay = tl.load(hyper + DECAY_BY_LR, mask=mask, other=0.0) * lr + tl.load(hyper + DECAY, mask=mask, other=0.0)
    tl.store(out + DECAY_OUT, tl.where(lr == 0.0, 0.0, decay).to(tl.float32), mask=mask)  # with lr 0, parameters stay
    tl.store(out + L2_OUT, tl.load(hyper + L2, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(out + EMA_RATE_OUT, tl.load(hyper + EMA_RATE, mask=mask, other=0.0).to(tl.float32), mask=mask)
    seed = tl.load(hyper + SEED, mask=mask, other=0.0).to(tl.int64)
    identity = tl.load(row + IDENTITY, mask=mask, other=0).to(tl.uint32)
    key0, key1 = noise_keys(seed, step.to(tl.int32).to(tl.uint32), identity)
    bits = out.to(tl.pointer_type(tl.uint32))
    tl.store(bits + KEY0_OUT, key0, mask=mask)
    tl.store(bits + KEY1_OUT, key1, mask=mask)

    numbers = load_columns(hyper + GROUP_WIDTH, mask, 0.0, NUMBERS)
    own = PREPARE(lr, step.to(tl.float64), numbers)
    for i in tl.static_range(OWN_COEFFICIENTS):
        tl.store(out + COEFFICIENTS_WIDTH + i, own[i].to(tl.float32), mask=mask)


def prepare_tile() -> dict[str, int]:
    """Return a tile with one tensor per thread."""
    return {"BLOCK": 32, "num_warps": warps(32)}


def prepare(
    table: Tensor,  # (T, columns of ROW) int64
    grads: Tensor,  # (T,) int64
    hyper: Tensor,  # (G, columns of group_record) f64
    steps: Tensor,  # (T,) f32, increased by 1 for a tensor that is updated
    coefficients: Tensor,  # (T, columns of coefficients_record) f32, written
    *,
    rule: Rule,
    grad_scale: Tensor | None = None,  # () f32
    found_inf: Tensor | None = None,  # () f32
    sums: Tensor | None = None,  # (SUMS,) f64, partial sums of the gradients' squares
    norm: Tensor | None = None,  # () f32, written if `sums` is given
) -> None:
    """Write the coefficients that `update` reads, and advance `steps`."""
    T = table.shape[0]
    with device_of(table):
        prepare_kernel[(cdiv(T, prepare_tile()["BLOCK"]),)](
            table,
            grads,
            hyper,
            grad_scale,
            found_inf,
            sums,
            steps_ptr=steps,
            coefficients_ptr=coefficients,
            norm_ptr=norm,
            T=T,
            SUMS=0 if sums is None else sums.numel(),
            PREPARE=rule.prepare,
            NUMBERS=len(rule.numbers),
            OWN_COEFFICIENTS=len(rule.coefficients),
            **prepare_tile(),
            **FP_FUSION,
        )
