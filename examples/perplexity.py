"""Perplexity of a text of any length in constant memory, and how often the next byte is among the likeliest.

A window slides over the text. Each byte counts once, and all but those of the first window have at least half a window
of context. The device holds only a sum in float64 and three counts, which are read at the end, however long the text
is. `memory_budget` limits the logits.

python examples/perplexity.py
"""

import argparse  # the model learns its source
from pathlib import Path
from typing import Any

import torch
from tiny_gpt import TinyGPT, batches
from torch import Tensor

from llmfast.losses import linear_cross_entropy, linear_logprobs
from llmfast.optim import FusedAdamW


@torch.no_grad()
def measured(model: TinyGPT, text: Tensor, rows: int = 8, context: int = 128, budget: Any = "auto") -> dict[str, float]:
    """Return the perplexity, and the shares of bytes with rank 0 and with a rank below 5.

    Args:
        model: The model.
        text: (length,) tokens in the host's memory.
        rows: Windows per batch.
        context: Tokens per window.
        budget: Bytes to hold beyond hidden states, see `linear_logprobs`.
    """
    device, step = model.head.weight.device, context // 2
    total = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    starts = [*range(0, max(1, len(text) - 1 - step), step)]
    for first in range(0, len(starts), rows):
        tokens, ids = torch.zeros(2, rows, context, dtype=torch.int64)
        ids.fill_(-100)
        for row, start in enumerate(starts[first : first + rows]):
            window = text[start : start + context + 1].long()
            tokens[row, : len(window) - 1] = window[:-1]
            new = step if start else 0  # what comes before has been counted
            ids[row, new : len(window) - 1] = window[1 + new :]
        tokens, ids = tokens.to(device), ids.to(device)
        options: dict[str, Any] = {"return_stats": True, "return_rank": True, "memory_budget": budget}
        found, stats = linear_logprobs(model(tokens), model.head.weight, ids, **options)  # llmfast
        total += found.sum(dtype=torch.float64)
        known = ids != -100
        counts += torch.stack([(known & (stats.rank < most)).sum() for most in (1, 5, 1 << 30)])
    first_five = (counts[:2] / counts[2]).tolist()
    return {"perplexity": (-total / counts[2]).exp().item(), "first": first_five[0], "first five": first_five[1]}


def trained(steps: int, device: str = "cpu") -> TinyGPT:
    torch.manual_seed(0)
    model = TinyGPT().to(device)
    optimizer = FusedAdamW(model.parameters(), lr=3e-3)  # llmfast
    for _, (tokens, targets) in zip(range(steps), batches(8, device)):
        linear_cross_entropy(model(tokens), model.head.weight, targets).backward()  # llmfast
        optimizer.step()
        optimizer.zero_grad()
    return model


if __name__ == "__main__":
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    for steps in (0, 100):
        model = trained(steps, "cuda" if torch.cuda.is_available() else "cpu")
        print(f"after {steps} steps:", {name: round(value, 3) for name, value in measured(model, text).items()})
