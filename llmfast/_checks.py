"""Errors at the public boundary: they name the argument, what was expected and what came."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # also for processes that have no use for torch
    from torch import Tensor


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def overlaps(t: Tensor) -> bool:
    """True if elements share memory, as those of an expanded tensor do: it must not be written to."""
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride()))


def describe(t: Tensor) -> str:
    """`(2, 3) torch.int64 on cpu`, for the end of an error message."""
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"
