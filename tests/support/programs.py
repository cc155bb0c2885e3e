"""Program with its own model, batches and optimizers, for the trainer's tests."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from llmfast.optim import FusedAdamW
from llmfast.train.config import Config
from llmfast.train.trainer import Hooks, Trainer

VOCABULARY, ROWS = 50, 4
Optimizer = torch.optim.Optimizer
Batch = dict[str, Tensor]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(16, 16), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dropout(self.inner(x).tanh())
        return out


class Model(nn.Module):
    """Model with dropout, whose unembedding is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.unembedding = nn.Linear(16, VOCABULARY, bias=False)
        self.unembedding.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.unembedding(x)
        return logits


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), reduction="sum")


def batches(rows: int = ROWS, seed: int = 0, bad: tuple[int, ...] = ()) -> Iterator[Batch]:
    """Yield batches whose rows do not depend on their number; all labels of row i count, or only some; NaN if `bad`."""
    generator = torch.Generator().manual_seed(seed)
    number = 0
    while True:
        tokens = torch.randint(0, VOCABULARY, (rows, 9), generator=generator)
        labels = tokens[:, 1:].clone()
        for row in range(rows):
            labels[row, : (number * rows + row) % 4 * 2] = -100
        weight = torch.tensor(math.nan if number in bad else 1.0)
        yield {"tokens": tokens[:, :-1], "labels": labels, "weight": weight}
        number += 1


def model_of(seed: int = 0) -> Model:
    torch.manual_seed(seed)
    return Model()


def settings(**values: Any) -> Config:
    """Return settings of the optimizer (such as `lr=`) and of the trainer (such as `steps=`)."""
    config = Config()
    config.optimizer.warmup_steps, config.optimizer.lr = 2, 0.01
    config.train.steps, config.train.batch_size, config.train.log_every = 6, ROWS, 1
    for name, value in values.items():
        section = config.optimizer if hasattr(config.optimizer, name) else config.train
        assert hasattr(section, name)
        setattr(section, name, value)
    return config


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def fused(model: nn.Module) -> Optimizer:
    return FusedAdamW(model.parameters(), lr=0.01, max_grad_norm=1.0)


OPTIMIZERS = [adamw, fused]


class Written(Hooks):
    """The lines of the log, but for times."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        self.lines.append({k: v for k, v in values.items() if k not in ("tokens_per_s", "memory_bytes")})

    def __getitem__(self, key: str) -> list[Any]:
        return [line.get(key) for line in self.lines]


def trainer_of(
    config: Config | None = None, make: Callable[[nn.Module], Optimizer] = adamw, *, data: Any = None, **more: Any
) -> tuple[Trainer, Written]:
    written = Written()
    hooks = [written, *more.pop("hooks", [])]
    more = {"console": Console(quiet=True), "loss": loss_of, "model": model_of(), **more}
    return Trainer(
        optimizer=make, data=batches() if data is None else data, config=config or settings(), hooks=hooks, **more
    ), written


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in trainer.model.state_dict().items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Assert equality bit for bit."""
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


def weighted(model: nn.Module, batch: Batch) -> Tensor:
    return loss_of(model, batch) * batch["weight"]
