"""How weights and optimizer states are kept in fewer bits than they are computed with, in plain torch.

The kernels' `formats.py` does the same bit for bit; what the formats are, and why, is said there. Tensors here are
flat, in the order in which they lie in memory, unless something else is said.
"""

from typing import Literal

import torch
from torch import Tensor

GROUP = 128  # elements that share the scale of an 8-bit state
MASK = 0xFFFFFFFF

MasterWeights = Literal["fp32", "split16", "split8", "stochastic", "kahan"]
LOW_BITS = "low_bits"
# Where each keeps what a parameter cannot hold: name of the state, and dtype (None: the parameter's).
LOW: dict[str, tuple[str, torch.dtype | None]] = {
    "fp32": ("master_param", torch.float32),
    "split16": (LOW_BITS, torch.int16),
    "split8": (LOW_BITS, torch.int8),
    "kahan": ("kahan_comp", None),
}
BITS = {"split16": 16, "split8": 8}


def scrambled(x: Tensor) -> Tensor:
    """Of uint32 values, held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & MASK
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & MASK
    return x ^ (x >> 16)


def noise_keys(seed: int, step: Tensor, tensor: int) -> tuple[Tensor, Tensor]:
    """Two 32-bit keys for the noise of one tensor at one step (a tensor of one element)."""
    seeds = torch.tensor([seed & MASK, (seed >> 32) & MASK, tensor], dtype=torch.int64, device=step.device)
    k = scrambled((scrambled((scrambled(seeds[0]) + seeds[1]) & MASK) + step.long()) & MASK)
    return scrambled((k + seeds[2]) & MASK), scrambled((scrambled(k ^ 0x85EBCA6B) + seeds[2]) & MASK)


def noise(element: Tensor, keys: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """32 random bits an element, of its place in the whole tensor, and 32 more."""
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
    """float32 of any shape -> bfloat16, and the integers (int16 or int8) by which it misses."""
    shift = 16 - low_bits
    bits = x.view(torch.int32).long()
    kept = (bits + ((1 << shift) >> 1)) >> shift
    high = (kept + (1 << (low_bits - 1))) >> low_bits
    low = kept - (high << low_bits)
    high = torch.where(x.isnan(), (bits >> 16) | 0x40, high)
    low = torch.where(_is_finite(high), low, 0)
    return _bfloat16(high), low.to(torch.int16 if low_bits == 16 else torch.int8)


def joined(high: Tensor, low: Tensor, low_bits: int) -> Tensor:
    """What `split` split; inf and NaN in the high half stay what they are."""
    bits = high.view(torch.int16).int()
    low = torch.where(_is_finite(bits), low.int(), 0)
    return ((bits << 16) + (low << (16 - low_bits))).view(torch.float32)


def sixteen(low: Tensor) -> Tensor:
    """The low half of `split` as 16 bits, of which 8 are zero where there were 8: as it is saved, of either kind."""
    return low.to(torch.int16) * 256 if low.dtype == torch.int8 else low.to(torch.int16)


def rounded_stochastically(x: Tensor, random: Tensor) -> Tensor:
    """float32 -> bfloat16, by the low 16 of the random bits."""
    bits = x.view(torch.int32).long()
    cut = torch.where(x.isnan(), (bits >> 16) | 0x40, bits >> 16)
    return _bfloat16(torch.where(x.isfinite(), (bits + (random & 0xFFFF)) >> 16, cut))


def _is_finite(high: Tensor) -> Tensor:
    return (high & 0x7F80) != 0x7F80


def _bfloat16(high: Tensor) -> Tensor:
    return (((high & 0xFFFF) ^ 0x8000) - 0x8000).to(torch.int16).view(torch.bfloat16)


def decoded(code: Tensor, scale: Tensor) -> Tensor:
    """8-bit codes, signed or not, and the largest magnitude of each group -> float32."""
    scales = scale.repeat_interleave(GROUP)[: code.numel()]
    if code.dtype == torch.int8:
        r = code.float() * (1 / 127)
        return r * r.abs() * scales
    r = code.float() * (1 / 255)
    return r * r * (r * r) * scales


def encoded(x: Tensor, random: Tensor | None, signed: bool) -> tuple[Tensor, Tensor]:
    """float32 -> codes (int8, or uint8 of what has no sign) and scales; by 16 random bits, or to nearest without."""
    magnitude = x.abs()
    groups = torch.nn.functional.pad(magnitude, (0, -x.numel() % GROUP)).view(-1, GROUP)
    scale = groups.amax(1)  # NaN comes out on top
    inverse = torch.where(scale > 0, 1 / scale, 0)
    y = magnitude * inverse.repeat_interleave(GROUP)[: x.numel()]
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
    """A flat view of a tensor that fills its memory."""
    return t.as_strided((t.numel(),), (1,))
