"""Step inside backward: each parameter is updated as soon as its gradient is available, which is then freed.

    python examples/optimizer_in_backward.py

The losses equal those of stepping after backward. Because all gradients never exist at once, accumulation over
micro-batches and clipping to a global norm are not possible.
"""

import torch
from tiny_gpt import TinyGPT, batches
from torch import Tensor

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW, optimizer_in_backward


def train(steps: int = 60, rows: int = 16) -> tuple[list[float], int]:
    """Train; return the losses and the peak of the bytes of gradients."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TinyGPT().to(device)
    most = 0

    def look(_: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(look)  # only for the report; runs before the hook that steps and frees
    optimizer = FusedAdamW(model.parameters(), lr=3e-3)  # llmfast
    optimizer_in_backward(model, optimizer)  # llmfast
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    data = batches(rows, device)
    losses = []
    for _ in range(steps):
        tokens, targets = next(data)
        loss = linear_cross_entropy(model(tokens), model.head.weight, targets)  # llmfast
        loss.backward()  # also steps
        optimizer.step()  # does nothing more, but schedulers expect it
        schedule.step()
        losses.append(loss.item())
    return losses, most


if __name__ == "__main__":
    losses, most = train()
    everything = sum(p.nbytes for p in TinyGPT().parameters())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    print(f"peak bytes of gradients: {most:,} of {everything:,}")
