"""How `llmfast plan` reads and writes numbers."""

from llmfast._checks import expect

UNITS = {"T": 1e12, "B": 1e9, "M": 1e6, "k": 1e3}


def number(name: str, text: str | None) -> float | None:
    """ "2.8B" or "1e21"; `name` is for the message of the ValueError."""
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
    """Three digits and a unit."""
    for unit, size in UNITS.items():
        if x >= 0.9995 * size:
            return f"{x / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{x:.3g}"


def in_bytes(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def duration(seconds: float) -> str:
    """In the largest unit of which there are two."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    unit, size = next(
        ((u, s) for u, s in (("days", 86_400), ("hours", 3600), ("minutes", 60)) if seconds >= 2 * s), ("s", 1)
    )
    return f"{seconds / size:.3g} {unit}"
