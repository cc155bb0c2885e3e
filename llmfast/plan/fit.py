"""Fits of scaling laws to your own runs, by variable projection.

Given the exponents, L = E + A / N^alpha + B / D^beta is linear in E, A and B, and the best values that are not negative
have a closed form. So only the exponents are searched, on a grid that shrinks around its best point: there are no
starting values, and no local minimum because of bad ones. The objective is Hoffmann's sum of Huber losses of
log(predicted / measured) (arXiv:2203.15556, approach 3): beyond `delta` it grows linearly, so that a run gone wrong has
no more influence than any other.

Resampling says how certain an exponent is: the same fit is repeated for as many runs drawn from the runs with
replacement (Efron 1979). All resamples are fitted at once; a run that was drawn twice has twice the weight.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from llmfast._checks import expect
from llmfast.plan.laws import ChinchillaLaw, PowerLaw

Array = npt.NDArray[np.float64]
Law = TypeVar("Law", ChinchillaLaw, PowerLaw)

LOWEST, HIGHEST = 0.01, 3.0  # range of exponents that is searched
# Three values of N give the loss's curvature in log N, and so an exponent; two give a slope only.
DISTINCT = 3


@dataclass(frozen=True)
class Fit(Generic[Law]):
    """A fitted law, how far the runs are from it, and the laws of resampled runs."""

    law: Law
    residuals: Array  # (runs,): log(predicted / measured)
    resampled: tuple[Law, ...]

    def interval(self, of: Callable[[Law], float], level: float = 0.95) -> tuple[float, float]:
        """Return the interval of `of(law)`, e.g. `lambda law: law.alpha`, over the middle `level` of resampled laws.

        Raises:
            ValueError: there are no resampled laws, or `level` is not between 0 and 1.
        """
        expect(0 < level < 1, f"level must be between 0 and 1; got {level}")
        expect(len(self.resampled) > 0, "an interval needs resampled laws; fit with resamples > 0")
        values = [of(law) for law in self.resampled]
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    @property
    def outliers(self) -> list[int]:
        """Return the indices of runs off by more than 2 % and by five standard deviations, estimated by the median."""
        size = np.abs(self.residuals)
        return [int(i) for i in np.flatnonzero(size > max(0.02, 5 * 1.4826 * float(np.median(size))))]


def fit_chinchilla(
    N: npt.ArrayLike,  # (runs,) parameters, with embeddings
    D: npt.ArrayLike,  # (runs,) tokens
    loss: npt.ArrayLike,  # (runs,) at the end of each run, nats per token
    *,
    delta: float = 1e-3,
    resamples: int = 0,
    seed: int = 0,
) -> Fit[ChinchillaLaw]:
    """Fit E + A / N^alpha + B / D^beta to runs that vary both N and D.

    Args:
        N, D, loss: of runs whose learning rate had come down when they ended: a point from the middle of a longer run
            has a higher loss than a run of that length.
        delta: where the Huber loss becomes linear, relative to the loss; Hoffmann's value by default.
        resamples: number of laws to fit to resampled runs, for `Fit.interval`; 200 are plenty.
        seed: seed of the resampling.

    Raises:
        ValueError: fewer than 6 runs, fewer than 3 different N or D (runs that vary one of them are for `fit_power`), N
            and D that only vary together, numbers that are not above 0, or a loss that falls with one of them alone.
    """
    n, d, losses = (_column(name, x) for name, x in (("N", N), ("D", D), ("loss", loss)))
    same = len(n) == len(d) == len(losses)
    expect(same, f"N, D and loss must have the same length; got {len(n)}, {len(d)}, {len(losses)}")
    expect(len(n) >= 6, f"five constants need at least 6 runs; got {len(n)}")
    for name, x in (("N", n), ("D", d)):
        _expect_distinct(name, x)
    together = abs(np.corrcoef(np.log(n), np.log(d))[0, 1])
    expect(
        together < 0.999,
        "N and D of these runs vary only together, as with a fixed number of tokens per parameter: which of the two "
        "lowers the loss cannot be told. Train some of the models on more or fewer tokens",
    )
    found = _search(_Runs(np.log(np.stack([n, d])), losses, delta), resamples, seed)
    laws = [
        ChinchillaLaw(E=float(c[0]), A=float(c[1]), B=float(c[2]), alpha=float(e[0]), beta=float(e[1]))
        for c, e in zip(found.coefficients, found.exponents)
    ]
    for name, factor, exponent in (("N", laws[0].A, laws[0].alpha), ("D", laws[0].B, laws[0].beta)):
        _expect_determined(name, factor, exponent)
    return Fit(laws[0], found.residuals, tuple(law for law in laws[1:] if law.A > 0 and law.B > 0))


def fit_power(
    x: npt.ArrayLike,  # (runs,) parameters without embeddings, tokens or FLOPs
    loss: npt.ArrayLike,  # (runs,) nats per token
    *,
    floor: bool = True,
    delta: float = 1e-3,
    resamples: int = 0,
    seed: int = 0,
) -> Fit[PowerLaw]:
    """Fit floor + (scale / x)^exponent to runs that vary x only, and have enough of everything else.

    Args:
        floor: fit a floor, as in Henighan's form; it is 0 if the runs show none. Without it the form is Kaplan's. Runs
            with losses far above a floor hardly show it, and the exponent is then uncertain too: see `Fit.interval`.
        delta, resamples, seed: as in `fit_chinchilla`.

    Raises:
        ValueError: fewer than 4 runs or 3 different x, numbers that are not above 0, or a loss that does not fall.
    """
    points, losses = _column("x", x), _column("loss", loss)
    expect(len(points) == len(losses), f"x and loss must have the same length; got {len(points)} and {len(losses)}")
    expect(len(points) >= 4, f"three constants need at least 4 runs; got {len(points)}")
    _expect_distinct("x", points)
    found = _search(_Runs(np.log(points)[None], losses, delta, constant=floor), resamples, seed)
    laws = [
        PowerLaw(scale=float(c[1] ** (1 / e[0])), exponent=float(e[0]), floor=float(c[0]))
        for c, e in zip(found.coefficients, found.exponents)
    ]
    _expect_determined("x", laws[0].scale, laws[0].exponent)
    return Fit(laws[0], found.residuals, tuple(law for law in laws[1:] if law.scale > 0))


# The search. R: fits made at once, of the runs as they are or of resamples. G: points of a grid of exponents. P: the
# exponents, 1 or 2. M: runs.


class _Runs:
    def __init__(self, logs: Array, loss: Array, delta: float, *, constant: bool = True) -> None:  # (P, M), (M,)
        expect(delta > 0, f"delta must be above 0; got {delta}")
        self.logs, self.loss, self.delta, self.constant = logs, loss, delta, constant
        self.middle = logs.mean(1, keepdims=True)
        self.x = logs - self.middle  # so that coefficients have the size of a loss

    def columns(self, exponents: Array) -> Array:
        """Map (..., P) to (..., 1 + P, M): 1, if there is a constant, and each x^-exponent."""
        powers = np.exp(-exponents[..., None] * self.x)
        return np.concatenate([np.full_like(powers[..., :1, :], float(self.constant)), powers], axis=-2)


@dataclass(frozen=True)
class _Found:
    exponents: Array  # (R, P)
    coefficients: Array  # (R, 1 + P)
    residuals: Array  # (M,) of the first fit


def _search(runs: _Runs, resamples: int, seed: int) -> _Found:
    """Fit the runs, and then resamples of them."""
    expect(resamples >= 0, f"resamples must not be negative; got {resamples}")
    P, M = runs.logs.shape
    counts = np.ones((1, M))
    axis = np.linspace(np.log(LOWEST), np.log(HIGHEST), 25)
    grid = np.array(list(itertools.product(axis, repeat=P)))[None]  # (1, G, P), logarithms of exponents
    best = _refined(_best(grid, runs, counts), axis[1] - axis[0], runs, counts)
    if resamples:
        drawn = _draw(runs, resamples, seed)
        best = np.concatenate([best, _refined(np.repeat(best, len(drawn), axis=0), 0.1, runs, drawn)])
        counts = np.concatenate([counts, drawn])

    exponents = np.exp(best)
    coefficients, predicted = _project(exponents[:, None], runs, counts)
    coefficients = coefficients[:, 0]
    coefficients[coefficients < 1e-9 * runs.loss.mean()] = 0.0  # rounding, of a loss that does not depend on x
    coefficients[:, 1:] *= np.exp(exponents * runs.middle[:, 0])
    return _Found(exponents, coefficients, np.log(predicted[0, 0] / runs.loss))


def _draw(runs: _Runs, resamples: int, seed: int) -> Array:
    """Draw how often each run counts, (<= resamples, M), without draws that could not be fitted."""
    M = len(runs.loss)
    drawn: npt.NDArray[np.int64] = np.random.default_rng(seed).multinomial(M, np.full(M, 1 / M), size=resamples)
    numbers = [distinct(np.exp(row)) for row in runs.logs]
    enough = [all(len(np.unique(row[counts > 0])) >= DISTINCT for row in numbers) for counts in drawn]
    return np.asarray(drawn[np.array(enough, dtype=bool)], dtype=np.float64)


def _refined(center: Array, step: float, runs: _Runs, counts: Array) -> Array:
    """Find the minimum near `center`, (R, P), with windows of 5 points per axis that move or shrink.

    A valley may lie across the axes, with its minimum outside a window that has only shrunk; so a window whose best
    point is on its edge moves and keeps its size.
    """
    window = np.array(list(itertools.product([-2.0, -1.0, 0.0, 1.0, 2.0], repeat=center.shape[1])))  # (5^P, P)
    center, steps = center.copy(), np.full((len(center), 1), step)
    for _ in range(200):
        left = steps[:, 0] > 1e-4
        if not left.any():
            break
        before, size = center[left], steps[left]
        grid = np.clip(before[:, None] + size[:, None] * window, np.log(LOWEST), np.log(HIGHEST))
        center[left] = _best(grid, runs, counts[left])
        on_edge = (np.abs(center[left] - before) > 1.5 * size).any(1, keepdims=True)
        steps[left] = np.where(on_edge, size, size / 2)
    return center


def _best(grid: Array, runs: _Runs, counts: Array) -> Array:  # grid: (R, G, P)
    """Return the point of each grid with the least sum of Huber losses, (R, P)."""
    _, predicted = _project(np.exp(grid), runs, counts)
    r, delta = np.abs(np.log(predicted / runs.loss)), runs.delta
    huber = np.where(r <= delta, 0.5 * r * r, delta * (r - 0.5 * delta))
    at = (huber * counts[:, None]).sum(-1).argmin(1)
    return np.take_along_axis(grid, at[:, None, None], axis=1)[:, 0]


def _project(exponents: Array, runs: _Runs, counts: Array) -> tuple[Array, Array]:
    """Find the best coefficients (R, G, 1 + P) for exponents (R, G, P), and what they predict, (R, G, M).

    Huber's loss by reweighted least squares: a residual r beyond delta counts delta / |r| as much as one within. The
    logarithm is followed by its tangent at the last prediction.
    """
    columns = runs.columns(exponents)
    predicted = np.broadcast_to(runs.loss, (*exponents.shape[:2], len(runs.loss)))
    coefficients = np.zeros(columns.shape[:-1])
    for _ in range(20):  # after 10 the exponents move in the fifth digit
        r = np.log(predicted / runs.loss)
        weights = counts[:, None] * np.minimum(1.0, runs.delta / np.maximum(np.abs(r), 1e-300))
        coefficients = _nonnegative(columns / predicted[..., None, :], weights, 1.0 - r)
        predicted = np.maximum((coefficients[..., None] * columns).sum(-2), 1e-300)
    return coefficients, predicted


def _nonnegative(columns: Array, weights: Array, target: Array) -> Array:
    """Solve weighted least squares with coefficients >= 0 exactly: the best free fit over all subsets of columns.

    Args: (R, G, K, M), (R, G, M), (R, G, M). Returns (R, G, K).
    """
    weighted = columns * weights[..., None, :]
    gram = weighted @ columns.swapaxes(-1, -2)  # (R, G, K, K)
    moment = (weighted @ target[..., None])[..., 0]  # (R, G, K)
    best = _solved(gram, moment)
    wrong = (best < 0).any(-1)  # few, near the minimum
    if wrong.any():
        best[wrong] = _best_subset(gram[wrong], moment[wrong])
    return best


def _best_subset(gram: Array, moment: Array) -> Array:  # (any, K, K), (any, K)
    K = moment.shape[1]
    best = np.zeros_like(moment)
    least = np.zeros(len(moment))  # of c G c - 2 c m, which is 0 for c = 0
    for size in range(1, K):
        for chosen in itertools.combinations(range(K), size):
            c = np.zeros_like(moment)
            index = np.array(chosen)
            c[:, index] = _solved(gram[:, index[:, None], index], moment[:, index])
            value = -(c * moment).sum(1)
            better = (c >= 0).all(1) & (value < least)
            best[better], least[better] = c[better], value[better]
    return best


def _solved(gram: Array, moment: Array) -> Array:
    """Return gram^-1 moment. Nearly equal columns, such as x^-0.01 and 1, share the weight; one of zeros gets 0."""
    ridge = 1e-13 * np.trace(gram, axis1=-2, axis2=-1)[..., None, None] * np.eye(gram.shape[-1])
    return np.linalg.solve(gram + ridge, moment[..., None])[..., 0].astype(np.float64, copy=False)


def distinct(x: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Assign numbers to the values of runs, (runs,), from the smallest on; values within 2 % of the next share one.

    Runs of the same length do not train on exactly the same number of labels.
    """
    values = np.log(_column("x", x))
    order = np.argsort(values, kind="stable")
    numbers = np.empty(len(values), dtype=np.int64)
    numbers[order] = np.concatenate([[0], np.cumsum(np.diff(values[order]) > 0.02)])
    return numbers


def _expect_distinct(name: str, x: Array) -> None:
    count = int(distinct(x).max()) + 1
    expect(
        count >= DISTINCT,
        f"{name} must take at least {DISTINCT} values, more than 2 % apart, for an exponent; got {count}",
    )


def _expect_determined(name: str, factor: float, exponent: float) -> None:
    expect(factor > 0, f"the loss of these runs does not fall with {name}")
    expect(
        1.01 * LOWEST < exponent < HIGHEST / 1.01,
        f"these runs do not determine an exponent of {name}: the best one is at an end of the searched range, "
        f"{LOWEST} to {HIGHEST}",
    )


def _column(name: str, values: npt.ArrayLike) -> Array:
    column = np.asarray(values, dtype=np.float64)
    expect(column.ndim == 1, f"{name} must be one-dimensional; got shape {column.shape}")
    wrong: Sequence[float] = column[~(np.isfinite(column) & (column > 0))].tolist()
    expect(not wrong, f"{name} must be finite and above 0; got {wrong[:3]}")
    return column
