"""The charts of a report. Matplotlib draws the lines and chooses the ticks; the page's style sheet sets the colours.

The SVG of a chart holds no text. The page writes the numbers at the axes as HTML around the SVG, so that they stay
readable on a phone.
"""

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from llmfast.train.metrics import FEW

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.ticker import Locator

WIDTH, HEIGHT = 440, 220  # size of the SVG in its own coordinates
BUCKETS = 150  # A chart's width is divided into so many; a long line keeps its lowest and highest point in each.
# Colours in matplotlib's SVG, and the style sheet's variables that replace them.
COLOURS = {f"#00000{i}": f"var(--c{i})" for i in range(1, 6)}
RULE = "#000009"
DASHES: tuple[Any, ...] = ("-", (0, (5, 3)), (0, (1.5, 2)))  # for series 0 to 4, 5 to 9, 10 to 14; then again

Style = Literal["plain", "training", "validation"]
Array = npt.NDArray[np.float64]


class Point(NamedTuple):
    """A logged number, with the step and the count of trained tokens after which it was logged."""

    step: float
    tokens: float
    value: float
    logged: bool = True  # False: no number, but the middle of steps that have none, where a line must not pass


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    name: str  # shown in the legend
    number: int  # chooses colour and dashes; where lines are runs, a run has the same number in all charts
    points: list[Point]
    style: Style = "plain"  # "training" is thin and pale; "validation" is dots if evaluations are few

    @property
    def label(self) -> str:
        return self.name + (f", {self.style}" if self.style != "plain" else "")


@dataclass(frozen=True)
class Drawn:
    """A chart as the page shows it."""

    title: str
    unit: str
    over: str
    note: str
    legend: list[tuple[str, str]]  # name of each series, and the style sheet's classes for its line
    svg: str  # content of the <svg> element, without the element itself
    names: str  # JSON list: the label of each line, in the order of the lines' `data-line` numbers
    x: tuple[float, float, int]  # both ends of the axis, and 1 if they are base-10 logarithms, else 0
    y: tuple[float, float, int]
    x_ticks: list[tuple[float, str]]  # position in percent of the axis, label
    y_ticks: list[tuple[float, str]]


@dataclass(frozen=True)
class Chart:
    """Title, unit and axes of a chart, without its series."""

    title: str
    unit: str
    over: Literal["tokens", "steps"]
    from_zero: bool = False
    log_x: bool = False
    log_y: bool = False
    factor: float = 1  # multiplies values, to convert them to `unit`

    def draw(self, series: Sequence[Series], *, legend: bool = True) -> Drawn | str | None:
        """Draw series, or say in a sentence that none of them changes; None if they hold no value to draw."""
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        lines = [(s, self._places(s)) for s in series]
        lines = [(s, xy) for s, xy in lines if np.isfinite(xy).all(1).any()]
        if not lines:
            return None
        if all(self._is_flat(s, xy) for s, xy in lines):
            return self._in_words(lines)
        lines.sort(key=lambda line: line[0].style != "training")  # training first, so that it lies under the rest
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        self._set_scales(axes, np.concatenate([xy for _, xy in lines]))
        counts = (int(np.isfinite(xy).all(1).sum()) for s, xy in lines if s.style == "validation")
        few = max(counts, default=0) <= FEW
        for i, (s, xy) in enumerate(lines):
            self._plot(axes, i, s, xy, dotted=few and s.style == "validation")
        x, y = _ticks(axes.get_xlim(), axes.xaxis, self.log_x), _ticks(axes.get_ylim(), axes.yaxis, self.log_y)
        out = io.StringIO()
        with rc_context({"svg.hashsalt": "llmfast", "path.simplify": False}):
            nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(out, format="svg", transparent=True, metadata=nothing)
        in_order = sorted((s for s, _ in lines), key=lambda s: s.number)
        kinds = {s.name: f"c{s.number % len(COLOURS) + 1} d{s.number // len(COLOURS) % len(DASHES)}" for s in in_order}
        return Drawn(
            title=self.title,
            unit=self.unit,
            over=self.over,
            note=self._note(lines, few=few),
            legend=list(kinds.items()) if legend else [],
            svg=_of_page(out.getvalue()),
            names=json.dumps([s.label for s, _ in lines]),
            x=x[0],
            y=y[0],
            x_ticks=x[1],
            y_ticks=y[1],
        )

    def _places(self, series: Series) -> Array:
        """Return x and y, (points, 2). What cannot be drawn is NaN: only y if x can be, so that its gap has a place.

        What is not finite, beyond 1e100 in size, or below 1e-100 on a logarithmic axis cannot be drawn.
        """
        at = [(p.tokens if self.over == "tokens" else p.step, p.value * self.factor) for p in series.points]
        xy = np.array(at, dtype=np.float64).reshape(-1, 2)
        least = np.array([1e-100 if log else -1e100 for log in (self.log_x, self.log_y)])
        with np.errstate(invalid="ignore"):
            inside = (xy >= least) & (xy <= 1e100)
        xy[~inside] = np.nan
        xy[~inside[:, 0]] = np.nan
        return xy

    def _is_flat(self, series: Series, xy: Array) -> bool:
        """Return True if the line would be drawn as a level one."""
        values = xy[[p.logged for p in series.points], 1]
        if not np.isfinite(values).all():
            return False
        visible = 0.01 if self.from_zero else 1e-6  # of the axis' height; 1e-6 is rounding
        return float(np.ptp(values)) <= visible * float(np.abs(values).max())

    def _in_words(self, lines: Sequence[tuple[Series, Array]]) -> str:
        last = [(s.label, float(xy[-1, 1])) for s, xy in lines]
        numbers = [(name, f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") for name, value in last]
        values = ", ".join(f"{name} {number}" for name, number in numbers) if len(lines) > 1 else numbers[0][1]
        once = all(len(xy) == 1 for _, xy in lines)
        return f"{self.title}{self.unit and f', {self.unit}'}: {values}{', logged once' if once else ' throughout'}."

    def _set_scales(self, axes: "Axes", xy: Array) -> None:
        drawn = xy[np.isfinite(xy).all(1)]
        (x_low, y_low), (x_high, y_high) = drawn.min(axis=0), drawn.max(axis=0)
        ends_x = _ends(x_low, x_high, log=self.log_x, from_zero=x_low <= 0.1 * x_high, margin=0)
        ends_y = _ends(y_low, y_high, log=self.log_y, from_zero=self.from_zero, margin=0.04)
        axes.set(xscale="log" if self.log_x else "linear", yscale="log" if self.log_y else "linear")
        axes.set(xlim=ends_x, ylim=ends_y)
        axes.xaxis.set_major_locator(_locator(*ends_x, log=self.log_x))
        axes.yaxis.set_major_locator(_locator(*ends_y, log=self.log_y))
        axes.minorticks_off()
        axes.tick_params(length=0, labelleft=False, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(axis="y", color=RULE, linewidth=1, clip_on=False)

    def _plot(self, axes: "Axes", number: int, series: Series, xy: Array, *, dotted: bool) -> None:
        """Draw one line, with gaps where it is NaN, and dots for points between two gaps; only dots if `dotted`."""
        colour = list(COLOURS)[series.number % len(COLOURS)]
        pale = series.style == "training"
        line = thinned(xy, _buckets(xy[:, 0], axes.get_xlim(), log=self.log_x))
        dot: dict[str, Any] = {"color": colour, "markersize": 6, "markeredgewidth": 0, "clip_on": False}
        if dotted:
            axes.plot(*line[np.isfinite(line).all(1)].T, "o", **dot, gid=f"line {number}")
            return
        axes.plot(
            *line.T,
            color=colour,
            linewidth=1.2 if pale else 1.8,
            alpha=0.5 if pale else None,
            linestyle=DASHES[series.number // len(COLOURS) % len(DASHES)],
            clip_on=False,
            gid=f"line {number}",
        )
        there = np.isfinite(np.pad(line[:, 1], 1, constant_values=np.nan))
        alone = there[1:-1] & ~there[:-2] & ~there[2:]
        if alone.any():
            axes.plot(*line[alone].T, "o", **dot)

    def _note(self, lines: Sequence[tuple[Series, Array]], *, few: bool) -> str:
        notes = [style for style in ("training", "validation") if any(s.style == style for s, _ in lines)]
        if len(notes) == 2:
            notes = ["line: training, dots: validation" if few else "thin: training, thick: validation"]
        logged = [(p, y) for s, xy in lines for p, y in zip(s.points, xy[:, 1]) if p.logged]
        gaps = []
        if not all(math.isfinite(p.value) for p, _ in logged):
            gaps.append("values that are not finite")
        elif any(np.isnan(y) for _, y in logged):
            gaps.append("values that are not above 0")
        if not all(p.logged for s, _ in lines for p in s.points if not (few and s.style == "validation")):
            gaps.append("steps without a value")
        return "; ".join([*notes, f"gaps: {' or '.join(gaps)}"] if gaps else notes)


def _ends(low: float, high: float, *, log: bool, from_zero: bool, margin: float) -> tuple[float, float]:
    """Choose the ends of an axis for values from `low` to `high`."""
    if from_zero := from_zero and low >= 0 and not log:
        low, high = 0.0, high or 1.0
    if high - low <= 1e-6 * max(abs(low), abs(high)):  # all values are equal, except for rounding
        slack = abs(high) / 2 or 1.0
        low, high = (low / 2, high * 2) if log else (low - slack, high + slack)
    if log:
        gap = (high / low) ** margin
        return low / gap, high * gap
    gap = margin * (high - low)
    return low if from_zero else low - gap, high + gap


def _locator(low: float, high: float, *, log: bool) -> "Locator":
    """Choose where ticks go.

    Linear axes, and logarithmic ones of less than 0.9 decades, get even steps. Other logarithmic axes get 1, 2 and 5
    times powers of 10; from 2.1 decades on, powers of 10 only.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator

    decades = math.log10(high / low) if log else 0.0
    if decades < 0.9:
        return MaxNLocator(5, steps=[1, 2, 5, 10])
    return LogLocator(subs=(1, 2, 5)) if decades < 2.1 else LogLocator(numticks=6)


def _ticks(ends: tuple[float, float], axis: Any, log: bool) -> tuple[tuple[float, float, int], list[tuple[float, str]]]:
    """Return an axis' ends and ticks in the form of `Drawn.x` and `Drawn.x_ticks`."""
    from matplotlib.ticker import EngFormatter

    class Units(EngFormatter):
        ENG_PREFIXES = {0: "", 3: "k", 6: "M", 9: "G", 12: "T"}  # noqa: RUF012

    low, high = map(math.log10, ends) if log else ends
    write = Units(sep="\u00a0")
    ticks = []
    for value in (at for at in axis.get_majorticklocs() if at > 0 or not log):
        place = ((math.log10(value) if log else value) - low) / (high - low)
        if -1e-6 <= place <= 1 + 1e-6:
            ticks.append((round(100 * place, 2), write(value)))
    return (low, high, int(log)), ticks


def _buckets(x: Array, ends: tuple[float, float], *, log: bool) -> npt.NDArray[np.int64]:
    low, high = map(math.log10, ends) if log else ends
    place = ((np.log10(x) if log else x) - low) / (high - low)
    # A point without a place on the other axis may lie far outside of this one's ends.
    return np.clip(np.nan_to_num(place) * BUCKETS, -BUCKETS, 2 * BUCKETS).astype(np.int64)


def thinned(xy: Array, bucket: npt.NDArray[np.int64]) -> Array:
    """Drop points of a long line, but keep its ends and each bucket's lowest and highest point, so that spikes stay.

    One NaN per bucket is kept too, which leaves a gap in the line.
    """
    if len(xy) <= 2 * BUCKETS:
        return xy
    kept = {0, len(xy) - 1}
    order = np.lexsort((xy[:, 1], bucket))  # NaN last
    for some in np.split(order, np.flatnonzero(np.diff(bucket[order])) + 1):
        finite = some[np.isfinite(xy[some, 1])]
        kept.update(finite[[0, -1]] if len(finite) else (), some[~np.isfinite(xy[some, 1])][:1])
    return xy[sorted(kept)]


def _of_page(svg: str) -> str:
    """Return the content of matplotlib's <svg>, with the style sheet's variables in place of colours."""
    found = re.search(r"<svg.*?>(.*)</svg>", svg, re.DOTALL)
    assert found is not None
    inside = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", found[1], flags=re.DOTALL)
    inside = inside.replace(' id="line ', ' data-line="')
    inside = re.sub(r' id="[a-z0-9.]+_\d+"', "", inside)
    inside = re.sub(r"\d+\.\d+", lambda number: f"{float(number[0]):.2f}", inside)
    for colour, variable in (COLOURS | {RULE: "var(--rule)"}).items():
        inside = inside.replace(colour, variable)
    return re.sub(r"\s*\n\s*", " ", inside)
