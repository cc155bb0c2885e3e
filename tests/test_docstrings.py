"""Formulas and figures in docstrings of laws, rules and options: each gives what the code does."""

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmfast import plan
from llmfast.models import memory
from llmfast.optim import Extras, FusedAdamW, FusedLion
from llmfast.plan import fit, laws, optimal_batch, optimal_lr, scale_lr
from llmfast_kernels.sizes import PER_SCALE

C, N, D, LOSS = 3e21, 2e9, 5e10, 2.3
LAW = laws.ChinchillaLaw(E=1.5, A=300.0, B=700.0, alpha=0.31, beta=0.27)
KAPLAN = laws.KaplanLaw(N_c=6e13, D_c=2e13, alpha_N=0.07, alpha_D=0.11)
POWER = laws.PowerLaw(scale=3e9, exponent=0.2, floor=0.4)


def words_of(documented: Any) -> str:
    return " ".join((inspect.getdoc(documented) or "").replace("`", "").split())


def value_of(formula: str, **numbers: Any) -> Any:
    """Compute a formula in which ^ is a power and a space multiplies."""
    formula = re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula.replace("^", "**"))
    return eval(formula, {"__builtins__": {}}, numbers)


def formula_of(documented: Any, pattern: str) -> str:
    """Return what a pattern's group finds in a docstring."""
    found = re.search(pattern, words_of(documented))
    assert found, f"the docstring of {documented} has no {pattern}"
    return found[1]


# What is documented, where the formula is in its docstring, the numbers in it, and what the code gives.
FORMULAS: dict[str, tuple[Any, str, dict[str, float], Callable[[], float]]] = {
    "optimal_batch": (optimal_batch, r"FLOPs: ([^:]*?)\. ", {"C": C}, lambda: optimal_batch(C)),
    "optimal_lr": (optimal_lr, r"optimal_batch: ([^:]*?), by", {"C": C}, lambda: optimal_lr(C)),
    "scale_lr, linear": (
        *(scale_lr, r'"linear" is (.*?), for SGD', {"lr": 0.3, "batch": 96, "base_batch": 8}),
        lambda: scale_lr(0.3, 96, 8, "linear"),
    ),
    "scale_lr, sqrt": (
        *(scale_lr, r'"sqrt" is (.*?), for Adam', {"lr": 0.3, "batch": 96, "base_batch": 8}),
        lambda: scale_lr(0.3, 96, 8, "sqrt"),
    ),
    "training_flops": (laws.training_flops, r"C = (.*?), without", {"N": N, "D": D}, lambda: 6 * N * D),
    "critical_batch": (
        *(laws.critical_batch, r"B_crit = (.*?)\. ", {"scale": 1e8, "loss": LOSS, "exponent": 0.2}),
        lambda: laws.critical_batch(LOSS, scale=1e8, exponent=0.2),
    ),
    "PowerLaw": (laws.PowerLaw, r"L\(x\) = (.*?), where", {**vars(POWER), "x": 7e6}, lambda: POWER.loss(7e6)),
    "KaplanLaw": (
        *(laws.KaplanLaw, r"L\(N, D\) = (.*?) \(arXiv", {**vars(KAPLAN), "N": N, "D": D}),
        lambda: KAPLAN.loss(N, D),
    ),
    "ChinchillaLaw": (
        *(laws.ChinchillaLaw, r"L\(N, D\) = (.*?) \(Hoff", {**vars(LAW), "N": N, "D": D}),
        lambda: LAW.loss(N, D),
    ),
    "optimal": (
        *(laws.ChinchillaLaw.optimal, r" N = (G .*?), where", {**vars(LAW), "C": C, "G": LAW._balance}),
        lambda: LAW.optimal(C).params,
    ),
    "balance": (laws.ChinchillaLaw.optimal, r"where G = (.*?): there", vars(LAW), lambda: LAW._balance),
    "kaplan_optimal, N": (
        *(laws.kaplan_optimal, r"N = (.*?) in PF-days", {"C_min": C / 2 / laws.PF_DAY}),
        lambda: laws.kaplan_optimal(C).params,
    ),
    "kaplan_optimal, D": (
        *(laws.kaplan_optimal, r"D = (.*?)\. ", {"flops": C, "N": laws.kaplan_optimal(C).params}),
        lambda: laws.kaplan_optimal(C).tokens,
    ),
    "kaplan_optimal, C_min": (
        *(laws.kaplan_optimal, r"here C_min is (.*?), and", {"flops": C}),
        lambda: laws.PF_DAY * (laws.kaplan_optimal(C).params / 1.3e9) ** (1 / 0.73),
    ),
    "Allocation.flops": (
        *(laws.Allocation.flops, r"^(.*)\.$", {"N": N, "D": D}),
        lambda: laws.Allocation(N, D, 2.0).flops,
    ),
    "Run.flops": (
        *(plan.Run.flops, r"^(.*)\.$", {"N": 7, "D": 11}),
        lambda: plan.Run("run", params=7, non_embedding=5, tokens=11, loss=2.0).flops,
    ),
    "fit_chinchilla": (
        *(fit.fit_chinchilla, r"Fit (.*?) to runs", {**vars(LAW), "N": N, "D": D}),
        lambda: LAW.loss(N, D),
    ),
    "fit_power": (fit.fit_power, r"Fit (.*?) to runs", {**vars(POWER), "x": 7e6}, lambda: POWER.loss(7e6)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_formula_gives_what_the_code_does(name: str) -> None:
    documented, pattern, numbers, computed = FORMULAS[name]
    assert value_of(formula_of(documented, pattern), **numbers) == pytest.approx(computed(), rel=1e-12)


def test_lion_is_what_its_docstring_says() -> None:
    numbers: dict[str, Any] = {"lr": 0.25, "beta1": 0.75, "beta2": 0.5, "weight_decay": 0.125}
    p, g, average = torch.tensor([2.0, -1.0, 3.0]), torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-8.0, 1.0, 0.0])
    numbers |= {"p": p, "g": g, "exp_avg": average, "sign": torch.sign}
    fall = value_of(formula_of(FusedLion, r"p decreases by (.*?), and then exp_avg"), **numbers)
    later = value_of(formula_of(FusedLion, r"exp_avg becomes (.*?)\. "), **numbers)
    q = torch.nn.Parameter(p.clone())
    optimizer = FusedLion([q], lr=0.25, betas=(0.75, 0.5), weight_decay=0.125)
    q.grad = g
    optimizer.state[q]["exp_avg"] = average.clone()
    optimizer.step()
    torch.testing.assert_close(q.detach(), p - fall)
    torch.testing.assert_close(optimizer.state[q]["exp_avg"], later)


@pytest.mark.parametrize("decay", ["lr", "independent", "relative"])
def test_decay_is_what_the_docstring_says(decay: Any) -> None:
    text = {"lr": r'"lr": (.*?), as in torch', "independent": r'"independent": (.*?) for every lr'}
    formula = formula_of(FusedAdamW, text.get(decay, r'"relative": (.*?), where'))
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = FusedAdamW([p], lr=0.5, weight_decay=0.125, decay=decay)
    optimizer.param_groups[0]["lr"], p.grad = 0.125, torch.zeros(2)
    optimizer.step()
    assert 1 - p[0].item() == value_of(formula, lr=0.125, weight_decay=0.125, lr_max=0.5)


def test_an_average_is_what_the_docstring_says() -> None:
    formula = formula_of(Extras, r", ema = (.*?), in state")
    p = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = FusedAdamW([p], lr=0.5, ema_decay=0.75)
    for step in range(3):
        before = optimizer.state[p]["ema_param"].clone() if step else p.detach().clone()
        p.grad = torch.ones(1)
        optimizer.step()
        wanted = value_of(formula, ema=before, p=p.detach(), ema_decay=0.75)
        torch.testing.assert_close(optimizer.state[p]["ema_param"], wanted)


def refuses(call: Callable[[], object]) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


def test_fits_need_as_many_runs_as_their_docstrings_say() -> None:
    runs, values = map(int, re.findall(r"fewer than (\d+)", words_of(fit.fit_chinchilla)))
    n = [1e7, 3e7, 9e7, 1e7, 3e7, 9e7, 1e7, 3e7, 9e7][:runs]
    d = [1e9, 3e9, 9e9, 9e9, 1e9, 3e9, 3e9, 9e9, 1e9][:runs]
    losses = [plan.BESIROGLU.loss(*pair) for pair in zip(n, d)]
    assert not refuses(lambda: fit.fit_chinchilla(n, d, losses))
    assert refuses(lambda: fit.fit_chinchilla(n[1:], d[1:], losses[1:]))
    few = [[*n[: values - 1] * runs][:runs], d]
    assert refuses(lambda: fit.fit_chinchilla(few[0], few[1], losses)) and len({*n}) == values
    found = re.search(r"fewer than (\d+) runs or (\d+) different x", words_of(fit.fit_power))
    assert found
    runs, values = map(int, found.groups())
    x = [1e7, 3e7, 9e7, 9e7][:runs]
    losses = [plan.KAPLAN_N.loss(v) for v in x]
    assert len({*x}) == values and not refuses(lambda: fit.fit_power(x, losses, floor=False))
    assert refuses(lambda: fit.fit_power(x[1:], losses[1:], floor=False))
    assert refuses(lambda: fit.fit_power([1e7, 1e7, *x[2:]], losses, floor=False))


def test_runs_are_as_far_apart_or_off_as_the_docstrings_say() -> None:
    apart = float(formula_of(fit.distinct, r"values within (\d+) % of")) / 100
    numbers = fit.distinct([1e7, 1e7 * math.exp(0.99 * apart), 2e7, 2e7 * math.exp(1.01 * apart)])
    assert numbers.tolist() == [0, 0, 1, 2]
    words = words_of(fit.Fit.outliers)
    least = float(formula_of(fit.Fit.outliers, r"by more than (\d+) %")) / 100
    deviations = {"five": 5}[formula_of(fit.Fit.outliers, r"by (\w+) standard deviations")]
    assert words.endswith("estimated by the median.")
    for typical in (0.001, 0.03):  # a normal deviation is 1.4826 times the median of sizes
        most = max(least, deviations * 1.4826 * typical)
        residuals = np.array([typical, -typical, typical, 0.999 * most, -1.001 * most])
        assert fit.Fit(LAW, residuals, ()).outliers == [4]


def test_figures_in_docstrings_are_the_codes() -> None:
    assert f"where {PER_SCALE} elements share a float32 scale" in words_of(Extras)
    most = max(share for share in range(101) if memory.fits(share, 100))
    assert most == 90 and "leave a tenth of it free" in words_of(memory.fits)
    best, source = laws.HOFFMANN.optimal(1e21), " ".join(inspect.getsource(laws).split())
    assert f"optimum at 1e21 FLOPs has {best.tokens_per_param:.0f} tokens per parameter" in source
    # Where steps and tokens are each twice their minimum, they are on (S / S_min - 1) (D / D_min - 1) = 1.
    times = {"twice": 2}[formula_of(laws.critical_batch, r"takes (\w+) the minimum of steps")]
    assert (times - 1) * (times - 1) == 1
    of_run = {"twice": 2}[formula_of(laws.kaplan_optimal, r"a run takes (\w+) that")]
    assert laws.kaplan_optimal(C).loss == pytest.approx(laws.KAPLAN_C.loss(C / of_run), rel=1e-12)
