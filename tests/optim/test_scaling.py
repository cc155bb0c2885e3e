"""Tests of the laws of learning rate and batch."""

import math

import pytest

from llmfast.optim import scale_lr
from llmfast.optim.scaling import optimal_batch, optimal_lr


def test_scaling_a_learning_rate() -> None:
    assert scale_lr(0.1, 1024, 256) == pytest.approx(0.4)
    assert scale_lr(1e-3, 1024, 256, rule="sqrt") == pytest.approx(2e-3)
    for bad, message in (((0.0, 1, 1), "lr must"), ((1.0, 0, 1), "batch must"), ((1.0, 1, -1), "base_batch must")):
        with pytest.raises(ValueError, match=message):
            scale_lr(*bad)
    with pytest.raises(ValueError, match="rule must"):
        scale_lr(1.0, 1, 1, rule="cubic")  # type: ignore[arg-type]


def test_the_best_batch_and_rate_are_those_of_the_published_runs() -> None:
    """DeepSeek LLM trained 7 and 67 B parameters on 2 T tokens: 2304 and 4608 rows of 4096, at 4.2e-4 and 3.2e-4."""
    for params, rows, lr in ((7e9, 2304, 4.2e-4), (67e9, 4608, 3.2e-4)):
        flops = 6 * params * 2e12
        assert optimal_batch(flops) == pytest.approx(rows * 4096, rel=0.05)
        assert optimal_lr(flops) == pytest.approx(lr, rel=0.02)


def test_laws_refuse_what_is_no_budget() -> None:
    for law in (optimal_batch, optimal_lr):
        for flops in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="flops must be a finite number above 0"):
                law(flops)


def test_the_laws_are_the_papers_to_the_last_digit() -> None:
    """Equation 1: 0.2920 C^0.3271 tokens, at 0.3118 C^-0.1250."""
    for flops in (1.0, 1e10, 1e24):
        assert optimal_batch(flops) == pytest.approx(0.2920 * flops**0.3271, rel=1e-12)
        assert optimal_lr(flops) == pytest.approx(0.3118 * flops**-0.1250, rel=1e-12)


@pytest.mark.parametrize("name", ["lr", "batch", "base_batch"])
def test_nothing_is_scaled_from_or_to_zero(name: str) -> None:
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=rf"^{name} must be greater than 0; got {wrong}"):
            scale_lr(**{"lr": 1.0, "batch": 2.0, "base_batch": 4.0, name: wrong})
    assert scale_lr(3.0, 2.0, 8.0) == 0.75 and scale_lr(3.0, 2.0, 8.0, "sqrt") == 1.5
