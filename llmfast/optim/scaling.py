"""Scaling of the learning rate with the batch size."""

import math
from typing import Literal

from llmfast._checks import expect


def scale_lr(lr: float, batch: float, base_batch: float, rule: Literal["linear", "sqrt"] = "linear") -> float:
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
    expect(rule in ("linear", "sqrt"), f'rule must be "linear" or "sqrt"; got {rule!r}')
    ratio = batch / base_batch
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))
