"""What is shown while a run goes on."""

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
        for step in (done, done + 50):
            display.show(step, 2.5, 1e-3, 12345.0)
            now += 2 * (PLAIN_SECONDS + 1)
            display.show(step + 50, 2.25, 1e-3, 12345.0)
    first, second, *_, last = out.getvalue().splitlines()
    assert first == f"step {done}/1000  loss 2.500  12,345 tok/s  lr 1.0e-03  0 s left"
    assert second == f"step {done + 50}/1000  loss 2.250  12,345 tok/s  lr 1.0e-03  {(950 - done) * 32 / 50:.0f} s left"
    assert last.endswith(f"  {(900 - done) * 64 / 100:.0f} s left")
