"""An ordinary PyTorch training loop with two lines changed. Run it: `python examples/plain_pytorch.py`.

The model is any module that returns hidden states; it learns the Python standard library's own `random.py` byte by
byte. The two original lines are commented out above their replacements.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: F401  (only the old line needs it)
from torch import nn

import llmfast.losses
import llmfast.optim


class TinyModel(nn.Module):
    """Model from bytes to hidden states: an embedding of the last eight bytes and two layers."""

    def __init__(self, width: int = 128, window: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.mix = nn.Sequential(
            nn.Linear(window * width, width), nn.GELU(), nn.Linear(width, width), nn.RMSNorm(width)
        )
        self.head = nn.Linear(width, 256, bias=False)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:  # (B, window) -> (B, width)
        return self.mix(self.embedding(windows).flatten(1))


def train(steps: int = 200) -> list[float]:
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(Path(random.__file__).read_bytes()), dtype=torch.uint8).long()
    windows = text.unfold(0, 9, 1)  # eight bytes and the next one
    model = TinyModel()
    # optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = llmfast.optim.FusedAdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        batch = windows[torch.randint(len(windows), (256,))]
        hidden, targets = model(batch[:, :-1]), batch[:, -1]
        # loss = F.cross_entropy(F.linear(hidden, model.head.weight), targets)
        loss = llmfast.losses.linear_cross_entropy(hidden, model.head.weight, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    losses = train()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} nats per byte")
