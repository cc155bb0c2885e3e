"""Losses with torchtitan's interface: on logits, or on hidden states with the head skipped.

    python examples/torchtitan_loss.py

Written for torchtitan 0.3.0, which need not be installed. There, a loss is called with `(pred, labels,
global_valid_tokens)` and returns `(loss, metrics)`: the sum over tokens, divided by the number of valid tokens in the
whole step. `cross_entropy_loss` below has the name and arguments of the function that its `CrossEntropyLoss` calls.
(In 0.2.1 that function returned the mean, `cross_entropy(pred, labels)`, and a model's `build_loss_fn` returned it.)

`HeadlessLoss` corresponds to its `ChunkedLossWrapper` without the chunks. If `ChunkedLossWrapper` is also a base, the
trainer does the rest: it passes the head and makes the model return hidden states.

    class FusedLoss(HeadlessLoss, ChunkedLossWrapper):
        @dataclass(kw_only=True, slots=True)
        class Config(ChunkedLossWrapper.Config): ...

    config.loss = FusedLoss.Config()

With FSDP2, the loss is computed inside the head's forward, where the weight is whole; the head no longer computes
logits. A vocabulary split across ranks (tensor parallelism) is not covered here.
"""

from typing import Any

import torch
from tiny_gpt import TinyGPT, batches
from torch import Tensor, nn

from llmfast.losses import cross_entropy, linear_cross_entropy
from llmfast.optim import FusedAdamW


def cross_entropy_loss(pred: Tensor, labels: Tensor, *, global_vocab_size: int | None = None) -> Tensor:
    """Return the sum over labels that are not -100, for logits (..., V) and labels (...), without a float32 copy."""
    return cross_entropy(pred, labels, reduction="sum")  # llmfast


class CrossEntropyLoss:
    """Counterpart of torchtitan's class of this name, for the loop below."""

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = cross_entropy_loss(pred, labels)
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


class HeadlessLoss:
    """Loss of hidden states `pred` (..., D): the trainer passes the head to `set_lm_head` and has the model skip it."""

    def set_lm_head(self, lm_head: Any) -> None:
        self.lm_head = lm_head
        # Called as a module, the head gathers its weight and reduces its gradient as FSDP2 expects.
        lm_head.forward = lambda hidden, labels: linear_cross_entropy(  # llmfast
            hidden, lm_head.weight, labels, reduction="sum"
        )

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.lm_head(pred, labels)
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


class Model(nn.Module):
    """Model with the two attributes that torchtitan's decoders have."""

    _skip_lm_head = False

    def __init__(self, **shape: int) -> None:
        super().__init__()
        self.body = TinyGPT(**shape)
        self.lm_head = self.body.head

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(tokens)
        return hidden if self._skip_lm_head else self.lm_head(hidden)


def train(loss_fn: Any, steps: int = 60, rows: int = 16, **shape: int) -> list[float]:
    """Train as torchtitan's trainer uses a loss, on one device."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model(**shape).to(device)
    if hasattr(loss_fn, "set_lm_head"):
        loss_fn.set_lm_head(model.lm_head)
        model._skip_lm_head = True
    optimizer = FusedAdamW(model.parameters(), lr=3e-3)  # llmfast
    losses = []
    data = batches(rows, device, model.body.positions.num_embeddings)
    for _ in range(steps):
        tokens, labels = next(data)
        loss, _ = loss_fn(model(tokens), labels, (labels != -100).sum())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for loss_fn in (CrossEntropyLoss(), HeadlessLoss()):
        losses = train(loss_fn)
        print(f"{type(loss_fn).__name__}: loss {losses[0]:.4f} -> {losses[-1]:.4f}")
