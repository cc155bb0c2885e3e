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
