"""Reader of what a run has written so far: settings, curves and a sample."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from llmfast._checks import expect
from llmfast.train.config import SCHEMA, Config, load_config
from llmfast.train.metrics import number, read_metrics
from llmfast.train.report.charts import Point


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
        f"{folder} is not the folder of a run: it has neither config.toml nor metrics.jsonl",
    )
    settings = flat(load_config(config)) if config.is_file() else {}
    lines = read_metrics(metrics, losses=False) if metrics.is_file() else []
    text = sample.read_text(encoding="utf-8", errors="replace") if sample.is_file() else ""
    return Log(name, settings, _curves(lines), text)


def flat(config: Config) -> dict[str, str]:
    """Write the settings that the run has as text, by dotted key; those that are tables key by key."""
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
    # An evaluation knows the tokens up to the last line of the log: interpolating between two lines is closer.
    known = {0.0: 0.0} | {float(line["step"]): float(line["tokens"]) for line in lines if "loss" in line}
    steps, tokens = np.array(sorted(known.items())).T
    curves: dict[str, dict[str, list[Point]]] = {}
    for line in lines:
        step = float(line["step"])
        at = float(np.interp(step, steps, tokens)) if "validation" in line else float(line["tokens"])
        for name, value in line.items():
            for part, logged in _numbers(value).items():
                curves.setdefault(name, {}).setdefault(part, []).append(Point(step, at, logged))
    usual = float(np.median(np.diff(steps))) if len(steps) > 1 else 0.0
    return {name: {part: _with_gaps(p, usual) for part, p in parts.items()} for name, parts in curves.items()}


def _with_gaps(points: list[Point], usual: float) -> list[Point]:
    """Put a point without a number wherever values are missing.

    That is between two points that are further apart than 1.5 times `usual`, the steps between two lines of the log,
    and than 1.5 times the distances to their neighbours on both sides: evaluations are rarer, but as regular.
    """
    apart = [0.0, *(b.step - a.step for a, b in pairwise(points)), 0.0]
    found = points[:1]
    for i, (a, b) in enumerate(pairwise(points), 1):
        if apart[i] > 1.5 * max(usual, apart[i - 1], apart[i + 1]):
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
