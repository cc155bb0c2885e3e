"""Layouts: functions that give a tensor of the same values, laid out otherwise in memory."""

import torch
from torch import Tensor


def offset(t: Tensor) -> Tensor:
    """Copy `t` to an address that is not a multiple of 16 bytes."""
    return torch.cat([t.new_ones(3), t.flatten()])[3:].view(t.shape)


def strided(t: Tensor) -> Tensor:
    return torch.stack([t, torch.ones_like(t)], -1)[..., 0]


def transposed(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() > 1 else strided(t)


def sliced(t: Tensor) -> Tensor:
    """Return `t` as rows of a wider tensor."""
    return torch.cat([t, torch.ones_like(t)], -1)[..., : t.shape[-1]] if t.dim() else t


def expanded(t: Tensor) -> Tensor:
    """Repeat the first row of `t` in the memory of one row, so the values differ from `t`."""
    return t[:1].expand(t.shape) if t.dim() else t


LAYOUTS = [offset, strided, transposed, sliced, expanded]
WRITABLE = [layout for layout in LAYOUTS if layout is not expanded]
