"""Numbers as people read and write them: 2.8 B, 24 GiB, 3.5 hours."""

import re

from llmfast._checks import expect

UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}
_BYTES = {"": 1} | {unit: 10 ** (3 * i) for i, unit in enumerate("kmgt", 1)}
_BYTES |= {f"{unit}i": 1 << (10 * i) for i, unit in enumerate("kmgt", 1)}


def number(name: str, text: str | None) -> float | None:
    """Read "2.8B" or "1e21"; `name` is for the message of the ValueError."""
    if text is None:
        return None
    unit = UNITS.get(text[-1:].replace("K", "k"))
    try:
        value = float(text if unit is None else text[:-1]) * (unit or 1.0)
    except ValueError:
        raise ValueError(f"{name} must be a number, such as 2.8e9 or 2.8B; got {text!r}") from None
    expect(0 < value < float("inf"), f"{name} must be finite and above 0; got {text!r}")
    return value


def short(x: float) -> str:
    """Write a number with three digits and a unit."""
    for unit, size in UNITS.items():
        if x >= 0.9995 * size:
            return f"{x / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{x:.3g}"


def in_bytes(n: float) -> str:
    """Write a number of bytes in the largest unit that it fills: "512 B", "1.5 MiB", "24.00 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def parse_bytes(text: str) -> int:
    """Read "24GiB", "80 GB", "512 MiB" or a plain number of bytes.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    try:
        assert found is not None
        size = int(float(found[1]) * _BYTES[found[2]])
    except (AssertionError, ValueError, KeyError):
        raise ValueError(f"expected an amount of memory such as 24GiB or 80GB; got {text!r}") from None
    expect(size > 0, f"expected an amount of memory above 0; got {text!r}")
    return size


def duration(seconds: float) -> str:
    """Write a time in the largest unit of which it has at least two."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    units = (("days", 86_400), ("hours", 3600), ("minutes", 60))
    unit, size = next(((u, s) for u, s in units if seconds >= 2 * s), ("s", 1))
    return f"{seconds / size:.3g} {unit}"
