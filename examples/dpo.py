"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) of a small GPT, without logits.

The model learns to prefer a line as it stands to the same line with its words in another order. Each step packs all its
sequences into one row; `linear_logprobs` gives one number per token, 0 for those of a prompt.

python examples/dpo.py
"""

import argparse  # the models learn its source
import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from tiny_gpt import Packing, TinyGPT
from torch import Tensor

from llmfast.losses import linear_logprobs
from llmfast.optim import FusedAdamW

Pair = tuple[bytes, bytes, bytes]  # prompt, chosen, rejected
BETA = 0.1


def pairs(rows: int) -> Iterator[list[Pair]]:
    """Yield lists of pairs, endlessly."""
    lines = [line.split() for line in Path(argparse.__file__).read_text().splitlines()]
    lines = [words for words in lines if len(words) >= 5 and sum(map(len, words)) < 80]
    draw = random.Random(0)
    while True:
        chosen = [draw.choice(lines) for _ in range(rows)]
        yield [(*(" ".join(part).encode() for part in (w[:2], w[2:], [*reversed(w[2:])])),) for w in chosen]


def sequence_logprobs(model: TinyGPT, sequences: list[Tensor], prompts: list[int]) -> Tensor:
    """Return the log-probability of each sequence after its prompt."""
    packed = Packing(sequences, prompts)
    hidden = model(packed.tokens, packed)
    return packed.sums(linear_logprobs(hidden, model.head.weight, packed.ids))  # llmfast


def train(
    steps: int, rows: int = 8, device: str = "cpu", logprobs: Callable[..., Tensor] = sequence_logprobs
) -> tuple[list[float], list[float]]:
    """Train; return the loss and the margin of each step: by how much the reward of the preferred line is higher."""
    torch.manual_seed(0)
    policy = TinyGPT().to(device)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = FusedAdamW(policy.parameters(), lr=1e-3)  # llmfast
    losses, margins = [], []
    for _, batch in zip(range(steps), pairs(rows)):
        texts = [(p, p + b" " + c) for p, c, _ in batch] + [(p, p + b" " + r) for p, _, r in batch]
        sequences = [torch.tensor([*text], device=device) for _, text in texts]
        prompts = [len(prompt) for prompt, _ in texts]
        with torch.no_grad():
            before = logprobs(reference, sequences, prompts)
        reward = BETA * (logprobs(policy, sequences, prompts) - before)
        chosen, rejected = reward.chunk(2)
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        margins.append((chosen - rejected).mean().item())
    return losses, margins


if __name__ == "__main__":
    losses, margins = train(40, device="cuda" if torch.cuda.is_available() else "cpu")
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, margin {margins[0]:.2f} -> {margins[-1]:.2f}")
