"""Colours, legends and bands that several pictures share."""

from collections.abc import Mapping, Sequence
from typing import Any

from docs.figures import BLUE, GREEN, GREY, ORANGE, PURPLE
from examples.chapter.told import Found

COLORS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
STYLES = [(color, line) for line in ("-", "--") for color in (BLUE, ORANGE, GREEN, PURPLE)]


def legend(figure: Any, axes: Any, columns: int) -> None:
    """Put a legend of the lines in `axes` above all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False)


def band(axes: Any, x: Any, each: Any, color: str, line: str = "-", label: str = "") -> None:
    """Draw means with the range over seeds; what has diverged is left out."""
    points = [(at, f) for at, f in zip(x, each) if f.mean < float("inf")]
    place, ended = [at for at, _ in points], [f for _, f in points]
    axes.fill_between(place, [min(f.values) for f in ended], [max(f.values) for f in ended], color=color, alpha=0.2)
    axes.plot(place, [f.mean for f in ended], "o", linestyle=line, color=color, markersize=3, label=label)


def ranges(axes: Any, names: Sequence[str], kinds: Mapping[str, Sequence[Found | None]]) -> None:
    """Draw means with the range over seeds, a row for each name; `kinds` gives those of each label, None for none."""
    for i, ((label, each), color) in enumerate(zip(kinds.items(), COLORS, strict=False)):
        shift = (i - (len(kinds) - 1) / 2) * 0.18
        place, drawn = zip(*((y + shift, f) for y, f in enumerate(each) if f is not None))
        low, high = zip(*((f.mean - min(f.values), max(f.values) - f.mean) for f in drawn))
        axes.errorbar([f.mean for f in drawn], place, xerr=(low, high), fmt="o", color=color, markersize=4, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(y=0.1)
    axes.grid(alpha=0.25)
