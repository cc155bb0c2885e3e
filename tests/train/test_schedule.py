"""Learning rates and head weights, step by step."""

import math
from itertools import pairwise
from typing import Any

import pytest

from llmfast.models.decoder import MTP
from llmfast.train.config import Config
from llmfast.train.schedule import described, head_weights_at, highest_lr, lr_at, lr_of_step


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_warms_up_and_comes_down(schedule: str, last: float) -> None:
    rates = [lr_at(i, lr=2.0, steps=50, warmup_steps=10, schedule=schedule, final_lr=0.1) for i in range(60)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert all(a >= b for a, b in pairwise(rates[9:]))
    assert rates[49:] == pytest.approx([2.0 * last] * 11)


def test_no_warm_up() -> None:
    assert lr_at(0, lr=1.0, steps=2, warmup_steps=0, schedule="linear", final_lr=0.0) == 0.5


@pytest.mark.parametrize(
    ("schedule", "remaining"),
    [
        ("linear", [1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.5 + 0.5 * math.cos(math.pi * share) for share in (0, 0.25, 0.5, 0.75, 1)]),
        ("wsd", [1, 1, 1, 0.625, 0]),
        ("constant", [1] * 5),
    ],
)
def test_the_rate_at_quarters_of_the_steps_after_warm_up(schedule: str, remaining: list[float]) -> None:
    given: dict[str, Any] = {"lr": 2.0, "steps": 44, "warmup_steps": 4, "schedule": schedule}
    rates = [lr_at(step, **given, final_lr=0.25, decay_share=0.4) for step in (3, 13, 23, 33, 43)]
    assert rates == pytest.approx([2.0 * (0.25 + 0.75 * share) for share in remaining])


def test_settings_reach_the_schedule() -> None:
    """Each has another value than its default."""
    config = Config()
    o, t = config.optimizer, config.train
    o.lr, o.warmup_steps, o.schedule, o.final_lr, o.decay_share = 3e-3, 5, "wsd", 0.3, 0.5
    o.lr_scaling, o.base_batch_size, t.batch_size, t.steps = "sqrt", 4, 16, 25
    given: dict[str, Any] = {"lr": 6e-3, "steps": 25, "warmup_steps": 5, "schedule": "wsd"}
    for step in range(25):
        assert lr_of_step(step, config) == pytest.approx(lr_at(step, **given, final_lr=0.3, decay_share=0.5))
    assert highest_lr(config) == pytest.approx(6e-3)
    assert described(config) == "times 2 for the batch size, then 5 steps of warm-up, then wsd to 30 % at step 25"
    o.lr_scaling, o.warmup_steps, o.schedule = "linear", 0, "constant"
    assert highest_lr(config) == pytest.approx(12e-3)
    assert described(config) == "times 4 for the batch size"
    o.lr_scaling = "none"
    assert highest_lr(config) == 3e-3 and described(config) == ""


@pytest.mark.parametrize("kind", ["parallel", "sequential", "shared"])
def test_settings_reach_the_weights_of_the_heads(kind: MTP) -> None:
    config = Config()
    config.model.mtp, t = kind, config.train
    t.steps, t.mtp_schedule, t.mtp_weight, t.mtp_final_weight, t.mtp_mean = 8, "linear", 0.4, 0.2, "yes"
    assert head_weights_at(2, 3, config) == pytest.approx([1, 0.175, 0.175])
    t.mtp_mean = "no"
    assert head_weights_at(2, 3, config) == pytest.approx([1, 0.35, 0.35])
    t.mtp_schedule = "staged"
    assert head_weights_at(2, 2, config) == pytest.approx([1, 0.2])
    t.mtp_schedule = "constant"
    assert head_weights_at(2, 3, config) == [1, 0.4, 0.4]
