"""How a learning rate follows the batch size."""

import math
from typing import Literal

from llmfast._checks import expect


def scale_lr(lr: float, batch: float, base_batch: float, rule: Literal["linear", "sqrt"] = "linear") -> float:
    """The learning rate for batches of `batch`, where `lr` is right for batches of `base_batch`.

    "linear", lr * batch / base_batch, is for SGD with and without momentum (Goyal et al. 2017, arXiv:1706.02677, with
    a warmup): k small steps and one step on their mean gradient then go about as far. "sqrt", lr * (batch /
    base_batch)^0.5, is for Adam and RMSProp (Malladi et al. 2022, arXiv:2205.10287), whose steps have the size of lr
    whatever the gradient's, so that the noise in them is what has to keep its size.

    Args:
        lr: the learning rate that was tuned.
        batch, base_batch: sizes in the same unit, samples or tokens.

    Raises:
        ValueError: a size or the learning rate is not above 0, or the rule is another.
    """
    for name, value in (("lr", lr), ("batch", batch), ("base_batch", base_batch)):
        expect(value > 0, f"{name} must be greater than 0; got {value}")
    expect(rule in ("linear", "sqrt"), f'rule must be "linear" or "sqrt"; got {rule!r}')
    ratio = batch / base_batch
    return lr * (ratio if rule == "linear" else math.sqrt(ratio))
