"""Rounding of NumPy arrays against torch's conversions and against exact arithmetic."""

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from evidence.rounding import bfloat16_to_float32, float32_to_bfloat16, float64_to_bfloat16, fma_float32

SPECIAL = np.array([0.0, -0.0, 1.0, -1.5, 3.4e38, math.inf, -math.inf, math.nan])


@pytest.fixture(autouse=True)
def _as_in_a_kernel() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def stored(values: torch.Tensor) -> np.ndarray:
    return values.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("shape", [(), (1,), (8,), (2, 4), (2, 2, 2)])
def test_arrays_of_every_shape_keep_it(shape: tuple[int, ...]) -> None:
    values = np.resize(SPECIAL[:-1], shape)
    for found in (float32_to_bfloat16(values.astype(np.float32)), float64_to_bfloat16(values)):
        assert found.shape == shape and found.dtype == np.uint16
        assert np.array_equal(found, stored(torch.from_numpy(values)).reshape(shape))
        back = bfloat16_to_float32(found)
        assert back.dtype == np.float32 and back.shape == shape
    assert fma_float32(*(values.astype(np.float32),) * 3).shape == shape


def test_strided_arrays_are_rounded_like_contiguous_ones() -> None:
    whole = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    assert np.array_equal(float32_to_bfloat16(whole[::2, ::-3]), float32_to_bfloat16(whole[::2, ::-3].copy()))


def test_every_nan_stays_one_and_no_infinity_becomes_one() -> None:
    payloads = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF, 0x7FC00000, 0x7F80FFFF], np.uint32)
    nan = payloads.view(np.float32)
    wide = nan.astype(np.float64)
    for found in (float32_to_bfloat16(nan), float64_to_bfloat16(wide)):
        assert np.isnan(bfloat16_to_float32(found)).all()
    infinite = np.array([math.inf, -math.inf])
    for found in (float32_to_bfloat16(infinite.astype(np.float32)), float64_to_bfloat16(infinite)):
        assert np.array_equal(bfloat16_to_float32(found), infinite)


def test_float64_is_rounded_once_on_both_sides_of_every_tie() -> None:
    ties = bfloat16_to_float32(np.arange(0x3F80, 0x4080, dtype=np.uint16)).astype(np.float64)
    ties += np.diff(ties, append=4.0) / 2
    below, above = ties * (1 - 2.0**-45), ties * (1 + 2.0**-45)  # less than float32 can tell from the tie
    low, high = (np.arange(start, start + 256, dtype=np.uint16) for start in (0x3F80, 0x3F81))
    for sign, bit in ((1.0, 0), (-1.0, 0x8000)):
        assert np.array_equal(float64_to_bfloat16(sign * below), low | bit)
        assert np.array_equal(float64_to_bfloat16(sign * above), high | bit)
        assert np.array_equal(float64_to_bfloat16(sign * ties), np.where(low % 2, high, low) | bit)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_fma_is_the_nearest_number_of_the_addends_type(dtype: type) -> None:
    random = np.random.default_rng(1)
    x, y = random.standard_normal((2, 300)).astype(dtype)
    z = (-(x.astype(np.float64) * y) * (1 + random.integers(-3, 4, 300) * 2.0**-9)).astype(dtype)
    z[:60] = (random.standard_normal(60) * 2.0 ** random.integers(-20, 14, 60)).astype(dtype)
    found = fma_float32(x, y, z)
    assert found.dtype == dtype
    for a, b, c, got in zip(x, y, z, found):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        off = abs(Fraction(float(got)) - exact)
        for neighbour in (np.nextafter(got, dtype(-np.inf)), np.nextafter(got, dtype(np.inf))):
            assert off <= abs(Fraction(float(neighbour)) - exact)


def test_fma_keeps_what_is_lost_beside_a_large_addend() -> None:
    """A product that is half a unit of the addend but for 2**-70 is decided by what float64 cannot hold."""
    x, y, z = (np.float32([v]) for v in (2.0**-24 * (1 - 2.0**-23), 1 + 2.0**-23, 1 + 2.0**-23))
    assert fma_float32(x, y, z) == z and fma_float32(-x, y, -z) == -z
    z = np.float32([1.0])
    assert fma_float32(x, y, z) == z and fma_float32(x * 3, y, z) == z + np.float32(2.0**-23)
