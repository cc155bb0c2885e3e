"""float16 autocast with torch's GradScaler: the optimizer's step unscales, clips, and skips non-finite gradients.

    python examples/grad_scaler.py

`scaler.unscale_(optimizer)` before clipping is not needed: the scale and the overflow flag stay on the device, where
`optimizer.step` reads them. The initial scale is much too high on purpose, so that the first steps overflow.
"""

import torch
from tiny_gpt import TinyGPT, batches

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW


def train(steps: int = 60, rows: int = 16, init_scale: float = 2.0**20) -> tuple[list[float], list[bool]]:
    """Return the losses and whether each step was skipped, which leaves parameters, moments and counters unchanged."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TinyGPT().to(device)
    optimizer = FusedAdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)  # llmfast
    scaler = torch.amp.GradScaler(device, init_scale=init_scale)
    data = batches(rows, device)
    losses, skipped = [], []
    for _ in range(steps):
        tokens, targets = next(data)
        with torch.autocast(device, torch.float16):
            hidden = model(tokens)
            loss = linear_cross_entropy(hidden, model.head.weight, targets)  # llmfast
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scale = scaler.get_scale()  # waits for the device, only for the report
        scaler.update()
        optimizer.zero_grad()
        skipped.append(scaler.get_scale() < scale)
        losses.append(loss.item())
    return losses, skipped


if __name__ == "__main__":
    losses, skipped = train()
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; steps skipped: {[i for i, was in enumerate(skipped) if was]}")
