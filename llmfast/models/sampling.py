"""Choice of the next token from a model's logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from llmfast._checks import expect
from llmfast._kinds import expect_kinds, expect_tensors, kinds_of


@dataclass(frozen=True)
class Sampler:
    """Rule that chooses a token, the most likely one unless there is a temperature.

    Args:
        temperature: Logits are divided by it; 0 is greedy.
        top_p: Choose among the most likely tokens that together have this probability (Holtzman 2020,
            arXiv:1904.09751), at least one.
        generator: Source of random numbers, on the logits' device. Each token takes one draw.

    Raises:
        ValueError: `temperature` or `top_p` is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        expect_kinds(_KINDS, vars(self))
        ok = 0 <= self.temperature < math.inf
        expect(ok, f"temperature must be finite and not negative; got {self.temperature}")
        expect(0 < self.top_p <= 1, f"top_p must be in (0, 1]; got {self.top_p}")

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose a token, (1,) int64, from logits (V,); ValueError if they are not finite."""
        expect_tensors(logits=logits)
        logits = logits.float()
        expect(bool(logits.isfinite().all()), "the model's logits are not finite: there is nothing to sample from")
        if self.temperature == 0:
            return logits.argmax(keepdim=True)
        below = logits - logits.max()  # so that no quotient overflows: 0 stays 0, all else tends to -inf
        p = torch.softmax(torch.where(below < 0, below / self.temperature, 0.0), -1)
        if self.top_p < 1:
            likely, order = p.sort(descending=True, stable=True)
            before = likely.cumsum(0) - likely  # probability of all that are more likely
            p = p.index_fill(0, order[before >= self.top_p], 0.0)
        return torch.multinomial(p, 1, generator=self.generator)


_KINDS = kinds_of(Sampler)
