"""Options that parameter groups have of their own: what each does, how clips go together, and what is refused."""

import copy
import dataclasses
import inspect
import math
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evidence.pretend_cuda import pretending_cuda
from llmfast.optim import (
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedLion,
    FusedOptimizer,
    FusedRMSprop,
    FusedSGD,
    optimizer_in_backward,
)
from llmfast.optim.options import Options as AllOptions
from llmfast_kernels import optimizer as kernels_of_optimizer
from support.launched import unrecorded
from support.training import Options, through_a_file

BF16, F32 = torch.bfloat16, torch.float32
SHAPES = [(300,), (33, 7), (130,), (6, 5)]  # two for each group
CLASSES: list[type[FusedOptimizer]] = [FusedAdamW, FusedAdam, FusedSGD, FusedRMSprop, FusedAdagrad, FusedLion]


def parameters(dtype: torch.dtype = BF16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in SHAPES]


def gradients(params: list[Tensor], step: int, only: int | None = None, scale: float = 1.0) -> None:
    """Create gradients for all groups, or for one; a group's gradients do not depend on this."""
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        g = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)
        p.grad = g if only is None or i // 2 == only else None


def grouped(params: list[Tensor], first: Options, second: Options) -> list[Options]:
    return [{"params": params[:2], **first}, {"params": params[2:], **second}]


def norm(params: list[Tensor]) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in params if p.grad is not None))


# Two groups are two optimizers.

PAIRS: list[tuple[Options, Options, Options]] = [
    ({}, {"state_dtype": F32}, {"state_dtype": "8bit"}),
    ({"state_dtype": "8bit"}, {"state_dtype": None}, {}),
    ({}, {"master_weights": "fp32"}, {"master_weights": "stochastic"}),
    ({"master_weights": "split16"}, {}, {"master_weights": None}),
    ({"master_weights": "split8"}, {"master_weights": "kahan"}, {}),
    ({}, {"ema_decay": 0.9}, {}),
    ({"ema_decay": 0.9}, {"ema_decay": 0.5}, {"ema_decay": None}),
    ({}, {"max_grad_norm": 0.1}, {"max_grad_norm": 0.5}),
    ({"max_grad_norm": 0.5}, {"max_grad_norm": 0.1}, {}),
    ({"max_grad_norm": 0.5}, {"max_grad_norm": None}, {}),
    ({"seed": 3}, {"max_grad_norm": 0.2, "state_dtype": "8bit", "master_weights": "split8", "ema_decay": 0.5}, {}),
]


def name_of(value: Any) -> str:
    return value.__name__ if isinstance(value, type) else str(value)


# Every pair of groups meets both classes and both dtypes, which meet each other too.
TOGETHER = [
    ([FusedAdamW, FusedSGD][(i + j) % 2], dtype, *pair)
    for (i, pair), (j, dtype) in product(enumerate(PAIRS), enumerate((BF16, F32)))
]


@pytest.mark.parametrize(("cls", "dtype", "all_of_them", "first", "second"), TOGETHER, ids=name_of)
@unrecorded()
def test_two_groups_are_two_optimizers(
    path: str, cls: Any, dtype: torch.dtype, all_of_them: Options, first: Options, second: Options
) -> None:
    """Compare bit for bit, for finite gradients, with equal positions among all parameters, on which noise depends."""
    settings = {"lr": 0.01, **({"momentum": 0.9} if cls is FusedSGD else {})}
    params = parameters(dtype)
    together = cls(grouped(params, first, second), **settings, **all_of_them)
    alone, apart = [], []
    for own in (first, second):
        alone.append(parameters(dtype))
        apart.append(cls(grouped(alone[-1], {}, {}), **settings, **{**all_of_them, **own}))
    for step in (1, 2):
        gradients(params, step)
        together.step()
        for i, optimizer in enumerate(apart):
            gradients(alone[i], step, only=i)
            optimizer.step()
    for i, optimizer in enumerate(apart):
        for p, q in zip(params[2 * i : 2 * i + 2], alone[i][2 * i :]):
            assert torch.equal(p, q)
            mine, theirs = together.state[p], optimizer.state[q]
            assert mine.keys() == theirs.keys()
            for name, t in mine.items():
                assert t.dtype == theirs[name].dtype
                torch.testing.assert_close(t, theirs[name], rtol=0, atol=0)


def test_one_launch_for_each_way_of_keeping_and_clipping(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[Any] = []
    update = kernels_of_optimizer.update
    monkeypatch.setattr(
        kernels_of_optimizer, "update", lambda *args, **kwargs: (launches.append(kwargs), update(*args, **kwargs))
    )
    ways: list[tuple[Options, Options, int]] = [
        ({}, {"lr": 0.1}, 1),
        ({"ema_decay": 0.9}, {"ema_decay": 0.8}, 1),
        ({"state_dtype": F32}, {"state_dtype": "8bit"}, 2),
        ({"max_grad_norm": 1.0}, {"max_grad_norm": 1.0}, 2),
    ]
    for first, second, count in ways:
        params = parameters()
        gradients(params, 1)
        launches.clear()
        FusedAdamW(grouped(params, first, second)).step()
        assert len(launches) == count


# Clipping.


def test_a_group_is_clipped_to_its_own_norm_and_the_others_together(path: str) -> None:
    shapes = [(70, 80), (5,), (33, 7), (4, 4), (9,)]
    torch.manual_seed(0)
    ours = [torch.randn(s).requires_grad_() for s in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    body, head, free = ours[:3], [ours[3]], [ours[4]]
    mine = FusedAdamW(
        [
            {"params": body[:1]},
            {"params": head, "max_grad_norm": 0.1},
            {"params": body[1:]},
            {"params": free, "max_grad_norm": None},
        ],
        lr=0.01,
        max_grad_norm=0.5,
    )
    other = torch.optim.AdamW(theirs, lr=0.01)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        measured = norm(ours[:4])
        mine.step()
        nn.utils.clip_grad_norm_(theirs[:3], 0.5)
        nn.utils.clip_grad_norm_(theirs[3:4], 0.1)
        other.step()
        assert mine.grad_norm is not None and mine.grad_norm.dtype == F32 and mine.grad_norm.shape == ()
        assert mine.grad_norm.item() == pytest.approx(measured, rel=1e-6)
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_a_norm_of_one_group_that_is_not_finite_changes_no_group(path: str, group: int, odd: float) -> None:
    params = [torch.ones(6, requires_grad=True) for _ in range(4)]
    optimizer = FusedAdamW(
        [
            {"params": params[:1]},
            {"params": params[1:2], "max_grad_norm": 0.1},
            {"params": params[2:3]},
            {"params": params[3:], "max_grad_norm": None},
        ],
        max_grad_norm=1.0,
        zero_grads=True,
    )
    for finite in (True, False, True):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.ones(6)
        if not finite:
            params[group].grad[2] = odd
        optimizer.step()
        assert optimizer.grad_norm is not None and bool(optimizer.grad_norm.isfinite()) == finite
        assert all(torch.equal(p, old) != finite for p, old in zip(params, before))
        assert all(torch.equal(p.grad, torch.zeros(6)) for p in params)
    assert all(optimizer.state[p]["step"] == 2 for p in params)


def test_gradients_of_a_group_that_is_not_measured_may_be_anything(path: str) -> None:
    params = [torch.ones(6, requires_grad=True) for _ in range(2)]
    optimizer = FusedSGD(
        [{"params": params[:1], "max_grad_norm": 0.1}, {"params": params[1:]}], lr=1.0
    )  # none for the optimizer
    params[0].grad, params[1].grad = torch.full((6,), 100.0), torch.full((6,), math.inf)
    optimizer.step()
    assert optimizer.grad_norm == pytest.approx(100 * 6**0.5, rel=1e-6)
    assert (params[1] == -math.inf).all()
    torch.testing.assert_close(params[0].detach(), torch.full((6,), 1 - 0.1 / 6**0.5), rtol=1e-5, atol=0)


def test_the_norms_are_of_unscaled_gradients(path: str) -> None:
    a, b = parameters(F32), parameters(F32)
    own = {"max_grad_norm": 0.1}
    mine, other = (FusedAdamW(grouped(params, own, {}), max_grad_norm=0.5) for params in (a, b))
    gradients(a, 4, scale=1024.0), gradients(b, 4)
    mine.grad_scale, mine.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    mine.step(), other.step()
    torch.testing.assert_close(mine.grad_norm, other.grad_norm, rtol=1e-6, atol=0)
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    before = [p.detach().clone() for p in a]
    mine.found_inf = torch.tensor(1.0)
    mine.step()
    assert all(torch.equal(p, old) for p, old in zip(a, before))


def test_a_limit_may_change_between_steps(path: str) -> None:
    params = [torch.zeros(4, requires_grad=True) for _ in range(2)]
    optimizer = FusedSGD([{"params": params[:1]}, {"params": params[1:], "max_grad_norm": 1.0}], lr=1.0)
    for own, shared in ((1.0, 2.0), (0.5, 1.0)):
        optimizer.group_options[1]["max_grad_norm"], optimizer.options.max_grad_norm = own, shared
        for p in params:
            p.grad = torch.full((4,), 8.0)
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((4,), -1.5), rtol=1e-5, atol=0)
    torch.testing.assert_close(params[1].detach(), torch.full((4,), -0.75), rtol=1e-5, atol=0)


CHANGES: list[Options] = [{}, {"max_grad_norm": 0.1}, {"max_grad_norm": 0.2}, {"max_grad_norm": None}]


# In each group every change happens, with either limit of the others half of them.
COMING_AND_GOING = [
    (before, now, shared, (i + j + k) % 2)
    for (i, before), (j, now), (k, shared) in product(enumerate(CHANGES), enumerate(CHANGES), enumerate((None, 0.5)))
]


@pytest.mark.parametrize(("before", "now", "shared", "group"), COMING_AND_GOING, ids=str)
@unrecorded()
def test_a_limit_of_a_group_may_come_and_go(
    path: str, before: Options, now: Options, shared: float | None, group: int
) -> None:
    """The next step is that of an optimizer which has had the option from its start."""
    params, twins = parameters(F32), parameters(F32)
    optimizer = FusedSGD(grouped(params, *((before, {}) if group == 0 else ({}, before))), lr=1.0, max_grad_norm=shared)
    other = FusedSGD(grouped(twins, *((now, {}) if group == 0 else ({}, now))), lr=1.0, max_grad_norm=shared)
    gradients(params, 1)
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(params, twins):
            q.copy_(p)
    optimizer.group_options[group].clear()
    optimizer.group_options[group].update(now)
    gradients(params, 2), gradients(twins, 2)
    optimizer.step(), other.step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins))
    torch.testing.assert_close(optimizer.grad_norm, other.grad_norm, rtol=1e-6, atol=0)


def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretending_cuda():
        params = parameters()
        groups = [*grouped(params, {"max_grad_norm": 0.1}, {}), {"params": [torch.ones(3, requires_grad=True)]}]
        optimizer = FusedAdamW([*groups[:2], {**groups[2], "max_grad_norm": None}], max_grad_norm=1.0)
        gradients(params, 4)
        optimizer.step()
        gradients(params, 3)
        for name in ("__bool__", "__float__", "__int__", "tolist", "nonzero", "cpu"):
            monkeypatch.setattr(Tensor, name, _refuse(name))
        monkeypatch.setattr(Tensor, "item", None)
        optimizer.step()


def _refuse(name: str) -> Callable[..., Any]:
    def refused(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"a step waits for the device in {name}")

    return refused


# Kept, copied, loaded.


def test_options_are_settings_and_not_part_of_the_state(path: str) -> None:
    """A run can therefore continue with other ones, and those in old checkpoints have no effect."""
    params = parameters()
    source = FusedAdamW(grouped(params, {"state_dtype": "8bit", "master_weights": "split16"}, {}))
    gradients(params, 1)
    source.step()
    saved = through_a_file(source.state_dict())
    assert not any(AllOptions.PER_GROUP.intersection(group) for group in saved["param_groups"])
    assert source.param_groups[0].keys() == torch.optim.AdamW(parameters()).param_groups[0].keys()
    for group in saved["param_groups"]:
        group |= {"state_dtype": "8bit", "max_grad_norm": 3.0}
    target = FusedAdamW(grouped(parameters(), {}, {"state_dtype": "8bit", "ema_decay": 0.5}))
    mine = copy.deepcopy(target.group_options)
    target.load_state_dict(saved)
    assert target.group_options == mine == [{}, {"state_dtype": "8bit", "ema_decay": 0.5}]
    loaded = [p for group in target.param_groups for p in group["params"]]
    for p, q in zip(params, loaded):
        with torch.no_grad():
            q.copy_(p)
    gradients(loaded, 2)
    with pytest.warns(UserWarning, match="which master_weights=None discards"):
        target.step()
    assert {name for name in target.state[loaded[0]] if "exp_avg" in name} == {"exp_avg", "exp_avg_sq"}
    assert "exp_avg_code" in target.state[loaded[2]] and "ema_param" in target.state[loaded[2]]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_same_options_of_its_own(path: str, clone: Callable[[FusedOptimizer], FusedOptimizer]) -> None:
    params = parameters()
    optimizer = FusedAdamW(grouped(params, {"master_weights": "split8", "max_grad_norm": 0.1}, {"ema_decay": 0.5}))
    gradients(params, 1)
    optimizer.step()
    twin = clone(optimizer)
    theirs = [p for group in twin.param_groups for p in group["params"]]
    for each, of in ((optimizer, params), (twin, theirs)):
        gradients(of, 2)
        each.step()
    assert all(torch.equal(p, q) for p, q in zip(params, theirs))
    assert all(optimizer.state[p].keys() == twin.state[q].keys() for p, q in zip(params, theirs))
    twin.group_options[0]["max_grad_norm"] = 9.0
    assert optimizer.group_options[0] == {"master_weights": "split8", "max_grad_norm": 0.1}


def test_the_callers_groups_serve_another_optimizer() -> None:
    groups = grouped(parameters(), {"state_dtype": "8bit", "name": "first"}, {"initial_lr": 0.1})
    for _ in range(2):
        optimizer = FusedAdamW(groups)
        assert optimizer.group_options == [{"state_dtype": "8bit"}, {}]
        assert optimizer.param_groups[0]["name"] == "first" and optimizer.param_groups[1]["initial_lr"] == 0.1
        assert "state_dtype" not in optimizer.param_groups[0]


def test_a_group_that_comes_later_has_its_own(path: str) -> None:
    params = parameters()
    optimizer = FusedAdamW(params[:2], max_grad_norm=1.0)
    gradients(params, 1)
    optimizer.step()
    optimizer.add_param_group({"params": params[2:], "state_dtype": "8bit", "max_grad_norm": 0.1})
    gradients(params, 2)
    optimizer.step()
    assert optimizer.group_options == [{}, {"state_dtype": "8bit", "max_grad_norm": 0.1}]
    assert "exp_avg_code" in optimizer.state[params[2]] and "exp_avg" in optimizer.state[params[0]]


def test_averages_of_some_groups(path: str) -> None:
    params = parameters(F32)
    optimizer = FusedAdamW(grouped(params, {"ema_decay": 0.5}, {}), lr=0.1)
    start = params[0].detach().clone()
    gradients(params, 1)
    optimizer.step()
    after = [p.detach().clone() for p in params]
    with optimizer.ema_weights():
        torch.testing.assert_close(params[0].detach(), (start + after[0]) / 2)
        assert torch.equal(params[2], after[2])
    assert all(torch.equal(p, value) for p, value in zip(params, after))


@pytest.mark.parametrize("averaged", [0, 1])
@pytest.mark.parametrize("whole", [None, 0.5])
def test_an_average_of_one_group_is_enough(path: str, averaged: int, whole: float | None) -> None:
    own: list[Options] = [{}, {}]
    own[averaged], own[1 - averaged] = {"ema_decay": 0.5}, {"ema_decay": None}
    params = parameters(F32)
    optimizer = FusedAdamW(grouped(params, *own), lr=0.1, ema_decay=whole)
    gradients(params, 1)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    with optimizer.ema_weights():
        changed = [not torch.equal(p, value) for p, value in zip(params, before)]
    assert changed == [i // 2 == averaged for i in range(4)]
    assert all(torch.equal(p, value) for p, value in zip(params, before))
    optimizer.group_options[averaged]["ema_decay"] = None
    with pytest.raises(ValueError, match="ema_weights needs an optimizer with ema_decay"), optimizer.ema_weights():
        pass


def test_stepping_in_backward_keeps_formats_and_refuses_a_clip(path: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    groups = [{"params": model[0].parameters(), "state_dtype": "8bit"}, {"params": model[1].parameters()}]
    optimizer = FusedAdamW(groups)
    optimizer_in_backward(model, optimizer)
    model(torch.randn(5, 8)).square().mean().backward()
    assert "exp_avg_code" in optimizer.state[model[0].weight] and "exp_avg" in optimizer.state[model[1].weight]
    clipped = FusedAdamW([{"params": model[0].parameters()}, {"params": model[1].parameters(), "max_grad_norm": 2.0}])
    with pytest.raises(ValueError, match=r"max_grad_norm must be None .* got 2.0"):
        optimizer_in_backward(model, clipped)


def test_a_compiled_step_has_them_too(path: str) -> None:
    results = []
    for compiled in (False, True):
        params = parameters()
        optimizer = FusedAdamW(grouped(params, {"state_dtype": "8bit", "max_grad_norm": 0.1}, {}), max_grad_norm=1.0)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for i in range(2):
            gradients(params, i)
            step()
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results))


# Refused.


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_argument_is_dropped_in_silence(cls: Any) -> None:
    """Every argument of every constructor works in a group, or is refused there by name."""
    named = set(inspect.signature(cls.__init__).parameters) - {"self", "params", "extras"}
    fields = {field.name for field in dataclasses.fields(AllOptions)}
    for name in named | fields:
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = cls([torch.nn.Parameter(torch.ones(2))])
        value = getattr(AllOptions(), name) if name in fields else optimizer.defaults.get(name, "independent")
        group = {"params": [p], name: value}
        if name in AllOptions.PER_GROUP:
            optimizer.add_param_group(group)
            assert optimizer.group_options[1] == {name: value}
        elif name in optimizer.defaults:
            optimizer.add_param_group(group)
            assert optimizer.group_options[1] == {} and optimizer.param_groups[1][name] == value
        else:
            with pytest.raises(
                ValueError, match=f"{name} must hold for all parameter groups: give it to {cls.__name__}"
            ):
                optimizer.add_param_group(group)
            assert len(optimizer.param_groups) == len(optimizer.group_options) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"max_gradnorm": 0.1},
            "a parameter group must spell its options correctly: 'max_grad_norm'; got 'max_gradnorm'",
        ),
        ({"master_weight": "fp32"}, "'master_weights'; got 'master_weight'"),
        ({"state_type": "8bit"}, "'state_dtype'; got 'state_type'"),
        ({"ema_deacy": 0.1}, "'ema_decay'; got 'ema_deacy'"),
        ({"zero_grad": True}, "'zero_grads'; got 'zero_grad'"),
        ({"seed": 1}, "seed must hold for all parameter groups: give it to FusedAdamW itself; got seed=1 in a group"),
        ({"decay": "independent"}, "decay must hold for all parameter groups"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be greater than 0, or None; got -1.0"),
        ({"state_dtype": "4bit"}, "state_dtype must be None or one of .*; got '4bit'"),
        ({"master_weights": "split16"}, "works on bits of bfloat16, and parameter 0 of group 1 is .*float16"),
    ],
    ids=str,
)
def test_what_a_group_cannot_have_is_refused_before_anything_changes(option: Options, message: str) -> None:
    p, q = torch.ones(2, requires_grad=True), torch.ones(2, dtype=torch.float16, requires_grad=True)
    with pytest.raises(ValueError, match=message):
        FusedAdamW([{"params": [p]}, {"params": [q], **option}])
    optimizer = FusedAdamW([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [q], **option})
    assert len(optimizer.param_groups) == len(optimizer.group_options) == 1


def test_the_callers_own_keys_are_allowed() -> None:
    own = {
        "name": "head",
        "initial_lr": 0.1,
        "max_lr": 1.0,
        "lr_scale": 0.5,
        "speed": 3,
        "grad_norm": 1.0,
        "use_muon": 1,
    }
    optimizer = FusedAdamW([{"params": [torch.ones(2)], **own}])
    assert own.items() <= optimizer.param_groups[0].items()


def test_centered_rmsprop_may_have_8_bits_where_it_is_not_centered() -> None:
    p, q = (torch.ones(2, requires_grad=True) for _ in range(2))
    FusedRMSprop([{"params": [p], "centered": True}, {"params": [q], "state_dtype": "8bit"}])
    with pytest.raises(ValueError, match="with centered=True, which takes a difference"):
        FusedRMSprop([{"params": [p], "centered": True, "state_dtype": "8bit"}, {"params": [q]}])


@pytest.mark.parametrize("stepped", [False, True])
def test_an_option_set_in_the_group_itself_is_refused(path: str, stepped: bool) -> None:
    """Such a setting would have no effect; learning rates and similar ones belong in the group."""
    p = torch.ones(2, requires_grad=True)
    optimizer = FusedAdamW([p])
    p.grad = torch.ones(2)
    if stepped:
        optimizer.step()
    before = p.detach().clone()
    optimizer.param_groups[0]["max_grad_norm"] = 0.5
    with pytest.raises(
        ValueError, match=r"max_grad_norm of group 0 must be set in group_options\[0\], not in the group"
    ):
        optimizer.step()
    assert torch.equal(p, before)


def test_groups_may_be_taken_away_where_none_has_options() -> None:
    params = parameters()
    gradients(params, 1)
    optimizer = FusedAdamW(grouped(params, {}, {}))
    optimizer.param_groups.pop()
    optimizer.add_param_group({"params": params[2:], "state_dtype": "8bit"})
    optimizer.step()
    assert "exp_avg_code" in optimizer.state[params[2]] and "exp_avg" in optimizer.state[params[0]]
    optimizer.param_groups.pop(0)
    with pytest.raises(RuntimeError, match=r"param_groups must be changed only by.*got 1 groups for group_options"):
        optimizer.step()
