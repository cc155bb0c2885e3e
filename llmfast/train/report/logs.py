"""Reader of what a run has written so far: settings, curves and a sample."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np

from llmfast._checks import expect
from llmfast.train.config import SCHEMA, Config, load_config
from llmfast.train.earlier import runs_in
from llmfast.train.metrics import number, read_metrics
from llmfast.train.report.charts import Point

EVALUATED = ("validation", "validation_mean")  # values of an evaluation's line; others are in lines of the log


@dataclass(frozen=True)
class Log:
    """The settings, curves and sample of one run, which need not be finished."""

    name: str
    settings: dict[str, str]  # by dotted key, as text; empty without config.toml
    curves: dict[str, dict[str, list[Point]]]  # by logged name and part: a source, a head from "0", or "" of a number
    sample: str

    def curve(self, name: str, part: str = "") -> list[Point]:
        return self.curves.get(name, {}).get(part, [])

    def values(self, name: str) -> list[float]:
        """Return the finite values of a curve."""
        return [p.value for p in self.curve(name) if math.isfinite(p.value)]

    def setting(self, key: str) -> str:
        return self.settings.get(key, "-") or '""'


def read_log(folder: Path, name: str) -> Log:
    """Read what `folder` holds of a run.

    Raises:
        ValueError: it holds no run, its settings are not llmfast's, or a line of its metrics lacks step or tokens.
        OSError: a file cannot be read.
    """
    config, metrics, sample = folder / "config.toml", folder / "metrics.jsonl", folder / "sample.txt"
    expect(
        config.is_file() or metrics.is_file(),
        f"{folder} is not the folder of a run: it has neither config.toml nor metrics.jsonl{runs_in(folder)}",
    )
    settings = flat(load_config(config)) if config.is_file() else {}
    lines = read_metrics(metrics, losses=False) if metrics.is_file() else []
    text = sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else ""
    return Log(name, settings, _curves(lines), text)


def flat(config: Config) -> dict[str, str]:
    """Return the settings that the run has, as text by dotted key; a table gives one entry per key."""
    found: dict[str, str] = {}
    for name, s in SCHEMA.settings.items():
        if (value := s.of(config)) is None:
            continue
        found |= {f"{name}.{k}": str(v) for k, v in value.items()} if isinstance(value, dict) else {name: _text(value)}
    return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _curves(lines: list[dict[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """Collect the curves; steps that have no value where one is expected get a point that says so."""
    # Earlier versions give an evaluation the tokens of the last line before it: interpolating between lines is closer.
    known = {0.0: 0.0} | {float(line["step"]): float(line["tokens"]) for line in lines if "loss" in line}
    steps, tokens = np.array(sorted(known.items())).T
    curves: dict[str, dict[str, list[Point]]] = {}
    for line in lines:
        step = float(line["step"])
        at = float(np.interp(step, steps, tokens)) if "validation" in line else float(line["tokens"])
        for name, value in line.items():
            for part, logged in _numbers(value).items():
                curves.setdefault(name, {}).setdefault(part, []).append(Point(step, at, logged))
    usual = _usual([line["step"] for line in lines if "loss" in line])
    rarer = max(usual, _usual([line["step"] for line in lines if "validation" in line]))
    return {
        name: {part: _with_gaps(points, rarer if name in EVALUATED else usual) for part, points in parts.items()}
        for name, parts in curves.items()
    }


def _usual(steps: Iterable[float]) -> float:
    """Return the steps that usually lie between two lines, counted from the beginning."""
    apart = [b - a for a, b in pairwise(sorted({0, *steps}))]
    return float(median_high(apart)) if apart else 0.0


def _with_gaps(points: list[Point], usual: float) -> list[Point]:
    """Put a point without a number wherever values are missing.

    That is between two points that are further apart than 1.5 times `usual`, the steps between two lines of their kind,
    unless three such distances follow each other: then values are rarer, but as regular.
    """
    apart = [b.step - a.step for a, b in pairwise(points)]
    # For each distance, the smallest of three in a row that it belongs to, where that is largest.
    threes = [0.0, 0.0, *map(min, zip(apart, apart[1:], apart[2:])), 0.0, 0.0]
    regular = map(max, zip(threes, threes[1:], threes[2:]))
    found = points[:1]
    for (a, b), distance, one in zip(pairwise(points), apart, regular):
        if distance > 1.5 * max(usual, one):
            found.append(Point((a.step + b.step) / 2, (a.tokens + b.tokens) / 2, math.nan, logged=False))
        found.append(b)
    return found


def _numbers(value: Any) -> dict[str, float]:
    """Return the numbers in a logged value: by key, by position, or by "" where it is one itself."""
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = value.items()
    else:
        items = enumerate(value) if isinstance(value, list) else [("", value)]
    return {str(key): number(item) for key, item in items if isinstance(item, int | float)}
