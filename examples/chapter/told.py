"""Sentences from numbers: a difference is reported only if it is larger than the spread over seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """One number of one kind of run, per seed; infinite where the run diverged."""

    name: str
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def spread(self) -> float:
        """The largest value minus the smallest; infinite if a seed diverged."""
        return max(self.values) - min(self.values) if self.mean < inf else inf

    def __str__(self) -> str:
        """Write the mean, and the range over seeds."""
        if self.mean == inf:
            return "diverged"
        return f"{self.mean:.3f} ({min(self.values):.3f} to {max(self.values):.3f})"


def found(rows: Iterable[Row], name: str = "", key: str = "loss", **labels: Any) -> Found:
    """Collect `key` from the rows with these labels, one value per seed; None becomes infinity."""
    mine = [row for row in rows if all(row.get(label) == value for label, value in labels.items())]
    if not mine:
        raise ValueError(f"labels must be those of a run; got {labels}")
    return Found(name, tuple(inf if row[key] is None else float(row[key]) for row in mine))


def differ(a: Found, b: Found) -> bool:
    """Say whether the means differ by more than either changes with the seed, or only one of them diverged."""
    if a.mean == inf or b.mean == inf:
        return a.mean != b.mean
    return abs(a.mean - b.mean) > max(a.spread, b.spread)


def verdict(a: Found, b: Found) -> str:
    """Say how `a` compares with `b`."""
    if not differ(a, b):
        return "no difference was seen"
    if inf in (a.mean, b.mean):
        return f"{a.name if a.mean == inf else b.name} diverged"
    return f"{a.name} is {'lower' if a.mean < b.mean else 'higher'} by {abs(a.mean - b.mean):.3f}"


def compared(a: Found, b: Found) -> str:
    """Compare two kinds of run in a sentence."""
    return f"{a.name[:1].upper()}{a.name[1:]} ends at {a}, {b.name} at {b}: {verdict(a, b)}."


def listed(about: str, sentences: Iterable[str]) -> str:
    """Write sentences as a list."""
    return "\n".join([f"{about}:\n", *(f"- {sentence}" for sentence in sentences)])


def joined(items: Sequence[Any]) -> str:
    """Write items as a list in a sentence."""
    *first, last = map(str, items)
    return f"{', '.join(first)} and {last}" if first else last


def best(candidates: Sequence[Found]) -> Found:
    """Return the one with the lowest mean."""
    return min(candidates, key=lambda each: each.mean)


def as_good_as_best(candidates: Sequence[Found]) -> list[Found]:
    """Return those that do not differ from the best one by more than the spread over seeds."""
    least = best(candidates)
    return [each for each in candidates if not differ(each, least)]
