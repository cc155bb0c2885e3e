from itertools import pairwise

import pytest

from llmfast.train.schedule import lr_at


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_warms_up_and_comes_down(schedule: str, last: float) -> None:
    rates = [lr_at(i, lr=2.0, steps=50, warmup_steps=10, schedule=schedule, final_lr=0.1) for i in range(60)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[49:] == pytest.approx([2.0 * last] * 11)


def test_no_warm_up() -> None:
    assert lr_at(0, lr=1.0, steps=2, warmup_steps=0, schedule="linear", final_lr=0.0) == 0.5
