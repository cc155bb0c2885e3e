"""Scaling laws with their published constants: the loss a model will reach, and how to spend a budget of FLOPs.

N is a number of parameters, D of training tokens, C of FLOPs, and losses are in nats per token. The laws count N
differently: Hoffmann counts all parameters, Kaplan and Henighan leave out the embeddings (Pearce & Song 2024,
arXiv:2406.12907, explain the consequences). Constants depend on text and tokenizer. Exponents, and the division of a
budget into N and D, transfer better; your own runs are best: see `fit`.

Training takes C = 6 N D: a product of a parameter and an activation is 2 FLOPs, and backward is twice forward.
Attention adds 12 * layers * T * width per token for rows of T tokens if each token is compared with all T tokens of its
row, and half of that if only with those before it. Relative to 6 N that is layers * T * width * 2 / N, or
T / (6 * width) where N is about 12 * layers * width^2. `models.cost.step_flops` counts both for a given model.
"""

import math
from dataclasses import dataclass

from llmfast._checks import expect

PF_DAY = 1e15 * 86_400
"""FLOPs of one petaflop/s-day, the unit of compute of Kaplan and Henighan."""


def training_flops(N: float, D: float) -> float:
    """Compute C = 6 N D, without attention."""
    _positive(N=N, D=D)
    return 6 * N * D


def critical_batch(loss: float, *, scale: float = 2e8, exponent: float = 0.21) -> float:
    """Compute the batch, in tokens, at which reaching `loss` takes twice the minimum of steps and of tokens.

    B_crit = scale / loss^(1 / exponent). Batches far below it waste steps, batches far above it waste tokens.
    McCandlish et al. 2018 (arXiv:1812.06162) say why, Kaplan et al. 2020 (arXiv:2001.08361, eq. 5.3) give the defaults.

    Args:
        loss: nats per token, with the tokenizer that the constants belong to.

    Raises:
        ValueError: an argument is not above 0.
    """
    _positive(loss=loss, scale=scale, exponent=exponent)
    return float(scale / loss ** (1 / exponent))


@dataclass(frozen=True)
class Allocation:
    """A model size, the tokens to train it on, and the loss that a law predicts."""

    params: float  # N
    tokens: float  # D
    loss: float  # nats per token

    @property
    def flops(self) -> float:
        """6 N D."""
        return training_flops(self.params, self.tokens)

    @property
    def tokens_per_param(self) -> float:
        return self.tokens / self.params


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = floor + (scale / x)^exponent, where the variable x is all that limits the loss.

    With floor 0 it is Kaplan's form, with a floor Henighan's (arXiv:2010.14701, eq. 1.1), who reads it as the entropy
    of the data.
    """

    scale: float  # in the unit of x
    exponent: float
    floor: float = 0.0  # nats per token

    def loss(self, x: float) -> float:
        """Compute the loss at `x`.

        Raises:
            ValueError: `x` is not above 0.
        """
        _positive(x=x)
        return float(self.floor + (self.scale / x) ** self.exponent)

    def needed(self, loss: float) -> float:
        """Compute the x that gives this loss.

        Raises:
            ValueError: `loss` is not above the floor.
        """
        expect(loss > self.floor, f"loss must be above the law's floor of {self.floor:g}; got {loss:g}")
        return float(self.scale / (loss - self.floor) ** (1 / self.exponent))


@dataclass(frozen=True)
class KaplanLaw:
    """L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D (arXiv:2001.08361, eq. 1.5).

    N does not include embeddings. D is the size of the text, which is read until the loss on held-out text is lowest.
    """

    N_c: float
    D_c: float
    alpha_N: float
    alpha_D: float

    def loss(self, N: float, D: float) -> float:
        """Compute the loss of N parameters and D tokens.

        Raises:
            ValueError: An argument is not above 0.
        """
        _positive(N=N, D=D)
        return float(((self.N_c / N) ** (self.alpha_N / self.alpha_D) + self.D_c / D) ** self.alpha_D)


@dataclass(frozen=True)
class ChinchillaLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, arXiv:2203.15556, approach 3), for fresh tokens."""

    E: float  # the loss that neither a larger model nor more text can lower
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: float, D: float) -> float:
        """Compute the loss of N parameters and D tokens.

        Raises:
            ValueError: An argument is not above 0.
        """
        _positive(N=N, D=D)
        return float(self.E + self.A / N**self.alpha + self.B / D**self.beta)

    def optimal(self, flops: float) -> Allocation:
        """Find the N and D with the lowest loss for 6 N D = `flops`.

        N = G (C / 6)^(beta / (alpha + beta)), where G = (alpha A / (beta B))^(1 / (alpha + beta)): there, one percent
        more N lowers the loss as much as one percent more D.

        Raises:
            ValueError: `flops` is not above 0.
        """
        _positive(flops=flops)
        N = self._balance * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return self.spent(N, flops)

    def sizes_within(self, flops: float, slack: float) -> tuple[float, float]:
        """Find the smallest and largest N that reach a loss of at most `slack` above the best for `flops`.

        Raises:
            ValueError: an argument is not above 0.
        """
        _positive(slack=slack)
        best = self.optimal(flops)
        found = []
        for factor in (1e-6, 1e6):
            good, bad = math.log(best.params), math.log(best.params * factor)
            for _ in range(60):
                middle = (good + bad) / 2
                if self.spent(math.exp(middle), flops).loss <= best.loss + slack:
                    good = middle
                else:
                    bad = middle
            found.append(math.exp(good))
        return found[0], found[1]

    def optimal_for_params(self, N: float) -> Allocation:
        """Find the budget for which N parameters are optimal, and what it buys; ValueError if N is not above 0."""
        _positive(N=N)
        return self.spent(N, 6 * (N / self._balance) ** ((self.alpha + self.beta) / self.beta))

    def optimal_for_tokens(self, D: float) -> Allocation:
        """Find the budget for which D tokens are optimal, and what it buys; ValueError if D is not above 0."""
        _positive(D=D)
        flops = 6 * (D * self._balance) ** ((self.alpha + self.beta) / self.alpha)
        return self.spent(flops / (6 * D), flops)

    def spent(self, N: float, flops: float) -> Allocation:
        """Spend all of `flops` on a model of N parameters; ValueError if either is not above 0."""
        _positive(N=N, flops=flops)
        D = flops / (6 * N)
        return Allocation(N, D, self.loss(N, D))

    @property
    def _balance(self) -> float:
        """G, as in `optimal`."""
        return float((self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta)))


BESIROGLU = ChinchillaLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""Besiroglu et al. 2024 (arXiv:2404.10102): Hoffmann's runs, read from their figure and fitted again. It agrees with
the paper's other two approaches where the paper's own fit does not, so it is the one to use."""
FITTED = 70e6, 16e9
"""Parameters of the smallest and the largest of Hoffmann's models, to which both laws are fits."""
HOFFMANN = ChinchillaLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""The constants in appendix D.3 of Hoffmann et al. 2022 (arXiv:2203.15556). Two digits of an exponent are few: with
them the optimum at 1e21 FLOPs has 50 tokens per parameter, while the paper's models have 20."""

KAPLAN_N = PowerLaw(scale=8.8e13, exponent=0.076)
"""Kaplan et al. 2020 (arXiv:2001.08361), table 5: loss by N, parameters without embeddings."""
KAPLAN_D = PowerLaw(scale=5.4e13, exponent=0.095)
"""The same table: loss by tokens."""
KAPLAN_C = PowerLaw(scale=3.1e8 * PF_DAY, exponent=0.050)
"""The same table: loss by FLOPs, optimally spent at small batches."""
KAPLAN = KaplanLaw(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103)
"""Kaplan's table 2: N and tokens fitted together, which gives other values."""

# Henighan et al. found no floor for language, but one for mathematics, on problems harder than those trained on.
HENIGHAN_N = PowerLaw(scale=1.47e14, exponent=0.070)
"""Henighan et al. 2020 (arXiv:2010.14701), table 1: language, by parameters without embeddings."""
HENIGHAN_C = PowerLaw(scale=3.47e8 * PF_DAY, exponent=0.048)
"""The same table: language, by FLOPs."""
HENIGHAN_MATH_N = PowerLaw(scale=1.1e4, exponent=0.16, floor=0.28)
"""The same table: mathematics, by parameters."""
HENIGHAN_MATH_C = PowerLaw(scale=1.4e-5 * PF_DAY, exponent=0.17, floor=0.14)
"""The same table: mathematics, by FLOPs."""


def kaplan_optimal(flops: float) -> Allocation:
    """Compute Kaplan's optimum: N = 1.3e9 C_min^0.73 in PF-days, without embeddings (table 6).

    C_min is what the run would take at small batches. At the critical batch size, for which the table is, a run takes
    twice that (eq. 5.5), so here C_min is `flops` / 2, and D = `flops` / (6 N). Hoffmann et al. blame the large N on
    learning rates that did not end with the run, and Pearce & Song on leaving out the embeddings of small models.

    Raises:
        ValueError: `flops` is not above 0.
    """
    _positive(flops=flops)
    least = flops / 2
    N = 1.3e9 * (least / PF_DAY) ** 0.73
    return Allocation(N, flops / (6 * N), KAPLAN_C.loss(least))


def _positive(**values: float) -> None:
    for name, value in values.items():
        expect(value > 0 and math.isfinite(value), f"{name} must be a finite number above 0; got {value:g}")
