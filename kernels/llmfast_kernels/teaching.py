"""A teacher's part of a row's loss, as records. No Triton: the plain torch path uses the same."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from llmfast_kernels.terms import Terms

TAUGHT = 4  # numbers per row in `Rows.taught`, whose meaning is that of the row operations


@dataclass(frozen=True)
class Divergence:
    """The loss of a row with a teacher.

    soft_weight * divergence + hard_weight * cross-entropy, where the divergence of the teacher's probabilities p and
    the student's q at the temperature is, with m = beta p + (1 - beta) q,

        beta KL(p || m) + (1 - beta) KL(q || m)

    and its limits KL(p || q) for beta = 0 and KL(q || p) for beta = 1.
    """

    beta: float
    temperature: float  # of all rows, where `Targets.temperatures` is None
    soft_weight: float
    hard_weight: float | None  # None: there are no targets to learn
    entropy: bool = True  # False: the cross-entropy -sum(p log q), which is KL(p || q) and the entropy of p

    @property
    def exchanged(self) -> "Divergence":
        """The same divergence of the student's probabilities from the teacher's, without targets."""
        beta = 1.0 - self.beta
        if self.beta > 0:  # a mixture stays one
            beta = min(beta, math.nextafter(1.0, 0.0))
        return Divergence(beta, self.temperature, self.soft_weight, None)


CROSS_ENTROPY = Divergence(0.0, 1.0, 1.0, None, entropy=False)


class TeacherRows(NamedTuple):
    """A teacher's N rows of some columns: logits, probabilities, or log-probabilities of some ids."""

    terms: Terms  # bias, scale and cap of its logits; or class weights and label smoothing of its probabilities
    logits: Tensor | None = None  # (N, columns or more)
    probabilities: Tensor | None = None  # (N, columns)
    ids: Tensor | None = None  # (N, K) int64, of all columns; negative for none
    logprobs: Tensor | None = None  # (N, K) f32
    bucket: bool = False  # all other classes count as one; if not, they have probability 0
