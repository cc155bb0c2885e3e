"""Formats that keep weights and optimizer states in fewer bits than they are computed with, in plain torch.

The kernels' `formats.py` does the same bit for bit, and documents the formats and their reasons. Every format is one
object here: a `ParamFormat` for each value of `master_weights`, and a `StateFormat` for each value of `state_dtype`.
Functions on bits take flat tensors in memory order, unless they say otherwise.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from llmfast_kernels.sizes import PER_SCALE

MASK = 0xFFFFFFFF
LOW_BITS = "low_bits"


def scrambled(x: Tensor) -> Tensor:
    """Permute uint32 values, held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def noise_keys(seed: int, step: Tensor, tensor: int) -> tuple[Tensor, Tensor]:
    """Return two 32-bit keys for the noise of one tensor at one step (a tensor of one element)."""
    seeds = torch.tensor([seed & MASK, (seed >> 32) & MASK, tensor], dtype=torch.int64, device=step.device)
    k = scrambled((scrambled((scrambled(seeds[0]) + seeds[1]) & MASK) + step.long()) & MASK)
    return scrambled((k + seeds[2]) & MASK), scrambled((scrambled(k ^ 0x85EBCA6B) + seeds[2]) & MASK)


def noise(element: Tensor, keys: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return 32 random bits per element, given its place in the whole tensor, and 32 more."""
    x = (element & MASK) ^ keys[0]
    x = (x + (element >> 32) * 0x9E3779B9) & MASK
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ keys[1]
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    x = x ^ (x >> 16)
    return x, scrambled(x ^ 0x68E31DA4)


def split(x: Tensor, low_bits: int) -> tuple[Tensor, Tensor]:
    """Split float32 of any shape into bfloat16 and what that misses, as int16 or int8 in units of the last bit kept."""
    shift = 16 - low_bits
    bits = x.view(torch.int32).long()
    kept = (bits + ((1 << shift) >> 1)) >> shift
    high = (kept + (1 << (low_bits - 1))) >> low_bits
    low = kept - (high << low_bits)
    high = torch.where(x.isnan(), (bits >> 16) | 0x40, high)
    low = torch.where(_is_finite(high), low, 0)
    return _bfloat16(high), low.to(torch.int16 if low_bits == 16 else torch.int8)


def joined(high: Tensor, low: Tensor, low_bits: int) -> Tensor:
    """Undo `split`; inf and NaN in the high half stay what they are."""
    bits = high.view(torch.int16).int()
    low = torch.where(_is_finite(bits), low.int(), 0)
    return ((bits << 16) + (low << (16 - low_bits))).view(torch.float32)


def sixteen(low: Tensor) -> Tensor:
    """Widen the low half of `split` to 16 bits, as it is saved; the last 8 are zero if it had only 8."""
    return low.to(torch.int16) * 256 if low.dtype == torch.int8 else low.to(torch.int16)


def rounded_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """Round float32 to bfloat16 by the low 16 random bits."""
    bits = x.view(torch.int32).long()
    cut = torch.where(x.isnan(), (bits >> 16) | 0x40, bits >> 16)
    return _bfloat16(torch.where(x.isfinite(), (bits + (random & 0xFFFF)) >> 16, cut))


def _is_finite(high: Tensor) -> Tensor:
    return (high & 0x7F80) != 0x7F80


def _bfloat16(high: Tensor) -> Tensor:
    return (((high & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16).view(torch.bfloat16)


def decoded(code: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of 8-bit codes, given the largest magnitude of each group."""
    scales = scale.repeat_interleave(PER_SCALE)[: code.numel()]
    if code.dtype == torch.int8:
        r = code.float() * (1 / 127)
        return r * r.abs() * scales
    r = code.float() * (1 / 255)
    return r * r * (r * r) * scales


def encoded(x: Tensor, random: Tensor | None, signed: bool) -> tuple[Tensor, Tensor]:
    """Return codes (int8, or uint8 for values without a sign) and scales; without random bits, round to nearest."""
    magnitude = x.abs()
    groups = torch.nn.functional.pad(magnitude, (0, -x.numel() % PER_SCALE)).view(-1, PER_SCALE)
    scale = groups.amax(1)  # NaN if there is one
    inverse = torch.where(scale > 0, 1 / scale, 0)
    y = magnitude * inverse.repeat_interleave(PER_SCALE)[: x.numel()]
    chance = 0.5 if random is None else (random & 0xFFFF).float() * (1 / 65536)
    if signed:
        y = y * 127.0**2
        below = y.sqrt().floor()
        low, high = below * below, (below + 1) * (below + 1)
    else:
        y = y * 255.0**4
        below = y.sqrt().sqrt().floor()
        low, high = below**2 * below**2, (below + 1) ** 2 * (below + 1) ** 2
    code = (below + (y - low > chance * (high - low))).nan_to_num(nan=127 if signed else 255)
    if signed:
        return (code.clamp(max=127) * x.sign().nan_to_num(0)).to(torch.int8), scale
    return torch.where(x > 0, code.clamp(1, 255), 0).to(torch.uint8), scale


def in_memory_order(t: Tensor) -> Tensor:
    """Return a flat view of a tensor that fills its memory."""
    return t.as_strided((t.numel(),), (1,))


def flat_like(stored: Tensor, x: Tensor) -> Tensor:
    """Return `x`, which has the shape of `stored`, flat in the memory order of `stored`."""
    return in_memory_order(torch.empty_like(stored, dtype=x.dtype).copy_(x))


def decoded_like(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values of codes in any memory order, in that order."""
    value = torch.empty_like(codes, dtype=torch.float32)
    in_memory_order(value).copy_(decoded(in_memory_order(codes), scale))
    return value


def encode_into(codes: Tensor, x: Tensor, random: Tensor | None) -> Tensor:
    """Write float32 values into codes of the same shape, in any memory order; return the scales."""
    code, scale = encoded(flat_like(codes, x), random, codes.dtype == torch.int8)
    in_memory_order(codes).copy_(code)
    return scale


class ParamFormat:
    """Format that adds bits to a bfloat16 or float16 parameter; this base class adds none.

    `p` is a parameter, or its local piece; `low` holds the additional bits, in the same shape.
    """

    state: str | None = None  # the name under which `low` is kept
    dtype: torch.dtype | None = None  # of `low`; None is the parameter's
    is_copy = False  # whether `low` is the whole parameter, of which `p` is a rounded copy
    bfloat16_only = False
    noisy = False  # whether `write` takes random bits

    def bytes_per_parameter(self, param_dtype: torch.dtype) -> int:
        """Return how many bytes the format keeps per parameter, in addition to the parameter itself."""
        return 0 if self.state is None else (self.dtype or param_dtype).itemsize

    def reads(self, p: Tensor, low: Tensor) -> bool:
        """Return True if a state of this name, with such dtypes, belongs to this format."""
        return True

    def read(self, p: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return a new tensor with all the bits of the parameter, in float32 or (without a format) `dtype`."""
        return p.detach().to(dtype, copy=True)

    def write(self, p: Tensor, low: Any, value: Tensor, random: Tensor | None) -> None:
        """Write a new value into `p` and `low`."""
        p.copy_(value)

    def keep(self, p: Tensor, low: Any, value: Tensor) -> None:
        """Write into a new `low` what `p` lacks of this value. `p` changes by a rounding error at most."""


class _Fp32(ParamFormat):
    state = "master_param"
    dtype = torch.float32
    is_copy = True

    def read(self, p: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert low is not None
        return low.to(dtype, copy=True)

    def write(self, p: Tensor, low: Any, value: Tensor, random: Tensor | None) -> None:
        p.copy_(value)
        low.copy_(value)

    def keep(self, p: Tensor, low: Any, value: Tensor) -> None:
        low.copy_(value)


class _Split(ParamFormat):
    state = LOW_BITS
    bfloat16_only = True

    def __init__(self, bits: int) -> None:
        self._bits = bits
        self.dtype = torch.int16 if bits == 16 else torch.int8

    def reads(self, p: Tensor, low: Tensor) -> bool:
        return low.dtype == self.dtype and p.dtype == torch.bfloat16

    def read(self, p: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert low is not None
        return joined(p.detach(), low, self._bits)

    def write(self, p: Tensor, low: Any, value: Tensor, random: Tensor | None) -> None:
        high, rest = split(value, self._bits)
        p.copy_(high)
        low.copy_(rest)

    def keep(self, p: Tensor, low: Any, value: Tensor) -> None:
        high, rest = split(value, self._bits)
        # `p` may have been rounded to the other neighbour. If it is further away than that, a user has set it since,
        # and nothing is known beyond its own bits.
        known = (value - p.float()).abs() <= 2.0**-7 * p.float().abs()
        p.copy_(torch.where(known, high, p))
        low.copy_(torch.where(known, rest, 0))


class _Kahan(ParamFormat):
    state = "kahan_comp"

    def read(self, p: Tensor, low: Tensor | None, dtype: torch.dtype) -> Tensor:
        assert low is not None
        return p.detach().float() + low.float()

    def write(self, p: Tensor, low: Any, value: Tensor, random: Tensor | None) -> None:
        p.copy_(value)
        self.keep(p, low, value)

    def keep(self, p: Tensor, low: Any, value: Tensor) -> None:
        missed = value - p.float()
        low.copy_(torch.where(missed.isfinite(), missed, 0))


class _Stochastic(ParamFormat):
    bfloat16_only = True
    noisy = True

    def write(self, p: Tensor, low: Any, value: Tensor, random: Tensor | None) -> None:
        assert random is not None
        target = torch.empty_like(p)
        in_memory_order(target).copy_(rounded_stochastically(flat_like(target, value), random))
        p.copy_(target)


MasterWeights = Literal["fp32", "split16", "split8", "stochastic", "kahan"]
PLAIN = ParamFormat()
PARAM_FORMATS: dict[MasterWeights, ParamFormat] = {
    "fp32": _Fp32(),
    "split16": _Split(16),
    "split8": _Split(8),
    "kahan": _Kahan(),
    "stochastic": _Stochastic(),
}
LOW_NAMES = tuple(dict.fromkeys(f.state for f in PARAM_FORMATS.values() if f.state is not None))


def param_format(master: MasterWeights | None) -> ParamFormat:
    """Return the format that `master_weights` names."""
    return PLAIN if master is None else PARAM_FORMATS[master]


def format_in(state: Mapping[str, Any], p: Tensor) -> ParamFormat:
    """Return the format in which a state keeps bits of its parameter."""
    for kept in PARAM_FORMATS.values():
        if kept.state is not None and kept.state in state and kept.reads(p, state[kept.state]):
            return kept
    return PLAIN


StateDtype = torch.dtype | Literal["8bit"]


class StateFormat:
    """Format of a state that has its parameter's shape; this base class has `dtype` (None: the parameter's)."""

    coded = False  # whether it is kept as 8-bit codes and scales, which are rounded stochastically

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def bytes(self, numel: int, param_dtype: torch.dtype) -> int:
        """Return the bytes of a state of so many elements."""
        return numel * (self.dtype or param_dtype).itemsize


class _Coded(StateFormat):
    coded = True

    def __init__(self) -> None:
        super().__init__(torch.float32)  # the dtype of states that need more than 8 bits

    def bytes(self, numel: int, param_dtype: torch.dtype) -> int:
        return numel + 4 * -(-numel // PER_SCALE)


STATE_FORMATS: dict[StateDtype | None, StateFormat] = {
    None: StateFormat(None),
    torch.float32: StateFormat(torch.float32),
    torch.bfloat16: StateFormat(torch.bfloat16),
    torch.float16: StateFormat(torch.float16),
    "8bit": _Coded(),
}
CODES: Mapping[bool, torch.dtype] = {True: torch.int8, False: torch.uint8}  # by whether states have a sign


def is_code(t: Tensor) -> bool:
    """Return True for a tensor of 8-bit codes."""
    return t.dtype in CODES.values()
