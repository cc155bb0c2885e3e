"""Optimizers whose settings are combined so that any two values of two settings meet, against torch in float64.

Before each step the truth is reset to the optimizer's own values, so that errors do not add up and a step may be off by
one rounding only. Settings come from the constructors and from `Options`: a new one fails
`test_every_setting_has_values` until `ARGUMENTS` or `EXTRAS` list its values.
"""

import copy
import dataclasses
import functools
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedOptimizer, FusedRMSprop, FusedSGD
from llmfast.optim.options import Options
from support.layouts import offset, strided
from support.pairs import Case, covering
from support.training import scaled, through_a_file

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CLASSES: list[type[FusedOptimizer]] = [FusedAdamW, FusedAdam, FusedSGD, FusedRMSprop, FusedAdagrad, FusedLion]
# Arguments of constructors; the first value is for optimizers that have no such argument.
ARGUMENTS: dict[str, list[Any]] = {
    "lr": [0.01, torch.tensor(0.02), 0.0],
    "betas": [None, (0.5, 0.75), (0.0, 0.9)],
    "eps": [None, 1e-2],
    "weight_decay": [0.0, 0.1],
    "amsgrad": [False, True],
    "momentum": [0, 0.9],
    "dampening": [0, 0.3],
    "nesterov": [False, True],
    "alpha": [None, 0.75],
    "centered": [False, True],
    "lr_decay": [0.0, 0.5],
    "initial_accumulator_value": [0.0, 0.5],
    "decoupled_weight_decay": [False, True],
    "decay": ["lr", "independent", "relative"],
    "maximize": [False, True],
}
# Arguments that are not varied here.
NOT_VARIED = {"self", "params", "foreach", "capturable", "fused", "differentiable", "extras"}
EXTRAS: dict[str, list[Any]] = {
    "max_grad_norm": [None, 0.5, math.inf],
    "master_weights": [None, "fp32", "split16", "split8", "kahan", "stochastic"],
    "state_dtype": [None, F32, BF16, "8bit"],
    "ema_decay": [None, 0.75, 0.0],
    "zero_grads": [False, True],
    "seed": [0, 2**53 - 1],
}
# Options that the second group sets for itself.
OWN: list[Case] = [
    *({}, {"max_grad_norm": None}, {"max_grad_norm": 0.25}, {"master_weights": None}, {"state_dtype": F32}),
    *({"ema_decay": 0.5}, {"ema_decay": None}, {"state_dtype": None, "master_weights": "kahan"}),
]
SURROUNDINGS: dict[str, list[Any]] = {
    "path": ["plain", "kernels"],
    "cls": CLASSES,
    "dtype": [F32, BF16, F16, F64],
    "grad_dtype": [None, F32, BF16],
    "groups": [1, 2],
    "own": OWN,
    "gradients": ["usual", "expanded", "contiguous"],
    "scale": [None, 1024.0],
    "skip": [None, "found_inf", "norm"],
    "skip_at": [1, 0],
    "copied_by": ["state_dict", "deepcopy", "pickle"],
}
# What a format of master weights adds: the state's name, its dtype in a state dict, and a weight's relative error.
LOW: dict[str | None, tuple[str | None, torch.dtype | None, float]] = {
    "fp32": ("master_param", F32, 2.0**-23),
    "split16": ("low_bits", torch.int16, 2.0**-23),
    "split8": ("low_bits", torch.int16, 2.0**-16),
    "kahan": ("kahan_comp", None, 2.0**-16),
    "stochastic": (None, None, 2.0**-7),
}
STATES: dict[type, tuple[str, ...]] = {
    FusedAdamW: ("exp_avg", "exp_avg_sq"),
    FusedAdam: ("exp_avg", "exp_avg_sq"),
    FusedSGD: (),
    FusedRMSprop: ("square_avg",),
    FusedAdagrad: ("sum",),
    FusedLion: ("exp_avg",),
}
SQUARES = {"exp_avg_sq", "square_avg", "sum"}
LATE, NEVER = 7, 8  # indices of the parameters whose first gradient comes in the second step, and never


@functools.cache
def arguments_of(cls: type) -> set[str]:
    return inspect.signature(cls.__init__).parameters.keys() - NOT_VARIED


def possible(case: Case) -> bool:
    """Return False for settings that exclude each other, or that an optimizer does not have."""
    given, cls = case.get, case.get("cls")
    own = given("own", {}) if given("groups", 2) == 2 else {}
    masters, formats = [given("master_weights"), own.get("master_weights")], [given("state_dtype")]
    clips = [given("max_grad_norm", 1.0)]
    return (
        (
            cls is None
            or all(given(name, v[0]) is v[0] for name, v in ARGUMENTS.items() if name not in arguments_of(cls))
        )
        and not (given("nesterov") and (given("momentum", 1) == 0 or given("dampening", 0) > 0))
        and not (given("centered") and "8bit" in formats)
        and not (given("decay") == "relative" and given("lr", 1.0) == 0.0)
        and not (given("dtype") == F16 and {"split16", "split8", "stochastic"}.intersection(masters))
        and not (given("skip") == "found_inf" and "scale" in case and case["scale"] is None)
        and not (given("skip") == "norm" and clips == [None])
        and not (given("own") and given("groups") == 1)
    )


CASES = covering({**SURROUNDINGS, **ARGUMENTS, **EXTRAS}, possible)


def parameters(case: Case) -> list[Tensor]:
    """Create parameters of more than one block, of few elements, at odd addresses, empty, and with gaps."""
    whole, odd, misaligned = torch.randn(300), torch.randn(5), offset(torch.randn(33))
    few = [torch.randn(()), torch.randn(0, 4), torch.randn(5, 6).T, torch.randn(9), torch.randn(7), torch.randn(3)]
    found = [t.to(case["dtype"]) for t in (whole, odd, misaligned, *few)]
    found[2], found[6] = offset(found[2]), strided(found[6])
    params = [t.detach().requires_grad_() for t in found]
    for p in params:
        if case["grad_dtype"] is not None:
            p.grad_dtype = case["grad_dtype"]
    return params


def groups(case: Case, params: list[Tensor]) -> list[Case]:
    """Return one group, or two that differ in every hyperparameter that is a number."""
    if case["groups"] == 1:
        return [{"params": params}]
    second: Case = {"params": params[5:], **case["own"]}
    for name in arguments_of(case["cls"]) - {"decay", "decoupled_weight_decay"}:
        value = case[name]
        if name == "betas" and value is not None:
            second[name] = (value[0] / 2, value[1] / 2)
        elif isinstance(value, float | Tensor):
            second[name] = value * 0.5
    return [{"params": params[:5]}, second]


def settings(case: Case) -> tuple[Case, Case]:
    """Return the constructor's own arguments, and those of `Extras` that differ from their defaults."""
    arguments = {name: copy.copy(case[name]) for name in arguments_of(case["cls"]) if case[name] is not None}
    return arguments, {name: case[name] for name in EXTRAS if case[name] != getattr(Options(), name)}


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def give_gradients(case: Case, params: list[Tensor], step: int, odd: bool) -> None:
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        dtype = case["grad_dtype"] or p.dtype
        value = torch.randn(p.shape, generator=generator) * (case["scale"] or 1.0)
        if odd and i == 1:
            value.fill_(math.inf)
        if i == 0 and case["gradients"] == "expanded":
            g = value[:1].to(dtype).expand(p.shape)
        elif case["gradients"] == "contiguous":
            g = value.to(dtype)
        else:
            g = torch.empty_like(p, dtype=dtype, requires_grad=False).copy_(value)
        p.grad = None if i == NEVER or (i == LATE and step == 0) else g


def limits(optimizer: FusedOptimizer, case: Case) -> list[float | None]:
    return [optimizer.group_options[i].get("max_grad_norm", case["max_grad_norm"]) for i in range(case["groups"])]


def clipped(optimizer: FusedOptimizer, case: Case) -> tuple[list[Tensor | None], float | None]:
    """Return the gradients as they enter the rule, in float64, and the norm before clipping."""
    scale = case["scale"] or 1.0
    grads = [[None if p.grad is None else p.grad.double() / scale for p in g["params"]] for g in optimizer.param_groups]

    def norm(*lists: list[Tensor | None]) -> float:
        return math.sqrt(sum(g.square().sum().item() for grads in lists for g in grads if g is not None))

    shared = [g for i, g in enumerate(grads) if "max_grad_norm" not in optimizer.group_options[i]]
    factors = [1.0] * len(grads)
    for i, limit in enumerate(limits(optimizer, case)):
        if limit is not None and limit < math.inf:
            alone = "max_grad_norm" in optimizer.group_options[i]
            factors[i] = min(1.0, limit / (norm(grads[i]) if alone else norm(*shared)))
    measured = [g for g, limit in zip(grads, limits(optimizer, case)) if limit is not None]
    whole = norm(*measured) if measured else None
    used = [None if g is None else g * factor for factor, mine in zip(factors, grads) for g in mine]
    return used, whole


def truth(cls: type, group: Case, decay: str, q: Tensor, g: Tensor, state: Case) -> None:
    """Take one step in float64: of torch's optimizer or, for Lion, which torch does not have, of the paper's."""
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    shrink = weight_decay * {"lr": lr, "independent": lr != 0, "relative": lr / group.get("lr_max", 1.0)}[decay]
    if cls is FusedLion:
        (b1, b2), m = group["betas"], state.setdefault("exp_avg", torch.zeros_like(q))
        g = -g if group["maximize"] else g
        q.mul_(1 - shrink).sub_(lr * (b1 * m + (1 - b1) * g).sign())
        m.mul_(b2).add_((1 - b2) * g)
        return
    torchs = getattr(torch.optim, cls.__name__.removeprefix("Fused"))
    known = inspect.signature(torchs.__init__).parameters.keys() & arguments_of(cls)
    arguments = {name: group[name] for name in known} | {"lr": lr}
    if decay != "lr":
        q.mul_(1 - shrink)
        arguments["weight_decay"] = 0.0
    leaf = q.requires_grad_()
    leaf.grad = g
    optimizer = torchs([leaf], foreach=False, **arguments)
    optimizer.state[leaf].update(state)
    optimizer.step()
    state.update(optimizer.state[leaf])
    q.requires_grad_(False)


def snapshot(optimizer: FusedOptimizer) -> dict[int, Case]:
    """Return copies of all states by the names that torch has for them, in float64."""
    saved = optimizer.torch_state_dict()["state"]
    return {
        i: {name: t.double().clone() if name != "step" else t.clone() for name, t in state.items() if t is not None}
        for i, state in saved.items()
    }


def near(what: str, ours: Tensor, wanted: Tensor, rtol: float, atol: Any = 0.0) -> None:
    error = (ours.double() - wanted).abs()
    allowed = rtol * wanted.abs() + atol + 1e-30
    worst = int((error - allowed).argmax()) if error.numel() else 0
    told = [f"{t.flatten()[worst]:.6g}" for t in (ours, wanted, error, allowed)] if error.numel() else []
    assert (error <= allowed).all(), f"{what}: {told[0]} is not {told[1]}, off by {told[2]}, allowed {told[3]}"


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def in_codes(x: Tensor, squares: bool) -> Tensor:
    """Return the 8-bit codes of `x` before they are rounded to integers."""
    groups = x.flatten().split(128)
    power, largest = (0.25, 255) if squares else (0.5, 127)
    return torch.cat([(g.abs() / max(g.abs().max().item(), 1e-30)) ** power * largest * g.sign() for g in groups])


def check_state(
    name: str, of: str, ours: Tensor, wanted: Tensor, dtype: Any, arithmetic: float, largest: float
) -> None:
    what, squares = f"{name} of {of}", name in SQUARES
    assert ours.shape == wanted.shape, what
    if dtype != "8bit":
        small = 2.0**-25 if dtype == F16 else 0.0
        near(what, ours, wanted, 0.51 * eps_of(dtype) + arithmetic, 0.1 * arithmetic * largest + small)
    elif wanted.numel():
        error = (in_codes(ours, squares) - in_codes(wanted, squares)).abs().max()
        assert error <= 1.02, f"{what}: {error:.3g} codes off"


def dtype_of(name: str, p: Tensor, chosen: Case) -> Any:
    """Return the dtype that a state should have, or "8bit"."""
    if chosen["state_dtype"] == "8bit":
        return F32 if name == "max_exp_avg_sq" else "8bit"
    return chosen["state_dtype"] or p.dtype


def names_of(case: Case, group: Case) -> list[str]:
    """Return torch's names of the states that have the parameter's shape."""
    names = [*STATES[case["cls"]], *(["max_exp_avg_sq"] if group.get("amsgrad") else [])]
    names += ["momentum_buffer"] * bool(group.get("momentum")) + ["grad_avg"] * bool(group.get("centered"))
    return names


def check_what_is_saved(optimizer: FusedOptimizer, case: Case) -> None:
    """Compare the names and dtypes in a state dict with those that the settings promise."""
    saved, index = optimizer.state_dict(), 0
    for group, own, held in zip(optimizer.param_groups, optimizer.group_options, saved["param_groups"]):
        assert {n: v for n, v in group.items() if n != "params"} == {n: v for n, v in held.items() if n != "params"}
        chosen = {**{name: case[name] for name in EXTRAS}, **own}
        for p in group["params"]:
            state, wanted = saved["state"].get(index, {}), {}
            if p.grad is not None or state:
                wanted = {name: dtype_of(name, p, chosen) for name in names_of(case, group)}
            for name in list(wanted):
                if wanted[name] == "8bit":
                    signed = torch.uint8 if name in SQUARES else torch.int8
                    wanted |= {f"{name}_code": signed, f"{name}_scale": F32}
                    del wanted[name]
            low, low_dtype, _ = LOW.get(chosen["master_weights"], (None, None, 0.0))
            if low is not None and p.dtype in (BF16, F16) and state:
                wanted[low] = low_dtype or p.dtype
            if chosen["ema_decay"] is not None and state:
                wanted["ema_param"] = F32
            noisy = chosen["master_weights"] == "stochastic" or chosen["state_dtype"] == "8bit"
            if (case["cls"] is not FusedSGD or noisy) and state:
                wanted["step"] = F32
            assert bool(state) or index == NEVER or case["cls"] is FusedSGD
            assert {name: t.dtype for name, t in state.items()} == wanted, (index, chosen)
            for name, t in state.items():
                assert t.shape == (() if name == "step" else (-(-p.numel() // 128),) if "scale" in name else p.shape)
            index += 1


def check_step(optimizer: FusedOptimizer, case: Case, step: int) -> None:
    """Take a step, and compare everything with the truth."""
    params, skipped = params_of(optimizer), case["skip"] is not None and step == case["skip_at"]
    give_gradients(case, params, step, odd=skipped)
    if case["scale"] is not None:
        scaled(optimizer, case["scale"], found_inf=float(skipped and case["skip"] == "found_inf"))
    used, norm = clipped(optimizer, case)
    if skipped and case["skip"] == "norm" and limits(optimizer, case)[0] is None:
        return
    grads = [p.grad for p in params]
    given = [None if g is None else g.clone() for g in grads]
    values = [optimizer.master_value(p).double() for p in params]
    states, averages = snapshot(optimizer), [optimizer.state.get(p, {}).get("ema_param") for p in params]
    averages = [None if t is None else t.double().clone() for t in averages]
    counts = [float(optimizer.state.get(p, {}).get("step", 0.0)) for p in params]
    before = [p.detach().clone() for p in params]
    held = [({n: copy.copy(v) for n, v in g.items() if n != "params"}, dict(g)) for g in optimizer.param_groups]
    options = copy.deepcopy((optimizer.options, optimizer.group_options))

    optimizer.step()

    for group, (was, objects) in zip(optimizer.param_groups, held):
        assert {n: v for n, v in group.items() if n != "params"} == was
        assert all(group[n] is v for n, v in objects.items())
    assert (optimizer.options, optimizer.group_options) == options
    assert all(a is p.grad for a, p in zip(grads, params)) and all(p.requires_grad for p in params)
    if norm is None:
        assert optimizer.grad_norm is None
    else:
        assert optimizer.grad_norm is not None and optimizer.grad_norm.dtype == F32 and optimizer.grad_norm.shape == ()
        torch.testing.assert_close(optimizer.grad_norm.double(), torch.tensor(norm).double(), rtol=1e-5, atol=0)
    after, index = snapshot(optimizer), 0
    for number, group in enumerate(optimizer.param_groups):
        chosen = {**{name: case[name] for name in EXTRAS}, **optimizer.group_options[number]}
        for p in group["params"]:
            i, index = index, index + 1
            what = f"parameter {i}, step {step}"
            may_stay = limits(optimizer, case)[number] is not None and case["path"] == "kernels"
            check_gradient(what, case, p.grad, given[i], None if skipped else used[i], may_stay)
            if used[i] is None or skipped:
                assert torch.equal(p.detach(), before[i]), what
                for name, t in states.get(i, {}).items():
                    torch.testing.assert_close(after[i][name], t, rtol=0, atol=0, msg=f"{name} of {what}")
                assert float(optimizer.state.get(p, {}).get("step", 0.0)) == counts[i], what
                continue
            assert float(optimizer.state[p]["step"]) == counts[i] + 1, what
            assert optimizer.state[p]["step"].dtype == F32
            state = {n: t.clone() for n, t in states.get(i, {}).items()}
            q, g = values[i].clone(), used[i]
            assert g is not None
            truth(case["cls"], group, case["decay"], q, g, state)
            check_value(what, optimizer.master_value(p), p.detach(), q, values[i], chosen)
            for name in names_of(case, group):
                # The norm is float32, and so are gradients that are converted for torch's own CPU kernels.
                single = p.dtype != F64 or optimizer.grad_norm is not None or dtype_of(name, p, chosen) != F64
                arithmetic = (2e-6 if name != "momentum_buffer" else 2e-5) if single else 1e-12
                parts = [
                    t.abs().max().item()
                    for t in (states.get(i, {}).get(name), state[name])
                    if t is not None and t.numel()
                ]
                check_state(
                    name,
                    what,
                    after[i][name],
                    state[name],
                    dtype_of(name, p, chosen),
                    arithmetic,
                    max(parts, default=0.0),
                )
            if (decay := chosen["ema_decay"]) is not None:
                old = values[i] if averages[i] is None else averages[i]
                new = optimizer.master_value(p).double()
                rounded = (
                    (1 - decay) * relative_error(p, chosen) * new.abs()
                )  # weights are averaged before they are rounded
                average = optimizer.state[p]["ema_param"]
                near(f"average of {what}", average, decay * old + (1 - decay) * new, 1e-6, 1e-7 + rounded)


def relative_error(p: Tensor, chosen: Case) -> float:
    """Return how far a weight may be off relative to itself, in the format that keeps it."""
    low = chosen["master_weights"] if p.dtype in (BF16, F16) else None
    return LOW[low][2] if low is not None else 0.51 * eps_of(p.dtype)


def check_value(what: str, master: Tensor, p: Tensor, wanted: Tensor, before: Tensor, chosen: Case) -> None:
    arithmetic = 1e-12 if p.dtype == F64 else 1.2e-7
    small = 2.0**-25 if p.dtype == F16 else 0.0
    moved = (wanted - before).abs()
    moved = 3e-6 * moved + 1e-6 * (moved.max() if moved.numel() else 0.0)  # two parts of the move may nearly cancel
    near(what, master, wanted, relative_error(p, chosen) * 1.001, small + moved + arithmetic * before.abs())
    noisy = chosen["master_weights"] == "stochastic" and p.dtype == BF16
    near(f"rounded {what}", p, master.double(), (1.01 if noisy else 0.51) * eps_of(p.dtype), small)


def check_gradient(
    what: str, case: Case, g: Tensor | None, given: Tensor | None, used: Tensor | None, may_stay: bool
) -> None:
    """Check the gradient after a step: zero, unchanged, or divided and clipped.

    `may_stay` allows a gradient that is only clipped to be unchanged: the kernels do not write it.
    """
    if g is None or given is None:
        assert g is given
    elif case["zero_grads"]:
        assert not g.any(), what
    elif used is None or (
        case["scale"] is None and torch.equal(g, given) and (may_stay or case["max_grad_norm"] is None)
    ):
        assert torch.equal(g, given), what
    else:
        near(f"gradient of {what}", g, used, eps_of(g.dtype) * (4 if case["path"] == "plain" else 1) + 2e-6, 2.0**-24)


def copied(optimizer: FusedOptimizer, case: Case) -> FusedOptimizer:
    if case["copied_by"] == "deepcopy":
        return copy.deepcopy(optimizer)
    if case["copied_by"] == "pickle":
        other: FusedOptimizer = pickle.loads(pickle.dumps(optimizer))
        return other
    params = [
        (strided if i == 6 else torch.clone)(p.detach()).requires_grad_() for i, p in enumerate(params_of(optimizer))
    ]
    places = [{"params": params}] if case["groups"] == 1 else [{"params": params[:5]}, {"params": params[5:]}]
    if case["groups"] == 2:
        places[1] |= case["own"]
    decay = {"decay": case["decay"]} if "decay" in arguments_of(case["cls"]) else {}
    other = case["cls"](places, **decay, **settings(case)[1])  # the state dict has the hyperparameters
    before = copy.deepcopy(optimizer.state_dict())
    other.load_state_dict(through_a_file(before))
    same(optimizer.state_dict(), before)
    return other


def same(a: Any, b: Any) -> None:
    """Assert that two trees are equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    else:
        assert a == b


@pytest.mark.parametrize(
    ("path", "case"),
    [pytest.param(c["path"], c, id=f"{i}-{c['path']}") for i, c in enumerate(CASES)],
    indirect=["path"],
)
def test_steps(path: str, case: Case) -> None:
    params = parameters(case)
    arguments, extras = settings(case)
    optimizer: FusedOptimizer = case["cls"](groups(case, params), **arguments, **extras)
    for step in range(3):
        check_step(optimizer, case, step)
    check_what_is_saved(optimizer, case)
    optimizer.zero_grad()
    other = copied(optimizer, case)
    for p in params_of(other):
        if case["grad_dtype"] is not None:
            p.grad_dtype = case["grad_dtype"]  # copies of tensors do not keep it
    assert type(other) is case["cls"] and (other.options, other.group_options) == (
        optimizer.options,
        optimizer.group_options,
    )
    same(other.state_dict(), optimizer.state_dict())
    for each in (optimizer, other):
        give_gradients(case, params_of(each), 5, odd=False)
        if case["scale"] is not None:
            scaled(each, case["scale"])
        each.step()
    for p, q in zip(params_of(optimizer), params_of(other), strict=True):
        assert p is not q and torch.equal(p, q)
        same(p.grad, q.grad)
    same(other.state_dict(), optimizer.state_dict())
    same(other.grad_norm, optimizer.grad_norm)


def test_every_setting_has_values() -> None:
    found: dict[str, Callable[..., Any]] = {name: cls for cls in CLASSES for name in arguments_of(cls)}
    assert found.keys() == ARGUMENTS.keys()
    assert EXTRAS.keys() == {field.name for field in dataclasses.fields(Options)}
    assert 30 < len(CASES) < 130
