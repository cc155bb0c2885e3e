"""Scaling laws against numbers that the papers print, and against a search."""

import dataclasses
import inspect
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.plan import (
    BESIROGLU,
    HENIGHAN_C,
    HENIGHAN_MATH_N,
    HENIGHAN_N,
    HOFFMANN,
    KAPLAN,
    KAPLAN_C,
    KAPLAN_D,
    KAPLAN_N,
    PF_DAY,
    ChinchillaLaw,
    PowerLaw,
    critical_batch,
    kaplan_optimal,
    laws,
    training_flops,
)
from llmfast.plan.laws import KaplanLaw

budgets = st.floats(1e15, 1e27)


DAY = 24 * 60 * 60 * 1e15  # of a petaflop/s
# Every law in `llmfast.plan.laws`, with the digits that its paper prints; compute in PF-days.
PRINTED: dict[str, ChinchillaLaw | KaplanLaw | PowerLaw] = {
    "BESIROGLU": ChinchillaLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658),
    "HOFFMANN": ChinchillaLaw(1.69, 406.4, 410.7, 0.34, 0.28),
    "KAPLAN_N": PowerLaw(8.8e13, 0.076),
    "KAPLAN_D": PowerLaw(5.4e13, 0.095),
    "KAPLAN_C": PowerLaw(3.1e8 * DAY, 0.050),
    "KAPLAN": KaplanLaw(N_c=6.4e13, D_c=1.8e13, alpha_N=0.076, alpha_D=0.103),
    "HENIGHAN_N": PowerLaw(1.47e14, 0.070),
    "HENIGHAN_C": PowerLaw(3.47e8 * DAY, 0.048),
    "HENIGHAN_MATH_N": PowerLaw(1.1e4, 0.16, 0.28),
    "HENIGHAN_MATH_C": PowerLaw(1.4e-5 * DAY, 0.17, 0.14),
}


def test_every_constant_is_as_printed() -> None:
    found = {name: law for name, law in vars(laws).items() if isinstance(law, ChinchillaLaw | KaplanLaw | PowerLaw)}
    assert found.keys() == PRINTED.keys()
    assert laws.FITTED == (70e6, 16e9)  # "from 70 million to over 16 billion parameters"
    for name, law in found.items():
        assert dataclasses.asdict(law) == pytest.approx(dataclasses.asdict(PRINTED[name]), rel=1e-12), name
    numbers = {name for name, value in vars(laws).items() if isinstance(value, int | float)}
    assert numbers == {"PF_DAY"} and laws.PF_DAY == 8.64e19
    defaults = {name: p.default for name, p in inspect.signature(critical_batch).parameters.items()}
    assert defaults == {"loss": inspect.Parameter.empty, "scale": 2e8, "exponent": 0.21}


def test_besiroglus_refit_at_1e21_flops() -> None:
    best = BESIROGLU.optimal(1e21)
    assert f"{best.params:.2e} {best.tokens:.1e} {best.tokens_per_param:.1f}" == "2.78e+09 6.0e+10 21.6"
    # 1.8172 + 482.01 / 2.778459e9^0.3478 + 2085.43 / 5.998528e10^0.3658 = 1.8172 + 0.25032 + 0.23801
    assert best.loss == pytest.approx(2.30553, abs=1e-5)


def test_hoffmanns_printed_constants_give_50_tokens_per_parameter() -> None:
    assert HOFFMANN.optimal(1e21).tokens_per_param == pytest.approx(50.08, abs=0.01)


@pytest.mark.parametrize(
    ("name", "N", "D", "loss"),
    [
        ("Chinchilla", 70e9, 1.4e12, 1.69 + 0.083487 + 0.163158),
        ("Gopher", 280e9, 300e9, 1.69 + 0.052110 + 0.251149),
    ],
)
def test_hoffmanns_law_term_by_term(name: str, N: float, D: float, loss: float) -> None:
    assert HOFFMANN.loss(N, D) == pytest.approx(loss, abs=2e-6)


@pytest.mark.parametrize(
    ("law", "x", "loss"),
    [
        (KAPLAN_N, 1.5e9, 2.303551),  # exp(0.076 ln(58666.7))
        (KAPLAN_N, 175e9, 1.604389),  # exp(0.076 ln(502.857))
        (KAPLAN_D, 2.29e10, 2.091188),  # exp(0.095 ln(2358.08)), all of WebText2
        (KAPLAN_C, PF_DAY, 2.658080),  # exp(0.050 ln(3.1e8))
        (KAPLAN_C, 3640 * PF_DAY, 1.764059),  # exp(0.050 ln(85164.8)), GPT-3's compute
        (HENIGHAN_N, 175e9, 1.602137),  # exp(0.070 ln(840))
        (HENIGHAN_C, 3640 * PF_DAY, 1.733816),  # exp(0.048 ln(95329.7))
        (HENIGHAN_MATH_N, 1e8, 0.28 + 0.232607),  # exp(0.16 ln(1.1e-4))
    ],
)
def test_laws_of_one_variable(law: PowerLaw, x: float, loss: float) -> None:
    assert law.loss(x) == pytest.approx(loss, abs=2e-6)
    assert law.needed(law.loss(x)) == pytest.approx(x, rel=1e-9)


def test_kaplans_law_of_both() -> None:
    # 64000^(0.076 / 0.103) = 3518.09 and 1.8e13 / 1e10 = 1800; exp(0.103 ln(5318.09))
    assert KAPLAN.loss(1e9, 1e10) == pytest.approx(2.419652, abs=2e-6)
    # With data without end it is a law of N alone, and the paper's 5e3 N^0.74 tokens keep the loss within 2 % of that.
    assert KAPLAN.loss(1e9, 1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076)
    for N in (1e7, 1e9):
        assert KAPLAN.loss(N, 5e3 * N**0.74) / KAPLAN.loss(N, 1e30) == pytest.approx(1.02, abs=0.003)


def test_kaplans_allocation_is_table_6() -> None:
    at_one = kaplan_optimal(2 * PF_DAY)  # C_min is half of it
    assert at_one.params == pytest.approx(1.3e9)
    assert at_one.tokens == pytest.approx(2e10, rel=0.15)  # printed with one digit
    assert at_one.loss == pytest.approx(2.65808, abs=2e-6)
    assert kaplan_optimal(2e1 * PF_DAY).params / at_one.params == pytest.approx(10**0.73)
    assert at_one.flops == pytest.approx(2 * PF_DAY)


def test_critical_batch() -> None:
    assert critical_batch(3.0) == pytest.approx(1.06911e6, rel=1e-4)  # 2e8 exp(-ln(3) / 0.21)
    assert critical_batch(1.0) == 2e8
    # "roughly doubling for every 13 % decrease in loss"
    assert critical_batch(0.87 * 2.5) / critical_batch(2.5) == pytest.approx(2, abs=0.1)


@given(budget=budgets, factor=st.floats(1.001, 1000), smaller=st.booleans())
def test_no_other_size_is_better_for_the_budget(budget: float, factor: float, smaller: bool) -> None:
    for law in (BESIROGLU, HOFFMANN):
        best = law.optimal(budget)
        assert best.flops == pytest.approx(budget)
        other = law.spent(best.params / factor if smaller else best.params * factor, budget)
        assert other.flops == pytest.approx(budget)
        assert other.loss > best.loss


@given(budget=budgets)
def test_the_best_size_and_length_lead_back_to_the_budget(budget: float) -> None:
    best = BESIROGLU.optimal(budget)
    for again in (BESIROGLU.optimal_for_params(best.params), BESIROGLU.optimal_for_tokens(best.tokens)):
        assert again.params == pytest.approx(best.params)
        assert again.tokens == pytest.approx(best.tokens)
        assert again.loss == pytest.approx(best.loss)


@given(budget=budgets)
def test_optimal_sizes_are_a_power_of_the_budget(budget: float) -> None:
    growth = BESIROGLU.optimal(10 * budget).params / BESIROGLU.optimal(budget).params
    assert math.log10(growth) == pytest.approx(0.3658 / (0.3478 + 0.3658))  # 0.513: nearly the square root


def test_refuses() -> None:
    law = ChinchillaLaw(1.0, 1.0, 1.0, 0.3, 0.3)
    for call, name in (
        (lambda: training_flops(0, 1), "N"),
        (lambda: law.loss(1, -1), "D"),
        (lambda: law.optimal(0), "flops"),
        (lambda: law.optimal_for_params(math.inf), "N"),
        (lambda: law.optimal_for_tokens(-1), "D"),
        (lambda: kaplan_optimal(math.nan), "flops"),
        (lambda: KAPLAN.loss(0, 1), "N"),
        (lambda: KAPLAN_N.loss(0), "x"),
        (lambda: critical_batch(0), "loss"),
        (lambda: critical_batch(3, scale=-1), "scale"),
        (lambda: critical_batch(3, exponent=0), "exponent"),
        (lambda: critical_batch(3, exponent=-0.21), "exponent"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a finite number above 0"):
            call()
    with pytest.raises(ValueError, match=r"loss must be above the law's floor of 0\.28; got 0\.2"):
        HENIGHAN_MATH_N.needed(0.2)


@pytest.mark.parametrize("law", [BESIROGLU, HOFFMANN])
def test_sizes_that_hardly_differ(law: ChinchillaLaw) -> None:
    best = law.optimal(1e21)
    low, high = law.sizes_within(1e21, 0.02)
    assert low < best.params < high
    for N in (low, high):
        assert law.spent(N, 1e21).loss == pytest.approx(best.loss + 0.02, abs=1e-6)
    narrow = law.sizes_within(1e21, 0.001)
    assert low < narrow[0] < best.params < narrow[1] < high
    with pytest.raises(ValueError, match="slack must be a finite number above 0; got 0"):
        law.sizes_within(1e21, 0)
