"""Learning rates and head weights as pure functions of the step."""

import math

from llmfast.mtp import head_weights
from llmfast.train.config import Config


def lr_at(
    step: int,  # of this update, counted from 0
    *,
    lr: float,
    steps: int,
    warmup_steps: int,
    schedule: str,  # "cosine", "linear" or "constant"
    final_lr: float,  # share of lr reached at the last step
) -> float:
    """Linear warm-up to `lr`, then down to `final_lr * lr` along the schedule."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps + 1) / max(1, steps - warmup_steps))
    remaining = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * progress),
    }[schedule]
    return lr * (final_lr + (1.0 - final_lr) * remaining) if schedule != "constant" else lr


def head_weights_at(step: int, K: int, config: Config) -> list[float]:
    """What each of K heads counts in update `step`, counted from 0; see `llmfast.mtp.head_weights`."""
    kind, t = config.model.mtp, config.train
    return head_weights(
        step / t.steps,
        K,
        schedule=t.mtp_schedule if t.mtp_schedule != "auto" else "staged" if kind == "shared" else "constant",
        weight=t.mtp_weight or {"sequential": 0.3, "shared": 0.5}.get(kind, 1.0),
        final=t.mtp_final_weight,
        mean=kind == "sequential" if t.mtp_mean == "auto" else t.mtp_mean == "yes",
    )
