"""`llmfast report`: what is on the page, what it refuses, and how a browser shows it on a phone."""

import argparse
import base64
import hashlib
import html
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from llmfast.cli import main
from llmfast.train.config import Config, dump_config, load_config
from llmfast.train.metrics import FEW
from llmfast.train.report import add_arguments, run, write_report
from llmfast.train.report.charts import BUCKETS, HEIGHT, WIDTH, Chart, Drawn, Point, Series, thinned
from llmfast.train.report.logs import read_log
from llmfast.train.run import train

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = '<img src="http://example.com/x.png" onerror=alert(1)>&'


# Runs to report.


def logged(step: int, **values: Any) -> dict[str, Any]:
    """Return a line as the trainer writes it."""
    line = dict(
        step=step,
        tokens=1000 * step,
        loss=5 - step / 20,
        lr=1e-3 / step,
        tokens_per_s=9000.0 + 20 * step,
        sequences=4 * step,
        grad_norm=1 + 1 / step,
        memory_bytes=(300 + step) * 2**20,
        source_loss={"code": 4 - step / 20, "prose": 5 - step / 20},
        shares={"code": step / 40, "prose": 1 - step / 40},
    )
    return line | values


def evaluated(step: int, **losses: float) -> dict[str, Any]:
    losses = losses or {"code": 4.1 - step / 20, "prose": 5.1 - step / 20}
    return dict(step=step, tokens=1000 * step, validation=losses, validation_mean=sum(losses.values()) / len(losses))


def usual() -> list[dict[str, Any]]:
    return [evaluated(0), *(logged(step) for step in range(2, 41, 2)), evaluated(20), evaluated(40)]


def with_heads() -> list[dict[str, Any]]:
    lines = [
        logged(s, head_loss=[3.0, 4 - s / 100], head_accuracy=[0.5, s / 100], objective=4.0) for s in range(2, 41, 2)
    ]
    weights = [line | {"head_weights": [1.0, 1 - line["step"] / 80]} for line in lines]
    return [*weights, dict(step=40, tokens=40_000, acceptance=[0.625], tokens_per_pass=1.625)]


def folder(
    where: Path, lines: Sequence[Mapping[str, Any]] | None = None, settings: Sequence[str] = (), sample: str = ""
) -> Path:
    """Write a run's folder, as far as the report reads it."""
    where.mkdir(parents=True)
    config = load_config(None, ["train.steps=40", *settings], base=Config(where.name, str(where.parent)))
    (where / "config.toml").write_text(dump_config(config))
    if lines is not None:
        (where / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if sample:
        (where / "sample.txt").write_text(sample, encoding="utf-8")
    return where


# The page, taken apart.


@dataclass
class Figure:
    title: str
    svg: dict[str, str] = field(default_factory=dict)
    lines: list[tuple[str, list[tuple[float, float]]]] = field(default_factory=list)  # each stretch without gaps
    dots: int = 0
    legend: list[str] = field(default_factory=list)
    note: str = ""

    def values(self, name: str) -> list[tuple[float, float]]:
        """Return the values of the line of that name: positions converted back by the axes that the script uses."""

        def back(axis: str, place: float) -> float:
            low, high, log = map(float, self.svg[axis].split())
            value = low + (high - low) * place
            return 10**value if log else value

        stretches = [points for found, points in self.lines if found == name]
        assert len(stretches) == 1 or all(len(points) == 1 for points in stretches), "it has gaps"
        line = [point for points in stretches for point in points]
        return [(back("data-x", x / WIDTH), back("data-y", 1 - y / HEIGHT)) for x, y in line]


class Page(HTMLParser):
    """Checks that elements are closed in turn, and keeps what the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: list[Figure] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.samples: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self._line = ""
        self.feed(text)
        self.close()
        assert self._open == [], "left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.attributes += [(tag, name, value) for name, value in found.items()]
        if tag != "meta":
            self._open.append(tag)
        if tag == "svg":
            self._line = ""
        if tag == "figure":
            self.figures.append(Figure(""))
        elif tag == "svg" and "data-x" in found:
            self.figures[-1].svg = found
        elif tag == "g" and "data-line" in found:
            self._line = json.loads(self.figures[-1].svg["data-names"])[int(found["data-line"])]
        elif tag == "path" and self._line and "defs" not in self._open:
            for stretch in filter(None, found["d"].split("M ")):
                places = [tuple(map(float, place.split())) for place in stretch.split("L ")]
                self.figures[-1].lines.append((self._line, places))  # type: ignore[arg-type]
            self._line = ""
        elif tag == "use":
            self.figures[-1].dots += 1
            if self._line:  # of dots alone
                self.figures[-1].lines.append((self._line, [(float(found["x"]), float(found["y"]))]))
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        elif tag == "pre":
            self.samples.append("")
        elif tag == "li":
            self.figures[-1].legend.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside in ("script", "style"):
            return
        self.text += data
        if inside in ("td", "th"):
            self.rows[-1][-1] += data.replace("\u00a0", " ")
        elif inside in ("h1", "h2", "h3"):
            self.headings[-1] += data
        elif inside == "pre":
            self.samples[-1] += data
        elif inside == "li":
            self.figures[-1].legend[-1] += data
        elif inside == "strong":
            self.figures[-1].title += data
        elif "p" in self._open and "figure" in self._open:
            self.figures[-1].note += data

    @property
    def titles(self) -> list[str]:
        return [figure.title for figure in self.figures]

    def figure(self, title: str) -> Figure:
        (found,) = (figure for figure in self.figures if figure.title == title)
        return found

    def row(self, first: str) -> list[str]:
        """Return the cells next to a heading, in the first table that has it."""
        return next(row[1:] for row in self.rows if row[0] == first)


def page(*runs: Path) -> Page:
    out = runs[0].parent / "report.html"
    write_report(runs, out)
    return Page(out.read_text(encoding="utf-8"))


# What is on it.


def test_a_run_that_was_trained(settings: list[str], tmp_path: Path) -> None:
    config = load_config(None, [*settings, "model.mtp=parallel", "model.mtp_heads=2", "model.layers=2"])
    found = page(train(config, console=Console(quiet=True)))
    assert found.row("steps") == ["8 of 8"] and found.row("guesses accepted")[0].endswith(" %")
    assert len(found.figure("All sources").values("demo, training")) == 4
    assert len(found.figure("All sources").values("demo, validation")) == 3
    assert {"Learning rate", "Gradient norm", "Throughput", "Accuracy"} <= set(found.titles)
    assert "Peak memory" in found.text
    assert found.row("model.mtp") == ["none", "parallel"] and "name" not in [row[0] for row in found.rows]
    assert found.samples[0].startswith("def")


def test_charts_show_the_numbers_that_were_logged(tmp_path: Path) -> None:
    figure = page(folder(tmp_path / "a", usual())).figure("All sources")
    for (x, y), step in zip(figure.values("a, training"), range(2, 41, 2)):
        assert (x, y) == pytest.approx((1000 * step, 5 - step / 20), abs=0.01 * 40, rel=1e-3)
    assert figure.values("a, validation") == [pytest.approx((1000 * s, 4.6 - s / 20), rel=1e-3) for s in (0, 20, 40)]
    assert figure.dots == 3 and figure.legend == [] and figure.note == "line: training, dots: validation tokens"


def test_of_one_run_the_parts_share_a_chart(tmp_path: Path) -> None:
    found = page(folder(tmp_path / "a", usual() + with_heads()))
    assert [name for name, _ in found.figure("Share of the mixture").lines] == ["code", "prose"]
    assert found.figure("Share of the mixture").values("code")[-1] == pytest.approx((40, 100), rel=1e-3)
    losses = [figure.legend for figure in found.figures if figure.title == "Loss"]
    assert losses == [["code", "prose"], ["next token", "2 tokens ahead"]]
    assert found.figure("Accuracy").legend == ["next token", "2 tokens ahead"]
    assert found.figure("Accuracy").values("2 tokens ahead")[-1] == pytest.approx((40_000, 40), rel=1e-3)


def test_of_several_runs_each_part_has_a_chart(tmp_path: Path) -> None:
    one = folder(tmp_path / "one", usual(), ["optimizer.lr=0.002"])
    other = [
        logged(s, source_loss={"poems": 3.0 / s, "prose": 4.0}, shares={"poems": 0.5, "prose": 0.5}) for s in (2, 4)
    ]
    found = page(one, folder(tmp_path / "two", other), folder(tmp_path / "heads", with_heads()))
    assert found.figure("Loss: code").legend == ["one", "heads"]
    assert found.figure("Loss: poems").legend == ["two"]
    assert found.figure("Loss: prose").legend == ["one", "two", "heads"]
    assert found.figure("Weight: 2 tokens ahead").legend == ["heads"]
    assert found.figure("Learning rate").legend == ["one", "two", "heads"]
    assert len({found.figure("Throughput").lines[i][0] for i in range(3)}) == 3


@pytest.mark.parametrize("count", [1, 2])
def test_each_chart_of_the_loss_names_several_runs(count: int, tmp_path: Path) -> None:
    runs = [folder(tmp_path / f"r{i}", usual()) for i in range(count)]
    names = [f"r{i}, {part}" for i in range(count) for part in ("training", "validation")]
    figures = [figure for figure in page(*runs).figures if "r0, training" in [name for name, _ in figure.lines]]
    assert len(figures) >= 2
    for figure in figures:
        assert sorted({name for name, _ in figure.lines}) == sorted(names)
        assert len(figure.legend) == (count if count > 1 else 0), figure.title


def test_summary_and_settings_say_what_differs(tmp_path: Path) -> None:
    lines = [
        *usual()[:-1],
        logged(40, skipped=3, memory_bytes=12 * 2**30, spike=True),
        evaluated(40, code=1.5, prose=2),
    ]
    a = folder(tmp_path / "a", lines, ["optimizer.lr=0.002", 'data.weights.code="0.2->0.8"'])
    b = folder(tmp_path / "b", with_heads(), ["model.mtp=parallel", "model.mtp_heads=2", "data.tokenizer=bytes"])
    found = page(a, b)
    head, *rows = found.rows[:3]
    assert dict(zip(head, rows[0])) == {
        "run": "a",
        "validation loss (nats per token)": "1.750",
        "model.mtp": "none",
        "model.mtp_heads": "0",
        "data.weights.code": "0.2->0.8",
        "data.tokenizer": "bpe",
        "optimizer.lr": "0.002",
        "steps": "40 of 40",
        "tokens": "40.0 k",
        "tokens/s, median": "9,440",
        "peak memory": "12.00 GiB",
        "steps skipped": "3",
        "loss spikes": "1",
        "guesses accepted": "-",
        "tokens per pass": "-",
    }
    two = dict(zip(head, rows[1]))
    assert two["peak memory"] == "340.0 MiB" and two["validation loss (nats per token)"] == "-"
    assert two["guesses accepted"] == "62 %" and two["tokens per pass"] == "1.62"
    assert found.row("optimizer.lr") == ["0.0015", "0.002", "0.0015"]
    assert found.row("data.weights.code") == ["-", "0.2->0.8", "-"]
    assert "differ in data.tokenizer: their losses are not of the same tokens" in found.text


def test_summary_takes_of_each_number_what_it_means(tmp_path: Path) -> None:
    """Skipped steps are counted from the beginning, spikes are not; memory is the most, speed the median."""
    of_lines = zip((10, 20, 30), (2, 5, 5), (5, 12, 3), (100.0, 900.0, 200.0), ({}, {"spike": True}, {"spike": True}))
    lines = [
        logged(step, skipped=skipped, memory_bytes=memory * 2**30, tokens_per_s=speed, **spike)
        for step, skipped, memory, speed, spike in of_lines
    ]
    rows = page(folder(tmp_path / "a", [*lines, evaluated(10, a=3), evaluated(30, a=2)])).rows
    found = {row[0]: row[1] for row in rows}
    assert [found[name] for name in ("steps", "steps skipped", "loss spikes")] == ["30 of 40", "5", "2"]
    assert [found[name] for name in ("tokens/s, median", "peak memory")] == ["200", "12.00 GiB"]
    assert found["validation loss (nats per token)"] == "2.000"


def test_settings_that_do_not_differ(tmp_path: Path) -> None:
    """Ignore a run's folder and name, which are not relevant settings."""
    a, b = (folder(tmp_path / f"runs of {name}" / name, usual()) for name in "ab")
    assert page(a).row("train.steps") == ["1000", "40"]
    assert "The runs have the same settings." in page(a, b).text


def test_charts_without_data_are_left_out(tmp_path: Path) -> None:
    lines = [
        dict(step=s, tokens=9 * s, loss=3.0 / s, tokens_per_s=5.0 * s, source_loss={"only": 3.0 / s})
        for s in range(1, 5)
    ]
    found = page(folder(tmp_path / "a", lines))
    assert found.titles == [
        "All sources",
        "After the first fifth, training averaged",
        "All sources, on logarithmic axes",
        "Throughput",
    ]
    assert [h for h in found.headings if h in ("Sources", "Optimizer", "Heads that predict further tokens")] == []


def test_evaluations_are_dots_until_there_are_many(tmp_path: Path) -> None:
    """A line would pass over steps that were not evaluated, also where evaluations are missing among many."""
    ends = page(folder(tmp_path / "ends", [*(logged(s) for s in range(2, 41, 2)), evaluated(0), evaluated(40)]))
    assert ends.figures[0].dots == 2 and "gaps" not in ends.figures[0].note
    few = page(folder(tmp_path / "few", [logged(60), *(evaluated(2 * i) for i in range(FEW))])).figures[0]
    assert [len(stretch) for name, stretch in few.lines if name == "few, validation"] == [1] * FEW
    many = [evaluated(s) for s in range(0, 400, 10) if s not in (150, 320, 330)]
    figure = page(folder(tmp_path / "many", [*(logged(s) for s in range(2, 401, 2)), *many])).figures[0]
    assert [len(stretch) for name, stretch in figure.lines if name == "many, validation"] == [15, 16, 6]
    assert figure.note.startswith("thin: training, thick: validation; gaps: steps without a value")


def test_lines_do_not_pass_over_steps_that_are_missing(tmp_path: Path) -> None:
    """Also of a source that was not read for a while, and where losses are averaged."""
    lines = [logged(s) for s in range(5, 401, 5) if not 100 < s <= 200]
    for line in lines:
        if 300 < line["step"] <= 350:
            del line["source_loss"]["code"]
    found = page(folder(tmp_path / "a", lines))
    whole, late = (found.figures[i].lines for i in (0, 1))
    assert [len(points) for _, points in whole] == [20, 40] and len(late) == 2
    assert [len(points) for name, points in found.figure("Loss").lines if name == "code, training"] == [20, 20, 10]
    assert "gaps: steps without a value" in found.figure("Learning rate").note


@pytest.mark.parametrize("spaces", [[250, 250, 10], [100, 100, 300, 300, 300], [10] * 5 + [7] * 5])
def test_lines_go_on_where_values_are_as_far_apart_as_usual(spaces: list[int], tmp_path: Path) -> None:
    steps = np.cumsum([10, *spaces]).tolist()
    figure = page(folder(tmp_path / "a", [logged(s) for s in steps])).figure("Learning rate")
    assert len(figure.lines) == 1 and "gaps" not in figure.note


@pytest.mark.parametrize("missing", [[(100, 150)], [(100, 150), (150, 200)], [(10, 60), (250, 300)]])
def test_gaps_next_to_each_other_are_found(missing: list[tuple[int, int]], tmp_path: Path) -> None:
    steps = [s for s in range(10, 311, 10) if not any(a < s < b for a, b in missing)]
    figure = page(folder(tmp_path / "a", [logged(s) for s in steps])).figure("Learning rate")
    assert len(figure.lines) == 1 + len(missing)


def test_the_curve_of_two_evaluations_has_no_gap(tmp_path: Path) -> None:
    lines = [*(logged(s) for s in range(2, 41, 2)), evaluated(0), evaluated(40)]
    points = read_log(folder(tmp_path / "a", lines), "a").curve("validation_mean")
    assert [p.step for p in points] == [0, 40]


def test_what_never_changes_is_said(tmp_path: Path) -> None:
    constant = dict(
        lr=0.003,
        memory_bytes=300 * 2**20,
        tokens_per_s=12_345.6,
        shares={"code": 0.3, "prose": 0.7},
        head_loss=[3.0, 4.0],
        head_accuracy=[0.5, 0.25],
        head_weights=[1.0, 0.5],
        objective=5.0,
    )
    lines = [logged(s, **constant) for s in range(2, 41, 2)]
    lines[3]["memory_bytes"] += 2**20  # which nobody would see
    found = page(folder(tmp_path / "a", lines))
    assert found.titles == [
        "All sources",
        "After the first fifth, training averaged",
        "All sources, on logarithmic axes",
        "Loss",
        "Gradient norm",
    ]
    for sentence in (
        "Learning rate: 0.003 throughout.",
        "Peak memory, MiB: 300 throughout.",
        "Throughput, tokens per second: 12,346 throughout.",
        "Share of the mixture, %: code 30, prose 70 throughout.",
        "Weight, in the objective: next token 1, 2 tokens ahead 0.5 throughout.",
        "Accuracy, %: next token 50, 2 tokens ahead 25 throughout.",
    ):
        assert sentence in found.text
    two = page(tmp_path / "a", folder(tmp_path / "b", [logged(2, **constant), logged(4, lr=0.001)]))
    assert "Learning rate" in two.titles  # of one of them it changes
    same = page(tmp_path / "a", folder(tmp_path / "c", [logged(2, **constant)]))
    assert "Learning rate: a 0.003, c 0.003 throughout." in same.text
    for mebibytes, said in ((10 * 1024, "GiB: 10"), (10 * 1024 - 1, "MiB: 10,239")):
        lines = [logged(step, **constant | {"memory_bytes": mebibytes * 2**20}) for step in (2, 4)]
        assert f"Peak memory, {said} throughout." in page(folder(tmp_path / said, lines)).text
    begun = page(folder(tmp_path / "d", [evaluated(0)]))
    assert begun.figures == [] and "All sources, nats per token: 4.6, logged once." in begun.text


def test_evaluations_between_lines_of_the_log_are_in_their_place(tmp_path: Path) -> None:
    lines = [evaluated(5) | {"tokens": 0}, logged(10), evaluated(15) | {"tokens": 10_000}, logged(20)]
    figure = page(folder(tmp_path / "a", lines)).figure("All sources")
    assert [x for x, _ in figure.values("a, validation")] == pytest.approx([5000, 15_000], rel=1e-3)


def test_values_that_are_not_finite_leave_gaps(tmp_path: Path) -> None:
    losses = [5.0, 4.0, math.nan, 3.0, math.inf, 2.0, 2.0]
    lines = [logged(i + 1, loss=loss, grad_norm=math.nan) for i, loss in enumerate(losses)]
    found = page(folder(tmp_path / "a", [*lines, evaluated(7, code=math.nan)]))
    figure = found.figures[0]
    assert [len(points) for _, points in figure.lines] == [2, 1, 2] and figure.dots == 1
    assert "gaps: values that are not finite" in figure.note and "Gradient norm" not in found.titles
    assert found.row("validation loss (nats per token)") == ["nan"]


def test_long_lines_keep_all_their_gaps(tmp_path: Path) -> None:
    missing = (100, 1500, 1999)
    lines = [
        logged(s, loss=math.nan if s in missing else 3.0, grad_norm=0.0 if s in missing else 1.0)
        for s in range(1, 2001)
    ]
    found = page(folder(tmp_path / "a", lines))
    loss, norm = found.figures[0], found.figure("Gradient norm")
    for figure in (loss, norm):
        assert len(figure.lines) == 4, figure.title
    assert "gaps: values that are not finite" in loss.note and "gaps: values that are not above 0" in norm.note


def test_long_runs_are_thinned_and_keep_their_spikes(tmp_path: Path) -> None:
    lines = [logged(i, loss=9.0 if i == 2501 else 3 + i % 2 / 10) for i in range(1, 5001)]
    figure = page(folder(tmp_path / "a", lines)).figures[0]
    values = figure.values("a, training")
    assert 250 < len(values) <= 2 * BUCKETS + 4
    assert max(y for _, y in values) == pytest.approx(9, rel=1e-2)


@pytest.mark.parametrize("ends", [(0.0, 0.0), (-1.0, 1.0), (math.nan, 0.5)])
def test_the_ends_of_a_long_line_stay(ends: tuple[float, float]) -> None:
    """Each end is neither the lowest nor the highest of its bucket, unless it is said to be."""
    count = 4 * BUCKETS
    xy = np.stack([np.arange(count) / count, np.where(np.arange(count) % 4 == 1, -1.0, 1.0)], 1)
    xy[0, 1], xy[-1, 1] = ends
    kept = thinned(xy, np.arange(count) // 4)
    assert np.array_equal(kept[[0, -1]], xy[[0, -1]], equal_nan=True)
    assert 2 * BUCKETS <= len(kept) <= 2 * BUCKETS + 2


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(-5, 5) | st.just(math.nan)), max_size=3000))
def test_thinning(points: list[tuple[float, float]]) -> None:
    xy = np.array(points).reshape(-1, 2)
    kept = thinned(xy, (xy[:, 0] * BUCKETS).astype(np.int64)).tolist()
    assert len(kept) <= 3 * (BUCKETS + 1) + 2
    rest = iter(map(repr, xy.tolist()))
    assert all(point in rest for point in map(repr, kept))  # in the same order
    if points:
        assert repr(kept[0]) == repr(xy[0].tolist()) and repr(kept[-1]) == repr(xy[-1].tolist())
        before, after = ([y for _, y in some if y == y] for some in (points, kept))
        assert not before or (min(before), max(before)) == (min(after), max(after))
        assert any(y != y for _, y in kept) == any(y != y for _, y in points)


NUMBERS = st.floats() | st.floats(0.001, 10) | st.sampled_from([0.0, 1e-3, 1.0, 5e-324, 1.7e308, -1.7e308])


FAR = [Point(0.0, 0.0, 1.0), Point(6e16, 0.0, 0.0)]  # a logarithmic axis has no place for the second


@settings(max_examples=30, deadline=None)
@example(points=FAR * 4, from_zero=False, log_x=False, log_y=True)
@example(points=[*FAR, Point(-1e99, 0.0, math.nan)], from_zero=True, log_x=False, log_y=False)
@given(
    st.lists(st.builds(Point, NUMBERS, NUMBERS, NUMBERS, st.just(True)), max_size=8),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
@pytest.mark.filterwarnings("error")
def test_any_numbers_can_be_drawn(points: list[Point], from_zero: bool, log_x: bool, log_y: bool) -> None:
    chart = Chart("t", "u", "steps", from_zero=from_zero, log_x=log_x, log_y=log_y)
    drawn = chart.draw([Series("s", 0, points, "validation")])
    possible = [p for p in points if (1e-100 if log_x else -1e100) <= p.step <= 1e100]
    possible = [p for p in possible if (1e-100 if log_y else -1e100) <= p.value <= 1e100]
    assert (drawn is not None) == bool(possible)
    if isinstance(drawn, Drawn):
        places = [tuple(map(float, place)) for place in re.findall(r'x="(\S+)" y="(\S+)"', drawn.svg)]
        assert len(places) == len(possible) and "nan" not in drawn.svg
        assert all(-0.1 <= x <= WIDTH + 0.1 and -0.1 <= y <= HEIGHT + 0.1 for x, y in places)


def axis(values: Sequence[float], **options: bool) -> Drawn:
    """Draw values, none of which need change: the last is not a number."""
    points = [Point(1, 1, value) for value in (*values, math.nan)]
    found = Chart("", "", "steps", **options).draw([Series("", 0, points)])
    assert isinstance(found, Drawn)
    return found


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e20, 1e20) | st.floats(1e-20, 1) | st.integers(0, 50), min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_ticks_are_few_within_the_axis_and_told_apart(values: list[float], log: bool, from_zero: bool) -> None:
    if log:
        values = [abs(v) + 1e-9 for v in values]
    ticks = axis(values, log_y=log, from_zero=from_zero).y_ticks
    assert 2 <= len(ticks) == len({label for _, label in ticks}) <= 8
    assert all(-1e-3 <= place <= 100.001 for place, _ in ticks)


@pytest.mark.parametrize(
    ("values", "log", "labels"),
    [
        ([0, 20_000], False, ["0", "5\u00a0k", "10\u00a0k", "15\u00a0k", "20\u00a0k"]),
        ([0, 2.5e-4], False, ["0", "0.0001", "0.0002"]),
        ([2.1, 2.3], False, ["2.1", "2.15", "2.2", "2.25", "2.3"]),
        ([1, 1e9], True, ["1", "100", "10\u00a0k", "1\u00a0M", "100\u00a0M"]),
        ([0.3, 7], True, ["0.5", "1", "2", "5"]),
        ([2.0, 4.0], True, ["2", "2.5", "3", "3.5", "4"]),
    ],
)
def test_labels(values: list[float], log: bool, labels: list[str]) -> None:
    assert [label for _, label in axis(values, log_y=log).y_ticks] == labels


def test_the_legend_shows_each_line_as_it_is_drawn() -> None:
    """Draw more lines than there are colours with dashes, in another order than that of the legend."""
    every = [Series(f"run {n}", n, [Point(0, 0, n), Point(9, 9, n + 1)]) for n in reversed(range(17))]
    drawn = Chart("Loss", "", "steps").draw(every)
    assert isinstance(drawn, Drawn)
    names, shown = json.loads(drawn.names), dict(drawn.legend)
    assert list(shown) == [f"run {n}" for n in range(17)]
    assert len(set(list(shown.values())[:15])) == 15
    dashes: dict[str, set[str]] = {}
    for number, style in re.findall(r'data-line="(\d+)">.*?style="(.*?)"', drawn.svg):
        colour, dash = shown[names[int(number)]].split()
        assert f"stroke: var(--{colour});" in style
        dashes.setdefault(dash, set()).update(re.findall(r"stroke-dasharray: ([\d.,]+)", style) or ["none"])
    solid, *others = (dashes[f"d{n}"] for n in range(3))
    assert solid == {"none"} and len(set.union(*others)) == len(others)


# What a page is made of.


def test_nothing_on_it_comes_from_elsewhere(tmp_path: Path) -> None:
    found = page(folder(tmp_path / "a", usual()), folder(tmp_path / "b", with_heads()))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"https?:|url\(|@import|//[a-z]", text) == []
    for _, name, value in found.attributes:
        assert name not in ("src", "srcset", "style") or (name == "style" and "url" not in value)
        assert name != "href" or value.startswith("#")
    assert {value[1:] for _, name, value in found.attributes if name == "href"} == {
        value for tag, name, value in found.attributes if (tag, name) == ("section", "id")
    }
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_text_of_files_is_text_on_the_page(tmp_path: Path) -> None:
    sample = HOSTILE + "</pre><script>\n\ttab \x1b[31m\x00 \u2028 é"
    lines = [logged(i, source_loss={HOSTILE: 3.0 / i, "\udc80": 2.0}) for i in (1, 2)]
    run_folder = folder(
        tmp_path / "<b>a & b",
        lines,
        [f"train.sample_prompt={json.dumps(HOSTILE)}", f"data.tokenizer={HOSTILE}"],
        sample,
    )
    found = page(run_folder)
    assert {tag for tag, _, _ in found.attributes}.isdisjoint({"img", "b"})
    assert "<b>a & b" in found.headings and HOSTILE in found.figure("Loss").legend
    assert found.row("data.tokenizer") == ["bpe", HOSTILE]
    assert found.samples == [sample.replace("\x1b", "\u241b").replace("\x00", "\u2400")]


# What it can and cannot be given.


def report(*arguments: Path | str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(list(map(str, arguments))))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert report(folder(tmp_path / "a", usual()), "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert Page(out.read_text(encoding="utf-8")).headings[0] == "a"


def test_runs_that_have_not_come_far(tmp_path: Path) -> None:
    new = folder(tmp_path / "new")
    empty = folder(tmp_path / "empty", [])
    begun = folder(tmp_path / "begun", [evaluated(0)])
    cut = folder(tmp_path / "cut", usual()[:3])
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "tok')
    alone = tmp_path / "alone"  # what a Trainer writes without `llmfast train`
    alone.mkdir()
    shutil.copy(cut / "metrics.jsonl", alone)
    assert "Nothing was logged yet." in page(new).text and page(empty).figures == []
    found = page(new, empty, begun, cut, alone)
    steps = [row[found.rows[0].index("steps")] for row in found.rows[1:6]]
    assert steps == ["0 of 40", "0 of 40", "0 of 40", "4 of 40", "4"]
    assert found.figures[0].legend == ["begun", "cut", "alone"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is not the folder of a run"),
        ({}, "is not the folder of a run"),
        ({"config.toml": b"[package]\nname = 'x'"}, "unknown key package"),
        ({"config.toml": b"model = {"}, "is not TOML"),
        ({"metrics.jsonl": b'{"loss": 1.0}'}, "numbers step and tokens; got {'loss': 1.0}"),
        ({"metrics.jsonl": b"[1, 2]"}, "numbers step and tokens; got [1, 2]"),
        ({"metrics.jsonl": b'{"step": NaN, "tokens": 1}'}, "numbers step and tokens"),
        ({"metrics.jsonl": b"\xff\xfe\x00"}, "is not text"),
    ],
)
def test_what_is_no_run_is_refused(
    files: dict[str, bytes] | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad, out = folder(tmp_path / "good", usual()), tmp_path / "bad", tmp_path / "report.html"
    if files is not None:
        bad.mkdir()
        for name, content in files.items():
            (bad / name).write_bytes(content)
    assert report(good, bad, "--out", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("llmfast: error: ") and error.count("\n") == 1
    assert message in error and str(bad) in error
    assert not out.exists()


def test_the_folder_of_runs_is_told_what_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(12):
        folder(tmp_path / "runs" / f"run{i:02}", usual())
    assert report(tmp_path / "runs") == 2
    error = capsys.readouterr().err
    assert "nor metrics.jsonl; it holds runs: run00, run01, " in error and error.endswith("run09 and 2 more\n")


def test_only_a_page_of_its_own_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = folder(tmp_path / "a", usual()), tmp_path / "notes.txt"
    out.write_text("weeks of work")
    assert report(run, "--out", out) == 2
    assert f"{out} exists and was not written by llmfast" in " ".join(capsys.readouterr().err.split())
    assert out.read_text() == "weeks of work"
    out.write_text("")
    assert report(run, "--out", out) == 0 and "</html>" in out.read_text()
    assert report(run, "--out", out) == 0


def test_a_name_that_is_not_unicode_can_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / os.fsdecode(b"page\xff.html")
    assert main(["report", str(folder(tmp_path / "a", usual())), "--out", str(out)]) == 0
    assert out.exists() and "page\\udcff.html" in capsys.readouterr().out


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report(folder(tmp_path / "a", usual()), "--out", tmp_path / "none" / "page.html") == 2
    assert "none" in capsys.readouterr().err
    with pytest.raises(ValueError, match="runs must name at least one folder"):
        write_report([], tmp_path / "page.html")


def test_values_of_other_kinds_are_passed_over(tmp_path: Path) -> None:
    lines = [
        logged(1, loss="low", source_loss=3, head_loss={"x": 1.0}, shares=None, lr=10**400, mfu=[[]]),
        logged(2),
        logged(3),
    ]
    found = page(folder(tmp_path / "a", lines))
    assert len(found.figure("Learning rate").values("a")) == 2 and len(found.figures[0].values("a, training")) == 2


def test_names(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "x" / "run", usual()), folder(tmp_path / "y" / "run", usual())
    out = tmp_path / "report.html"
    write_report([a, b, a / "." / ".." / "run"], out)
    assert [row[0] for row in Page(out.read_text()).rows[1:3]] == [str(a), str(b)]
    write_report([a, a], out)
    assert Page(out.read_text()).headings[0] == "run"


# In a browser.

PROBE = """
const all = (selector, node = document) => [...node.querySelectorAll(selector)]
const box = element => element.getBoundingClientRect()
const first = document.querySelector(".plot > svg")
for (const details of all("details")) details.open = true
first.dispatchEvent(new PointerEvent("pointermove", {clientX: box(first).right - 1, clientY: box(first).top + 9}))
const apart = spans => spans.every((span, i) => i == 0 || box(spans[i - 1]).right <= box(span).left)
parent.postMessage("found " + JSON.stringify({
  window: innerWidth,
  page: document.documentElement.scrollWidth,
  lengths: all("figure").map(f => Math.max(...all("[data-line] path", f).map(line => line.getTotalLength()))),
  widths: all(".plot > svg").map(svg => box(svg).width),
  smallest: Math.min(...all("main *").map(element => parseFloat(getComputedStyle(element).fontSize))),
  cut: all(".wide, .wide td, li, figcaption, h1, h3, .over, pre").filter(e => e.scrollWidth > e.clientWidth)
    .map(e => e.textContent),
  ticks: all(".x span, .y span").filter(e => box(e).left < 0 || box(e).right > innerWidth).map(e => e.textContent),
  apart: all(".x").every(axis => apart(all("span", axis))),
  readout: document.querySelector("output").textContent,
  requests: performance.getEntriesByType("resource").map(entry => entry.name),
}), "*")
"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
def test_in_a_browser_on_a_phone(tmp_path: Path) -> None:
    long_name = "longer_than_a_phone_is_wide_" * 5  # without a place to break it
    runs = [
        folder(tmp_path / "one", usual(), ["optimizer.lr=0.002"], sample="x" * 500 + HOSTILE),
        folder(tmp_path / long_name, with_heads(), [f"data.tokenizer={'/long/path' * 20}"]),
        folder(tmp_path / "<b>", [logged(s, source_loss={HOSTILE: 3.0 + s, "prose": 4.0}) for s in range(1, 9)]),
    ]
    out = tmp_path / "report.html"
    write_report(runs, out)
    found = browse(out, width=375)
    assert found["window"] == 375
    assert found["page"] <= 375
    assert len(found["lengths"]) == len(Page(out.read_text()).figures) > 10 and min(found["lengths"]) > 100
    assert min(found["widths"]) > 250
    assert found["smallest"] >= 12 and found["apart"]
    assert found["cut"] == found["ticks"] == []  # also of tables of many runs
    assert "one, training: 3\n" in found["readout"] and found["readout"].startswith("near 39,")
    assert found["requests"] == []


def browse(report: Path, width: int) -> dict[str, Any]:
    """Open a local copy of the page with the probe's script added and allowed, in a frame.

    A window can be too wide for a phone's page. Nothing else of the page's policy changes, and no host name is
    resolved.
    """
    digest = base64.b64encode(hashlib.sha256(PROBE.encode()).digest()).decode()
    text = report.read_text(encoding="utf-8").replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
    report.with_name("probed.html").write_text(text.replace("</body>", f"<script>{PROBE}</script></body>"))
    frame = report.with_name("frame.html")
    frame.write_text(
        "<!DOCTYPE html><title>-</title><script>onmessage = e => document.title = e.data</script>"
        f'<iframe src="probed.html" width="{width}" height="700"></iframe>'
    )
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--hide-scrollbars",
        "--disable-background-networking",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=3000",
        f"--user-data-dir={report.with_name('browser')}",
        "--dump-dom",
        frame.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (found,) = re.findall(r"<title>found (.*?)</title>", done.stdout)
    values: dict[str, Any] = json.loads(html.unescape(found))
    return values
