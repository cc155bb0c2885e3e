"""Bounds as errors tell them: "must be in [0, 1)", "must be at least 2", "must not be negative"."""

import math
import re
from typing import NamedTuple


class Bounds(NamedTuple):
    """An interval; `inside` says whether each of its ends belongs to it."""

    low: float
    high: float
    inside: tuple[bool, bool]

    def accepted(self) -> list[float]:
        """Return the ends, or the numbers next to them where they do not belong to it."""
        ends = ((self.low, math.inf, self.inside[0]), (self.high, -math.inf, self.inside[1]))
        return [end if belongs else beside(end, towards) for end, towards, belongs in ends if math.isfinite(end)]

    def refused(self) -> list[float]:
        """Return the ends that do not belong to it, or the numbers beyond them."""
        ends = ((self.low, -math.inf, self.inside[0]), (self.high, math.inf, self.inside[1]))
        return [beside(end, towards) if belongs else end for end, towards, belongs in ends if math.isfinite(end)]


def beside(x: float, towards: float) -> float:
    """Return a number close to `x`, but not so close that arithmetic cannot tell."""
    step = max(abs(x), 1.0) * 1e-9
    return x + step if towards > x else x - step


_NUMBER = r"(-?[0-9.]+(?:e-?[0-9]+)?(?:(?:\*\*|\^)[0-9]+)?)"
_FORMS: list[tuple[str, str]] = [
    (rf"(?:in|IN) ([\[(]){_NUMBER}, {_NUMBER}([\])])", "interval"),
    (rf"above {_NUMBER} and at most {_NUMBER}", "(]"),
    (rf"within {_NUMBER} and {_NUMBER}", "[]"),
    (rf"between {_NUMBER} and {_NUMBER}", "()"),
    (rf"at least {_NUMBER}", "["),
    (rf"(?:above|greater than) {_NUMBER}", "("),
    (r"must be positive", "positive"),
    (r"must not be negative", "not negative"),
]


def _number(text: str) -> float:
    base, _, power = text.replace("**", "^").partition("^")
    return float(base) ** int(power or 1)


def told(message: str) -> Bounds | None:
    """Read the bounds in a message, if it has some."""
    for pattern, kind in _FORMS:
        if (found := re.search(pattern, message)) is None:
            continue
        match kind:
            case "interval":
                opening, low, high, closing = found.groups()
                return Bounds(_number(low), _number(high), (opening == "[", closing == "]"))
            case "positive":
                return Bounds(0.0, math.inf, (False, False))
            case "not negative":
                return Bounds(0.0, math.inf, (True, False))
            case "[" | "(":
                return Bounds(_number(found[1]), math.inf, (kind == "[", False))
        return Bounds(_number(found[1]), _number(found[2]), (kind[0] == "[", kind[1] == "]"))
    return None
