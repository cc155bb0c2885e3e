"""Formats that keep weights and optimizer states in fewer bits than they are computed with.

A parameter's format is a pair of functions. `read(p_ptr, mask, low)` returns the parameter as float32; `low` holds the
format's additional bits, already loaded, or None. `write(p, random, TYPE)` returns the parameter in its own type and
the new `low`, which the caller converts to its type; a format without additional bits returns any value there. 8-bit
states are read by `decoded` and written by `encoded`.

`llmfast/optim/formats.py` has the same formats in plain torch, bit for bit. See `kernels/README.md` for how to read a
kernel.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from llmfast_kernels import sizes

PER_SCALE: tl.constexpr = tl.constexpr(sizes.PER_SCALE)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def scrambled(x):
    """Permute 32-bit numbers so that every input bit reaches every output bit (Wellons' lowbias32)."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def noise_keys(seed, step, tensor):
    """Return two 32-bit keys for the noise of one tensor at one step. `seed` is int64, the others uint32."""
    k = scrambled(scrambled(scrambled(seed.to(tl.uint32)) + (seed >> 32).to(tl.uint32)) + step)
    return scrambled(k + tensor), scrambled(scrambled(k ^ 0x85EBCA6B) + tensor)


@triton.jit
def noise(element, key0, key1):
    """Return 32 random bits per element.

    They depend on the keys and on the element's place in the whole tensor (int64), not on which program computes them.
    """
    x = element.to(tl.uint32) ^ key0
    x += (element >> 32).to(tl.uint32) * 0x9E3779B9
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= key1
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def is_finite_bf16(high):
    """Return True where these bits of a bfloat16, held in an integer, are a finite number."""
    return (high & 0x7F80) != 0x7F80


@triton.jit
def split(x, LOW_BITS: tl.constexpr):
    """Split float32 into the nearest bfloat16 and the `LOW_BITS` bits by which it misses, as integers.

    16 bits are all there are; 8 are rounded. Adding half a unit before cutting would turn the NaN of all ones into
    -0.0, so NaN takes a path of its own.
    """
    SHIFT: tl.constexpr = 16 - LOW_BITS
    bits = x.to(tl.int32, bitcast=True)
    kept = (bits + ((1 << SHIFT) >> 1)) >> SHIFT
    high = (kept + (1 << (LOW_BITS - 1))) >> LOW_BITS
    low = kept - (high << LOW_BITS)
    high = tl.where(x != x, (bits >> 16) | 0x40, high)
    low = tl.where(is_finite_bf16(high), low, 0)
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True), low


@triton.jit
def joined(high, low, LOW_BITS: tl.constexpr):
    """Undo `split`. Inf and NaN that a user has written into the high half since stay what they are."""
    high = high.to(tl.int16, bitcast=True).to(tl.int32)
    low = tl.where(is_finite_bf16(high), low.to(tl.int32), 0)
    return ((high << 16) + (low << (16 - LOW_BITS))).to(tl.float32, bitcast=True)


@triton.jit
def rounded_stochastically(x, random):
    """Round float32 to bfloat16 by the low 16 random bits: up or down, with the odds that make it right on average."""
    bits = x.to(tl.int32, bitcast=True)
    high = (bits + (random & 0xFFFF).to(tl.int32)) >> 16
    finite = is_finite_bf16(bits >> 16)
    high = tl.where(finite, high, tl.where(x != x, (bits >> 16) | 0x40, bits >> 16))
    return high.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def spread(scale, BLOCK: tl.constexpr):
    """Repeat one number per group (BLOCK / PER_SCALE,) for each of the group's elements (BLOCK,)."""
    return tl.reshape(tl.broadcast_to(scale[:, None], (BLOCK // PER_SCALE, PER_SCALE)), (BLOCK,))


@triton.jit
def decoded(code, scale, SIGNED: tl.constexpr):
    """Return the float32 values of 8-bit codes (BLOCK,), given each group's largest magnitude (BLOCK / PER_SCALE,).

    Codes are dense near zero, where most values are: the magnitude is (code / 127)^2 with a sign, (code / 255)^4
    without. States without a sign are squares of gradients, so both reach down to 1/16000 of a gradient.
    """
    scales = spread(scale, code.shape[0])
    if SIGNED:
        r = code.to(tl.float32) * (1.0 / 127.0)
        x = r * tl.abs(r) * scales
    else:
        r = code.to(tl.float32) * (1.0 / 255.0)
        x = r * r * (r * r) * scales
    return x


@triton.jit
def encoded(x, random, SIGNED: tl.constexpr):
    """Return 8-bit codes of float32 values (BLOCK,), and the scale of each group (BLOCK / PER_SCALE,).

    The low 16 random bits decide whether to round up or down, with the odds that make the decoded value right on
    average. Rounding to nearest would stop a moving average that moves by less than half a code per step. A value
    without a sign stays above zero if it is above zero, because an update is divided by its root. NaN and inf become
    the scale of their group, and so make the whole group NaN or inf.
    """
    magnitude = tl.abs(x)
    # As integers, magnitudes keep their order, and NaN is the largest.
    bits = tl.reshape(magnitude.to(tl.int32, bitcast=True), (x.shape[0] // PER_SCALE, PER_SCALE))
    scale = tl.max(bits, axis=1).to(tl.float32, bitcast=True)
    y = magnitude * spread(tl.where(scale > 0.0, 1.0 / scale, 0.0), x.shape[0])
    chance = (random & 0xFFFF).to(tl.float32) * (1.0 / 65536.0)
    if SIGNED:
        y *= 127.0 * 127.0
        below = tl.floor(tl.sqrt(y))
        up = (y - below * below) > chance * (2.0 * below + 1.0)
        code = tl.minimum(below + tl.where(up, 1.0, 0.0), 127.0)
        stored = tl.where(x < 0.0, -code, code).to(tl.int8)
    else:
        y *= 255.0 * 255.0 * 255.0 * 255.0
        below = tl.floor(tl.sqrt(tl.sqrt(y)))
        square, next_square = below * below, (below + 1.0) * (below + 1.0)
        up = (y - square * square) > chance * (next_square * next_square - square * square)
        code = tl.minimum(below + tl.where(up, 1.0, 0.0), 255.0)
        stored = tl.where(x > 0.0, tl.maximum(code, 1.0), 0.0).to(tl.int32).to(tl.uint8)
    return stored, scale


@triton.jit
def read_plain(p_ptr, mask, low):
    """Read what the parameter itself holds."""
    return tl.load(p_ptr, mask=mask).to(tl.float32)


@triton.jit
def write_plain(p, random, TYPE: tl.constexpr):
    """Round to nearest."""
    return p.to(TYPE), 0


@triton.jit
def read_fp32(p_ptr, mask, low):
    """Read the float32 copy alone."""
    return low


@triton.jit
def write_fp32(p, random, TYPE: tl.constexpr):
    """Round to nearest, and keep a float32 copy."""
    return p.to(TYPE), p


@triton.jit
def read_split16(p_ptr, mask, low):
    """Append 16 bits to those of the parameter."""
    return joined(tl.load(p_ptr, mask=mask), low, 16)


@triton.jit
def write_split16(p, random, TYPE: tl.constexpr):
    """Keep the 16 bits that the parameter does not hold."""
    return split(p, 16)


@triton.jit
def read_split8(p_ptr, mask, low):
    """Append 8 bits to those of the parameter."""
    return joined(tl.load(p_ptr, mask=mask), low, 8)


@triton.jit
def write_split8(p, random, TYPE: tl.constexpr):
    """Keep the first 8 of the bits that the parameter does not hold."""
    return split(p, 8)


@triton.jit
def read_kahan(p_ptr, mask, low):
    """Add back what rounding lost."""
    return tl.load(p_ptr, mask=mask).to(tl.float32) + low.to(tl.float32)


@triton.jit
def write_kahan(p, random, TYPE: tl.constexpr):
    """Round to nearest, and keep what that loses, in the parameter's type."""
    rounded = p.to(TYPE)
    missed = p - rounded.to(tl.float32)
    return rounded, tl.where(tl.abs(missed) <= LARGEST, missed, 0.0)


@triton.jit
def write_stochastic(p, random, TYPE: tl.constexpr):
    """Round up or down at random."""
    return rounded_stochastically(p, random), 0


class ParamFormat(NamedTuple):
    """Functions of a parameter's format that the kernels call."""

    read: Any  # @triton.jit functions
    write: Any
    noisy: bool  # whether `write` takes random bits


PARAM_FORMATS = {
    None: ParamFormat(read=read_plain, write=write_plain, noisy=False),
    "fp32": ParamFormat(read=read_fp32, write=write_fp32, noisy=False),
    "split16": ParamFormat(read=read_split16, write=write_split16, noisy=False),
    "split8": ParamFormat(read=read_split8, write=write_split8, noisy=False),
    "kahan": ParamFormat(read=read_kahan, write=write_kahan, noisy=False),
    "stochastic": ParamFormat(read=read_plain, write=write_stochastic, noisy=True),
}
