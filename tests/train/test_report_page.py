"""The page of a report without files: which charts it has, on which axes, and what its script shows."""

import argparse
import functools
import html
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import llmfast
from llmfast._commands import WRITTEN
from llmfast.train import report
from llmfast.train.config import Config
from llmfast.train.report import charts, logs
from llmfast.train.report import page as module
from llmfast.train.report.charts import Chart, Drawn, Point, Series
from llmfast.train.report.logs import Log, flat
from llmfast.train.report.page import page

NODE = shutil.which("node")


def curve(first: float, last: float) -> list[Point]:
    """Return six points from one value to another, each ten steps and a thousand tokens after the one before it."""
    return [Point(10.0 * i, 1000.0 * i, first + (last - first) * i / 5) for i in range(1, 6)]


def a_log(name: str, *, sample: str = "", **settings: str) -> Log:
    """Return a run with two sources and two heads, of which everything changes."""
    parts = {"a": curve(4, 3), "b": curve(5, 4)}
    heads = {"0": curve(3, 2), "1": curve(6, 5)}
    single = {"loss": (5, 3), "validation_mean": (5, 4), "lr": (1, 0.1), "grad_norm": (2, 1), "objective": (9, 8)}
    single |= {"tokens_per_s": (100, 300), "mfu": (0.1, 0.3), "memory_bytes": (2**20, 2**22)}
    curves = {key: {"": curve(*ends)} for key, ends in single.items()}
    curves |= dict.fromkeys(("source_loss", "validation"), parts) | {"shares": {"a": curve(0, 1), "b": curve(1, 0)}}
    curves |= dict.fromkeys(("head_loss", "head_accuracy", "head_weights"), heads)
    return Log(name, {"train.steps": "50", **{k.replace("__", "."): v for k, v in settings.items()}}, curves, sample)


@functools.cache
def page_of_one() -> str:
    return page([a_log("run", sample="def x", train__sample_prompt="de'f")])


Call = tuple[Chart, list[tuple[str, int, str]], bool]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Note each chart with the name, number and style of its series that have values, and whether it has a legend."""
    calls: list[Call] = []
    parts: dict[str, Any] = dict.fromkeys(("title", "unit", "over", "note", "svg"), "") | {"legend": [], "names": "[]"}
    empty = Drawn(**parts, x=(0, 1, 0), y=(0, 1, 0), x_ticks=[(0, "")], y_ticks=[(0, "")])

    def noted(self: Chart, series: Sequence[Series], *, legend: bool = True) -> Drawn:
        calls.append((self, [(s.name, s.number, s.style) for s in series if s.points], legend))
        return empty

    monkeypatch.setattr(Chart, "draw", noted)
    return calls


LOSS = ("nats per token", "tokens")
WHOLE = [
    Chart("All sources", *LOSS),
    Chart("After the first fifth, training averaged", *LOSS),
    Chart("All sources, on logarithmic axes", *LOSS, log_x=True, log_y=True),
]
BY_RUN = [
    Chart("Learning rate", "", "steps", from_zero=True),
    Chart("Gradient norm", "before clipping", "steps", log_y=True),
    Chart("Throughput", "tokens per second", "steps", from_zero=True),
    Chart("Model FLOPs utilization", "%", "steps", from_zero=True, factor=100),
    Chart("Peak memory", "MiB", "steps", from_zero=True, factor=2**-20),
]
BY_PART = {  # with the parts and styles of its lines
    "source": [
        (Chart("Loss", *LOSS), ("a", "b"), ("training", "validation")),
        (Chart("Share of the mixture", "%", "steps", from_zero=True, factor=100), ("a", "b"), ("plain",)),
    ],
    "head": [
        (Chart("Loss", *LOSS), ("next token", "2 tokens ahead"), ("plain",)),
        (Chart("Accuracy", "%", "tokens", from_zero=True, factor=100), ("next token", "2 tokens ahead"), ("plain",)),
        (
            Chart("Weight", "in the objective", "steps", from_zero=True),
            ("next token", "2 tokens ahead"),
            ("plain",),
        ),
    ],
}
OBJECTIVE = Chart("Objective", "weighted sum of the heads' losses", "tokens")


def test_of_one_run_each_chart_is_on_axes_of_its_own(drawn: list[Call]) -> None:
    page([a_log("run")])
    whole = [("run", 0, "training"), ("run", 0, "validation")]
    single = [("run", 0, "plain")]
    wanted: list[Call] = [(chart, whole, False) for chart in WHOLE]
    for kind in ("source", "head"):
        for chart, parts, styles in BY_PART[kind]:
            wanted.append((chart, [(part, i, style) for i, part in enumerate(parts) for style in styles], True))
    wanted += [(chart, single, False) for chart in (*BY_RUN, OBJECTIVE)]
    assert sorted(drawn, key=str) == sorted(wanted, key=str)


def test_of_two_runs_each_part_is_on_axes_of_its_own(drawn: list[Call]) -> None:
    page([a_log("one"), a_log("two")])
    runs = list(enumerate(("one", "two")))
    whole = [(name, i, style) for style in ("training", "validation") for i, name in runs]
    wanted: list[Call] = [(chart, whole, True) for chart in WHOLE]
    for chart, parts, styles in (row for rows in BY_PART.values() for row in rows):
        for part in parts:
            titled = Chart(**vars(chart) | {"title": f"{chart.title}: {part}"})
            wanted.append((titled, [(name, i, style) for i, name in runs for style in styles], True))
    wanted += [(chart, [(name, i, "plain") for i, name in runs], True) for chart in (*BY_RUN, OBJECTIVE)]
    assert sorted(drawn, key=str) == sorted(wanted, key=str)


def text_of(element: str) -> str:
    return html.unescape(re.sub("<.*?>", "", element)).strip()


def test_the_page_is_in_sections_with_links() -> None:
    found = page_of_one()
    sections = {
        "runs": "Runs",
        "loss": "Loss",
        "sources": "Sources",
        "optimizer": "Optimizer",
        "speed": "Speed and memory",
        "heads": "Heads that predict further tokens",
        "settings": "Settings",
        "samples": "Samples",
    }
    assert re.findall(r'<section id="(.*?)"><h2>(.*?)</h2>', found) == list(sections.items())
    assert re.findall(r'<a href="#(.*?)">(.*?)</a>', found) == list(sections.items())
    (folded,) = re.findall(r"<details>(.*?)</details>", found, re.DOTALL)
    assert folded.startswith("<summary>On logarithmic axes</summary>") and folded.count("<figure>") == 1
    (sample,) = re.findall(r"<h3>.*?</pre>", found)
    assert text_of(sample) == 'run begun with "de\'f"def x'
    assert f"<footer>llmfast {llmfast.__version__}</footer>" in found
    assert f'<meta name="generator" content="{html.escape(WRITTEN)}">' in found
    captions = [text_of(caption) for caption in re.findall(r"<figcaption>(.*?)</figcaption>", found)]
    assert "Gradient norm before clipping" in captions and "Share of the mixture %" in captions
    (over,) = re.findall(r'aria-label="Throughput" .*? data-over="(.*?)"', found)
    assert over == "steps"
    assert "begun with" not in page([Log("run", {}, {}, "def x")])


@pytest.mark.parametrize(
    ("count", "title"), [(1, "r0"), (3, "r0, r1, r2"), (4, "r0, r1, r2 and 1 more"), (6, "r0, r1, r2 and 3 more")]
)
def test_the_title_names_up_to_three_runs(count: int, title: str) -> None:
    found = page([Log(f"r{i}", {}, {}, "") for i in range(count)])
    assert re.findall(r"<(title|h1)>(.*?)</\1>", found) == [("title", title), ("h1", title)]


def test_ticks_are_where_their_numbers_are() -> None:
    found = page_of_one()
    (figure,) = re.findall(r"<figure><figcaption><strong>Share.*?</figure>", found, re.DOTALL)
    low, high, _ = map(float, re.findall(r'data-y="(.*?)"', figure)[0].split())
    ticks = re.findall(r'<span style="bottom:(.*?)%">(.*?)</span>', figure)
    assert [label for _, label in ticks] == ["0", "50", "100"]
    assert [float(place) for place, _ in ticks] == pytest.approx(
        [100 * y / (high - low) for y in (0, 50, 100)], abs=0.1
    )
    places = re.findall(r'<span style="left:(.*?)%">(.*?)</span>', figure)
    assert [(float(place), label) for place, label in places] == [(2.5 * (x - 10), str(x)) for x in range(10, 51, 10)]


def test_cells_of_a_table_say_of_what_they_are() -> None:
    """On a phone, a wide table becomes a list."""
    found = page(
        [Log(name, {"optimizer.lr": lr, "train.steps": "9"}, {}, "") for name, lr in (("one", "1"), ("two", "2"))]
    )
    (table,) = re.findall(r'<section id="runs">.*?<table>(.*?)</table>', found, re.DOTALL)
    head = re.findall(r'<th scope="col">(.*?)</th>', table)
    row = re.search(r'<tr><th scope="row">two</th>(.*?)</tr>', table)
    assert row is not None and [of for of, _ in re.findall(r'<td data-of="(.*?)">(.*?)</td>', row[1])] == head[1:]
    assert dict(re.findall(r'<td data-of="(.*?)">(.*?)</td>', row[1]))["optimizer.lr"] == "2"


def test_settings_are_written_as_in_a_file() -> None:
    config = Config()
    config.data.weights, config.data.sources = {"code": 0.5, "b.c": "rest"}, ["code", "x"]
    found = flat(config)
    assert (found["model.tie_embeddings"], found["train.compile"]) == ("true", "false")
    assert found["data.sources"] == "code, x" and "data.weights" not in found
    assert (found["data.weights.code"], found["data.weights.b.c"]) == ("0.5", "rest")
    assert found["train.steps"] == "1000" and "optimizer.momentum" not in found
    assert Log("a", {"x": "", "y": "1"}, {}, "").setting("x") == '""' and Log("a", {}, {}, "").setting("x") == "-"


def test_a_gap_is_in_the_middle_of_what_is_missing() -> None:
    points = [Point(10.0 * i, 100.0 * i, 1.0) for i in (1, 2, 6, 7)]
    a, b, gap, c, d = logs._with_gaps(points, 10.0)
    assert [a, b, c, d] == points and (gap.step, gap.tokens, gap.logged) == (40, 400, False) and math.isnan(gap.value)
    for usual, gaps in ((26.0, 1), (27.0, 0)):  # 1.5 times as far apart as usual, and more
        assert len(logs._with_gaps(points, usual)) - len(points) == gaps


@pytest.mark.parametrize("name", ["validation", "validation_mean"])
def test_evaluations_may_be_rarer_than_lines(name: str) -> None:
    """Their gaps are by their own distance; those of the log are not."""
    lines: list[dict[str, Any]] = [{"step": s, "tokens": s, "loss": 1.0} for s in range(10, 101, 10)]
    lines += [{"step": s, "tokens": s, "validation": {"a": 1.0}, "validation_mean": 1.0} for s in (40, 80)]
    part = "a" if name == "validation" else ""
    assert all(point.logged for point in logs._curves(lines)[name][part])


def test_stretches_of_a_line_are_averaged() -> None:
    points = [Point(i, 10.0 * i, 2.0 * i, logged=i != 100) for i in range(1, 104)]
    found = module._means(points)  # fifty at most: three in each
    assert len(found) == 35 and found[0] == Point(2, 20, 4) and found[-1] == Point(103, 1030, 206)
    assert [point.step for point in found if not point.logged] == [101]
    assert module._means(points[:50]) == points[:50] and module._means([]) == []


def test_the_later_part_of_the_loss_begins_after_a_fifth_of_the_tokens() -> None:
    (figure,) = re.findall(r"<figure><figcaption><strong>After the first fifth.*?</figure>", page_of_one(), re.DOTALL)
    x = [float(end) for end in re.findall(r'data-x="(.*?)"', figure)[0].split()]
    assert x == [2000, 5000, 0]  # not the point at 1000 of 5000 tokens


@pytest.mark.parametrize(
    ("low", "high", "options", "ends"),
    [
        (1, 3, {}, (0.8, 3.2)),
        (1, 3, {"from_zero": True}, (0, 3.3)),
        (-1, 3, {"from_zero": True}, (-1.4, 3.4)),
        (0, 0, {"from_zero": True}, (0, 1.1)),
        (2, 2, {}, (0.8, 3.2)),
        (0, 0, {}, (-1.2, 1.2)),
        (-2, -2, {}, (-3.2, -0.8)),
        (1, 100, {"log": True}, (100**-0.1, 100**1.1)),
        (1, 100, {"log": True, "from_zero": True}, (100**-0.1, 100**1.1)),
        (5, 5, {"log": True}, (2.5 / 4**0.1, 10 * 4**0.1)),
    ],
)
def test_an_axis_holds_its_values_with_a_margin(low: float, high: float, options: Any, ends: Any) -> None:
    found = charts._ends(low, high, **{"log": False, "from_zero": False, "margin": 0.1} | options)
    assert found == pytest.approx(ends)


@pytest.mark.parametrize(
    ("high", "labels"),
    [
        *((5.5, ["1", "2", "3", "4", "5"]), (9, ["1", "2", "5"])),
        *((80, ["1", "2", "5", "10", "20", "50"]), (95, ["1", "10", "100"])),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_by_its_length(high: float, labels: list[str]) -> None:
    """Even steps up to 0.9 decades, powers of ten alone from 2.1 decades on; the margins of the axis count."""
    points = [Point(1, 1, value) for value in (1, high, math.nan)]
    found = Chart("", "", "steps", log_y=True).draw([Series("", 0, points)])
    assert isinstance(found, Drawn) and [label for _, label in found.y_ticks] == labels


@pytest.mark.parametrize(("first", "begin"), [(1, 0), (2, 2)])
def test_the_beginning_of_a_run_is_shown_if_most_of_it_is(first: int, begin: int) -> None:
    found = Chart("", "", "steps").draw([Series("", 0, [Point(s, 0, s) for s in (first, 10)])])
    assert isinstance(found, Drawn) and found.x == (begin, 10, 0)


def test_losses_of_training_are_thin_and_pale() -> None:
    points = [[Point(s, s, s + 1), Point(s + 9, s, s)] for s in range(3)]
    series = [Series("a", i, points[i], style) for i, style in enumerate(("plain", "training", "validation"))]  # type: ignore[arg-type]
    many = [*series[:2], Series("a", 2, [Point(s, s, s) for s in range(26)], "validation")]
    found = Chart("", "", "steps").draw(many)
    assert isinstance(found, Drawn) and json.loads(found.names) == ["a, training", "a", "a, validation"]
    styles = re.findall(r'data-line="(\d)">.*?style="(.*?)"', found.svg)
    assert [number for number, _ in styles] == ["0", "1", "2"]
    for number, style in styles:
        assert ("stroke-opacity: 0.5" in style, "stroke-width: 1.2" in style) == ((number == "0",) * 2)
        assert ("stroke-width: 1.8" in style) == (number != "0")


@pytest.mark.parametrize(
    ("values", "from_zero", "flat"),
    [
        ([100, 101], True, True),
        ([100, 101.1], True, False),
        ([100, 100.01], False, False),
        ([100, 100.00001], False, True),
        ([0, 0], False, True),
    ],
)
def test_what_nobody_would_see_is_said(values: list[float], from_zero: bool, flat: bool) -> None:
    found = Chart("T", "u", "steps", from_zero=from_zero).draw(
        [Series("", 0, [Point(i, i, v) for i, v in enumerate(values)])]
    )
    assert isinstance(found, str) == flat


@pytest.mark.parametrize(
    ("values", "unit", "told"),
    [
        ([[999.96] * 2], "", "T: 1000 throughout."),
        ([[1234.5] * 2], "u", "T, u: 1,234 throughout."),
        ([[-1234.6] * 2], "u", "T, u: -1,235 throughout."),
        ([[0.123456] * 2], "u", "T, u: 0.1235 throughout."),
        ([[1.5], [2.5]], "u", "T, u: s0 1.5, s1 2.5, logged once."),
        ([[1.5], [2.5, 2.5]], "u", "T, u: s0 1.5, s1 2.5 throughout."),
    ],
)
def test_numbers_in_words(values: list[list[float]], unit: str, told: str) -> None:
    series = [Series(f"s{n}", n, [Point(i, i, v) for i, v in enumerate(some)]) for n, some in enumerate(values)]
    assert Chart("T", unit, "steps").draw(series) == told


@pytest.mark.parametrize("command", [["a"], ["a", "b"]])
def test_the_command_writes_a_page_here_unless_told(command: list[str]) -> None:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    found = parser.parse_args(command)
    assert found.out == Path("report.html") and found.runs == [Path(name) for name in command]


def test_a_missing_package_is_told_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def missing(*args: Any) -> None:
        raise ImportError("No module named 'jinja2'")

    monkeypatch.setattr(report, "write_report", missing)
    assert report.run(argparse.Namespace(runs=[tmp_path], out=tmp_path / "x.html")) == 2
    assert capsys.readouterr().err == (
        "llmfast: error: No module named 'jinja2'; reports need the extra: pip install 'llmfast-torch[train]'\n"
    )


DOM = """{
const use = (x, y) => ({getAttribute: name => ({x, y})[name]})
const line = (number, d, dots = []) => ({
  dataset: {line: number}, querySelectorAll: () => dots, firstElementChild: {getAttribute: () => d},
})
const removed = [], shown = []
const tip = {remove: () => removed.push(tip.textContent)}
const chart = (x, y, over, names, lines) => ({
  dataset: {x, y, over, names: JSON.stringify(names)},
  viewBox: {baseVal: {width: 440, height: 220}},
  querySelectorAll: () => lines,
  getBoundingClientRect: () => ({left: 100, width: 200}),
  parentNode: {append: element => shown.push([element.className, element.textContent])},
})
const charts = [
  chart("0 4000 0", "0 10 0", "tokens", ["a", "b"],
    [line(1, "M 0 220 L 220 110 L 440 0"), line(0, "", [use("110", "55"), use("330", "165")])]),
  chart("0 2 1", "-1 1 1", "steps", ["c"], [line(0, "M 0 110 L 440 0")]),
]
globalThis.document = {createElement: () => tip, querySelectorAll: () => charts}
require("vm").runInThisContext(require("fs").readFileSync(process.argv[1], "utf8"))
for (const [chart, clientX] of [[0, 100], [0, 141.32], [0, 200], [0, 300], [1, 200]]) {
  charts[chart].onpointermove({clientX})
}
charts[0].onpointerdown({clientX: 100})
const left = ["touch", "mouse"].map(pointerType => {
  charts[0].onpointerleave({pointerType})
  return removed.length
})
console.log(JSON.stringify([shown, left]))
}"""


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_script_shows_the_values_under_the_pointer() -> None:
    """Read the axes' ends and the lines' positions as the page has them, of two lines and of a logarithmic one."""
    script = Path(report.__file__).with_name("page.js")
    done = subprocess.run([str(NODE), "-e", DOM, str(script)], capture_output=True, text=True, check=True)
    shown, left = json.loads(done.stdout)
    assert shown == [
        ["right", "near 0 tokens\nb: 0\na: 7.5"],
        ["right", "near 826.4 tokens\nb: 0\na: 7.5"],
        ["left", "near 2,000 tokens\nb: 5\na: 7.5"],
        ["left", "near 4,000 tokens\nb: 10\na: 2.5"],
        ["left", "near 10 steps\nc: 1"],
        ["right", "near 0 tokens\nb: 0\na: 7.5"],
    ]
    assert left == [0, 1]


def test_names_that_are_not_unicode_are_shown_as_far_as_they_go(tmp_path: Path) -> None:
    runs = [tmp_path / os.fsdecode(name) for name in (b"run\xff", b"other")]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "loss": 3.0}\n')
    report.write_report([*runs, runs[0]], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "run?, other" in text and text.count("run?") > 1


@pytest.mark.parametrize(("inside", "typed"), [("mine", "."), ("mine/checkpoints", ".."), (".", "link")])
def test_a_run_has_the_name_of_the_folder_that_a_path_leads_to(
    inside: str, typed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "checkpoints").mkdir(parents=True)
    (tmp_path / "mine" / "metrics.jsonl").write_text('{"step": 1, "tokens": 9, "loss": 2.0}\n')
    (tmp_path / "link").symlink_to("mine")
    monkeypatch.chdir(tmp_path / inside)
    report.write_report([Path(typed)], tmp_path / "page.html")
    assert "<title>mine" in (tmp_path / "page.html").read_text("utf-8")
