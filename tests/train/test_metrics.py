"""Tests of what is shown during a run."""

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from llmfast.train.metrics import FEW, PLAIN_SECONDS, ProgressDisplay, plot_loss, print_table


@pytest.mark.parametrize("done", [0, 900])
def test_the_time_left_is_by_the_steps_of_this_start(done: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A resumed run has not taken its earlier steps in the time since it was started again."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), 1000, done) as display:
        for steps in (0, 50, 100):
            display.show(done + steps, 2.5, 1e-3, 12345.0)
            now += 2 * PLAIN_SECONDS
    assert out.getvalue().splitlines() == [
        f"step {done + steps}/1000  loss 2.500  12,345 tok/s  lr 1.0e-03  {left:.0f} s left"
        for steps, left in ((0, 0), (50, (950 - done) * 30 / 50), (100, (900 - done) * 60 / 100))
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        ([0.5] * 100, [3, 30, 60, 90, 100]),  # lines 15 s apart
        ([90.0, *[0.5] * 99], [3, 6, 30, 60, 90, 100]),  # the first step compiles
        ([0.5] * 20 + [9.0] * 40, [3, 30, 33, 36, 39, 42, 45, 48, 51, 54, 57, 60]),  # a run that becomes slow
        ([60.0] * 11, [3, 6, 9, 11]),
    ],
)
def test_lines_are_at_even_steps(seconds: list[float], shown: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), len(seconds), 0, log_every=3) as display:
        for step, took in enumerate(seconds, 1):
            now += took
            if step % 3 == 0 or step == len(seconds):
                display.show(step, 2.5, 1e-3, 12345.0)
    assert [int(line.split("/")[0].removeprefix("step ")) for line in out.getvalue().splitlines()] == shown


def test_the_last_step_is_shown_however_soon_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), 3, 0) as display:
        for step in (1, 2, 3):
            display.show(step, 2.5, 1e-3, 12345.0)
    assert [line.partition("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/3", "step 3/3"]


def test_tables_show_long_names_whole() -> None:
    out, name = io.StringIO(), "a_source_with_a_name_" * 5
    print_table(Console(file=out, width=60), [("source", "share"), (name, "100%")])
    assert "".join(line.split()[0] for line in out.getvalue().splitlines()[1:]) == name


@pytest.mark.parametrize("count", [FEW, FEW + 1])
def test_the_picture_joins_evaluations_if_they_are_many(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Test also that its legend hides none of them."""
    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **how: (save(self, *args, **how), drawn.append(self))[0])
    lines = [{"step": i, "tokens": 1000 * i, "validation": {"code": 4 - i / 9, "prose": 3.0}} for i in range(count)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", unigram_entropy=2.0)
    (axes,) = drawn[0].axes
    assert {line.get_linestyle() for line in axes.lines if "validation" in line.get_label()} == {
        "None" if count == FEW else "-"
    }
    (legend,) = drawn[0].legends
    renderer = drawn[0].canvas.get_renderer()
    assert not legend.get_window_extent(renderer).overlaps(axes.get_window_extent(renderer))
