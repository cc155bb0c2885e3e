"""Tests of what is shown during a run."""

import io
import time

import pytest
from rich.console import Console

from llmfast.train.metrics import PLAIN_SECONDS, ProgressDisplay


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


def test_the_last_step_is_shown_however_soon_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    out = io.StringIO()
    with ProgressDisplay(Console(file=out, width=200), 3, 0) as display:
        for step in (1, 2, 3):
            display.show(step, 2.5, 1e-3, 12345.0)
    assert [line.partition("  ")[0] for line in out.getvalue().splitlines()] == ["step 1/3", "step 3/3"]
