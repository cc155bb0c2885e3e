"""Tests of what is shown during a run."""

import io
import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from llmfast.train import metrics
from llmfast.train.metrics import (
    FEW,
    PLAIN_SECONDS,
    MetricsFile,
    ProgressDisplay,
    number,
    outliving,
    peak_memory_bytes,
    plot_loss,
    print_table,
    read_metrics,
    say,
    weighted_mean,
)
from support.programs import settings, trainer_of


@pytest.mark.parametrize("done", [0, 900])
def test_the_time_left_is_by_the_steps_of_this_start(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has not taken its earlier steps in the time since it was started again."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), 1000, done) as display:
        for steps in (0, 50, 100):
            display.show(done + steps, 2.5, 1e-3, 12345.0, 2 * PLAIN_SECONDS)
            now += 2 * PLAIN_SECONDS
    assert out.getvalue().splitlines() == [
        f"step {done + steps}/1000  loss 2.500  12,345 tok/s  lr 1.0e-03  {left:.0f} s left"
        for steps, left in ((0, 0), (50, (950 - done) * 30 / 50), (100, (900 - done) * 60 / 100))
    ]


def test_a_resumed_run_keeps_its_lines_up_to_where_it_resumes(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for resume_at, kept in ((0, []), (2, [0, 1, 2]), (0, [])):  # a new run begins a new file, also at step 0
        file = MetricsFile(path, resume_at=resume_at)
        assert [line["step"] for line in read_metrics(path)] == kept
        for step in range(resume_at + (resume_at > 0), 5):
            file.write(step=step, tokens=10 * step)
            assert read_metrics(path)[-1] == {"step": step, "tokens": 10 * step}  # at once
        file.close()


@pytest.mark.parametrize(
    "line", ["1", "[]", "{}", '{"step": 1}', '{"step": 1, "tokens": NaN}', '{"step": "1", "tokens": 1}']
)
def test_lines_that_are_no_metrics(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match="a line must be an object with the numbers step and tokens; got"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_terminal_shows_a_bar() -> None:
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200, force_terminal=True), 10, 0) as display:
        display.show(4, 2.5, 1e-3, 12345.0, 1.0)
    for part in ("4/10", "loss 2.500", "12,345 tok/s", "lr 1.0e-03", "\r"):
        assert part in out.getvalue()
    assert "step 4/10" not in out.getvalue()  # which lines of a file begin with


def test_a_line_has_all_figures_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six steps of this start took 12 s, and four are left."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), 20, 10, log_every=6) as display:
        now += 12.0
        display.show(16, 2.5, 1e-3, 12345.0, 12.0)
    assert out.getvalue() == "step 16/20  loss 2.500  12,345 tok/s  lr 1.0e-03  8 s left\n"


@pytest.mark.parametrize(
    ("seconds", "evaluations", "shown"),
    [
        ([0.5] * 100, {}, [3, 30, 60, 90, 100]),  # lines 15 s apart
        ([0.5] * 100, {40: 600.0}, [3, 30, 60, 90, 100]),  # an evaluation does not make steps slow
        ([0.04] * 1000, {}, [3, 300, 600, 900, 1000]),
        ([2.0] * 20, {}, [3, 6, 12, 18, 20]),  # twice a power of ten times log_every, too
        ([0.25] * 130, {}, [3, 60, 120, 130]),
        ([90.0, *[0.5] * 99], {}, [3, 6, 30, 60, 90, 100]),  # the first step compiles
        ([0.5] * 20 + [9.0] * 40, {}, [3, 30, 33, 36, 39, 42, 45, 48, 51, 54, 57, 60]),  # a run that becomes slow
        ([60.0] * 11, {}, [3, 6, 9, 11]),
        ([0.5] * 30 + [2.0] * 60, {}, [3, 30, 60, 90]),  # lines a minute apart are not too far
        ([0.5] * 30 + [2.1] * 60, {}, [3, 30, 60, 66, 72, 78, 84, 90]),
    ],
)
def test_lines_are_at_even_steps(
    seconds: list[float], evaluations: dict[int, float], shown: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), len(seconds), 0, log_every=3) as display:
        since = 0.0
        for step, took in enumerate(seconds, 1):
            now += took + evaluations.get(step, 0.0)
            since += took
            if step % 3 == 0 or step == len(seconds):
                display.show(step, 2.5, 1e-3, 12345.0, since)
                since = 0.0
    assert [int(line.split("/")[0].removeprefix("step ")) for line in out.getvalue().splitlines()] == shown


def test_the_last_step_is_shown_however_soon_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), 3, 0) as display:
        for step in (1, 2, 3):
            display.show(step, 2.5, 1e-3, 12345.0, 0.0)
    assert [line.partition("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/3", "step 3/3"]


def test_tables_show_long_names_whole() -> None:
    out, name = io.StringIO(), "a_source_with_a_name_" * 5
    print_table(Console(file=out, width=60), [("source", "share"), (name, "100%")])
    assert "".join(line.split()[0] for line in out.getvalue().splitlines()[1:]) == name


def picture(lines: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the figure that the loss of a run is drawn in."""
    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (save(self, *args, **how), drawn.append(self))[0])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_loss(folder / "metrics.jsonl", folder / "loss.png", unigram_entropy=2.0)
    return drawn[0]


@pytest.mark.parametrize("count", [FEW, FEW + 1])
def test_the_picture_joins_evaluations_if_they_are_many(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test also that its legend hides none of them."""
    lines = [{"step": i, "tokens": 1000 * i, "validation": {"code": 4 - i / 9, "prose": 3.0}} for i in range(count)]
    figure = picture(lines, tmp_path, monkeypatch)
    (axes,) = figure.axes
    assert {line.get_linestyle() for line in axes.lines if "validation" in line.get_label()} == {
        "None" if count == FEW else "-"
    }
    (legend,) = figure.legends
    renderer = figure.canvas.get_renderer()
    assert not legend.get_window_extent(renderer).overlaps(axes.get_window_extent(renderer))


@pytest.mark.parametrize(
    ("tokens", "places", "unit"), [(999_000, 999, "thousand tokens"), (1_000_000, 1, "million tokens")]
)
def test_the_picture_has_the_name_of_its_run_and_a_unit_that_its_tokens_fill(
    tokens: int, places: float, unit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"step": 1, "tokens": tokens // 2, "loss": 5.0}]
    lines += [{"step": 2, "tokens": tokens, "loss": 4.0, "validation": {"code": 4.5}}]
    (axes,) = picture(lines, tmp_path, monkeypatch).axes
    assert (axes.get_title(), axes.get_xlabel()) == (tmp_path.name, unit)
    training, validation, _ = axes.lines
    assert list(training.get_xdata()) == [places / 2, places] and list(validation.get_xdata()) == [places]


@pytest.mark.parametrize("name", ["source{}", "a/rather/long/path/to/the/folder/of/texts/number{}"])
def test_a_legend_of_many_sources_leaves_the_picture_its_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heights, tops = [], []
    for sources in (1, 40):
        losses = {name.format(i): 3 + i / 50 for i in range(sources)}
        lines = [{"step": i, "tokens": 1000 * i, "validation": losses} for i in range(3)]
        figure = picture(lines, tmp_path, monkeypatch)
        renderer = figure.canvas.get_renderer()
        heights.append(figure.axes[0].get_window_extent(renderer).height / figure.dpi)
        legend = figure.legends[0].get_window_extent(renderer)
        tops.append((legend.x0, figure.bbox.width - legend.x1, legend.y0))
    assert heights[1] > 0.9 * heights[0] > 2
    assert min(min(room) for room in tops) >= 0, "the legend is cut off"


@pytest.mark.parametrize(
    ("value", "is_number"),
    [
        *((1, True), (-2.5, True), (2**63 - 1, True), (True, True), (math.inf, True)),
        *((2**63, False), (-(2**63), False), (10**400, False)),
        *(("1", False), (None, False), ([], False), (math.nan, False)),
    ],
)
def test_numbers_are_told_from_what_is_none(value: Any, is_number: bool) -> None:
    found = number(value)
    assert isinstance(found, float) and (found == float(value) if is_number else math.isnan(found))


def test_lines_of_a_log_are_read_whatever_it_begins_and_ends_with(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {"step": 1, "tokens": 2, "loss": math.nan, "validation": {"a": 1.5}, "validation_mean": 2}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(good).encode() + b"\n" + b"[" * 100_000 + b"\n{" + b'"step": 3, "to')
    (line,) = read_metrics(path)
    assert line["step"] == 1 and math.isnan(line["loss"])
    for key, wrong in (("loss", "x"), ("validation_mean", "x"), ("validation", [1]), ("validation", {"a": "x"})):
        path.write_text(json.dumps(good | {key: wrong}))
        with pytest.raises(ValueError, match=f"{key} must be "):
            read_metrics(path)
        assert read_metrics(path, losses=False)[0][key] == wrong
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"metrics\.jsonl is not text"):
        read_metrics(path)


def test_a_mean_is_by_tokens() -> None:
    assert weighted_mean({"a": (1.0, 30), "b": (4.0, 10), "c": (9.0, 0)}) == 1.75
    assert weighted_mean({}) == weighted_mean({"a": (0.0, 0)}) == 0.0


def test_every_number_of_a_line_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Any] = []

    class Writer:
        def __init__(self, folder: str, *, purge_step: int) -> None:
            events.append((folder, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            events.append((name, value, step))

        def close(self) -> None:
            events.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    file = MetricsFile(tmp_path / "metrics.jsonl", resume_at=7, tensorboard=True)
    file.write(step=8, tokens=90, loss=2.5, head_loss=[1.5, 2], validation={"a": {"b": 3}}, name="text", spike=True)
    file.close()
    assert events[0] == (str(tmp_path / "events"), 8) and events[-1] == "closed"
    assert events[1:-1] == [
        *(("loss", 2.5, 8), ("head_loss/0", 1.5, 8), ("head_loss/1", 2.0, 8)),
        *(("validation/a/b", 3.0, 8), ("spike", 1.0, 8)),
    ]


def test_no_file_of_a_run_stays_open(tmp_path: Path) -> None:
    trainer, _ = trainer_of(settings(steps=2, save_every=1), run=tmp_path)
    trainer.fit()
    opened = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert not [name for name in opened if name.startswith(str(tmp_path))]


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes(platform: str, unit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(metrics.resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=5))
    assert peak_memory_bytes(torch.device("cpu")) == 5 * unit
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7)
    assert peak_memory_bytes(torch.device("cuda")) == 7


def test_the_picture_shows_losses_over_million_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = [
        {"step": 1, "tokens": 1_000_000, "loss": 3.0},
        {"step": 1, "tokens": 1_500_000, "validation": {"b": 2.0, "a": 2.5}},
        {"step": 2, "tokens": 2_000_000, "loss": 2.0},
        {"step": 2, "tokens": 2_500_000, "validation": {"a": 1.5}},
    ]
    (axes,) = picture(lines, tmp_path, monkeypatch).axes
    drawn = {line.get_label(): [list(map(float, xy)) for xy in line.get_data()] for line in axes.lines}
    assert drawn["training"] == [[1.0, 2.0], [3.0, 2.0]]
    assert drawn["validation: a"] == [[1.5, 2.5], [2.5, 1.5]] and drawn["validation: b"] == [[1.5], [2.0]]
    assert drawn["unigram entropy of held-out text"][1] == [2.0, 2.0] and len(drawn) == 4
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("million tokens", "loss (nats per token)")


def test_what_is_said_is_printed_as_it_is() -> None:
    out = io.StringIO()
    say(Console(file=out, width=10, force_terminal=True), "a [bold]line[/bold] of 12345 words, longer than it is wide")
    assert out.getvalue() == "a [bold]line[/bold] of 12345 words, longer than it is wide\n"
    out = io.StringIO()
    print_table(Console(file=out, width=80), [("a", "[red]b"), ("longer", "c")])
    assert [line.split() for line in out.getvalue().splitlines()] == [["a", "[red]b"], ["longer", "c"]]


def test_when_lines_and_dots_are_shown() -> None:
    assert (PLAIN_SECONDS, FEW) == (15.0, 25)
    assert weighted_mean({"a": (3.0, 1)}) == 3.0


@pytest.mark.parametrize(("sources", "columns", "rows"), [(1, 1, 3), (5, 1, 7), (6, 2, 4), (40, 2, 21)])
def test_the_picture_is_as_wide_as_a_page_and_has_a_row_for_each_pair_of_sources(
    sources: int, columns: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[dict[str, Any]] = [{"step": 1, "tokens": 1000, "loss": 3.0}]
    lines += [{"step": 1, "tokens": 1000, "validation": {f"s{i}": 3.0 for i in range(sources)}}]
    figure = picture(lines, tmp_path, monkeypatch)
    (legend,) = figure.legends
    assert figure.get_size_inches().tolist() == pytest.approx([8, 3.9 + 0.21 * rows])
    assert legend._ncols == columns and not legend.get_frame_on()


def test_a_console_follows_stdout_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guard a console once, and not at all one of a command, whose stdout is guarded."""
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", first)
    console = Console()
    with outliving(console):
        guarded = console.file
        with outliving(console):
            say(console, "one")
            assert console.file is guarded is not first
    monkeypatch.setattr(sys, "stdout", second)
    say(console, "two")
    assert (first.getvalue(), second.getvalue()) == ("one\n", "two\n")
