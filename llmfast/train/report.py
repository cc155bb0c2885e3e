"""`llmfast report`: one HTML page about one or several runs, that needs nothing but a browser.

Curves are inline SVG without numbers on it: it stretches with the page, and the numbers are HTML around it, so they
stay readable on a phone. Nothing is loaded, and the page's own Content-Security-Policy forbids it. A script of a few
lines shows the values under the pointer; without it everything else works.
"""

import argparse
import base64
import hashlib
import html
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import llmfast
from llmfast._checks import expect
from llmfast._commands import WRITTEN, expect_replaceable, fail

COLOURS = 5  # of the style sheet; further lines take them again, dashed and dotted
BUCKETS = 150  # across a chart: a line's lowest and highest point in each are drawn
SIZE = 1000  # of a chart, in its own units
TEXT = ("data.sources", "data.held_out", "data.tokenizer", "data.vocab_size")  # settings that change what is predicted


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """To the parser of `llmfast report`; `run` takes what it parses."""
    parser.description = (
        "One HTML page of one or several runs, finished or not: their curves side by side, how their settings differ, "
        "and what the models write. It opens from the disk and loads nothing from anywhere."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page; replaces only one that was made like this (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page as `add_arguments` has parsed it; returns the exit code, 2 for a user's mistake."""
    try:
        expect_replaceable(args.out)
        write_report(args.runs, args.out)
    except ImportError as e:
        return fail(f"{e}; reports need the extra: pip install 'llmfast-torch[train]'")
    except (ValueError, OSError) as e:
        return fail(str(e))
    print(args.out)
    return 0


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one page about `runs`, folders as `llmfast train` leaves them; a folder that is given twice counts once.

    Raises:
        ValueError: `runs` is empty, one of them is not the folder of a run, or what it holds cannot be read as such.
            Then nothing is written.
        OSError: a file cannot be read, or `out` not be written.
    """
    expect(len(runs) > 0, "runs must name at least one folder; got none")
    folders: dict[Path, Path] = {}
    for folder in runs:
        folders.setdefault(Path(os.path.realpath(folder)), folder)
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders.values()]
    page = _page([read_run(folder, name) for folder, name in zip(folders.values(), names)])
    out.write_bytes(page.encode("utf-8", "replace"))  # names of files may hold what is not Unicode


# What a run has written down.


class Point(NamedTuple):
    """A logged number: after which step, and after how many trained tokens."""

    step: float
    tokens: float
    value: float


@dataclass(frozen=True)
class Run:
    name: str
    settings: dict[str, str]  # by dotted key, as text; none without config.toml
    curves: dict[str, dict[str, list[Point]]]  # by logged name and part: a source, a head from "0", or "" of a number
    sample: str

    def curve(self, name: str, part: str = "") -> list[Point]:
        return self.curves.get(name, {}).get(part, [])

    def values(self, name: str) -> list[float]:
        """Finite ones."""
        return [p.value for p in self.curve(name) if math.isfinite(p.value)]

    def setting(self, key: str) -> str:
        return self.settings.get(key, "-") or '""'


def read_run(folder: Path, name: str) -> Run:
    """What `folder` holds of a run, which need not be finished.

    Raises:
        ValueError: it holds no run, its settings are not llmfast's, or a line of its metrics lacks step or tokens.
        OSError: a file cannot be read.
    """
    from llmfast.train.config import load_config
    from llmfast.train.metrics import read_metrics

    config, metrics, sample = folder / "config.toml", folder / "metrics.jsonl", folder / "sample.txt"
    expect(
        config.is_file() or metrics.is_file(),
        f"{folder} is not the folder of a run: it has neither config.toml nor metrics.jsonl",
    )
    settings = _settings(asdict(load_config(config))) if config.is_file() else {}
    lines = read_metrics(metrics, losses=False) if metrics.is_file() else []
    text = sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else ""
    return Run(name, settings, _curves(lines), text)


def _settings(table: dict[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= _settings(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            found[prefix + key] = ", ".join(map(str, value))
        else:
            found[prefix + key] = str(value).lower() if isinstance(value, bool) else str(value)
    return found


def _curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    # Evaluations know the tokens up to the last line of the log: a straight line between two of them knows better.
    known = {0.0: 0.0} | {float(line["step"]): float(line["tokens"]) for line in lines if "loss" in line}
    steps, tokens = np.array(sorted(known.items())).T
    curves: dict[str, dict[str, list[Point]]] = {}
    for line in lines:
        step = float(line["step"])
        at = float(np.interp(step, steps, tokens)) if "validation" in line else float(line["tokens"])
        for name, value in line.items():
            for part, number in _numbers(value).items():
                curves.setdefault(name, {}).setdefault(part, []).append(Point(step, at, number))
    return curves


def _numbers(value: Any) -> dict[str, float]:
    """The numbers in a logged value: by key, by position, or by "" where it is one itself."""
    from llmfast.train.metrics import number

    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else [("", value)]
    return {str(key): number(item) for key, item in items if isinstance(item, int | float)}


# The page.


def _page(runs: Sequence[Run]) -> str:
    sections = [
        ("runs", "Runs", _summary(runs)),
        ("loss", "Loss", _loss(runs)),
        ("sources", "Sources", _sources(runs)),
        ("optimizer", "Optimizer", _optimizer(runs)),
        ("speed", "Speed and memory", _speed(runs)),
        ("heads", "Heads that predict further tokens", _heads(runs)),
        ("settings", "Settings", _differences(runs)),
        ("samples", "Samples", _samples(runs)),
    ]
    sections = [section for section in sections if section[2]]
    more = f" and {len(runs) - 3} more" if len(runs) > 3 else ""
    title = html.escape(", ".join(run.name for run in runs[:3]) + more)
    links = " ".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
    body = "".join(f'<section id="{key}"><h2>{name}</h2>{content}</section>' for key, name, content in sections)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{WRITTEN}">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{STYLE}</style></head>'
        f"<body><header><h1>{title}</h1><nav>{links}</nav></header><main>{body}</main>"
        f"<footer>llmfast {llmfast.__version__}</footer><script>{SCRIPT}</script></body></html>\n"
    )


def _summary(runs: Sequence[Run]) -> str:
    differing = _differing(runs) if len(runs) > 1 else []
    guesses = any("acceptance" in run.curves for run in runs)
    head = ["run", "validation loss, nats a token", *differing, "steps", "tokens", "tokens/s, median", "peak memory"]
    head += ["steps skipped", "loss spikes", *(["guesses accepted", "tokens a pass"] if guesses else [])]
    rows = [head]
    for run in runs:
        last = run.curve("loss")[-1] if run.curve("loss") else Point(0, 0, math.nan)
        planned = f"\u00a0of\u00a0{_whole(float(run.setting('train.steps')))}" if run.settings else ""
        speeds, memory, skipped = run.values("tokens_per_s"), run.values("memory_bytes"), run.values("skipped")
        row = [run.name, _last(run.curve("validation_mean"), "{:.3f}"), *map(run.setting, differing)]
        row += [_whole(last.step) + planned, _short(last.tokens)]
        row += [_whole(statistics.median(speeds)) if speeds else "-", _bytes(max(memory)) if memory else "-"]
        row += [_whole(skipped[-1]) if skipped else "0", _whole(sum(run.values("spike")))]
        if guesses:
            heads = run.curves.get("acceptance", {}).values()
            row += [", ".join(f"{100 * head[-1].value:.0f}\u00a0%" for head in heads) or "-"]
            row += [_last(run.curve("tokens_per_pass"), "{:.2f}")]
        rows.append(row)
    # A single run reads better from top to bottom.
    text = _table(rows if len(runs) > 1 else list(zip(*rows)))
    if others := [key for key in differing if key in TEXT]:
        text += f"<p>The runs differ in {', '.join(others)}: their losses are not of the same tokens.</p>"
    if not any(run.curves for run in runs):
        text += "<p>Nothing was logged yet.</p>"
    return text


def _loss(runs: Sequence[Run]) -> str:
    training = [Series(run.name, i, run.curve("loss"), "training") for i, run in enumerate(runs)]
    validation = [Series(run.name, i, run.curve("validation_mean"), "validation") for i, run in enumerate(runs)]
    chart, legend = Chart("All sources", "nats a token", "tokens"), len(runs) > 1
    whole = chart.draw([*training, *validation], legend=legend)
    # The first steps' losses are so large that the last ones', which matter, look alike.
    begin = max((p.tokens for s in training for p in s.points), default=0) / 5
    late = [*(replace(s, points=_means(s.points)) for s in training), *validation]
    late = [replace(s, points=[p for p in s.points if p.tokens > begin]) for s in late]
    closer = replace(chart, title="After the first fifth, training averaged").draw(late, legend=legend)
    chart = replace(chart, title="All sources, on logarithmic axes", log_x=True, log_y=True)
    log = chart.draw([*training, *validation], legend=legend)
    return _grid(whole, closer) + (f"<details><summary>On logarithmic axes</summary>{log}</details>" if log else "")


def _means(points: list[Point], count: int = 50) -> list[Point]:
    """Of as many stretches of a line; not a number where one of its values is none."""
    size = math.ceil(len(points) / count) or 1
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [Point(*(sum(column) / len(stretch) for column in zip(*stretch))) for stretch in stretches]


def _sources(runs: Sequence[Run]) -> str:
    if len(_parts(runs, ["source_loss", "validation", "shares"])) < 2:
        return ""
    return _grid(
        _split(runs, Chart("Loss", "nats a token", "tokens"), ["source_loss", "validation"]),
        _split(runs, Chart("Share of the mixture", "%", "steps", from_zero=True, factor=100), ["shares"]),
    )


def _optimizer(runs: Sequence[Run]) -> str:
    return _grid(
        _by_run(runs, Chart("Learning rate", "", "steps", from_zero=True), "lr"),
        _by_run(runs, Chart("Gradient norm", "before clipping", "steps", log_y=True), "grad_norm"),
    )


def _speed(runs: Sequence[Run]) -> str:
    peak = max((value for run in runs for value in run.values("memory_bytes")), default=0)
    unit, size = ("GiB", 2**30) if peak >= 10 * 2**30 else ("MiB", 2**20)
    return _grid(
        _by_run(runs, Chart("Throughput", "tokens a second", "steps", from_zero=True), "tokens_per_s"),
        _by_run(runs, Chart("Model FLOPs utilization", "%", "steps", from_zero=True, factor=100), "mfu"),
        _by_run(runs, Chart("Peak memory", unit, "steps", from_zero=True, factor=1 / size), "memory_bytes"),
    )


def _heads(runs: Sequence[Run]) -> str:
    weights = [{p.value for p in head} for run in runs for head in run.curves.get("head_weights", {}).values()]
    changing = any(max(values) > 1.001 * min(values) for values in weights)
    weight = _split(runs, Chart("Weight", "in the objective", "steps", from_zero=True), ["head_weights"], _head)
    return _grid(
        _split(runs, Chart("Loss", "nats a token", "tokens"), ["head_loss"], _head),
        _split(runs, Chart("Accuracy", "%", "tokens", from_zero=True, factor=100), ["head_accuracy"], _head),
        weight if changing else "",
        _by_run(runs, Chart("Objective", "weighted sum of the heads' losses", "tokens"), "objective"),
    )


def _head(part: str) -> str:
    return f"{int(part) + 1} tokens ahead" if part.isdecimal() and part != "0" else "next token"


def _differences(runs: Sequence[Run]) -> str:
    from llmfast.train.config import Config

    defaults = Run("default", _settings(asdict(Config())), {}, "")
    keys = _differing(runs if len(runs) > 1 else [defaults, *runs])
    if not any(run.settings for run in runs):
        return ""
    if not keys:
        return f"<p>{'The runs have the same settings.' if len(runs) > 1 else 'All settings are the defaults.'}</p>"
    table = [defaults, *runs]
    return _table([["what differs", *(r.name for r in table)], *([k, *(r.setting(k) for r in table)] for k in keys)])


def _differing(runs: Sequence[Run]) -> list[str]:
    """The keys of settings that are not the same in all runs that have settings."""
    known = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for settings in known for key in settings if key not in ("name", "runs"))
    return [key for key in keys if len({settings.get(key) for settings in known}) > 1]


def _samples(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if run.sample:
            prompt = run.settings.get("train.sample_prompt", "")
            begun = f" <small>begun with {html.escape(repr(prompt))}</small>" if prompt else ""
            parts.append(f"<h3>{html.escape(run.name)}{begun}</h3><pre>{_visible(run.sample)}</pre>")
    return "".join(parts)


def _visible(text: str) -> str:
    """Escaped, with symbols in place of control characters, which HTML cannot hold."""
    symbols = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
    return html.escape(text.translate(symbols))


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    lines = ["<tr>" + "".join(f'<th scope="col">{cell}</th>' for cell in head) + "</tr>"]
    for first, *rest in body:
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>")
    return f'<div class="scroll" tabindex="0" role="region" aria-label="table"><table>{"".join(lines)}</table></div>'


def _grid(*charts: str) -> str:
    return f'<div class="grid">{"".join(charts)}</div>' if any(charts) else ""


# Charts.

Style = Literal["plain", "training", "validation"]
STYLES: dict[str, Style] = {"source_loss": "training", "validation": "validation"}


@dataclass(frozen=True)
class Series:
    name: str  # in the legend
    colour: int  # any number; a run's is the same in all charts
    points: list[Point]
    style: Style = "plain"  # training: thin and pale; validation: with dots, if they are few


@dataclass(frozen=True)
class Chart:
    """How series are drawn."""

    title: str
    unit: str
    over: Literal["tokens", "steps"]
    from_zero: bool = False
    log_x: bool = False
    log_y: bool = False
    factor: float = 1  # of values, for the unit

    def draw(self, series: Sequence[Series], *, legend: bool = True) -> str:
        """A figure; nothing if there is no value to draw."""
        lines = [(s, self._places(s.points)) for s in series]
        lines = [(s, places) for s, places in lines if any(map(self._can_draw, places))]
        if not lines:
            return ""
        lines.sort(key=lambda line: line[0].style != "training")  # below the others
        xs, ys = zip(*(place for _, places in lines for place in places if self._can_draw(place)))
        x = Axis.of(xs, log=self.log_x, from_zero=min(xs) <= 0.1 * max(xs))
        y = Axis.of(ys, log=self.log_y, from_zero=self.from_zero, margin=0.04)
        few = max((len(places) for s, places in lines if s.style == "validation"), default=0) <= 25
        marks = "".join(self._line(s, places, x, y, dotted=few and s.style == "validation") for s, places in lines)
        rules = "".join(f"M0 {SIZE * (1 - y(tick)):.1f}h{SIZE}" for tick in y.ticks)
        title, unit = html.escape(self.title), html.escape(self.unit)
        return (
            f"<figure><figcaption><strong>{title}</strong> <span>{unit}</span></figcaption>"
            f"{_legend([s for s, _ in lines]) if legend else ''}"
            f'<div class="plot" style="grid-template-columns:{max(map(len, y.labels))}ch 1fr">'
            f'<div class="y">{y.numbers("bottom")}</div>'
            f'<svg viewBox="0 0 {SIZE} {SIZE}" preserveAspectRatio="none" role="img" aria-label="{title}" '
            f'data-x="{x.range}" data-y="{y.range}" data-over="{self.over}">'
            f'<path class="rules" d="{rules}"/>{marks}</svg><div class="x">{x.numbers("left")}</div></div>'
            f'<p class="over"><span>{self._note(lines)}</span> <span>{self.over}</span></p></figure>'
        )

    def _places(self, points: list[Point]) -> list[tuple[float, float]]:
        return [(p.tokens if self.over == "tokens" else p.step, p.value * self.factor) for p in points]

    def _can_draw(self, place: tuple[float, float]) -> bool:
        """Also not what is so large or small that a difference or quotient would overflow. NaN compares as false."""
        (x, y), least, most = place, 1e-300, 1e300
        return abs(x) < most and abs(y) < most and (x > least or not self.log_x) and (y > least or not self.log_y)

    def _note(self, lines: Sequence[tuple[Series, list[tuple[float, float]]]]) -> str:
        notes = [style for style in ("training", "validation") if any(s.style == style for s, _ in lines)]
        if len(notes) == 2:
            notes = ["thin: training, thick: validation"]
        if not all(math.isfinite(y) for _, places in lines for _, y in places):
            notes.append("gaps: not finite")
        return "; ".join(notes)

    def _line(self, series: Series, places: list[tuple[float, float]], x: "Axis", y: "Axis", *, dotted: bool) -> str:
        """Polylines, broken where there is nothing to draw; and dots, also where a line would have no length."""
        name = html.escape(series.name + (f", {series.style}" if series.style != "plain" else ""))
        kind = f"{series.style} {_colour(series.colour)}"
        text, dots = "", ""
        for can_draw, stretch in groupby(places, self._can_draw):
            if can_draw:
                points = thinned([(SIZE * x(a), SIZE * (1 - y(b))) for a, b in stretch])
                corners = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
                text += f'<polyline class="{kind}" data-name="{name}" points="{corners}"/>'
                if dotted or len(points) == 1:
                    dots += "".join(f"M{a:.1f} {b:.1f}h0" for a, b in points)
        return text + (f'<path class="dots {kind}" d="{dots}"/>' if dots else "")


@dataclass(frozen=True)
class Axis:
    """From a value to its place, 0 to 1; with ticks at round values."""

    low: float  # this and the next: of the logarithm, if log
    high: float
    log: bool
    ticks: list[float]
    labels: list[str]

    @classmethod
    def of(cls, values: Sequence[float], *, log: bool = False, from_zero: bool = False, margin: float = 0) -> "Axis":
        low, high = min(values), max(values)
        if from_zero := from_zero and low >= 0 and not log:
            low, high = 0.0, high or 1.0
        if high - low <= max(1e-6 * max(abs(low), abs(high)), 1e-300):  # all the same, but for rounding
            slack = abs(high) / 2 if abs(high) > 1e-300 else 1.0
            low, high = (low / 2, high * 2) if log else (low - slack, high + slack)
        ticks = _log_ticks(low, high) if log else []
        labels = [_short(tick) for tick in ticks]
        if not ticks:
            ticks = _ticks(low, high)
            labels = _labels(ticks)
        if log:
            low, high = math.log10(low), math.log10(high)
        gap = margin * (high - low)
        return cls(low - (0 if from_zero else gap), high + gap, log, ticks, labels)

    def __call__(self, value: float) -> float:
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def numbers(self, side: str) -> str:
        return "".join(
            f'<span style="{side}:{100 * self(t):.2f}%">{label}</span>' for t, label in zip(self.ticks, self.labels)
        )

    @property
    def range(self) -> str:
        """For the script."""
        return f"{self.low!r} {self.high!r} {int(self.log)}"


def _legend(series: Sequence[Series]) -> str:
    colours = {s.name: _colour(s.colour) for s in sorted(series, key=lambda s: s.colour)}
    key = '<svg class="key {}" viewBox="0 0 24 8" aria-hidden="true"><path d="M1 4h22"/></svg>'
    items = [f"<li>{key.format(colour)}{html.escape(name)}</li>" for name, colour in colours.items()]
    return f"<ul>{''.join(items)}</ul>"


def _by_run(runs: Sequence[Run], chart: Chart, name: str) -> str:
    return chart.draw([Series(run.name, i, run.curve(name)) for i, run in enumerate(runs)], legend=len(runs) > 1)


def _split(runs: Sequence[Run], chart: Chart, names: Sequence[str], label: Callable[[str], str] = str) -> str:
    """A run's parts in one chart; of several runs, a chart for each part: so that lines differ in one thing only."""
    parts = _parts(runs, names)
    if len(runs) == 1:
        return chart.draw([s for i, part in enumerate(parts) for s in _series(runs[0], part, names, label(part), i)])
    charts = [replace(chart, title=f"{chart.title}: {label(part)}") for part in parts]
    return "".join(
        chart.draw([s for i, run in enumerate(runs) for s in _series(run, part, names, run.name, i)])
        for chart, part in zip(charts, parts)
    )


def _series(run: Run, part: str, names: Sequence[str], label: str, colour: int) -> list[Series]:
    return [Series(label, colour, run.curve(name, part), STYLES.get(name, "plain")) for name in names]


def _parts(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(part for run in runs for name in names for part in run.curves.get(name, {})))


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of points with x in 0..SIZE: the ends, and the lowest and the highest of each bucket, so that spikes stay."""
    if len(points) <= 2 * BUCKETS:
        return points
    low: dict[int, int] = {}
    high: dict[int, int] = {}
    for i, (x, y) in enumerate(points):
        bucket = int(x * BUCKETS / SIZE)
        if bucket not in low or y < points[low[bucket]][1]:
            low[bucket] = i
        if bucket not in high or y > points[high[bucket]][1]:
            high[bucket] = i
    return [points[i] for i in sorted({0, len(points) - 1, *low.values(), *high.values()})]


def _colour(number: int) -> str:
    """Classes of the style sheet."""
    return f"c{number % COLOURS} d{number // COLOURS % 3}"


# Numbers.


def _ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of 10."""
    size = 10.0 ** math.floor(math.log10((high - low) / about))
    step = next(size * m for m in (1, 2, 5, 10) if size * m * about >= (high - low) * (1 - 1e-9))
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of 10, or some of these alone; none within less than a decade, where even steps do."""
    powers = [10.0**k for k in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    ticks = [m * power for power in powers for m in (1, 2, 5) if low <= m * power <= high]
    if len(ticks) > 6:
        ticks = [power for power in powers if low <= power <= high]
        return ticks[:: math.ceil(len(ticks) / 6)]
    return ticks if len(ticks) >= 3 else []


def _labels(ticks: list[float]) -> list[str]:
    """Of even steps: in one unit, with as many digits as tell them apart."""
    top, step = max(map(abs, ticks)), math.log10(ticks[1] - ticks[0]) + 1e-9
    if top < 1e-3 or top >= 1e15:
        digits = max(0, math.floor(math.log10(top)) - math.floor(step))
        return [_exponent(f"{t:.{digits}e}") if t else "0" for t in ticks]
    unit, size = next(((u, s) for u, s in UNITS if top >= 10 * s), ("", 1.0))
    digits = max(0, -math.floor(step - math.log10(size)))
    return [f"{t / size:.{digits}f}{unit}" if t else "0" for t in ticks]


UNITS = (("\u00a0T", 1e12), ("\u00a0G", 1e9), ("\u00a0M", 1e6), ("\u00a0k", 1e3))


def _short(x: float) -> str:
    """Three digits."""
    for unit, size in UNITS:
        if 0.9995 * size <= abs(x) < 1e15:
            return f"{x / size:.3g}{unit}"
    return _exponent(f"{x:.3g}")


def _exponent(text: str) -> str:
    """1e-5 for 1e-05."""
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def _whole(x: float) -> str:
    return f"{x:,.0f}"


def _bytes(n: float) -> str:
    return f"{n / 2**30:.1f}\u00a0GiB" if n >= 10 * 2**30 else f"{n / 2**20:,.0f}\u00a0MiB"


def _last(points: Sequence[Point], form: str) -> str:
    return form.format(points[-1].value) if points else "-"


# How it looks. Colours were chosen for their distance, to eyes of all kinds, on both backgrounds.

STYLE = """
:root{--back:#fff;--text:#1c1e21;--soft:#62676d;--rule:#e3e5e8;--box:#f5f6f7;
--c0:#1976d2;--c1:#d95f02;--c2:#0a5c4a;--c3:#c9659a;--c4:#3b1f7a}
@media (prefers-color-scheme:dark){:root{--back:#16181c;--text:#e4e6e9;--soft:#9ba1a8;--rule:#2f3339;--box:#1f2227;
--c0:#58a6ff;--c1:#f28c38;--c2:#a8e6c8;--c3:#c0508e;--c4:#f7eca0}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;max-width:1120px;padding:0 16px 32px;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1{font-size:1.5rem;line-height:1.25;margin:24px 0 8px}h2{font-size:1.15rem;margin:40px 0 12px}
h3{font-size:1rem;margin:20px 0 6px}small,footer,.over,figcaption span{color:var(--soft);font-weight:400}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.9rem}nav a{color:var(--soft);padding:4px 0}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:24px 32px}
figure{margin:0;padding-right:14px;min-width:0}figcaption{margin-bottom:4px}
figure ul{list-style:none;margin:0 0 6px;padding:0;display:flex;flex-wrap:wrap;gap:0 16px;font-size:.85rem}
li{min-width:0}
.key{width:24px;height:8px;margin-right:6px;vertical-align:middle}
.plot{display:grid;gap:0 6px;font-size:.75rem;color:var(--soft);position:relative;
font-variant-numeric:tabular-nums}
.plot svg{width:100%;height:240px;overflow:visible;touch-action:pan-y;border-bottom:1px solid var(--soft)}
.y,.x{position:relative;height:100%}.x{grid-column:2;height:20px}
.y span,.x span{position:absolute;white-space:nowrap;line-height:1}
.y span{right:0;transform:translateY(50%)}.x span{top:6px;transform:translateX(-50%)}
.over{margin:0;font-size:.75rem;display:flex;justify-content:space-between;gap:16px}.over :last-child{flex:none}
polyline,path{fill:none;stroke-width:1.8;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.rules{stroke:var(--rule);stroke-width:1}.training{stroke-width:1.2;opacity:.5}
.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}.c4{stroke:var(--c4)}
.d1{stroke-dasharray:7 4}.d2{stroke-dasharray:2 3}
.dots{stroke-width:6;stroke-linecap:round;stroke-dasharray:none}
output{position:absolute;top:0;max-width:80%;padding:4px 8px;background:var(--box);border:1px solid var(--rule);
border-radius:4px;color:var(--text);white-space:pre-line;pointer-events:none}
.left{left:0}.right{right:0}
.scroll{overflow-x:auto}table{border-spacing:0;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:6px 16px 6px 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:top;
max-width:20rem;overflow-wrap:break-word}
tr>:first-child{position:sticky;left:0;background:var(--back);max-width:11rem}th{font-weight:600}
tr:first-child th{color:var(--soft);font-weight:400;vertical-align:bottom}
pre{margin:0;padding:12px;background:var(--box);border-radius:4px;font-size:.85rem;white-space:pre-wrap;
max-height:28rem;overflow-y:auto}
details{margin-top:12px}summary{color:var(--soft);cursor:pointer;padding:4px 0}
footer{margin-top:40px;font-size:.8rem}
"""

# The values nearest to the pointer, of the lines' places in the SVG. After a touch they stay.
SCRIPT = """
const tip = document.createElement("output")
for (const svg of document.querySelectorAll(".plot > svg")) {
  const axis = name => {
    const [low, high, log] = svg.dataset[name].split(" ").map(Number)
    const value = t => log ? 10 ** (low + (high - low) * t) : low + (high - low) * t
    return t => value(t).toLocaleString("en", {maximumSignificantDigits: 4})
  }
  const x = axis("x"), y = axis("y"), lines = new Map()
  for (const line of svg.querySelectorAll("polyline")) {
    const points = line.getAttribute("points").split(" ").map(p => p.split(",").map(Number))
    lines.set(line.dataset.name, (lines.get(line.dataset.name) || []).concat(points))
  }
  svg.onpointerdown = svg.onpointermove = e => {
    const box = svg.getBoundingClientRect(), at = (e.clientX - box.left) / box.width * 1000
    const nearest = points => points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a)
    const values = [...lines].map(([name, points]) => `${name}: ${y(1 - nearest(points)[1] / 1000)}`)
    tip.textContent = [`near ${x(at / 1000)} ${svg.dataset.over}`, ...values].join("\\n")
    tip.className = at < 500 ? "right" : "left"
    svg.parentNode.append(tip)
  }
  svg.onpointerleave = e => e.pointerType == "touch" || tip.remove()
}
"""
