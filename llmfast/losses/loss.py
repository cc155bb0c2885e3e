"""A loss between its public function and its kernels: a record that knows how to run forward and backward."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmfast.losses.options import Reduction
from llmfast.losses.parallel import ProcessGroup, over_ranks
from llmfast.losses.rows import RowOps, row_ops
from llmfast.losses.targets import divided, reciprocal, reduced
from llmfast_kernels.terms import Rows, Softmax, Targets, Terms, Upstream

Tensors = tuple[Tensor | None, ...]


class Found(NamedTuple):
    """Results of a forward pass."""

    rows: Rows
    lse: Tensor | None  # (N,), with statistics
    kept: Any = None  # for the first backward pass, which uses it up


class Returned(NamedTuple):
    """Upstream gradients of the results; None for a result that got none."""

    loss: Tensor | None  # () or (N,); (N, K) for log-probabilities
    lse: Tensor | None  # (N,)
    entropy: Tensor | None  # (N,)

    def per_row(self, count: Tensor | None, like: Tensor) -> Upstream:
        """Return the gradients of each row's results, contiguous."""
        if self.loss is None:
            loss = torch.zeros_like(like)
        else:
            loss = divided(self.loss, count).to(like.dtype).expand_as(like).contiguous()
        lse, entropy = (None if t is None else t.contiguous() for t in (self.lse, self.entropy))
        return Upstream(loss, lse, entropy)


@dataclass(frozen=True, kw_only=True)
class Loss(ABC):
    """A loss with checked arguments. Its inputs, the tensors that get gradients, are passed to each call.

    Operators (`operators.py`) take no `group`, and none of the fields to which subclasses give a default.
    """

    targets: Targets
    terms: Terms
    reduction: Reduction
    count: Tensor | None  # () that a mean divides by
    stats: bool
    dtype: torch.dtype  # of logits and their gradients
    logprobs: bool = False  # return the targets' log-probabilities, (N, K), instead of losses
    places: bool = False  # with statistics, return the targets' places too, see `Rows`
    group: "ProcessGroup | None" = None

    def value(self, rows: Rows) -> Tensor:
        """Return what the caller gets: the rows' reduced loss, or their log-probabilities."""
        return reduced(rows.loss, self.reduction, self.count) if rows.logprobs is None else rows.logprobs

    def weighted(self, returned: Returned) -> "tuple[Loss, Returned]":
        """Return a loss with one number per row, and its upstream gradient, that give the inputs the same gradients.

        Log-probabilities have the gradient of a cross-entropy whose target weights are the negated upstream gradients.
        """
        if not self.logprobs or returned.loss is None:
            return self, returned
        targets = replace(self.targets, weights=returned.loss.neg().contiguous())
        return replace(self, targets=targets), returned._replace(loss=returned.loss.new_ones(()))

    @property
    def divides_early(self) -> bool:
        """True if gradients made in the forward pass are divided by `count` as they are written.

        An upstream gradient of 1 then leaves nothing to do. float16 would underflow, and waits for the loss scale
        that the upstream gradient brings.
        """
        return not self.is_half

    @property
    def is_half(self) -> bool:
        return self.dtype == torch.float16

    @property
    def early_factor(self) -> Tensor | None:
        """Factor for gradients as they are written in the forward pass, (); None for 1."""
        return reciprocal(self.count) if self.count is not None and self.divides_early else None

    def late_factor(self, d_loss: Tensor) -> Tensor:
        """Return the factor that those gradients still need once their upstream gradient, (), is known."""
        return divided(d_loss, None if self.divides_early else self.count)

    @property
    def traceable(self) -> bool:
        """True if an operator of torch can stand for this loss."""
        return self.group is None

    def makes_gradients(self, inputs: Tensors, wants: tuple[bool, ...]) -> bool:
        """Return True if the forward pass makes all gradients that `wants` names."""
        return False

    @abstractmethod
    def forward(self, inputs: Tensors, wants: tuple[bool, ...]) -> Found:
        """Compute the rows. `wants` says which inputs need a gradient."""

    @abstractmethod
    def backward(
        self, inputs: Tensors, wants: tuple[bool, ...], softmax: Softmax, returned: Returned, kept: Any
    ) -> Tensors:
        """Compute the gradients of the inputs; `kept` is what the forward pass left, or None."""

    def ops(self, t: Tensor) -> RowOps:
        """Return the operations on rows like `t`, over all ranks where the classes are split."""
        ops = row_ops(t, dense=self.targets.probabilities is not None)
        return ops if self.group is None else over_ranks(ops, self.group)
