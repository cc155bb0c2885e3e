"""Swapping llmfast in changes nothing but the speed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast._dispatch import kernels_on_cpu
from llmfast.data import ByteTokenizer, Mixture, pack
from llmfast.losses import cross_entropy, linear_cross_entropy
from llmfast.models import Decoder, DecoderConfig
from llmfast.optim import FusedAdamW

ROOT = Path(__file__).parent.parent
EXAMPLE = (ROOT / "examples" / "plain_pytorch.py").read_text()


def run_example(source: str) -> list[float]:
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(source, "plain_pytorch.py", "exec"), namespace)
    return namespace["train"](60)


def test_the_example_with_its_two_lines_learns_as_the_one_before() -> None:
    """Swap each replaced line with the comment above it that holds the original, and compare."""
    before, swaps = re.subn(r"( +)# (\w+ = (?:torch|F)\..*)\n +\w+ = llmfast\..*\n", r"\1\2\n", EXAMPLE)
    assert swaps == 2
    assert "llmfast." not in before.partition("def train")[2]
    ours, torchs = run_example(EXAMPLE), run_example(before)
    assert ours[-1] < 0.6 * ours[0], "it learns"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(torchs), rtol=2e-4, atol=0)


def curve(
    loss_of: Callable[[Decoder, Tensor, Tensor], Tensor], make_optimizer: type[torch.optim.AdamW], steps: int = 12
) -> list[float]:
    torch.manual_seed(0)
    tokenizer = ByteTokenizer()
    rows = pack([tokenizer.encode(EXAMPLE)], seq_len=16, eot_id=tokenizer.eot_id)
    model = Decoder(DecoderConfig(tokenizer.vocab_size, width=32, layers=1, heads=2))
    optimizer = make_optimizer(model.parameters(), lr=3e-3)  # at 1e-2 torch's own fused and unfused AdamW part by 2e-5
    losses = []
    mixture = Mixture({"text": len(rows)}, {}, total=4 * steps)
    for step in range(steps):
        batch = rows.batch(mixture.sequences(4 * step, 4 * step + 4)[1])
        hidden = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids)
        loss = loss_of(model, hidden, batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("loss", ["linear", "in place"])
def test_training_on_the_kernels_follows_plain_torch(loss: str) -> None:
    """Compare 12 float32 steps of the interpreted kernels with F.cross_entropy and torch.optim.AdamW."""
    losses: dict[str, Callable[[Decoder, Tensor, Tensor], Tensor]] = {
        "linear": lambda m, h, y: linear_cross_entropy(h, m.unembedding, y, memory_budget=64 * 320 * 4),
        "in place": lambda m, h, y: cross_entropy(h @ m.unembedding.T, y, inplace=True),
    }
    plain = curve(lambda m, h, y: F.cross_entropy((h @ m.unembedding.T).flatten(0, 1), y.flatten()), torch.optim.AdamW)
    with kernels_on_cpu():
        ours = curve(losses[loss], FusedAdamW)
    assert plain[-1] < 0.8 * plain[0], "there is something to follow"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(plain), rtol=1e-5, atol=0)
