"""Rounding of NumPy arrays as GPUs do it: to bfloat16, held as uint16 because NumPy has no such type, and in an fma."""

import numpy as np

from evidence.observers import Array


def bfloat16_to_float32(stored: Array) -> Array:
    """Convert bfloat16 bit patterns held as uint16 to float32, exactly."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """Round float32 to the bit patterns of bfloat16, ties to even; NaN stays NaN."""
    word = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    last_kept = (word >> np.uint32(16)) & np.uint32(1)
    rounded = (word + np.uint32(0x7FFF) + last_kept) >> np.uint32(16)
    # The carry of the addition above would turn a NaN with a large payload into an infinity or a zero.
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def _round_to_odd(rounded: Array, error: Array) -> Array:
    """Step `rounded` towards the exact value `rounded + error` where it is inexact and its last bit is even.

    A value rounded to odd can be rounded again to a format at least two bits narrower as if it had been exact.
    """
    word = rounded.view(f"uint{8 * rounded.itemsize}")
    inexact_even = (error != 0) & ~np.isnan(error) & (word % 2 == 0)
    towards = np.copysign(rounded.dtype.type(np.inf), error.astype(rounded.dtype))
    return np.where(inexact_even, np.nextafter(rounded, towards), rounded)


def float64_to_bfloat16(values: Array) -> Array:
    """Round float64 to the bit patterns of bfloat16, once, although the values pass through float32."""
    nearest = values.astype(np.float32)
    return float32_to_bfloat16(_round_to_odd(nearest, values - nearest))


def fma_float32(x: Array, y: Array, z: Array) -> Array:
    """Return `x * y + z` rounded once to the type of `z`; the operands are float32 or narrower."""
    product = x.astype(np.float64) * y.astype(np.float64)  # exact: 24 + 24 bits fit in 53
    addend = z.astype(np.float64)
    total = product + addend
    # Knuth's two-sum: `total + error` is the sum without rounding.
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    return _round_to_odd(total, error).astype(z.dtype)
