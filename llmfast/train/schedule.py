"""Learning rates as a pure function of the step."""

import math


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
