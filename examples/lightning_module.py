"""An ordinary LightningModule with two lines of llmfast: a loss without logits, one optimizer launch per step.

pip install '.[lightning]' && python examples/lightning_module.py
"""

import random  # the model learns its source
from pathlib import Path

import lightning
import torch
from torch import Tensor, nn

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW


class Bytes(lightning.LightningModule):
    """Language model that predicts the next byte."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, 256, bias=False)
        self.losses: list[Tensor] = []

    def training_step(self, row: Tensor, batch_idx: int) -> Tensor:  # (B, T + 1)
        hidden, _ = self.rnn(self.embedding(row[:, :-1]))
        # was: loss = F.cross_entropy(self.head(hidden).flatten(0, 1), row[:, 1:].flatten())
        loss = linear_cross_entropy(hidden, self.head.weight, row[:, 1:])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The optimizer clips, so Trainer(gradient_clip_val=) must not. Under "bf16-mixed" and "16-mixed", Lightning
        # rejects that argument anyway, as it does for torch's own fused optimizers.
        return FusedAdamW(self.parameters(), lr=1e-2, max_grad_norm=1.0)


def train(steps: int) -> list[float]:
    """Train and return the loss of each step."""
    text = torch.frombuffer(bytearray(Path(random.__file__).read_bytes()), dtype=torch.uint8).long()
    rows = torch.utils.data.DataLoader(text.unfold(0, 65, 64), batch_size=8)  # type: ignore[arg-type]

    torch.manual_seed(0)
    model = Bytes()
    trainer = lightning.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(model, rows)
    return [loss.item() for loss in model.losses]


if __name__ == "__main__":
    losses = train(200)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
