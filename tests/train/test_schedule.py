"""Learning rates and head weights, step by step."""

import math
from itertools import pairwise
from typing import Any

import pytest

from llmfast.models.decoder import MTP
from llmfast.train.config import Config, load_config
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


def test_weights_of_the_heads_where_settings_say_nothing() -> None:
    """Each kind has the schedule and the weights of the paper that it is from."""
    config = Config()
    config.train.steps = 8
    wanted: dict[MTP, list[list[float]]] = {
        "parallel": [[1, 1, 1]] * 3,
        "sequential": [[1, 0.15, 0.15]] * 3,
        "shared": [[1, 0.5, 0.25], [1, 0.25, 0], [1, 0, 0]],
    }
    for kind, weights in wanted.items():
        config.model.mtp = kind
        for step, wants in zip((0, 4, 6), weights):
            assert head_weights_at(step, 3, config) == pytest.approx(wants), (kind, step)
    for kind in wanted:  # and where they say one thing alone
        config.model.mtp, config.train.mtp_weight = kind, 0.4
        assert head_weights_at(0, 2, config) == pytest.approx([1, 0.4])
        config.train.mtp_weight, config.train.mtp_schedule = 0.0, "constant"
        others = head_weights_at(7, 3, config)[1:]
        assert others == pytest.approx({"parallel": [1, 1], "sequential": [0.15] * 2, "shared": [0.5] * 2}[kind])
        config.train.mtp_schedule = "linear"  # to 0.1
        assert head_weights_at(4, 2, config)[1] == pytest.approx({"parallel": 0.55, "sequential": 0.2}.get(kind, 0.3))
        config.train.mtp_schedule = "auto"


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("scaling", ["none", "linear", "sqrt"])
def test_a_rate_of_zero_is_zero_throughout(schedule: str, scaling: str) -> None:
    config = Config()
    o, t = config.optimizer, config.train
    o.lr, o.base_batch_size, o.warmup_steps, t.batch_size, t.steps = 0.0, 4, 2, 16, 6
    o.schedule, o.lr_scaling = schedule, scaling  # type: ignore[assignment]
    assert highest_lr(config) == 0 and [lr_of_step(step, config) for step in range(8)] == [0] * 8
    assert "for the batch size" not in described(config)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_a_run_of_warm_up_alone_ends_and_goes_on(schedule: str) -> None:
    """Steps may be as many as those of warm-up, or fewer."""
    for steps in (2, 3, 4):
        given: dict[str, Any] = {"lr": 6.0, "steps": steps, "warmup_steps": 3, "schedule": schedule, "final_lr": 0.5}
        assert [lr_at(step, **given) for step in range(3)] == pytest.approx([2, 4, 6])
        assert lr_at(3, **given) == lr_at(9, **given) == pytest.approx(3)


def test_wsd_falls_in_the_last_fifth_unless_told() -> None:
    given: dict[str, Any] = {"lr": 1.0, "steps": 10, "warmup_steps": 0, "schedule": "wsd", "final_lr": 0.0}
    assert [lr_at(step, **given) for step in (6, 7, 8, 9)] == pytest.approx([1, 1, 0.5, 0])


@pytest.mark.parametrize(
    ("scaled", "times"),
    [("", ""), ("=1", "times 2 for the batch size"), ("=16", "times 0.5 for the batch size"), ("=4", "")],
)
@pytest.mark.parametrize("warmup", [0, 1, 50])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_a_schedule_in_words_has_each_part_that_changes_a_rate(
    scaled: str, times: str, warmup: int, schedule: str
) -> None:
    """The rate is for one row, for sixteen, or for the four that there are."""
    more = ["optimizer.lr_scaling=sqrt", f"optimizer.base_batch_size{scaled}"] if scaled else []
    config = load_config(
        None,
        [
            *("train.batch_size=4", "train.steps=99", f"optimizer.schedule={schedule}", "optimizer.final_lr=0.25"),
            *(f"optimizer.warmup_steps={warmup}", *more),
        ],
    )
    parts = [times, f"{warmup} steps of warm-up" * bool(warmup)]
    parts.append(f"{schedule} to 25 % at step 99" if schedule != "constant" else "")
    assert described(config) == ", then ".join(filter(None, parts))
