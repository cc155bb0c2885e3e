"""Tests of optimizer states: exchanged with torch, saved and loaded, converted, copied, and rejected."""

import copy
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import (
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedLion,
    FusedOptimizer,
    FusedRMSprop,
    FusedSGD,
)
from support.devices import DEVICE
from support.launched import unrecorded
from support.training import (
    CASES,
    FULL,
    LATE,
    PLAIN,
    STRAIGHT,
    TRANSPOSED,
    Case,
    Options,
    gradients,
    parameters,
    through_a_file,
    values,
)

MOMENTUM = [
    Case(FusedAdamW, {"amsgrad": True}),
    Case(FusedAdam, {"weight_decay": 0.1}),
    Case(FusedSGD, {"momentum": 0.9, "dampening": 0.3}),
    Case(FusedRMSprop, {"momentum": 0.9}),
    Case(FusedAdagrad, {"lr_decay": 0.1}),
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CLASSES_WITH_STATES: list[tuple[type[FusedOptimizer], Options]] = [
    *((FusedAdamW, {"amsgrad": True}), (FusedSGD, {"momentum": 0.9}), (FusedLion, {}), (FusedAdagrad, {})),
    (FusedRMSprop, {"momentum": 0.5}),
]


def some_parameters(dtype: torch.dtype = FP32) -> list[Tensor]:
    params = parameters(dtype)
    return [params[STRAIGHT], params[TRANSPOSED]]


def copies(params: list[Tensor]) -> list[Tensor]:
    return [p.detach().clone().requires_grad_() for p in params]


def of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: torch.optim.Optimizer, steps: int = 2, first: int = 0) -> None:
    params = of(optimizer)
    for step in range(first, first + steps):
        gradients(LATE + 2 + 3 * step, params)  # all have one
        optimizer.step()


def assert_same(ours: Any, theirs: Any) -> None:
    """Assert that two states are equal bit for bit, with equal dtypes."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        other = theirs[key]
        if isinstance(value, dict):
            assert_same(value, other)
        elif isinstance(value, Tensor):
            assert value.dtype == other.dtype, key
            torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True, msg=key)
        else:
            assert value == other, key


# With torch.


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("steps", [1, 2])
def test_the_state_is_named_and_typed_as_in_torch(path: str, case: Case, steps: int) -> None:
    ours, theirs = case.make_ours(some_parameters()), case.make_exact(some_parameters())
    train(ours, steps)
    train(theirs, steps)
    saved, other = ours.state_dict(), theirs.state_dict()
    assert saved["param_groups"][0].keys() == other["param_groups"][0].keys()
    assert saved["state"].keys() == other["state"].keys()
    for key, state in saved["state"].items():
        assert state.keys() == other["state"][key].keys()
        for name, t in state.items():
            torch.testing.assert_close(t, other["state"][key][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", FULL, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_checkpoint_goes_there_and_back_unchanged(path: str, case: Case, dtype: torch.dtype) -> None:
    ours = case.make_ours(some_parameters(dtype))
    train(ours)
    saved = through_a_file(ours.state_dict())
    theirs, back = case.make_exact(some_parameters(dtype)), case.make_ours(some_parameters(dtype))
    theirs.load_state_dict(saved)
    assert_same(theirs.state_dict()["state"], saved["state"])
    back.load_state_dict(through_a_file(theirs.state_dict()))
    assert_same(back.state_dict()["state"], saved["state"])


IMPLEMENTATIONS = [
    (case, flag)
    for case in FULL
    for flag in ("fused", "foreach", "capturable")
    if flag in inspect.signature(case.torchs.__init__).parameters
]


@pytest.mark.parametrize(("case", "flag"), IMPLEMENTATIONS, ids=str)
def test_a_checkpoint_of_any_of_torchs_implementations(path: str, case: Case, flag: str) -> None:
    # A capturable one runs on a GPU alone; what shows in its checkpoint is the flag.
    theirs = case.make(case.torchs, some_parameters(), **({} if flag == "capturable" else {flag: True}))
    train(theirs)
    saved = through_a_file(theirs.state_dict())
    saved["param_groups"][0][flag] = True
    params = copies(theirs.param_groups[0]["params"])
    ours = case.make_ours(params)
    ours.load_state_dict(saved)
    train(theirs, 1, first=2)
    train(ours, 1, first=2)
    torch.testing.assert_close(values(params), values(theirs.param_groups[0]["params"]), rtol=1e-6, atol=1e-6)
    if "step" in saved["state"][0]:
        assert ours.state[params[0]]["step"] == 3


@pytest.mark.parametrize("case", MOMENTUM, ids=str)
def test_a_checkpoint_of_torchs_goes_on_with_more_precise_weights_and_coarser_states(path: str, case: Case) -> None:
    theirs = case.make_exact(
        some_parameters(BF16),
    )
    train(theirs)
    params = copies(theirs.param_groups[0]["params"])
    ours = case.make_ours(params, master_weights="fp32", state_dtype="8bit")
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    train(theirs, 1, first=2)
    train(ours, 1, first=2)
    lr = ours.param_groups[0]["lr"]
    torch.testing.assert_close(values(params), values(theirs.param_groups[0]["params"]), rtol=0.02, atol=lr)
    for p in params:
        assert ours.state[p]["master_param"].dtype == torch.float32
        codes = [name for name in ours.state[p] if name.endswith("_code")]
        assert codes and all(ours.state[p][name].dtype in (torch.int8, torch.uint8) for name in codes)


@pytest.mark.parametrize("case", MOMENTUM, ids=str)
def test_torch_goes_on_from_8_bit_states(path: str, case: Case) -> None:
    ours = case.make_ours(some_parameters(), state_dtype="8bit", ema_decay=0.9)
    train(ours)
    params = ours.param_groups[0]["params"]
    theirs = case.make_exact(copies(params))
    train(theirs)
    fresh = {key: list(state) for key, state in theirs.state_dict()["state"].items()}
    exported = through_a_file(ours.torch_state_dict())
    assert {key: list(state) for key, state in exported["state"].items()} == fresh
    theirs = case.make_exact(copies(params))
    theirs.load_state_dict(exported)
    before = values(params)
    train(ours, 1, first=2)
    train(theirs, 1, first=2)
    moved, apart = values(params) - before, values(params) - values(theirs.param_groups[0]["params"])
    assert apart.norm() < 0.02 * moved.norm()  # states of ours are rounded once more


# Saved and loaded.

MODES: list[tuple[torch.dtype, Options]] = [
    (BF16, {"state_dtype": FP32}),
    (BF16, {"state_dtype": "8bit"}),
    (FP32, {"state_dtype": BF16}),
    (FP32, {"state_dtype": "8bit"}),
    (BF16, {"master_weights": "fp32"}),
    (FP16, {"master_weights": "fp32", "state_dtype": FP32}),
    (BF16, {"master_weights": "split16"}),
    (BF16, {"master_weights": "split8"}),
    (BF16, {"master_weights": "kahan"}),
    (FP16, {"master_weights": "kahan"}),
    (FP32, {"ema_decay": 0.9}),
]
MIXED: list[tuple[torch.dtype, Options]] = [
    (FP32, {"state_dtype": FP16, "ema_decay": 0.9}),
    (BF16, {"master_weights": "stochastic", "seed": 3}),
    (BF16, {"master_weights": "split8", "state_dtype": "8bit", "ema_decay": 0.9}),
]
COMBINED = [*((MOMENTUM[0], mode) for mode in MODES), *((case, mode) for case in MOMENTUM for mode in MIXED)]


@pytest.mark.parametrize(("case", "mode"), COMBINED, ids=str)
@unrecorded()
def test_training_goes_on_bit_for_bit(path: str, case: Case, mode: tuple[torch.dtype, Options]) -> None:
    dtype, extras = mode
    whole = case.make_ours(some_parameters(dtype), **extras)
    train(whole)
    saved = through_a_file(whole.state_dict())
    resumed = case.make_ours(copies(of(whole)), **extras)
    resumed.load_state_dict(saved)
    assert_same(resumed.state_dict()["state"], saved["state"])
    train(whole, 1, first=2)
    train(resumed, 1, first=2)
    assert torch.equal(values(of(resumed)), values(of(whole)))
    assert_same(resumed.state_dict()["state"], whole.state_dict()["state"])


def test_a_loaded_copy_is_kept_where_the_parameter_is_nan(path: str) -> None:
    """A NaN says nothing about the weights that the copy belongs to; any other number that differs does."""
    source = FusedAdamW([torch.tensor([1.0, 2.0, 3.0], dtype=BF16, requires_grad=True)], lr=0.0, master_weights="fp32")
    (p,) = source.param_groups[0]["params"]
    p.grad = torch.zeros_like(p)
    source.step()
    q = torch.tensor([1.0, math.nan, 5.0], dtype=BF16, requires_grad=True)
    other = FusedAdamW([q], lr=0.0, weight_decay=0.0, master_weights="fp32")
    other.load_state_dict(source.state_dict())
    q.grad = torch.zeros_like(q)
    other.step()
    assert other.state[q]["master_param"].tolist() == [1.0, 2.0, 5.0]


MASTERS = ["fp32", "split16", "split8", "kahan"]
KEPT = {"fp32": 0.0, "split16": 0.0, "split8": 2.0**-16, "kahan": 2.0**-16}  # relative errors


def loaded_at_lr_0(source: FusedOptimizer, master: str | None, params: list[Tensor] | None = None) -> FusedAdamW:
    """Load the state into another format, and take a step that changes nothing else."""
    optimizer = FusedAdamW(params or copies(of(source)), master_weights=master)  # type: ignore[arg-type]
    optimizer.load_state_dict(through_a_file(source.state_dict()))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(optimizer, 1)
    return optimizer


@pytest.mark.parametrize("source", MASTERS)
@unrecorded()
def test_weights_keep_their_bits_whatever_keeps_these(path: str, source: Any) -> None:
    optimizer = FusedAdamW(some_parameters(BF16), lr=0.1, master_weights=source)
    train(optimizer, 3)
    truth = [optimizer.master_value(p) for p in of(optimizer)]
    assert any((value != p.float()).any() for value, p in zip(truth, of(optimizer)))
    for master, error in KEPT.items():
        other = loaded_at_lr_0(optimizer, master)
        for p, value in zip(of(other), truth):
            torch.testing.assert_close(other.master_value(p), value, rtol=error, atol=0)


@pytest.mark.parametrize("master", ["split16", "split8"])
def test_a_weight_halfway_between_two_values_keeps_its_bits(path: str, master: str) -> None:
    halfway = 1 + 2.0**-8  # to nearest is 1, to even; split, it is the next above, less a half
    source = FusedAdamW([torch.ones(3, dtype=BF16, requires_grad=True)], lr=0.0, master_weights="fp32")
    train(source, 1)
    source.state[of(source)[0]]["master_param"].fill_(halfway)
    other = loaded_at_lr_0(source, master)
    assert torch.equal(other.master_value(of(other)[0]), torch.full((3,), halfway))


def test_a_weight_that_was_set_to_something_else_has_no_old_bits(path: str) -> None:
    source = FusedAdamW([torch.ones(3, dtype=BF16, requires_grad=True)], lr=0.01, master_weights="fp32")
    train(source, 1)
    other = loaded_at_lr_0(source, "split16", [torch.full((3,), 5.0, dtype=BF16, requires_grad=True)])
    assert torch.equal(other.master_value(of(other)[0]), torch.full((3,), 5.0))


@pytest.mark.parametrize("later", ["step", "plan", "load"])
def test_a_weight_that_is_set_alone_follows_its_float32_copy_until_a_state_is_loaded(path: str, later: str) -> None:
    found = []
    for set_alone in (False, True):
        optimizer = FusedAdamW([torch.ones(3, dtype=BF16, requires_grad=True)], lr=0.01, master_weights="fp32")
        train(optimizer, 2)
        (p,) = of(optimizer)
        if set_alone:
            p.detach().fill_(5.0)
        if later == "plan":
            optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
        elif later == "load":
            optimizer.load_state_dict(optimizer.state_dict())
        train(optimizer, 1)
        found.append(optimizer.master_value(p))
    untouched, touched = found
    if later == "load":
        assert (touched - 5.0).abs().max() < 0.02 and (untouched - 1.0).abs().max() < 0.04
    else:
        assert torch.equal(touched, untouched)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
def test_a_copy_that_is_made_after_loading_knows_what_was_loaded(
    path: str, clone: Callable[[FusedOptimizer], FusedOptimizer]
) -> None:
    """Its first step then looks whether the loaded copies of weights belong to the loaded weights."""
    source, other = (
        FusedAdamW([torch.full((3,), x, dtype=BF16, requires_grad=True)], lr=0.01, master_weights="fp32")
        for x in (1.0, 5.0)
    )
    train(source, 1)
    other.load_state_dict(source.state_dict())
    twin = clone(other)
    for optimizer in (other, twin):
        train(optimizer, 1)
    assert (other.master_value(of(other)[0]) - 5.0).abs().max() < 0.1
    assert torch.equal(twin.master_value(of(twin)[0]), other.master_value(of(other)[0]))


@pytest.mark.parametrize("source", MASTERS)
def test_lost_bits_are_told_of(path: str, source: Any) -> None:
    optimizer = FusedAdamW([torch.ones(3, dtype=BF16, requires_grad=True)], lr=0.01, master_weights=source)
    train(optimizer, 1)
    name = {"fp32": "master_param", "kahan": "kahan_comp"}.get(source, "low_bits")
    warning = rf"has additional bits \({name}\) of parameter 0, \(3,\) torch.bfloat16.*discards"
    with pytest.warns(UserWarning, match=warning):
        other = loaded_at_lr_0(optimizer, None)
    assert torch.equal(values(of(other)), values(of(optimizer)))
    assert other.state_dict()["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("dtype", [None, FP32, BF16], ids=str)
def test_8_bit_states_become_what_the_options_ask_for(path: str, dtype: Any) -> None:
    coarse = FusedAdamW(some_parameters(), state_dtype="8bit")
    train(coarse)
    fine = FusedAdamW(copies(of(coarse)), state_dtype=dtype)
    fine.load_state_dict(through_a_file(coarse.state_dict()))
    decoded = coarse.torch_state_dict()["state"]
    for group in fine.param_groups:
        group["betas"] = (1.0, 1.0)  # states stay
        group["lr"] = 0.0
    train(fine, 1)
    for state, other in zip(fine.state_dict()["state"].values(), decoded.values()):
        assert state.keys() == other.keys()
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == (dtype or FP32)
            assert torch.equal(state[name], other[name].to(dtype or FP32))


# Copied, added to, shared.


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("case", [MOMENTUM[0], MOMENTUM[2]], ids=str)
@unrecorded()
def test_a_copy_goes_on_alone_with_the_same_options(
    path: str, case: Case, clone: Callable[[FusedOptimizer], FusedOptimizer]
) -> None:
    extras = {"master_weights": "stochastic", "state_dtype": FP32, "ema_decay": 0.5, "max_grad_norm": 9.0, "seed": 7}
    optimizer = case.make_ours(some_parameters(BF16), **extras)
    train(optimizer)
    before = values(of(optimizer))
    twin = clone(optimizer)
    assert twin.options == optimizer.options
    assert twin.options is not optimizer.options
    train(twin, 1, first=2)
    assert torch.equal(values(of(optimizer)), before)
    train(optimizer, 1, first=2)
    assert torch.equal(values(of(optimizer)), values(of(twin)))
    assert_same(twin.state_dict()["state"], optimizer.state_dict()["state"])


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_copy_has_every_public_attribute(
    path: str, case: Case, clone: Callable[[FusedOptimizer], FusedOptimizer]
) -> None:
    optimizer = case.make_ours(some_parameters(), max_grad_norm=1.0)
    train(optimizer)
    optimizer.note = {"of": "the user"}
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)  # wraps `step`, which is of this optimizer alone
    twin = clone(optimizer)
    names = {name for name in vars(optimizer) if not name.startswith("_")} - {"step"}
    assert names == {name for name in vars(twin) if not name.startswith("_")} > {"grad_norm", "note", "options"}
    assert twin.note == optimizer.note
    assert twin.grad_norm is not None and torch.equal(twin.grad_norm, optimizer.grad_norm)
    assert "step" not in vars(twin)
    before = values(of(optimizer))
    train(twin, 1, first=2)
    assert torch.equal(values(of(optimizer)), before)


def test_a_copy_keeps_its_kind_of_decay() -> None:
    optimizer = FusedAdamW([torch.ones(3)], lr=0.1, decay="relative")
    twin = pickle.loads(pickle.dumps(optimizer))
    assert twin.decay == "relative"
    assert twin.param_groups[0]["lr_max"] == 0.1


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_group_is_added_in_the_middle(path: str, case: Case) -> None:
    def run(make: Callable[[list[Tensor]], Any]) -> Tensor:
        first, second = some_parameters()
        optimizer = make([first])
        train(optimizer)
        optimizer.add_param_group({"params": [second], "lr": 0.1, "weight_decay": 0.2})
        train(optimizer, first=2)
        return values([first, second])

    torch.testing.assert_close(run(case.make_ours), run(case.make_exact), rtol=1e-6, atol=1e-6)


def test_sums_of_adagrad_stay_in_shared_memory(path: str) -> None:
    params = some_parameters()
    optimizer = FusedAdagrad(params)
    optimizer.share_memory()
    train(optimizer)
    assert all(optimizer.state[p]["sum"].is_shared() for p in params)


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_names_of_parameters_are_kept(case: Case) -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = case.make_ours(model.named_parameters())
    saved = through_a_file(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = case.make_ours(torch.nn.Linear(2, 3).named_parameters())
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]


# Refused.


@pytest.mark.parametrize("case", FULL, ids=str)
def test_a_state_of_another_shape_is_refused_by_name(path: str, case: Case) -> None:
    source = case.make_ours([torch.ones(3, requires_grad=True), torch.ones(10, 8, requires_grad=True)])
    train(source)
    # Same strides, fewer rows: a kernel that trusted the address would write past the state's end.
    target = case.make_ours([torch.ones(3, requires_grad=True), torch.ones(200, 8, requires_grad=True)])
    target.load_state_dict(source.state_dict())
    before = copy.deepcopy(target.state_dict()["state"])
    with pytest.raises(ValueError, match=r"state \w+ must .* its parameter, \(200, 8\).*got \(10, 8\)"):
        train(target)
    assert torch.equal(values(of(target)), torch.ones(3 + 200 * 8))
    assert_same(target.state_dict()["state"], before)


def test_nothing_changes_where_one_state_is_refused(path: str) -> None:
    params = [torch.ones(3, requires_grad=True) for _ in range(3)]
    optimizer = FusedAdamW(params)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"state exp_avg must .* got \(4,\)"):
        optimizer.step()
    assert list(optimizer.state) == [params[2]] and list(optimizer.state[params[2]]) == ["exp_avg"]
    assert all(torch.equal(p, torch.ones(3)) for p in params)


def test_8_bit_states_without_their_scales_are_refused(path: str) -> None:
    optimizer = FusedAdamW(some_parameters(), state_dtype="8bit")
    train(optimizer)
    saved = optimizer.state_dict()
    del saved["state"][0]["exp_avg_scale"]
    optimizer.load_state_dict(saved)
    needs = r"state exp_avg of \(512,\).*holds 8-bit codes, which need 4 scales; got"
    with pytest.raises(ValueError, match=rf"{needs} none"):
        train(optimizer)
    saved["state"][0]["exp_avg_scale"] = torch.ones(3)
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=rf"{needs} \(3,\)"):
        train(optimizer)


@pytest.mark.parametrize("state_dtype", [None, "8bit"])
@pytest.mark.parametrize(("cls", "options"), [*MOMENTUM, (FusedLion, {})])
def test_a_saved_state_without_what_the_rule_keeps_is_refused(cls: Any, options: Options, state_dtype: Any) -> None:
    optimizer = cls(some_parameters(), state_dtype=state_dtype, **options)
    train(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    free = optimizer.late if optimizer.torch_counts_steps else optimizer.late | {"step"}
    # How many scales are needed, the next step knows.
    needed = [n for n in saved["state"][0] if not n.endswith("_scale") and n.removesuffix("_code") not in free]
    for name in needed:
        part = copy.deepcopy(saved)
        value = part["state"][0].pop(name)
        with pytest.raises(ValueError, match=f"parameter 0 must have .*, without {name.removesuffix('_code')}$"):
            optimizer.load_state_dict(part)
        part["state"][0][f"{name}1"] = value  # as bitsandbytes and others name it
        with pytest.raises(ValueError, match=rf"; got .*\b{name}1, without"):
            optimizer.load_state_dict(part)
        assert_same(optimizer.state_dict()["state"], saved["state"])
    optimizer.load_state_dict({**saved, "state": {}})  # as before the first step


LATE_STATES: list[tuple[type[FusedOptimizer], Options, set[str]]] = [
    (FusedAdam, {"amsgrad": True}, {"max_exp_avg_sq"}),
    (FusedAdamW, {"amsgrad": True}, {"max_exp_avg_sq"}),
    (FusedRMSprop, {"momentum": 0.9, "centered": True}, {"momentum_buffer", "grad_avg"}),
    (FusedSGD, {"momentum": 0.9}, {"momentum_buffer"}),
    (FusedLion, {}, {"step"}),
    (FusedAdagrad, {}, set()),
]


@pytest.mark.parametrize(("cls", "options", "late"), LATE_STATES)
def test_states_that_begin_late_may_be_missing(cls: Any, options: Options, late: set[str]) -> None:
    """Let a setting of a run that goes on ask for them; from 0 they do no harm."""
    trained = cls(some_parameters(), **options)
    train(trained)
    assert cls.late == late
    moves = []
    for missing in (set(), late):
        saved = copy.deepcopy(trained.state_dict())
        for name in missing:
            del saved["state"][0][name]
        optimizer = cls(copies(of(trained)), **options)
        optimizer.load_state_dict(saved)
        train(optimizer, 1)
        moves.append((values(of(optimizer)) - values(of(trained))).abs().max())
    assert 0 < moves[1] < 2 * moves[0]


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_an_unknown_keyword_is_a_type_error(case: Case) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'master_weight'; those beyond torch's are"):
        case.make_ours([torch.ones(2)], master_weight="fp32")


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be greater than 0, or None; got 0.0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be greater than 0, or None; got nan"),
        ({"master_weights": "split"}, r"master_weights must be None or one of \['fp32', .*'stochastic'\]; got 'split'"),
        ({"state_dtype": torch.float64}, "state_dtype must be None or one of .*; got torch.float64"),
        ({"state_dtype": "4bit"}, "state_dtype must be None or one of .*; got '4bit'"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), or None; got 1.0"),
        ({"ema_decay": -0.1}, r"ema_decay must be in \[0, 1\), or None; got -0.1"),
        ({"seed": -1}, r"seed must be in \[0, 2\^53\); got -1"),
        ({"seed": 1 << 53}, r"seed must be in \[0, 2\^53\); got 9007199254740992"),
    ],
)
def test_an_option_out_of_range_is_refused(extras: Options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedSGD([torch.ones(2)], **extras)


@pytest.mark.parametrize("master", ["split16", "split8", "stochastic"])
def test_float16_is_refused_by_name_where_bits_are_those_of_bfloat16(master: Any) -> None:
    message = rf"master_weights='{master}' works on bits of bfloat16, and %s is \(2,\) torch.float16"
    half = torch.ones(2, dtype=FP16)
    with pytest.raises(ValueError, match=message % "head"):
        FusedAdamW([("body", torch.ones(2, dtype=BF16)), ("head", half)], master_weights=master)
    optimizer = FusedAdamW([torch.ones(2)], master_weights=master)
    with pytest.raises(ValueError, match=message % "parameter 0 of group 1"):
        optimizer.add_param_group({"params": [half]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("extras", [{"master_weights": "fp32"}, {"state_dtype": "8bit"}, {"ema_decay": 0.9}])
def test_complex_parameters_are_refused_what_is_for_real_ones(extras: Options) -> None:
    with pytest.raises(
        ValueError, match=rf"complex parameters; got parameter 0 of group 0, \(2,\) torch.complex64 on {DEVICE}"
    ):
        FusedAdamW([torch.ones(2, dtype=torch.complex64)], **extras)


def test_centered_rmsprop_is_refused_8_bits() -> None:
    with pytest.raises(ValueError, match="with centered=True, which takes a difference"):
        FusedRMSprop([torch.ones(2)], centered=True, state_dtype="8bit")


def test_there_are_no_averages_without_ema_decay() -> None:
    with (
        pytest.raises(ValueError, match="ema_weights needs an optimizer with ema_decay; got"),
        FusedSGD([torch.ones(2)]).ema_weights(),
    ):
        pass


@pytest.mark.parametrize("dtype", [None, torch.float32, "8bit"])
def test_states_of_parameters_that_come_later_start_as_those_of_the_others(path: str, dtype: Any) -> None:
    """Torch makes Adagrad's states when it is constructed, and then no more."""
    first, later = (torch.nn.Parameter(torch.ones(256)) for _ in range(2))
    optimizer = FusedAdagrad([first], lr=0.5, initial_accumulator_value=9.0, state_dtype=dtype)
    optimizer.add_param_group({"params": [later]})
    for p in (first, later):
        p.grad = torch.full_like(p, 4.0)
    optimizer.step()
    torch.testing.assert_close(later.detach(), torch.full((256,), 1 - 0.5 * 4 / 5))
    assert torch.equal(first, later)


def test_states_of_complex_parameters_that_come_later_start_as_torchs(path: str) -> None:
    found = []
    for cls in (FusedAdagrad, torch.optim.Adagrad):
        first, later = (torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)) for _ in range(2))
        ours = cls is FusedAdagrad
        optimizer: Any = cls([first] if ours else [first, later], lr=0.5, initial_accumulator_value=9.0)
        if ours:
            optimizer.add_param_group({"params": [later]})
        for p in (first, later):
            p.grad = torch.full_like(p, 3 + 4j)
        optimizer.step()
        found.append([later.detach(), optimizer.state[later]["sum"]])
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs)


def test_a_loss_of_bits_is_told_where_the_step_is_taken() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=BF16))
    for options in ({"master_weights": "split16"}, {"ema_decay": 0.5}):
        saved, optimizer = FusedAdamW([p], **options), FusedAdamW([p])  # type: ignore[arg-type]
        p.grad = torch.ones_like(p)
        saved.step()
        optimizer.load_state_dict(saved.state_dict())
        with pytest.warns(UserWarning, match="discards") as told:
            optimizer.step()
        assert [warning.filename for warning in told] == [__file__]


def test_a_state_on_another_device_is_refused(path: str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = FusedAdamW([p], ema_decay=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    for name in ("exp_avg", "ema_param"):
        kept = optimizer.state[p][name]
        optimizer.state[p][name] = kept.to("meta")
        with pytest.raises(ValueError, match=rf"^state {name} must have the shape and device of .*on meta$"):
            optimizer.step()
        optimizer.state[p][name] = kept
    optimizer.step()


@pytest.mark.parametrize("master", MASTERS)
def test_states_are_loaded_onto_the_device_of_their_parameter(master: Any) -> None:
    """A checkpoint is usually read on the CPU, and the parameters are elsewhere."""
    source = FusedAdamW([torch.ones(300, dtype=BF16, requires_grad=True)], master_weights=master, state_dtype="8bit")
    source.options.ema_decay = 0.5
    train(source, 1)
    p = torch.empty(300, dtype=BF16, device="meta", requires_grad=True)
    optimizer = FusedAdamW([p], master_weights=master, state_dtype="8bit", ema_decay=0.5)
    optimizer.load_state_dict(source.state_dict())
    kept = {name: t for name, t in optimizer.state[p].items() if name != "step"}
    assert len(kept) == 6 and all(t.device.type == "meta" for t in kept.values())
    assert {name: t.dtype for name, t in kept.items()} == {
        name: t.dtype for name, t in source.state_dict()["state"][0].items() if name != "step"
    }


def test_loading_leaves_no_hook_behind() -> None:
    optimizer = FusedAdamW([torch.nn.Parameter(torch.ones(3))])
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict(saved | {"param_groups": []})
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 0


def test_a_copy_has_options_of_its_own() -> None:
    optimizer = FusedAdamW([{"params": [torch.nn.Parameter(torch.ones(3))], "max_grad_norm": 1.0}], ema_decay=0.5)
    other = copy.copy(optimizer)
    other.options.ema_decay, other.group_options[0]["max_grad_norm"] = 0.25, 2.0
    assert optimizer.options.ema_decay == 0.5 and optimizer.group_options == [{"max_grad_norm": 1.0}]


@pytest.mark.parametrize("master", [None, *MASTERS])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_a_value_that_was_asked_for_does_not_change_with_the_next_step(path: str, master: Any, dtype: Any) -> None:
    (p,) = params = [torch.ones(300, dtype=dtype, requires_grad=True)]
    optimizer = FusedAdamW(params, lr=0.1, master_weights=master)
    for _ in range(2):
        value = optimizer.master_value(p)
        kept = value.clone()
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(value, kept) and not torch.equal(optimizer.master_value(p), kept)
        assert not value.requires_grad


def test_what_torch_does_not_keep_is_not_saved_for_it() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    relative = FusedAdamW([p], decay="relative")
    assert "lr_max" in relative.state_dict()["param_groups"][0]
    assert relative.torch_state_dict()["param_groups"][0].keys() == torch.optim.AdamW([p]).param_groups[0].keys()
    plain, torchs = FusedSGD([p]), torch.optim.SGD([p])
    for optimizer in (plain, torchs):
        optimizer.step()
    assert plain.state_dict()["state"] == torchs.state_dict()["state"] == {}


@pytest.mark.parametrize("state_dtype", [None, FP32, "8bit"], ids=str)
def test_a_buffer_that_has_seen_no_gradient_is_not_saved(path: str, state_dtype: Any) -> None:
    p = torch.nn.Parameter(torch.ones(256))
    optimizer = FusedSGD([p], momentum=0.9, dampening=0.5, state_dtype=state_dtype)
    for skip, saved in ((1.0, False), (0.0, True)):
        p.grad, optimizer.found_inf = torch.ones_like(p), torch.tensor(skip)
        optimizer.step()
        state = optimizer.state_dict()["state"].get(0, {})
        assert any(name.startswith("momentum_buffer") for name in state) == saved


COUNTED = [
    (low, states, CLASSES_WITH_STATES[(i + j) % len(CLASSES_WITH_STATES)], 0.9 if (i + j) % 2 else None)
    for i, low in enumerate((None, "fp32", "split16", "split8", "kahan", "stochastic"))
    for j, states in enumerate((None, "8bit", FP32, BF16))
]


@pytest.mark.parametrize(("low", "states", "rule", "ema"), COUNTED)
def test_bytes_are_those_that_parameters_of_any_dtype_will_need(
    low: str | None, states: Any, rule: tuple[type[FusedOptimizer], Options], ema: float | None
) -> None:
    """Ask before the first step, of meta tensors too, and count after it."""
    (cls, options), shapes = rule, ((300, 2), (7,), ())
    made = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes for dtype in (BF16, FP32)]
    more = {"master_weights": low, "state_dtype": states, "ema_decay": ema, **options}
    optimizer = cls(made, lr=0.1, **more)
    elsewhere = cls([p.detach().to("meta").requires_grad_() for p in made], lr=0.1, **more)
    told = optimizer.state_bytes()
    for p in made:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))
    assert told == elsewhere.state_bytes() == optimizer.state_bytes() == held
