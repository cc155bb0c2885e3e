"""Objectives: what a training step minimises, and what is logged about it.

One rule holds for all: a loss is a sum over tokens divided by the number of valid tokens in the whole step, however the
step is divided into ranks and micro-batches. An objective is told that number, so the parts of a loss add up.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.data import IGNORE_INDEX, Batch
from llmfast.losses import linear_cross_entropy, mtp_cross_entropy, mtp_valid_counts
from llmfast.losses.targets import numbers

Sums = dict[str, Tensor]  # add up over micro-batches, ranks and steps


class Objective(Protocol):
    """A loss that `Trainer` minimises. A plain function will do too: see `Summed`."""

    def num_valid(self, batch: Any) -> Tensor:
        """Count each head's valid labels, (K,) int64, in a batch that is still on the CPU."""
        ...

    def __call__(self, model: nn.Module, batch: Any, num_valid: Tensor, step: int, detail: bool) -> tuple[Tensor, Sums]:
        """Return this batch's part of the loss, and sums to log, in a step with `num_valid` labels, (K,) and not 0.

        One of the sums is "loss", the one that is logged. With `detail`, in steps that end in a line of the log, there
        may be more sums.
        """
        ...

    def logged(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        """Make numbers for the log from sums over `steps` steps, on the CPU; the mean of "loss" is logged anyway."""
        ...


class Summed:
    """An objective made of a function of model and batch that returns the sum of all valid tokens' losses.

    Valid tokens are those whose label is not -100, in `batch.labels` or `batch["labels"]`.
    """

    def __init__(self, function: Callable[[nn.Module, Any], Tensor]) -> None:
        self._function = function

    def num_valid(self, batch: Any) -> Tensor:
        labels = batch["labels"] if isinstance(batch, Mapping) else batch.labels
        count: Tensor = (labels != IGNORE_INDEX).sum()
        return count.reshape(1)

    def __call__(self, model: nn.Module, batch: Any, num_valid: Tensor, step: int, detail: bool) -> tuple[Tensor, Sums]:
        loss = self._function(model, batch) / num_valid[0]
        return loss, {"loss": loss.detach()}

    def logged(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        return {}


class NextToken:
    """The next token's cross-entropy, for a model that returns hidden states and has an `unembedding`."""

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self.sources = list(sources)  # whose losses are logged one by one

    def num_valid(self, batch: Batch) -> Tensor:
        return torch.tensor([batch.num_valid], dtype=torch.int64, device="cpu")

    def __call__(self, model: Any, batch: Batch, num_valid: Tensor, step: int, detail: bool) -> tuple[Tensor, Sums]:
        hidden = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids)
        options: dict[str, Any] = {"num_valid": num_valid[0]}
        if not detail or len(self.sources) < 2 or batch.sources is None:
            loss = linear_cross_entropy(hidden, model.unembedding, batch.labels, **options)
            return loss, {"loss": loss.detach()}
        loss, stats = linear_cross_entropy(hidden, model.unembedding, batch.labels, return_stats=True, **options)
        one_hot = F.one_hot(batch.sources, len(self.sources)).float()  # (B, sources)
        token_loss, valid = stats.token_loss.view(batch.labels.shape), batch.labels != IGNORE_INDEX

        def by_source(by_token: Tensor) -> Tensor:  # no matrix product: autocast would round it
            return (by_token.float().sum(1, keepdim=True) * one_hot).sum(0)

        sums = {"loss": loss.detach(), "source_loss": by_source(token_loss), "source_tokens": by_source(valid)}
        return loss, sums

    def logged(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        if "source_loss" not in sums:
            return {}
        means = (sums["source_loss"] / sums["source_tokens"]).tolist()
        return {"source_loss": {name: mean for name, mean in zip(self.sources, means) if mean == mean}}


class FurtherTokens:
    """The weighted sum of the losses of a decoder's heads. What is logged as "loss" is the next token's loss."""

    def __init__(self, heads: int, weights_at: Callable[[int], list[float]], *, shared: bool, detached: bool) -> None:
        self.heads, self._weights_at = heads, weights_at
        self._detached = [detached and k > 0 for k in range(heads)]
        self._alone = heads == 1 and not shared  # the result then equals the next token's loss to the last bit

    def num_valid(self, batch: Batch) -> Tensor:
        return mtp_valid_counts(batch.labels, self.heads, batch.document_ids)

    def __call__(self, model: Any, batch: Batch, num_valid: Tensor, step: int, detail: bool) -> tuple[Tensor, Sums]:
        hiddens = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids, all_heads=True)
        weights = numbers(self._weights_at(step), num_valid.device).float()
        loss, stats = mtp_cross_entropy(
            hiddens,
            model.unembedding,
            batch.labels,
            document_ids=batch.document_ids,
            head_weights=None if self._alone else weights,
            num_valid=num_valid,
            detach_unembedding=self._detached,
            return_stats=True,
        )
        hits = torch.where(stats.num_valid > 0, stats.accuracy * stats.num_valid, 0.0)
        sums = {
            "loss": stats.head_loss[0],
            "objective": loss.detach(),
            "head_loss": stats.head_loss,
            "head_accuracy": hits / num_valid,
            "head_weights": weights / num_valid * stats.num_valid,
        }
        return loss, sums

    def logged(self, sums: Mapping[str, Tensor], steps: int) -> dict[str, Any]:
        return {name: (total / steps).tolist() for name, total in sums.items() if name != "loss"}


class WithLoss(nn.Module):
    """A model and its objective as one module, so that wrappers of modules (DDP, FSDP) surround both."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Any, num_valid: Tensor, step: int, detail: bool) -> tuple[Tensor, Sums]:
        return self.objective(self.model, batch, num_valid, step, detail)
