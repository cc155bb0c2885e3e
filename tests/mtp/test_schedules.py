"""Head weights over training."""

import itertools
from typing import Any

import pytest

from llmfast.mtp import constant_weights, head_weights, linear_weights, staged_weights
from llmfast.mtp.schedules import SCHEDULES


def test_constant() -> None:
    assert constant_weights(1, 7.0) == constant_weights(1, 7.0, mean=True) == [1.0]
    assert constant_weights(3, 0.5) == [1.0, 0.5, 0.5]
    assert constant_weights(4, 0.3, mean=True) == pytest.approx([1.0, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(
    ("schedule", "given"),
    [
        (lambda **given: constant_weights(2, **given), {"weight": -0.5}),
        (lambda **given: linear_weights(0.5, 2, **{"weight": 0.5, "final": 0.5} | given), {"weight": -0.5}),
        (lambda **given: linear_weights(0.5, 2, **{"weight": 0.5, "final": 0.5} | given), {"final": -0.5}),
        (lambda **given: staged_weights(0.5, 2, **given), {"weight": -0.5}),
    ],
)
def test_no_weight_is_negative(schedule: Any, given: dict[str, float]) -> None:
    (name,) = given
    with pytest.raises(ValueError, match=f"{name} must not be negative; got -0.5"):
        schedule(**given)
    schedule(**{name: 0.0})


@pytest.mark.parametrize("K", [0, -1])
def test_there_is_at_least_one_head(K: int) -> None:
    for call in (
        lambda: constant_weights(K, 0.5),
        lambda: linear_weights(0.5, K, 0.5, 0.5),
        lambda: staged_weights(0.5, K),
        lambda: head_weights(0.5, K, schedule="constant", weight=0.5),
    ):
        with pytest.raises(ValueError, match=f"K must be at least 1; got {K}"):
            call()


def test_linear() -> None:
    assert linear_weights(0.0, 2, 0.3, 0.1) == pytest.approx([1.0, 0.3])
    assert linear_weights(0.5, 3, 0.3, 0.1, mean=True) == pytest.approx([1.0, 0.1, 0.1])
    assert linear_weights(1.0, 2, 0.3, 0.1) == pytest.approx([1.0, 0.1])


@pytest.mark.parametrize(
    ("fraction", "weights"),
    [
        (0.0, [1.0, 0.5, 0.25]),
        (1 / 6, [1.0, 0.5, 0.125]),
        (1 / 3, [1.0, 0.5, 0.0]),
        (1 / 2, [1.0, 0.25, 0.0]),
        (2 / 3, [1.0, 0.0, 0.0]),
        (1.0, [1.0, 0.0, 0.0]),
    ],
)
def test_staged_is_modded_nanogpts(fraction: float, weights: list[float]) -> None:
    assert staged_weights(fraction, 3) == pytest.approx(weights, abs=1e-12)
    assert staged_weights(fraction, 1) == [1.0]


def test_staged_has_no_jumps() -> None:
    steps = [staged_weights(i / 1000, 4) for i in range(1001)]
    assert max(abs(a - b) for one, two in itertools.pairwise(steps) for a, b in zip(one, two)) < 3e-3


def test_by_name() -> None:
    """Every argument has another value than its default, and reaches the schedule."""
    assert head_weights(0.5, 3, schedule="constant", weight=0.3) == [1.0, 0.3, 0.3]
    assert head_weights(0.5, 3, schedule="constant", weight=0.3, mean=True) == [1.0, 0.15, 0.15]
    assert head_weights(0.25, 3, schedule="linear", weight=0.3, final=0.1) == pytest.approx([1.0, 0.25, 0.25])
    assert head_weights(0.25, 3, schedule="linear", weight=0.3, final=0.1, mean=True) == pytest.approx(
        [1.0, 0.125, 0.125]
    )
    assert head_weights(0.5, 3, schedule="linear", weight=0.3) == pytest.approx([1.0, 0.15, 0.15])
    assert head_weights(0.25, 2, schedule="staged", weight=0.3) == pytest.approx([1.0, 0.15])
    assert head_weights(0.0, 3, schedule="staged", weight=0.3) == pytest.approx([1.0, 0.3, 0.09])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schedule": "cosine"}, "schedule must be one of 'constant', 'linear', 'staged'; got 'cosine'"),
        ({"fraction": 1.5}, r"fraction must be in \[0, 1\]; got 1.5"),
        ({"K": 0}, "K must be at least 1; got 0"),
        ({"weight": -0.01}, "weight must not be negative; got -0.01"),
        ({"final": -0.01}, "final must not be negative; got -0.01"),
    ],
)
def test_refuses(changed: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"fraction": 0.5, "K": 2, "schedule": "linear", "weight": 1.0, "final": 0.0}
    with pytest.raises(ValueError, match=message):
        head_weights(**(given | changed))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_every_schedule_ends_with_the_run(schedule: str, fraction: float) -> None:
    with pytest.raises(ValueError, match=rf"^fraction must be in \[0, 1\]; got {fraction}$"):
        head_weights(fraction, 3, schedule=schedule, weight=0.5)
