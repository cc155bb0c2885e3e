"""Inputs and outputs of a row's loss besides its logits. No Triton: the plain torch path uses the same."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

GROUP = 128  # columns that the gradient filter keeps or drops together


@dataclass(frozen=True)
class Targets:
    """Targets of N rows. K > 1 is for several weighted targets on the same logits."""

    classes: Tensor  # (N, K) int64 or int32, contiguous
    weights: Tensor | None = None  # (N, K) or (1, K) f32 with stride 1 over K, or None for 1
    token_weights: Tensor | None = None  # (N,) f32, or None for 1
    temperatures: Tensor | None = None  # (N,) f32 that divide the rows' logits, after softcap; or None
    # (N, V) with stride 1 over V, or None: probabilities of all classes. `classes` is (N, 1) then, and means nothing.
    probabilities: Tensor | None = None

    def __getitem__(self, rows: "slice | Tensor") -> "Targets":
        weights = self.weights
        return Targets(
            self.classes[rows],
            weights[rows] if weights is not None and len(weights) > 1 else weights,
            *(None if t is None else t[rows] for t in (self.token_weights, self.temperatures, self.probabilities)),
        )


@dataclass(frozen=True)
class Terms:
    """Parts of the loss that are the same for every row. None leaves a part out."""

    V: int  # classes in all, also where a buffer holds only some of them
    ignore_index: int = -100
    v_start: int = 0  # number of the buffer's first column
    bias: Tensor | None = None  # (columns of the buffer,), any float dtype
    class_weights: Tensor | None = None  # (V,) f32
    class_weight_sums: Tensor | None = None  # (2,) f32: over the buffer's columns, over all
    label_smoothing: float | None = None
    z_loss: float | None = None
    logit_scale: float | None = None
    softcap: float | None = None

    @property
    def without_lse(self) -> "Terms":
        """The terms without those that depend on logsumexp alone."""
        return replace(self, z_loss=None)

    def columns(self, columns: slice) -> "Terms":
        """Return the terms for a buffer that holds these columns of the present one."""
        bias = None if self.bias is None else self.bias[columns]
        return replace(self, v_start=self.v_start + columns.start, bias=bias)


class Rows(NamedTuple):
    """Results of N rows, all (N,) but the last three. Ignored rows have loss, lse and entropy 0, and an argmax of -1.

    logsumexp is kept as peak and total: one float32 would lose what the logits differ by where they are all large. The
    peak is the largest logit. A plan that forgets leaves a sum of losses per chunk, and no peaks and totals.
    """

    loss: Tensor  # f32
    peak: Tensor  # f32
    total: Tensor  # f32: sum(exp(x - largest x))
    entropy: Tensor | None  # f32
    argmax: Tensor | None  # int64
    logprobs: Tensor | None = None  # (N, K) f32, unweighted: of each target; 0 for ignored ones
    places: Tensor | None = None  # (N, K) int64: classes with a larger logit than each target; -1 for ignored ones
    taught: Tensor | None = None  # (N, TAUGHT) f32: what backward reads besides, see `teaching.py`

    @property
    def softmax(self) -> "Softmax":
        return Softmax(self.peak, self.total, self.entropy, self.taught)

    @property
    def lse(self) -> Tensor:
        """Logsumexp of the logits."""
        return self.peak + self.total.log()


class Softmax(NamedTuple):
    """The part of `Rows` that the backward pass reads."""

    peak: Tensor
    total: Tensor
    entropy: Tensor | None = None  # needed only with `Upstream.entropy`
    taught: Tensor | None = None  # needed only with a teacher or probabilities


class Upstream(NamedTuple):
    """Gradients of each row's results, all (N,) f32. None stands for zeros."""

    loss: Tensor
    lse: Tensor | None = None
    entropy: Tensor | None = None


class Partials(NamedTuple):
    """Contributions of some columns to the results of N rows, all (N,) but the last; the columns' ranks combine them.

    t is x - peak, with the peak of these columns alone. Ignored rows have 0 everywhere, and an argmax of -1.
    """

    peak: Tensor  # f32: the largest x
    total: Tensor  # f32: sum(exp(t))
    moment: Tensor | None  # f32: sum(t exp(t)), for the entropy
    pull: Tensor  # f32: what pulls the loss down, less mass * peak
    mass: Tensor  # f32: the weight of lse in the loss that these columns account for
    argmax: Tensor | None  # int64
    below: Tensor | None = None  # (N, K) f32: t of each target; 0 for those that are ignored or lie elsewhere
