"""A state kept in any format, loaded into an optimizer of any other: the right values, or an error that says which."""

import copy
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llmfast.optim import FusedAdamW, FusedLion, FusedOptimizer, FusedSGD
from llmfast.optim.formats import MasterWeights, StateDtype
from llmfast.optim.kept import OWN_NAMES
from llmfast.optim.loading import _keeper_of
from support.launched import unrecorded
from support.training import Options, through_a_file

BF16, F32 = torch.bfloat16, torch.float32
EMA = 0.75


class Format(NamedTuple):
    master: MasterWeights | None
    state: StateDtype | None
    averaged: bool

    @property
    def options(self) -> Options:
        return {
            "master_weights": self.master,
            "state_dtype": self.state,
            "ema_decay": EMA if self.averaged else None,
        }

    @property
    def names(self) -> set[str]:
        """Return the names saved for each parameter by AdamW."""
        low = {"fp32": "master_param", "split16": "low_bits", "split8": "low_bits", "kahan": "kahan_comp"}
        found = {low[self.master]} if self.master in low else set()
        found |= {"ema_param"} if self.averaged else set()
        moments = ("exp_avg", "exp_avg_sq")
        kinds = ("_code", "_scale") if self.state == "8bit" else ("",)
        return found | {"step"} | {f"{name}{kind}" for name in moments for kind in kinds}

    def __str__(self) -> str:
        return f"{self.master}-{self.state}-{'averaged' if self.averaged else 'alone'}"


MASTERS: list[MasterWeights | None] = [None, "fp32", "split16", "split8", "stochastic", "kahan"]
STATES: list[StateDtype | None] = [None, F32, "8bit"]
# Every pair of master weights meets every pair of states; averages are there in half of them.
FORMATS = [Format(m, s, (i + j) % 2 == 0) for (i, m), (j, s) in product(enumerate(MASTERS), enumerate(STATES))]


def half_of_the_targets(source: Format, other: bool) -> list[Format]:
    """Return one half or the other; over all sources both have all pairs of master weights, and of states."""
    offset = MASTERS.index(source.master) // 2 + STATES.index(source.state) + other
    return [form for form in FORMATS if (offset + MASTERS.index(form.master)) % 2 == 0]


# What of a weight, and of a moment, a format keeps: relative errors. What the weight's own bits cannot hold is lost.
WEIGHTS = {None: 2.0**-8, "stochastic": 2.0**-7, "fp32": 0.0, "split16": 0.0, "split8": 2.0**-16, "kahan": 2.0**-16}
MOMENTS: dict[Any, float] = {None: 2.0**-8, F32: 0.0, "8bit": 0.07}


def made(form: Format, seed: int = 0) -> tuple[nn.Module, FusedAdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 13), nn.Tanh(), nn.Linear(13, 3)).to(BF16)
    return model, FusedAdamW(model.parameters(), lr=0.01, **form.options)


def step(model: nn.Module, optimizer: FusedOptimizer, seed: int) -> None:
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(seed)).to(BF16)
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(form: Format) -> tuple[nn.Module, FusedAdamW]:
    model, optimizer = made(form)
    for seed in range(2):
        step(model, optimizer, seed)
    return model, optimizer


def held(optimizer: FusedOptimizer) -> list[dict[str, Tensor]]:
    """Return the values of all parameters, in whatever format they are kept."""
    found = []
    states = optimizer.torch_state_dict()["state"].values()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, state in zip(params, states):
        average = optimizer.state[p].get("ema_param")
        more = {} if average is None else {"average": average.clone()}
        found.append({"weight": optimizer.master_value(p).float(), **copy.deepcopy(state), **more})
    return found


def settle(optimizer: FusedOptimizer) -> None:
    """Take a step that changes nothing but formats, and averages by what they are of."""
    for group in optimizer.param_groups:
        group["lr"], group["betas"] = 0.0, (1 - 1e-9, 1 - 1e-9)  # 1 in float32
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()


def assert_holds(optimizer: FusedOptimizer, target: Format, source: Format, truth: list[dict[str, Tensor]]) -> None:
    for mine, theirs in zip(held(optimizer), truth, strict=True):
        torch.testing.assert_close(mine["weight"], theirs["weight"], rtol=WEIGHTS[target.master], atol=0)
        assert mine["step"] == theirs["step"] + 1
        for name in ("exp_avg", "exp_avg_sq"):
            assert mine[name].dtype in ((F32, BF16) if target.state is None else (F32,))
            # A state of the parameter's dtype has it, whatever it was loaded from.
            rounding = MOMENTS[target.state]
            atol = 0.02 * theirs[name].float().abs().max().item() if target.state == "8bit" else 0.0
            torch.testing.assert_close(mine[name].float(), theirs[name].float(), rtol=rounding, atol=atol)
        assert ("average" in mine) == target.averaged
        if target.averaged:
            before = theirs.get("average", theirs["weight"])
            expected = before.lerp(mine["weight"], 1 - EMA)
            torch.testing.assert_close(mine["average"], expected, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("source", FORMATS, ids=str)
@pytest.mark.filterwarnings("ignore:the state holds")
@unrecorded()
def test_load_state_dict_converts_every_format_into_every_other(source: Format) -> None:
    model, optimizer = trained(source)
    truth, saved = held(optimizer), through_a_file(optimizer.state_dict())
    assert all(set(state) == source.names for state in saved["state"].values())
    for target in FORMATS:
        other, resumed = made(target, seed=1)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(copy.deepcopy(saved))
        settle(resumed)
        assert_holds(resumed, target, source, truth)
        assert all(set(state) == target.names for state in resumed.state_dict()["state"].values())


@pytest.mark.parametrize("i", range(len(FORMATS)))
@pytest.mark.filterwarnings("ignore:the state holds")
@unrecorded()
def test_kernels_go_on_from_a_converted_state(kernels: None, i: int) -> None:
    source, target = FORMATS[i], FORMATS[(7 * i + 5) % len(FORMATS)]
    model, optimizer = trained(source)
    truth = held(optimizer)
    other, resumed = made(target, seed=1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    settle(resumed)
    assert_holds(resumed, target, source, truth)


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize("source", FORMATS, ids=str)
@pytest.mark.filterwarnings("ignore:the state holds", "ignore:torch.distributed is disabled")
@unrecorded()
def test_torch_distributed_checkpoint_converts_or_names_what_is_missing(
    source: Format, flat: bool, tmp_path: Path
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = trained(source)
    truth = held(optimizer)
    weights, states = get_state_dict(model, optimizer, options=options)
    save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
    for target in half_of_the_targets(source, flat):
        other, resumed = made(target, seed=1)
        weights, states = get_state_dict(other, resumed, options=options)
        missing = target.names - source.names
        if missing:
            names = "|".join(sorted(missing))
            with pytest.raises(CheckpointException, match=rf"Missing key .*: optimizer\.state\.0\.weight\.({names})\."):
                load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
            continue
        load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
        set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states, options=options)
        settle(resumed)
        # What has no name in the target stays behind: bits beyond the weight's own are lost, without a word from DCP.
        assert_holds(resumed, target, source, truth)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("source", FORMATS[::2], ids=str)
@pytest.mark.filterwarnings("ignore:the state holds")
@unrecorded()
def test_whole_state_dicts_are_converted(source: Format, offload: bool) -> None:
    """DCP fills in what they lack, from states that the new optimizer has of its first, random weights."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    model, optimizer = trained(source)
    truth = held(optimizer)
    weights, states = map(copy.deepcopy, get_state_dict(model, optimizer, options=options))
    for target in half_of_the_targets(source, offload):
        if offload and target.averaged and not source.averaged:
            continue  # what is filled in is a copy then, which looks like what was saved
        other, resumed = made(target, seed=1)
        mine = copy.deepcopy(states)
        set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=mine, options=options)
        settle(resumed)
        assert_holds(resumed, target, source, truth)


def test_a_flattened_state_of_other_formats_is_refused_by_name() -> None:
    """Load without a checkpoint in between, which would report a missing key."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    wanted = {
        "exp_avg_code for parameter 0.weight, which state_dtype='8bit' keeps": {"state_dtype": "8bit"},
        "master_param for parameter 0.weight, which master_weights='fp32' keeps": {"master_weights": "fp32"},
        "low_bits for parameter 0.weight, which master_weights='split16' or 'split8' keeps": {
            "master_weights": "split8"
        },
        "ema_param for parameter 0.weight, which ema_decay keeps": {"ema_decay": 0.9},
    }
    for message, extras in wanted.items():
        model, optimizer = made(Format(None, None, averaged=False))
        step(model, optimizer, 0)
        weights, states = get_state_dict(model, optimizer, options=options)
        resumed = FusedAdamW(model.parameters(), **extras)
        with pytest.raises(ValueError, match=f"must have {message}; got one of .*into this one"):
            set_state_dict(model, resumed, model_state_dict=weights, optim_state_dict=states, options=options)


@pytest.mark.parametrize(
    ("cls", "extras"),
    [(FusedSGD, {}), (FusedSGD, {"momentum": 0.9}), (FusedLion, {"state_dtype": "8bit"}), (FusedLion, {})],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_not_saved_is_not_missed_where_it_is_flattened(cls: Any, extras: Options, tmp_path: Path) -> None:
    """SGD counts steps of its own, which torch's does not have; a frozen parameter has no state."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)

    def start(seed: int) -> tuple[nn.Module, FusedOptimizer]:
        model, _ = made(Format(None, None, averaged=False), seed)
        model[0].bias.requires_grad_(False)  # type: ignore[index]
        return model, cls(model.parameters(), lr=0.01, **extras)

    model, optimizer = start(0)
    step(model, optimizer, 0)
    weights, states = get_state_dict(model, optimizer, options=options)
    save({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
    other, resumed = start(1)
    weights, states = get_state_dict(other, resumed, options=options)
    load({"model": weights, "optimizer": states}, checkpoint_id=tmp_path)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states, options=options)
    for each in ((model, optimizer), (other, resumed)):
        step(*each, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


@pytest.mark.parametrize("target", ["split16", "split8", "fp32"])
@pytest.mark.parametrize(
    ("source", "dtype"), [("split16", torch.int16), ("split16", torch.int32), ("split8", torch.int8)]
)
def test_low_bits_of_older_checkpoints_are_told_apart_by_their_dtype(
    path: str, source: Any, dtype: torch.dtype, target: Any
) -> None:
    """They had one name, `remainder`; int32 is what those of DTensors were saved as."""
    model, optimizer = trained(Format(source, None, averaged=False))
    truth, saved = held(optimizer), through_a_file(optimizer.state_dict())
    for state in saved["state"].values():
        low = state.pop("low_bits")
        state["remainder"] = (low // 256 if dtype == torch.int8 else low).to(dtype)
    form = Format(target, None, averaged=False)
    other, resumed = made(form, seed=1)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(saved)
    settle(resumed)
    assert_holds(resumed, form, Format(source, None, averaged=False), truth)


@pytest.mark.filterwarnings("ignore:the state has an average .ema_param. of parameter [1-3]")
def test_an_average_that_is_not_kept_up_does_not_stay() -> None:
    _, optimizer = trained(Format(None, None, averaged=True))
    other, resumed = made(Format(None, None, averaged=False))
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    with pytest.warns(UserWarning, match=r"has an average \(ema_param\) of parameter 0, \(13, 20\).*, which ema_d"):
        step(other, resumed, 0)
    assert all("ema_param" not in state for state in resumed.state.values())


@pytest.mark.parametrize("master", ["split16", "split8"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_older_checkpoints_are_read_under_the_name_they_have(master: Any, tmp_path: Path) -> None:
    """Follow the documentation, with torch.distributed.checkpoint only."""
    dtype = torch.int16 if master == "split16" else torch.int8
    form = Format(master, None, averaged=False)
    model, optimizer = trained(form)
    truth = held(optimizer)

    def renamed(states: Any) -> Any:
        for state in states["state"].values():
            low = state.pop("low_bits")
            state["remainder"] = (low // 256 if dtype == torch.int8 else low).to(dtype)
        return states

    weights, states = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": renamed(states)}, checkpoint_id=tmp_path)
    other, resumed = made(form, seed=1)
    weights, states = get_state_dict(other, resumed)
    load({"model": weights, "optimizer": renamed(states)}, checkpoint_id=tmp_path)
    set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states)
    settle(resumed)
    assert_holds(resumed, form, form, truth)


def test_every_name_of_a_state_is_told_with_the_setting_that_keeps_it() -> None:
    wanted = {
        "master_param": "master_weights='fp32'",
        "low_bits": "master_weights='split16' or 'split8'",
        "kahan_comp": "master_weights='kahan'",
        "ema_param": "ema_decay",
        "exp_avg_code": "state_dtype='8bit'",
        "exp_avg_scale": "state_dtype='8bit'",
        "exp_avg": "a state_dtype other than '8bit'",
        "sum": "a state_dtype other than '8bit'",
    }
    assert {name: _keeper_of(name) for name in wanted} == wanted
    assert {*OWN_NAMES} <= wanted.keys()
