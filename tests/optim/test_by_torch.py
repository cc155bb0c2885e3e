"""Parameters that go by torch's own functions, with settings combined so that any two values meet, against torch.

They are complex, have sparse gradients, or are stepped differentiably. The truth is torch's optimizer with gradients
that are unscaled and clipped beforehand; Lion, which torch does not have, is computed from the paper's two formulas.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedRMSprop, FusedSGD
from support.launched import unrecorded
from support.pairs import Case, covering
from support.training import scaled

# Settings of an optimizer's own; the first value is for those that have none of that name.
OWN: dict[str, tuple[tuple[type, ...], list[Any]]] = {
    "weight_decay": ((FusedAdam, FusedAdamW, FusedSGD, FusedRMSprop, FusedAdagrad, FusedLion), [0.0, 0.25]),
    "betas": ((FusedAdam, FusedAdamW, FusedLion), [None, (0.5, 0.75), (0.25, 0.5)]),
    "amsgrad": ((FusedAdam, FusedAdamW), [False, True]),
    "decoupled_weight_decay": ((FusedAdam,), [False, True]),
    "decay": ((FusedAdamW, FusedLion), ["lr", "independent", "relative"]),
    "momentum": ((FusedSGD, FusedRMSprop), [0, 0.75]),
    "dampening": ((FusedSGD,), [0, 0.25]),
    "nesterov": ((FusedSGD,), [False, True]),
    "centered": ((FusedRMSprop,), [False, True]),
    "lr_decay": ((FusedAdagrad,), [0.0, 0.5]),
    "initial_accumulator_value": ((FusedAdagrad,), [0.0, 0.5]),
}
FACTORS: dict[str, list[Any]] = {
    "path": ["plain", "kernels"],
    "kind": ["complex", "sparse", "differentiable"],
    "cls": [FusedAdamW, FusedAdam, FusedSGD, FusedRMSprop, FusedAdagrad, FusedLion],
    "lr": [0.125, torch.tensor(0.125), torch.tensor([0.125])],
    "maximize": [False, True],
    **{name: values for name, (_, values) in OWN.items()},
    "max_grad_norm": [None, 0.5, math.inf],
    "scale": [None, 4.0],
    "skip_at": [None, 0, 1],
    "ema_decay": [None, 0.75],
    "zero_grads": [False, True],
    "beside": [False, True],
}


def possible(case: Case) -> bool:
    given, cls, kind = case.get, case.get("cls"), case.get("kind")
    return (
        (cls is None or all(given(n, v[0]) is v[0] for n, (those, v) in OWN.items() if cls not in those))
        and not (kind == "sparse" and (cls not in (None, FusedSGD, FusedAdagrad) or given("weight_decay")))
        and not (kind == "sparse" and any(given(n, v[0]) is not v[0] for n, (t, v) in OWN.items() if not {*t} & SPARSE))
        and not (kind == "differentiable" and (cls is FusedLion or given("amsgrad") or given("centered")))
        and not (cls in OWN["betas"][0] and given("betas", 1) is None)  # torch's float32 counter is inexact with 0.999
        and not (kind == "complex" and given("ema_decay") is not None)
        and not (given("nesterov") and (given("momentum", 1) == 0 or given("dampening", 0) > 0))
        and not (given("skip_at") is not None and "scale" in case and case["scale"] is None)
    )


SPARSE = {FusedSGD, FusedAdagrad}
CASES = covering(FACTORS, possible)


def gradient(case: Case, step: int) -> Tensor:
    """Return a gradient that is dense; where sparse ones are asked for, some of its rows are zero."""
    generator = torch.Generator().manual_seed(step)
    g = torch.randn(5, 3, dtype=torch.complex64 if case["kind"] == "complex" else torch.float32, generator=generator)
    if case["kind"] == "sparse":
        g[[1, 3 + step % 2]] = 0
    return g


def truth(case: Case, p: Tensor, grads: list[Tensor | None]) -> list[Tensor]:
    """Return the values after each step; a gradient of None is that of a skipped step."""
    cls, decay, found = case["cls"], case["decay"], []
    lr, weight_decay = float(case["lr"]), case["weight_decay"]
    shrink = weight_decay * {"lr": lr, "independent": 1.0, "relative": 1.0}[decay]
    given = {n: case[n] for n, (those, v) in OWN.items() if cls in those and n != "decay" and case[n] is not None}
    if cls is FusedLion:
        b1, b2 = case["betas"]
        average = torch.zeros_like(p)
        for g in grads:
            if g is not None:
                g = -g if case["maximize"] else g
                direction = torch.view_as_real(b1 * average + (1 - b1) * g).sign()
                p = p * (1 - shrink) - lr * torch.view_as_complex(direction)
                average = b2 * average + (1 - b2) * g
            found.append(p)
        return found
    if decay != "lr":
        given["weight_decay"] = 0.0
    torchs = getattr(torch.optim, cls.__name__.removeprefix("Fused"))
    leaf = p.clone().requires_grad_()
    optimizer = torchs([leaf], lr=lr, maximize=case["maximize"], foreach=False, **given)
    for g in grads:
        if g is not None:
            leaf.detach().mul_(1 - shrink if decay != "lr" else 1.0)
            leaf.grad = g.clone()
            optimizer.step()
        found.append(leaf.detach().clone())
    return found


@pytest.mark.parametrize(
    ("path", "case"),
    [pytest.param(c["path"], c, id=f"{i}-{c['kind']}") for i, c in enumerate(CASES)],
    indirect=["path"],
)
@unrecorded()
def test_steps(path: str, case: Case) -> None:
    kind, scale, limit = case["kind"], case["scale"] or 1.0, case["max_grad_norm"]
    start = torch.linspace(-1, 1, 15).view(5, 3).to(torch.complex64 if kind == "complex" else torch.float32)
    p = start.clone().requires_grad_()
    p = p.clone() if kind == "differentiable" else p
    params = [p, torch.zeros(4, requires_grad=True)][: 1 + case["beside"]]
    given = {name: case[name] for name in OWN if case["cls"] in OWN[name][0] and case[name] is not None}
    given |= {name: case[name] for name in ("maximize", "max_grad_norm", "ema_decay", "zero_grads")}
    groups: list[Case] = [{"params": [t]} for t in params]
    if kind == "differentiable":
        given["differentiable"] = True
        for group in groups[1:]:
            group["differentiable"] = False
    optimizer: Any = case["cls"](groups, lr=torch.clone(torch.as_tensor(case["lr"])), **given)
    whole = [gradient(case, step) for step in range(3)]
    norms = [torch.linalg.vector_norm(g).item() for g in whole]
    factors = [1.0 if limit is None else min(1.0, limit / (norm + 1e-6)) for norm in norms]
    skipped = [step == case["skip_at"] for step in range(3)]
    wanted = truth(case, start, [None if skip else f * g for g, f, skip in zip(whole, factors, skipped)])
    average = start
    for step, g in enumerate(whole):
        p.grad = (g * scale).to_sparse(1) if kind == "sparse" else g * scale
        for other in params[1:]:
            other.grad = torch.zeros(4)
        if case["scale"] is not None:
            scaled(optimizer, scale, found_inf=float(skipped[step]))
        optimizer.step()
        torch.testing.assert_close(p.detach(), wanted[step], rtol=1e-5, atol=1e-6)
        assert optimizer.state[p]["step"] == sum(not skip for skip in skipped[: step + 1])
        left = torch.zeros_like(g) if case["zero_grads"] else g * (scale if skipped[step] else factors[step])
        torch.testing.assert_close(p.grad.detach().to_dense(), left, rtol=1e-5, atol=1e-6)
        assert p.grad.is_sparse == (kind == "sparse")
        if limit is None:
            assert optimizer.grad_norm is None
        else:
            torch.testing.assert_close(optimizer.grad_norm, torch.tensor(norms[step]), rtol=1e-5, atol=0)
        if case["ema_decay"] is not None:
            average = average if skipped[step] else torch.lerp(average, wanted[step], 1 - case["ema_decay"])
            torch.testing.assert_close(optimizer.state[p]["ema_param"], average, rtol=1e-5, atol=1e-6)
        for other in params[1:]:
            assert torch.equal(other, torch.zeros(4))


def test_every_two_values_meet() -> None:
    assert 20 < len(CASES) < 90
    assert {case["kind"] for case in CASES} == {*FACTORS["kind"]}


def test_momentum_of_sparse_gradients_goes_there_and_back() -> None:
    """Torch's buffer of them is sparse until it is loaded."""
    rows = torch.sparse_coo_tensor(torch.tensor([[1, 3, 1]]), torch.ones(3, 2), (5, 2), check_invariants=True)

    def step(optimizer: torch.optim.Optimizer) -> Tensor:
        (p,) = optimizer.param_groups[0]["params"]
        p.grad = rows
        optimizer.step()
        return p.detach().clone()

    kinds: list[Any] = [FusedSGD, torch.optim.SGD]
    for source in kinds:
        for target in kinds:
            first, second = (
                kind([torch.ones(5, 2, requires_grad=True)], lr=0.5, momentum=0.75) for kind in (source, target)
            )
            before = step(first)
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            with torch.no_grad():
                second.param_groups[0]["params"][0].copy_(before)
            torch.testing.assert_close(step(second), step(first))
            assert step(first)[1].tolist() == [1 - 0.5 * (2 + 3.5 + 4.625)] * 2
