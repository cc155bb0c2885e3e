"""Optimizer updates for many tensors in one launch. See `kernels/README.md` for how to read it.

The tensors come as a table of addresses on the device, a row of coefficients each; a program updates one chunk of one
tensor, whatever the rule: `adam`, `sgd`, `rmsprop`, `adagrad` and `lion` below are what differs. `prepare_kernel` turns
step counters and hyperparameters into the coefficients, in float64 and on the device, so that the update has no powers
to take and the host nothing to wait for. With `norm_kernel` before it, gradients are clipped on the way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels.formats import (
    GROUP,
    decoded,
    encoded,
    joined,
    noise,
    noise_keys,
    rounded_stochastically,
    scrambled,
    split,
)
from llmfast_kernels.launch import FP_FUSION, cdiv, warps

# The table (int64): a row a tensor, with addresses (0 for what it lacks) ...
PARAM = tl.constexpr(0)
STATES = tl.constexpr(1)  # three
SCALES = tl.constexpr(4)  # two: of the first two states, where they have 8 bits
LOW = tl.constexpr(6)  # master copy, low bits or compensation of the parameter
EMA = tl.constexpr(7)
# ... and numbers.
NUMEL = tl.constexpr(8)
FIRST_CHUNK = tl.constexpr(9)
HYPER = tl.constexpr(10)  # row of the hyperparameters
IDENTITY = tl.constexpr(11)  # keeps the noise of two tensors apart
# Element e of this piece is element e // RUN * STRIDE + e % RUN + OFFSET of the whole tensor.
RUN, STRIDE, OFFSET = tl.constexpr(12), tl.constexpr(13), tl.constexpr(14)
COLUMNS = tl.constexpr(15)

# What a parameter group says (float64). The last four mean what the rule takes them for: see `prepare_kernel`.
HYPERPARAMETERS = tl.constexpr(13)
HYPER_NAMES = (
    *("lr", "sign", "decay_by_lr", "decay", "l2", "ema_rate", "max_norm", "seed", "eps"),
    *("first", "second", "third", "fourth"),
)

# What the update needs to know of a tensor (float32; the keys are integers).
ACTIVE, GRAD_FACTOR, DECAY, L2, EMA_RATE = (tl.constexpr(i) for i in range(5))
KEYS = tl.constexpr(5)  # two
RULE_COEFFICIENTS = tl.constexpr(7)  # seven
COEFFICIENTS = tl.constexpr(14)

CHUNK = 4096  # elements a program updates: small models still fill a GPU, and the table stays a rounding error
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def power(x, n):
    """Of numbers in [0, 1), where 0 is 0 however often multiplied."""
    return tl.where(x > 0.0, tl.exp2(n * tl.log2(tl.where(x > 0.0, x, 1.0))), 0.0)


@triton.jit(do_not_specialize=["T", "SUMS"], do_not_specialize_on_alignment=["hyper_ptr"])
def prepare_kernel(
    # in
    table_ptr,  # (T, COLUMNS) int64
    grads_ptr,  # (T,) int64 addresses, 0 where there is no gradient
    hyper_ptr,  # (G, HYPERPARAMETERS) f64
    grad_scale_ptr,  # () f32 that gradients were multiplied by, or None
    found_inf_ptr,  # () f32, not 0 if the step must change nothing, or None
    sums_ptr,  # (SUMS,) f64, squares of all gradients; or None, which clips nothing
    # in and out
    steps_ptr,  # (T,) f32
    # out
    coefficients_ptr,  # (T, COEFFICIENTS) f32
    norm_ptr,  # () f32, of the gradients before clipping
    # sizes
    T,
    SUMS,
    # flags
    RULE: tl.constexpr,
    # tile
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = t < T
    row = table_ptr + t * COLUMNS
    hyper = hyper_ptr + tl.load(row + HYPER, mask=mask, other=0) * HYPERPARAMETERS
    lr = tl.load(hyper + 0, mask=mask, other=0.0)
    factor = tl.load(hyper + 1, mask=mask, other=0.0)
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
        active = tl.where(norm < float("inf"), active, False)  # not NaN either
        factor *= tl.minimum(tl.load(hyper + 6, mask=mask, other=0.0) / (norm + 1e-6), 1.0)
    step = tl.load(steps_ptr + t, mask=mask, other=0.0) + tl.where(active, 1.0, 0.0)
    tl.store(steps_ptr + t, step, mask=mask)

    out = coefficients_ptr + t * COEFFICIENTS
    tl.store(out + ACTIVE, tl.where(active, 1.0, 0.0), mask=mask)
    tl.store(out + GRAD_FACTOR, factor.to(tl.float32), mask=mask)
    decay = tl.load(hyper + 2, mask=mask, other=0.0) * lr + tl.load(hyper + 3, mask=mask, other=0.0)
    tl.store(out + DECAY, tl.where(lr == 0.0, 0.0, decay).to(tl.float32), mask=mask)  # lr 0 moves nothing
    tl.store(out + L2, tl.load(hyper + 4, mask=mask, other=0.0).to(tl.float32), mask=mask)
    tl.store(out + EMA_RATE, tl.load(hyper + 5, mask=mask, other=0.0).to(tl.float32), mask=mask)
    seed = tl.load(hyper + 7, mask=mask, other=0.0).to(tl.int64)
    identity = tl.load(row + IDENTITY, mask=mask, other=0).to(tl.uint32)
    key0, key1 = noise_keys(seed, step.to(tl.int32).to(tl.uint32), identity)
    keys = (out + KEYS).to(tl.pointer_type(tl.uint32))
    tl.store(keys, key0, mask=mask)
    tl.store(keys + 1, key1, mask=mask)

    step = step.to(tl.float64)
    eps = tl.load(hyper + 8, mask=mask, other=0.0)
    first = tl.load(hyper + 9, mask=mask, other=0.0)
    second = tl.load(hyper + 10, mask=mask, other=0.0)
    third = tl.load(hyper + 11, mask=mask, other=0.0)
    if RULE == "adam":  # beta1, beta2
        # float32 as soon as may be, since numbers of 64 bits fill the registers.
        step_size = (lr / (1.0 - power(first, step))).to(tl.float32)
        root2 = (1.0 / tl.sqrt(1.0 - power(second, step))).to(tl.float32)
        c = first, 1.0 - first, second, 1.0 - second, step_size, root2, eps
    elif RULE == "sgd":  # momentum, dampening, whether Nesterov's; the first gradient is not damped
        rate = tl.where(step > 1.0, 1.0 - second, 1.0)
        c = first, rate, third, tl.where(third != 0.0, first, 1.0), lr, lr, lr
    elif RULE == "rmsprop":  # alpha, momentum
        c = first, 1.0 - first, second, lr, eps, eps, eps
    elif RULE == "lion":  # beta1, beta2
        c = first, 1.0 - first, second, 1.0 - second, lr, lr, lr
    else:  # adagrad: lr_decay
        c = lr / (1.0 + (step - 1.0) * first), eps, eps, eps, eps, eps, eps
    for i in tl.static_range(7):
        tl.store(out + RULE_COEFFICIENTS + i, c[i].to(tl.float32), mask=mask)


# The rules: gradient and states (float32, None where there is none) -> by how much the parameter falls, and the states.
# Before Triton 3.7, None cannot be among what a function returns: what stands there instead of a state is not stored.


@triton.jit
def adam(g, m, v, vmax, c):
    """Adam (Kingma & Ba 2015) with torch's placement of eps; with `vmax`, AMSGrad (Reddi et al. 2018)."""
    beta1, rate1, beta2, rate2, step_size, root2, eps = c
    m = beta1 * m + rate1 * g  # not m + rate1 * (g - m), which loses a small g beside a large m
    v = beta2 * v + rate2 * g * g
    second = v
    if vmax is not None:
        second = tl.maximum(v, vmax, propagate_nan=tl.PropagateNan.ALL)
    return step_size * tl.div_rn(m, tl.sqrt_rn(second) * root2 + eps), m, v, second


@triton.jit
def sgd(g, buffer, none1, none2, c):
    """Gradient descent, with momentum where there is a buffer (Sutskever et al. 2013 for Nesterov's)."""
    momentum, rate, own, carried, lr, _, _ = c
    change = g
    new = g
    if buffer is not None:
        new = momentum * buffer + rate * g
        change = own * g + carried * new
    return lr * change, new, g, g


@triton.jit
def rmsprop(g, square, buffer, mean, c):
    """RMSProp (Hinton 2012); with `mean` centered (Graves 2013), with `buffer` momentum over scaled gradients."""
    alpha, rate, momentum, lr, eps, _, _ = c
    square = alpha * square + rate * g * g
    variance = square
    new_mean = g
    if mean is not None:
        new_mean = alpha * mean + rate * g
        # Rounding must not make it less than nothing.
        variance = tl.maximum(square - new_mean * new_mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    change = tl.div_rn(g, tl.sqrt_rn(variance) + eps)
    if buffer is not None:
        change = momentum * buffer + change
    return lr * change, square, change, new_mean


@triton.jit
def adagrad(g, total, none1, none2, c):
    """AdaGrad (Duchi et al. 2011)."""
    lr, eps, _, _, _, _, _ = c
    total += g * g
    return lr * tl.div_rn(g, tl.sqrt_rn(total) + eps), total, g, g


@triton.jit
def lion(g, m, none1, none2, c):
    """Lion (Chen et al. 2023): the sign of an average, for which the newest gradient counts more than for the next."""
    beta1, rate1, beta2, rate2, lr, _, _ = c
    direction = beta1 * m + rate1 * g
    sign = tl.where(direction > 0.0, 1.0, tl.where(direction < 0.0, -1.0, direction))  # of NaN it is NaN
    return lr * sign, beta2 * m + rate2 * g, g, g


# What tensors hold, read into float32 and written back.


@triton.jit
def elements(address, start, i, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements start + i; with ALIGNED the compiler knows the address for a multiple of 16 bytes."""
    ptr = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        # Rounding makes it a value of its own: the hint must not reach pointers made from the same address elsewhere.
        ptr = tl.multiple_of((address // 16 * 16).to(tl.pointer_type(TYPE)), 16)
    return ptr + start + i


@triton.jit
def read(ptr, halves, HALF: tl.constexpr, mask):
    """Of bytes, which come by the pair of tiles, this tile's half; of all else, what is in memory."""
    if HALF is None or ptr.dtype.element_ty.primitive_bitwidth != 8:
        x = tl.load(ptr, mask=mask)
    else:
        x = halves[HALF]
    return x


@triton.jit
def write(ptr, x, HALF: tl.constexpr, mask):
    """To memory; but bytes of one tile of a pair stay with the caller."""
    if HALF is None or ptr.dtype.element_ty.primitive_bitwidth != 8:
        tl.store(ptr, x, mask=mask)


@triton.jit
def halves_of(address, start, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    """The bytes of two tiles that follow on each other, 16 to a thread; nothing of what is wider, or not there."""
    halves = 0, 0
    if TYPE is not None:
        ptr = elements(address, start, tl.arange(0, 2 * BLOCK), TYPE, True)
        if ptr.dtype.element_ty.primitive_bitwidth == 8:
            halves = tl.split(tl.permute(tl.reshape(tl.load(ptr), (2, BLOCK)), (1, 0)))
    return halves


@triton.jit
def write_halves(address, start, first, second, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    if TYPE is not None:
        ptr = elements(address, start, tl.arange(0, 2 * BLOCK), TYPE, True)
        if ptr.dtype.element_ty.primitive_bitwidth == 8:
            tl.store(ptr, tl.reshape(tl.permute(tl.join(first, second), (1, 0)), (2 * BLOCK,)))


@triton.jit
def read_param(p_ptr, low_ptr, low_halves, HALF: tl.constexpr, mask, MASTER: tl.constexpr):
    if MASTER == "fp32":
        p = tl.load(low_ptr, mask=mask)
    elif MASTER == "split16":
        p = joined(tl.load(p_ptr, mask=mask), tl.load(low_ptr, mask=mask), 16)
    elif MASTER == "split8":
        p = joined(tl.load(p_ptr, mask=mask), read(low_ptr, low_halves, HALF, mask), 8)
    else:
        p = tl.load(p_ptr, mask=mask).to(tl.float32)
        if MASTER == "kahan":
            p += tl.load(low_ptr, mask=mask).to(tl.float32)
    return p


@triton.jit
def write_param(p_ptr, low_ptr, p, random, HALF: tl.constexpr, mask, MASTER: tl.constexpr):
    """Returns the bytes that the caller is to write, or something it has no use for."""
    TYPE: tl.constexpr = p_ptr.dtype.element_ty
    kept = 0
    if MASTER == "stochastic":
        tl.store(p_ptr, rounded_stochastically(p, random), mask=mask)
    elif MASTER == "split16":
        high, low = split(p, 16)
        tl.store(p_ptr, high, mask=mask)
        tl.store(low_ptr, low.to(tl.int16), mask=mask)
    elif MASTER == "split8":
        high, low = split(p, 8)
        tl.store(p_ptr, high, mask=mask)
        kept = low.to(tl.int8)
        write(low_ptr, kept, HALF, mask)
    else:
        rounded = p.to(TYPE)
        tl.store(p_ptr, rounded, mask=mask)
        if MASTER == "fp32":
            tl.store(low_ptr, p, mask=mask)
        elif MASTER == "kahan":
            missed = p - rounded.to(tl.float32)
            tl.store(low_ptr, tl.where(tl.abs(missed) <= LARGEST, missed, 0.0).to(TYPE), mask=mask)
    return kept


@triton.jit
def read_state(ptr, scale_ptr, halves, HALF: tl.constexpr, mask, group_mask):
    if ptr is None:
        x = None
    elif ptr.dtype.element_ty.is_int():
        scale = tl.load(scale_ptr, mask=group_mask)
        x = decoded(read(ptr, halves, HALF, mask), scale, ptr.dtype.element_ty.is_int_signed())
    else:
        x = tl.load(ptr, mask=mask).to(tl.float32)
    return x


@triton.jit
def write_state(ptr, scale_ptr, x, random, SHIFT: tl.constexpr, HALF: tl.constexpr, mask, group_mask):
    """Returns what `write_param` returns."""
    kept = 0
    if ptr is not None:
        if ptr.dtype.element_ty.is_int():
            x = x if mask is None else tl.where(mask, x, 0.0)
            kept, scale = encoded(x, random >> SHIFT, ptr.dtype.element_ty.is_int_signed())
            write(ptr, kept, HALF, mask)
            tl.store(scale_ptr, scale, mask=group_mask)
        else:
            tl.store(ptr, x.to(ptr.dtype.element_ty), mask=mask)
    return kept


@triton.jit
def update_tile(
    g_address, row, start, count, c, factors, keys,
    RULE: tl.constexpr, PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr,
    STATE0: tl.constexpr, STATE1: tl.constexpr, STATE2: tl.constexpr,
    MASTER: tl.constexpr, LOW_TYPE: tl.constexpr, NOISE: tl.constexpr, STRIDED: tl.constexpr,
    AVERAGED: tl.constexpr, ZERO: tl.constexpr, UNSCALE: tl.constexpr,
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr, halves, HALF: tl.constexpr,
):  # fmt: skip
    """BLOCK elements from `start` on, all of them there if ALIGNED, else `count`.

    Where tiles go in pairs, `halves` holds the bytes of both, HALF is which of them this is, and its new ones are
    returned; else HALF is None.
    """
    p_address, s0_address, s1_address, s2_address, scale0, scale1, low_address, ema_address = row
    factor, decay, l2, ema_rate = factors
    group = tl.arange(0, BLOCK // GROUP)
    i = tl.arange(0, BLOCK)
    mask = None if ALIGNED else i < count
    group_mask = None if ALIGNED else group * GROUP < count

    p_ptr = elements(p_address, start, i, PARAM_TYPE, ALIGNED)
    g_ptr = elements(g_address, start, i, GRAD_TYPE, ALIGNED)
    s0_ptr = None if STATE0 is None else elements(s0_address, start, i, STATE0, ALIGNED)
    s1_ptr = None if STATE1 is None else elements(s1_address, start, i, STATE1, ALIGNED)
    s2_ptr = None if STATE2 is None else elements(s2_address, start, i, STATE2, ALIGNED)
    low_ptr = None if LOW_TYPE is None else elements(low_address, start, i, LOW_TYPE, ALIGNED)
    scale0_ptr = elements(scale0, start // GROUP, group, tl.float32, False)
    scale1_ptr = elements(scale1, start // GROUP, group, tl.float32, False)

    g = tl.load(g_ptr, mask=mask).to(tl.float32) * factor
    if UNSCALE:
        tl.store(g_ptr, tl.where(factor < 0.0, -g, g).to(GRAD_TYPE), mask=mask)  # the sign is the update's affair
    s0_halves, s1_halves, low_halves = halves
    p = read_param(p_ptr, low_ptr, low_halves, HALF, mask, MASTER)
    s0 = read_state(s0_ptr, scale0_ptr, s0_halves, HALF, mask, group_mask)
    s1 = read_state(s1_ptr, scale1_ptr, s1_halves, HALF, mask, group_mask)
    s2 = read_state(s2_ptr, None, None, None, mask, None)
    bounded = tl.clamp(p, -LARGEST, LARGEST)  # an infinite weight, less its decay, is infinite and not NaN
    g += l2 * bounded
    if RULE == "adam":
        change, s0, s1, s2 = adam(g, s0, s1, s2, c)
    elif RULE == "sgd":
        change, s0, s1, s2 = sgd(g, s0, s1, s2, c)
    elif RULE == "rmsprop":
        change, s0, s1, s2 = rmsprop(g, s0, s1, s2, c)
    elif RULE == "lion":
        change, s0, s1, s2 = lion(g, s0, s1, s2, c)
    else:
        change, s0, s1, s2 = adagrad(g, s0, s1, s2, c)
    p -= decay * bounded + change  # one rounding at p's own size

    bits = None
    more = None
    if NOISE:
        key0, key1, run, stride, offset = keys
        e = start + i
        e = e // run * stride + e % run + offset if STRIDED else e + offset
        bits = noise(e, key0, key1)
        more = scrambled(bits ^ 0x68E31DA4)
    low = write_param(p_ptr, low_ptr, p, bits, HALF, mask, MASTER)
    s0 = write_state(s0_ptr, scale0_ptr, s0, more, 0, HALF, mask, group_mask)
    s1 = write_state(s1_ptr, scale1_ptr, s1, more, 16, HALF, mask, group_mask)
    write_state(s2_ptr, None, s2, None, 0, None, mask, None)
    if AVERAGED:
        ema_ptr = elements(ema_address, start, i, tl.float32, ALIGNED)
        ema = tl.load(ema_ptr, mask=mask)
        tl.store(ema_ptr, ema + ema_rate * (p - ema), mask=mask)
    if ZERO:
        tl.store(g_ptr, tl.zeros_like(i).to(GRAD_TYPE), mask=mask)
    return s0, s1, low


@triton.jit(do_not_specialize=["T"])
def update_kernel(
    # in
    table_ptr,  # (T, COLUMNS) int64
    grads_ptr,  # (T,) int64 addresses
    coefficients_ptr,  # (T, COEFFICIENTS) f32
    chunk_tensor_ptr,  # (programs,) int32: the row of the table whose tensor a program works on
    # sizes
    T,
    # flags
    RULE: tl.constexpr,
    PARAM_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    STATE0: tl.constexpr,  # types of the states, None for those that there are not
    STATE1: tl.constexpr,
    STATE2: tl.constexpr,
    MASTER: tl.constexpr,  # how a parameter has more bits than its own: "fp32", "split16", ... or ""
    LOW_TYPE: tl.constexpr,  # of what holds them, or None
    NOISE: tl.constexpr,  # whether something is rounded stochastically
    STRIDED: tl.constexpr,  # whether tensors are pieces whose elements do not follow on each other in the whole
    AVERAGED: tl.constexpr,  # whether an average of the parameter is kept
    ZERO: tl.constexpr,  # whether to leave zeros in the gradient
    UNSCALE: tl.constexpr,  # whether to leave in the gradient what the update took of it
    PAIRED: tl.constexpr,  # whether some elements are bytes, which go 16 at a time only with two tiles together
    # tile
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    chunk = tl.program_id(0)
    t = tl.load(chunk_tensor_ptr + chunk)
    row = table_ptr + t * COLUMNS
    g = tl.load(grads_ptr + t)
    start = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK  # int64: a tensor can pass 2**31 elements
    count = tl.minimum(tl.load(row + NUMEL) - start, CHUNK).to(tl.int32)
    c = coefficients_ptr + t * COEFFICIENTS
    if tl.load(c + ACTIVE) == 0.0:
        if ZERO:
            if g != 0:
                for offset in range(0, count, BLOCK):
                    i = offset + tl.arange(0, BLOCK)
                    tl.store(elements(g, start, i, GRAD_TYPE, False), tl.zeros_like(i).to(GRAD_TYPE), mask=i < count)
        return

    factors = tl.load(c + GRAD_FACTOR), tl.load(c + DECAY), tl.load(c + L2), tl.load(c + EMA_RATE)
    key_ptr = c.to(tl.pointer_type(tl.uint32)) + KEYS
    keys = tl.load(key_ptr), tl.load(key_ptr + 1), tl.load(row + RUN), tl.load(row + STRIDE), tl.load(row + OFFSET)
    c += RULE_COEFFICIENTS
    rule = (
        tl.load(c), tl.load(c + 1), tl.load(c + 2), tl.load(c + 3), tl.load(c + 4), tl.load(c + 5), tl.load(c + 6),
    )  # fmt: skip
    p = tl.load(row + PARAM)
    s0, s1, s2 = tl.load(row + STATES), tl.load(row + STATES + 1), tl.load(row + STATES + 2)
    scale0, scale1 = tl.load(row + SCALES), tl.load(row + SCALES + 1)
    low, ema = tl.load(row + LOW), tl.load(row + EMA)
    addresses = p, s0, s1, s2, scale0, scale1, low, ema
    # Whole tiles of aligned tensors go 16 bytes at a time; a tensor's end, and views at odd addresses, go masked.
    aligned = ((p | g | s0 | s1 | s2 | low | ema) & 15) == 0
    TOGETHER: tl.constexpr = 2 * BLOCK if PAIRED else BLOCK
    whole = tl.where(aligned, count // TOGETHER * TOGETHER, 0)
    for offset in range(0, whole, TOGETHER):
        here = start + offset
        if PAIRED:
            halves = (
                halves_of(s0, here, STATE0, BLOCK), halves_of(s1, here, STATE1, BLOCK),
                halves_of(low, here, LOW_TYPE, BLOCK),
            )  # fmt: skip
            first = update_tile(
                g, addresses, here, BLOCK, rule, factors, keys,
                RULE, PARAM_TYPE, GRAD_TYPE, STATE0, STATE1, STATE2, MASTER, LOW_TYPE, NOISE, STRIDED, AVERAGED,
                ZERO, UNSCALE, BLOCK, True, halves, 0,
            )  # fmt: skip
            second = update_tile(
                g, addresses, here + BLOCK, BLOCK, rule, factors, keys,
                RULE, PARAM_TYPE, GRAD_TYPE, STATE0, STATE1, STATE2, MASTER, LOW_TYPE, NOISE, STRIDED, AVERAGED,
                ZERO, UNSCALE, BLOCK, True, halves, 1,
            )  # fmt: skip
            write_halves(s0, here, first[0], second[0], STATE0, BLOCK)
            write_halves(s1, here, first[1], second[1], STATE1, BLOCK)
            write_halves(low, here, first[2], second[2], LOW_TYPE, BLOCK)
        else:
            update_tile(
                g, addresses, here, BLOCK, rule, factors, keys,
                RULE, PARAM_TYPE, GRAD_TYPE, STATE0, STATE1, STATE2, MASTER, LOW_TYPE, NOISE, STRIDED, AVERAGED,
                ZERO, UNSCALE, BLOCK, True, (None, None, None), None,
            )  # fmt: skip
    for offset in range(whole, count, BLOCK):
        update_tile(
            g, addresses, start + offset, count - offset, rule, factors, keys,
            RULE, PARAM_TYPE, GRAD_TYPE, STATE0, STATE1, STATE2, MASTER, LOW_TYPE, NOISE, STRIDED, AVERAGED,
            ZERO, UNSCALE, BLOCK, False, (None, None, None), None,
        )  # fmt: skip


TRITON_TYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


def tile() -> dict[str, int]:
    """8 elements a thread: two 16-byte loads of each float32 tensor in the air, all tensors at a time. With 16, for the
    sake of bytes, registers spill: so two tiles share the accesses to bytes and are worked on one after the other.

    Tensors of different widths are loaded by different threads and change hands inside the loop, for which all threads
    wait for each other: so not many of them.
    """
    return {"CHUNK": CHUNK, "BLOCK": 1024, "num_warps": warps(128)}


def prepare_tile() -> dict[str, int]:
    """One tensor a thread."""
    return {"BLOCK": 32, "num_warps": warps(32)}


def prepare(
    table: Tensor,  # (T, COLUMNS) int64
    grads: Tensor,  # (T,) int64
    hyper: Tensor,  # (G, HYPERPARAMETERS) f64
    steps: Tensor,  # (T,) f32, counted up where there is a gradient
    coefficients: Tensor,  # (T, COEFFICIENTS) f32, written
    *,
    rule: str,
    grad_scale: Tensor | None = None,  # () f32
    found_inf: Tensor | None = None,  # () f32
    sums: Tensor | None = None,  # (S,) f64, of squares of gradients
    norm: Tensor | None = None,  # () f32, written where there are sums
) -> None:
    """What `update` needs to know, worked out on the device. Hyperparameters as in HYPER_NAMES."""
    T = table.shape[0]
    with device_of(table):
        prepare_kernel[(cdiv(T, prepare_tile()["BLOCK"]),)](
            table, grads, hyper, grad_scale, found_inf, sums, steps, coefficients, norm,
            T=T, SUMS=0 if sums is None else sums.numel(), RULE=rule, **prepare_tile(), **FP_FUSION,
        )  # fmt: skip


def update(
    table: Tensor,  # (T, COLUMNS) int64
    grads: Tensor,  # (T,) int64
    coefficients: Tensor,  # (T, COEFFICIENTS) f32
    chunk_tensor: Tensor,  # (programs,) int32
    *,
    rule: str,
    param_dtype: torch.dtype,
    grad_dtype: torch.dtype,
    state_dtypes: tuple[torch.dtype | None, ...],  # three
    master: str | None,
    low_dtype: torch.dtype | None,
    strided: bool,
    averaged: bool,
    zero: bool,
    unscale: bool,
) -> None:
    """One step of every tensor in the table by one launch, whatever T is. All tensors share these dtypes."""
    dtypes = [param_dtype, grad_dtype, *state_dtypes, low_dtype]
    bytes_ = (torch.int8, torch.uint8)
    coded = any(dtype in bytes_ for dtype in state_dtypes)
    param_type, grad_type, *state_types, low_type = [None if d is None else TRITON_TYPES[d] for d in dtypes]
    if chunk_tensor.shape[0] > 0:
        with device_of(table):
            update_kernel[(chunk_tensor.shape[0],)](
                table, grads, coefficients, chunk_tensor, T=table.shape[0],
                RULE=rule, PARAM_TYPE=param_type, GRAD_TYPE=grad_type,
                STATE0=state_types[0], STATE1=state_types[1], STATE2=state_types[2],
                MASTER=master or "", LOW_TYPE=low_type, NOISE=coded or master == "stochastic", STRIDED=strided,
                AVERAGED=averaged, ZERO=zero, UNSCALE=unscale and not zero, PAIRED=coded or low_dtype in bytes_,
                **tile(), **FP_FUSION,
            )  # fmt: skip
