"""Errors at the public boundary, which name the argument, what was expected and what was given."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for processes that do not need torch
    from torch import Tensor


def expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def is_unicode(text: str) -> bool:
    """Return True if UTF-8 can encode the text. Half a surrogate pair is not: JSON may escape it, arguments hold it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def worst(errors: Iterable[float]) -> float:
    """Return the largest of errors, or NaN if one is NaN, which `max` passes over unless it comes first."""
    return max(errors, key=lambda error: (error != error, error))


def overlaps(t: Tensor) -> bool:
    """Return True if elements share memory, as in an expanded tensor, which must not be written to."""
    return any(size > 1 and stride == 0 for size, stride in zip(t.shape, t.stride()))


def describe(t: Tensor) -> str:
    """Format a tensor as `(2, 3) torch.int64 on cpu` for the end of an error message."""
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"
