"""Fits of runs that follow a known law.

The noise is 0.5 % of the loss, about as much as two seeds of a run differ by. The 64 runs below were drawn with 300
seeds: 98.7 % of the fits gave both exponents within 2 %, and all within 2.4 %. With one run off by 20 % in addition, it
was 99 %, and all within 2.2 %.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.plan import (
    BESIROGLU,
    ChinchillaLaw,
    PowerLaw,
    fit_chinchilla,
    fit_power,
    plot_chinchilla,
    plot_power,
)
from llmfast.plan.fit import Fit, distinct

Array = np.ndarray[Any, np.dtype[np.float64]]
NOISE = 0.005


def runs(law: ChinchillaLaw, seed: int, noise: float = NOISE, grid: int = 8) -> tuple[Array, Array, Array]:
    """Create runs of 1 M to 10 B parameters, each trained on 10 M to 100 B tokens."""
    N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e6, 1e10, grid), np.geomspace(1e7, 1e11, grid)))
    losses = np.array([law.loss(n, d) for n, d in zip(N, D)])
    return N, D, losses * np.exp(np.random.default_rng(seed).normal(0, noise, N.shape))


def curve(law: PowerLaw, seed: int, noise: float = NOISE) -> tuple[Array, Array]:
    x = np.geomspace(1e6, 1e10, 30)
    losses = np.array([law.loss(v) for v in x])
    return x, losses * np.exp(np.random.default_rng(seed).normal(0, noise, x.shape))


def huber(law: ChinchillaLaw, N: Array, D: Array, loss: Array, delta: float = 1e-3) -> float:
    return float(huber_of(np.log([law.loss(n, d) for n, d in zip(N, D)]) - np.log(loss), delta))


def huber_of(residuals: Array, delta: float) -> Any:
    """Sum over the last axis."""
    r = np.abs(residuals)
    return np.where(r <= delta, 0.5 * r**2, delta * (r - 0.5 * delta)).sum(-1)


@pytest.mark.parametrize("outlier", [False, True])
def test_planted_exponents_come_back_within_2_percent(outlier: bool) -> None:
    within = 0
    for seed in range(12):
        N, D, loss = runs(BESIROGLU, seed)
        if outlier:
            loss[seed] *= 1.2  # a run gone wrong
        fit = fit_chinchilla(N, D, loss)
        errors = fit.law.alpha / BESIROGLU.alpha - 1, fit.law.beta / BESIROGLU.beta - 1
        assert max(map(abs, errors)) < 0.025, seed
        within += max(map(abs, errors)) < 0.02
        assert abs(fit.law.E / BESIROGLU.E - 1) < 0.05
        best, truth = fit.law.optimal(1e21).params, BESIROGLU.optimal(1e21).params
        assert best == pytest.approx(truth, rel=0.2)
        assert fit.outliers == ([seed] if outlier else [])
    assert within >= 11


def test_with_less_noise_all_exponents_come_back_within_2_percent() -> None:
    """The noise is 0.2 %: at 0.5 %, three standard deviations of the best possible estimate already reach 2 %."""
    for seed in range(12):
        fit = fit_chinchilla(*runs(BESIROGLU, seed, noise=0.002))
        for found, planted in ((fit.law.alpha, BESIROGLU.alpha), (fit.law.beta, BESIROGLU.beta)):
            assert found == pytest.approx(planted, rel=0.02), seed


@settings(max_examples=10)
@given(
    E=st.floats(0.5, 3),
    A=st.floats(50, 1000),
    B=st.floats(50, 3000),
    alpha=st.floats(0.2, 0.5),
    beta=st.floats(0.2, 0.5),
)
def test_without_noise_it_is_exact(E: float, A: float, B: float, alpha: float, beta: float) -> None:
    law = ChinchillaLaw(E, A, B, alpha, beta)
    N, D, loss = runs(law, 0, noise=0.0, grid=4)
    found = fit_chinchilla(N, D, loss)
    assert np.abs(found.residuals).max() < 2e-4
    assert found.law.alpha == pytest.approx(alpha, rel=2e-3)
    assert found.law.beta == pytest.approx(beta, rel=2e-3)


def test_no_law_nearby_has_a_smaller_huber_loss() -> None:
    N, D, loss = runs(BESIROGLU, 3)
    loss[10] *= 1.3
    law = fit_chinchilla(N, D, loss).law
    least = huber(law, N, D, loss)
    rng = np.random.default_rng(0)
    for size in (1e-3, 1e-2, 1e-1):
        for _ in range(100):
            E, A, B, alpha, beta = (
                value * float(np.exp(size * rng.normal())) for value in (law.E, law.A, law.B, law.alpha, law.beta)
            )
            # Move along the valley of the loss, where a factor compensates for its exponent.
            A *= float(np.exp(np.log(N).mean() * (alpha - law.alpha)))
            B *= float(np.exp(np.log(D).mean() * (beta - law.beta)))
            assert huber(ChinchillaLaw(E, A, B, alpha, beta), N, D, loss) > least * (1 - 1e-6)


@pytest.mark.parametrize("delta", [0.3 * NOISE, NOISE, 3 * NOISE])
def test_a_law_without_a_floor_has_the_least_huber_loss_of_all(delta: float) -> None:
    """Its logarithm is a straight line, so that the loss is convex and a grid that shrinks finds its minimum."""
    for seed in range(6):
        x, loss = curve(PowerLaw(8.8e13, 0.076), seed)
        loss[seed] *= 1.2
        along, wanted = np.log(x) - np.log(x).mean(), np.log(loss)
        low, high = np.array([-1.0, wanted.min()]), np.array([0.0, wanted.max()])
        while (high - low).max() > 1e-10:
            slopes, heights = (np.linspace(*ends, 33) for ends in zip(low, high))
            found = huber_of(slopes[:, None, None] * along + heights[None, :, None] - wanted, delta)
            i, j = np.unravel_index(found.argmin(), found.shape)
            width = 0.15 * (high - low)
            low, high = np.array([slopes[i], heights[j]]) - width, np.array([slopes[i], heights[j]]) + width
        law = fit_power(x, loss, floor=False, delta=delta).law
        fitted = huber_of(np.log([law.loss(v) for v in x]) - wanted, delta)
        assert fitted == pytest.approx(found.min(), rel=1e-5), seed


def test_intervals_hold_the_truth_and_are_wider_for_fewer_runs() -> None:
    many = fit_chinchilla(*runs(BESIROGLU, 1, grid=6), resamples=30)
    few = fit_chinchilla(*runs(BESIROGLU, 1, grid=4), resamples=30)
    assert len(many.resampled) == 30
    widths = []
    for fit in (many, few):
        low, high = fit.interval(lambda law: law.alpha)
        assert low < BESIROGLU.alpha < high
        low, high = fit.interval(lambda law: law.beta)
        assert low < BESIROGLU.beta < high
        widths.append(high - low)
    assert widths[1] > 1.3 * widths[0]
    low, high = many.interval(lambda law: law.optimal(1e21).params, level=0.9)
    assert low < BESIROGLU.optimal(1e21).params < high
    again, other = (fit_chinchilla(*runs(BESIROGLU, 1, grid=4), resamples=3, seed=seed) for seed in (0, 1))
    assert again.resampled == few.resampled[:3] and again.resampled != other.resampled


def test_an_interval_leaves_out_equal_shares_on_both_sides() -> None:
    fit = Fit(PowerLaw(1.0, 0.5), np.zeros(4), tuple(PowerLaw(float(i + 1), 0.5) for i in range(101)))
    for level, low, high in ((0.95, 3.5, 98.5), (0.5, 26.0, 76.0), (0.2, 41.0, 61.0)):
        assert fit.interval(lambda law: law.scale, level) == pytest.approx((low, high))
    assert fit.interval(lambda law: law.scale) == fit.interval(lambda law: law.scale, 0.95)


@pytest.mark.parametrize(("truth", "floor"), [(PowerLaw(1e9, 0.3, 1.5), True), (PowerLaw(8.8e13, 0.076), False)])
def test_planted_exponent_of_one_variable(truth: PowerLaw, floor: bool) -> None:
    within = 0
    for seed in range(12):
        x, loss = curve(truth, seed)
        loss[seed] *= 1.15
        fit = fit_power(x, loss, floor=floor)
        error = abs(fit.law.exponent / truth.exponent - 1)
        assert error < 0.03, seed
        within += error < 0.02
        assert fit.law.floor == pytest.approx(truth.floor, abs=0.05)
        assert fit.outliers == [seed]
    assert within >= 11


def test_interval_of_one_variable() -> None:
    truth = PowerLaw(1e9, 0.3, 1.5)
    fit = fit_power(*curve(truth, 0), resamples=50)
    low, high = fit.interval(lambda law: law.exponent)
    assert low < 0.3 < high and high - low < 0.05


def test_numbers_within_2_percent_count_as_one() -> None:
    assert distinct([100.0, 1.0, 101.0, 1.01, 50.0]).tolist() == [2, 0, 2, 0, 1]


def test_pictures(tmp_path: Path) -> None:
    N, D, loss = runs(BESIROGLU, 0, grid=4)
    loss[3] *= 1.2
    plot_chinchilla(fit_chinchilla(N, D, loss), list(N), list(D), list(loss), tmp_path / "fit.png")
    x, losses = curve(PowerLaw(1e9, 0.3, 1.5), 0)
    plot_power(fit_power(x, losses), list(x), list(losses), tmp_path / "power.svg", xlabel="tokens D")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "power.svg").read_text()
    with pytest.raises(ValueError, match="x must be of the fit's 30 runs; got 1"):
        plot_power(fit_power(x, losses), [1.0], [1.0], tmp_path / "no.png", xlabel="N")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """List the two axes of each picture that is written."""
    found: list[Any] = []
    monkeypatch.setattr("llmfast.plan.picture._save", lambda figure, picture: found.append(figure.axes[:2]))
    return found


def points_of(axes: Any) -> list[Array]:
    return [np.asarray(some.get_offsets().T) for some in axes.collections]


def test_a_picture_shows_the_runs_and_the_law(drawn: list[Any], tmp_path: Path) -> None:
    N, D, loss = runs(BESIROGLU, 0, grid=4)
    loss[3] *= 1.2
    fit = fit_chinchilla(N, D, loss)
    plot_chinchilla(fit, list(N), list(D), list(loss), tmp_path / "fit.png")
    above, below = drawn[0]
    shown, rings = points_of(above)
    np.testing.assert_allclose(shown, [6 * N * D, loss])
    np.testing.assert_allclose(rings, [6 * N[[3]] * D[[3]], loss[[3]]])
    np.testing.assert_allclose(points_of(below)[0], [6 * N * D, 100 * fit.residuals])
    *sizes, best, floor = above.lines
    for line, size in zip(sizes, np.unique(N)):
        x, y = line.get_data()
        np.testing.assert_allclose(y, [fit.law.spent(size, flops).loss for flops in x])
    x, y = best.get_data()
    assert (x[0], x[-1]) == pytest.approx(((6 * N * D).min(), 10 * (6 * N * D).max()))
    np.testing.assert_allclose(y, [fit.law.optimal(flops).loss for flops in x])
    assert set(floor.get_ydata()) == {fit.law.E}


def test_a_picture_of_one_variable_shows_the_runs_and_the_law(drawn: list[Any], tmp_path: Path) -> None:
    x, loss = curve(PowerLaw(1e9, 0.3, 1.5), 0)
    fit = fit_power(x, loss)
    plot_power(fit, list(x), list(loss), tmp_path / "power.svg", xlabel="tokens D")
    above, below = drawn[0]
    np.testing.assert_allclose(points_of(above)[0], [x, loss])
    np.testing.assert_allclose(points_of(below)[0], [x, 100 * fit.residuals])
    line, floor = above.lines
    np.testing.assert_allclose(line.get_ydata(), [fit.law.loss(at) for at in line.get_xdata()])
    assert set(floor.get_ydata()) == {fit.law.floor} and below.get_xlabel() == "tokens D"


def test_refuses_runs_that_do_not_determine_a_law() -> None:
    N, D, loss = runs(BESIROGLU, 0, grid=4)
    one = np.full_like(N, 1e9)
    for arguments, message in (
        ((N[:5], D[:5], loss[:5]), "five constants need at least 6 runs; got 5"),
        ((N, D, loss[:-1]), "N, D and loss must have the same length; got 16, 16, 15"),
        ((one, D, loss), "N must take at least 3 values, more than 2 % apart, for an exponent; got 1"),
        ((N, one * np.linspace(1, 1.01, 16), loss), "D must take at least 3 values"),
        ((N, 20 * N, loss), "vary only together"),
        ((N, D, -loss), r"loss must be finite and above 0; got \["),
        ((N, np.where(D.max() == D, 0, D), loss), r"D must be finite and above 0; got \[0.0"),
        ((N, D, loss * np.nan), "loss must be finite"),
        ((N[None], D, loss), r"N must be one-dimensional; got shape \(1, 16\)"),
        ((N, D, 1 + N / N.max()), "the loss of these runs does not fall with"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_chinchilla(*arguments)
    x, losses = curve(PowerLaw(1e9, 0.3, 1.5), 0)
    for points, given_losses, message in (
        (x[:3], losses[:3], "three constants need at least 4 runs; got 3"),
        (x, losses[:4], "x and loss must have the same length; got 30 and 4"),
        (x * 0 + 1, losses, "x must take at least 3 values"),
        (x, losses[::-1], "the loss of these runs does not fall with x"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_power(points, given_losses)
    with pytest.raises(ValueError, match="delta must be above 0; got 0"):
        fit_power(x, losses, delta=0)
    with pytest.raises(ValueError, match="resamples must not be negative; got -1"):
        fit_power(x, losses, resamples=-1)
    with pytest.raises(ValueError, match="an interval needs resampled laws"):
        fit_power(x, losses).interval(lambda law: law.exponent)
    with pytest.raises(ValueError, match="level must be between 0 and 1; got 95"):
        fit_power(x, losses, resamples=5).interval(lambda law: law.exponent, level=95)


def test_refuses_exponents_at_the_end_of_the_search() -> None:
    x = np.geomspace(1e6, 1e7, 20)
    with pytest.raises(ValueError, match="do not determine an exponent of x"):
        fit_power(x, 2 + 3 * (1e6 / x) ** 6)
