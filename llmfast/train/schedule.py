"""Learning rates and head weights as pure functions of the step."""

import math
from typing import Any

from llmfast.mtp import head_weights
from llmfast.optim.scaling import scale_lr
from llmfast.train.config import Config


def lr_at(
    step: int,  # of this update, counted from 0
    *,
    lr: float,
    steps: int,
    warmup_steps: int,
    schedule: str,  # "cosine", "linear", "wsd" or "constant"
    final_lr: float,  # share of lr reached at the last step
    decay_share: float = 0.2,  # of the steps after warm-up, for "wsd"
) -> float:
    """Compute the learning rate: linear warm-up to `lr`, then down to `final_lr * lr` along the schedule.

    "wsd" (warmup, stable, decay: Hu et al. 2024, arXiv:2404.06395) stays at `lr` and falls at the end.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps + 1) / max(1, steps - warmup_steps))
    remaining = {
        "wsd": min(1.0, (1.0 - progress) / decay_share),
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 + 0.5 * math.cos(math.pi * progress),
    }[schedule]
    return lr * (final_lr + (1.0 - final_lr) * remaining) if schedule != "constant" else lr


def highest_lr(config: Config) -> float:
    """Compute the learning rate after warm-up, for the configured batch size."""
    o = config.optimizer
    if o.lr_scaling == "none" or o.lr == 0:
        return o.lr
    rule: Any = o.lr_scaling
    return scale_lr(o.lr, config.train.batch_size, o.base_batch_size, rule)


def lr_of_step(step: int, config: Config) -> float:
    """Compute the learning rate of update `step`, counted from 0."""
    o, lr = config.optimizer, highest_lr(config)
    shape: dict[str, Any] = {"schedule": o.schedule, "final_lr": o.final_lr, "decay_share": o.decay_share}
    return lr_at(step, lr=lr, steps=config.train.steps, warmup_steps=o.warmup_steps, **shape)


def described(config: Config) -> str:
    """Describe what the schedule does to a learning rate, as in "50 steps of warm-up, then ..."; "" if nothing."""
    o = config.optimizer
    scale = highest_lr(config) / o.lr if o.lr else 1.0
    parts = [f"times {scale:g} for the batch size"] if scale != 1.0 else []
    if o.warmup_steps:
        parts.append(f"{o.warmup_steps} steps of warm-up")
    if o.schedule != "constant":
        parts.append(f"{o.schedule} to {100 * o.final_lr:g} % at step {config.train.steps}")
    return ", then ".join(parts)


def head_weights_at(step: int, K: int, config: Config) -> list[float]:
    """Compute the weights of K heads in update `step`, counted from 0; see `llmfast.mtp.head_weights`."""
    kind, t = config.model.mtp, config.train
    return head_weights(
        step / t.steps,
        K,
        schedule=t.mtp_schedule if t.mtp_schedule != "auto" else "staged" if kind == "shared" else "constant",
        weight=t.mtp_weight or {"sequential": 0.3, "shared": 0.5}.get(kind, 1.0),
        final=t.mtp_final_weight,
        mean=kind == "sequential" if t.mtp_mean == "auto" else t.mtp_mean == "yes",
    )
