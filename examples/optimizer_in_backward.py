"""Stepping inside backward: each parameter as soon as its gradient is there, and the gradient is freed at once.

    python examples/optimizer_in_backward.py

The losses are those of stepping after backward. What goes with it: all gradients at once, and with them accumulation
over micro-batches and clipping to a global norm.
"""

import torch
from tiny_gpt import TinyGPT, batches
from torch import Tensor

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW, optimizer_in_backward


def train(steps: int = 60, rows: int = 16) -> tuple[list[float], int]:
    """The losses, and the most bytes of gradients that there were at a time."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TinyGPT().to(device)
    most = 0

    def look(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)  # for the report: before the one that steps and frees
    optimizer = FusedAdamW(model.parameters(), lr=3e-3)  # llmfast
    optimizer_in_backward(model, optimizer)  # llmfast
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    data = batches(rows, device)
    losses = []
    for _ in range(steps):
        tokens, targets = next(data)
        loss = linear_cross_entropy(model(tokens), model.head.weight, targets)  # llmfast
        loss.backward()  # steps, too
        optimizer.step()  # nothing is left for it, but schedules expect it
        schedule.step()
        losses.append(loss.item())
    return losses, most


if __name__ == "__main__":
    losses, most = train()
    everything = sum(p.nbytes for p in TinyGPT().parameters())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"bytes of gradients at a time: {most:,} at most, of {everything:,}")
