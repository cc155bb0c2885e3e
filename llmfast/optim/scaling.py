"""Rules for learning rate and batch size: how the rate follows the batch, and the best ones for a budget of FLOPs."""

import math
from collections.abc import Callable
from typing import Literal

from llmfast._checks import expect

ScalingRule = Literal["linear", "sqrt"]
RULES: dict[ScalingRule, Callable[[float], float]] = {"linear": lambda ratio: ratio, "sqrt": math.sqrt}
"""Factor on the learning rate for a batch that is `ratio` times as large, by the name of the rule."""


def scale_lr(lr: float, batch: float, base_batch: float, rule: ScalingRule = "linear") -> float:
    """Scale a learning rate `lr` tuned for batches of `base_batch` to batches of `batch`.

    "linear" is lr * batch / base_batch, for SGD with and without momentum (Goyal et al. 2017, arXiv:1706.02677, with
    a warmup): k small steps then move about as far as one step on their mean gradient. "sqrt" is lr * (batch /
    base_batch)^0.5, for Adam and RMSProp (Malladi et al. 2022, arXiv:2205.10287). The size of their steps is lr for any
    gradient, so it is the noise in them that has to keep its size.

    Args:
        lr: The tuned learning rate.
        batch, base_batch: Sizes in the same unit, samples or tokens.
        rule: "linear" or "sqrt".

    Raises:
        ValueError: A size or the learning rate is not above 0, or the rule is unknown.
    """
    for name, value in (("lr", lr), ("batch", batch), ("base_batch", base_batch)):
        expect(value > 0, f"{name} must be greater than 0; got {value}")
    expect(rule in RULES, f"rule must be one of {', '.join(map(repr, RULES))}; got {rule!r}")
    return lr * RULES[rule](batch / base_batch)


def optimal_batch(flops: float) -> float:
    """Compute the best batch, in tokens, for a training run of so many FLOPs: 0.2920 C^0.3271.

    By DeepSeek LLM (Bi et al. 2024, arXiv:2401.02954, eq. 1), for AdamW. Values in a wide range around it are nearly as
    good.

    Raises:
        ValueError: `flops` is not a finite number above 0.
    """
    expect(0 < flops < math.inf, f"flops must be a finite number above 0; got {flops:g}")
    return float(0.2920 * flops**0.3271)


def optimal_lr(flops: float) -> float:
    """Compute the best peak learning rate at `optimal_batch`: 0.3118 C^-0.1250, by the same equation.

    Raises:
        ValueError: `flops` is not a finite number above 0.
    """
    expect(0 < flops < math.inf, f"flops must be a finite number above 0; got {flops:g}")
    return float(0.3118 * flops**-0.1250)
