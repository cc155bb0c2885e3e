"""Train with torch.optim.AdamW, load its checkpoint into FusedAdamW, and continue.

    python examples/resume_from_torch.py

State names, shapes and parameter groups are the same as torch's. The opposite direction takes the same two calls.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tiny_gpt import TinyGPT, batches
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(
    model: TinyGPT,
    optimizer: torch.optim.Optimizer,
    schedule: CosineAnnealingLR,
    data: Iterator[tuple[Tensor, Tensor]],
    steps: int,
) -> list[float]:
    losses = []
    for _ in range(steps):
        tokens, targets = next(data)
        loss = linear_cross_entropy(model(tokens), model.head.weight, targets)  # llmfast
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def train(steps: int = 60, rows: int = 16) -> list[float]:
    half, data = steps // 2, batches(rows, DEVICE)
    torch.manual_seed(0)
    model = TinyGPT().to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = CosineAnnealingLR(optimizer, steps)
    losses = run(model, optimizer, schedule, data, half)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pt"
        parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        saved = torch.load(file, map_location=DEVICE, weights_only=True)

    model = TinyGPT().to(DEVICE)  # as in a new process
    optimizer = FusedAdamW(model.parameters(), lr=3e-3)  # llmfast
    schedule = CosineAnnealingLR(optimizer, steps)
    for name, part in {"model": model, "optimizer": optimizer, "schedule": schedule}.items():
        part.load_state_dict(saved[name])
    return losses + run(model, optimizer, schedule, data, steps - half)


if __name__ == "__main__":
    losses = train()
    for step in range(0, len(losses), 10):
        print(f"step {step}: loss {losses[step]:.4f}")
