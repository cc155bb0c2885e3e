"""A loop in the style of nanoGPT, before and after llmfast: warm-up and cosine, accumulation, clipping, autocast.

    python examples/nanogpt_before.py
    python examples/nanogpt_after.py
    diff examples/nanogpt_before.py examples/nanogpt_after.py

The two files differ in their imports and in two lines. In float32 both print the same losses.
"""

import math

import torch
import torch.nn.functional as F
from tiny_gpt import TinyGPT, batches


def lr_at(step: int, steps: int, peak: float = 3e-3, warmup: int = 10) -> float:
    """Return the learning rate: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train(steps: int = 60, rows: int = 16, accumulate: int = 2) -> list[float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = TinyGPT().to(device)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    data = batches(rows, device)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps)
        total = torch.zeros((), device=device)
        for _ in range(accumulate):
            tokens, targets = next(data)
            with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
                hidden = model(tokens)
                loss = F.cross_entropy(model.head(hidden).flatten(0, 1), targets.flatten())
            (loss / accumulate).backward()
            total += loss.detach() / accumulate
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item())
        if step % 10 == 0 or step == steps - 1:
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    train()
