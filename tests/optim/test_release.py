"""Stepping inside backward."""

import copy
import gc
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmfast.optim import (
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedLion,
    FusedRMSprop,
    FusedSGD,
    optimizer_in_backward,
)
from llmfast.optim.kept import Kept
from support.devices import DEVICE
from support.launched import unrecorded
from support.pairs import covering


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    made[2].weight = nn.Parameter(made[2].weight.detach().clone())
    return made


def loss(net: nn.Module, step: int) -> Tensor:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
    return net(x).square().mean()


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"amsgrad": True, "state_dtype": torch.bfloat16}])
def test_matches_stepping_after_backward(path: str, options: dict[str, Any]) -> None:
    ours, theirs = model(), model()
    a, b = FusedAdamW(ours.parameters(), lr=1e-2, **options), FusedAdamW(theirs.parameters(), lr=1e-2, **options)
    schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 5) for o in (a, b)]
    optimizer_in_backward(ours, a)
    for step in range(5):
        loss(ours, step).backward()
        assert all(p.grad is None for p in ours.parameters())
        a.step()
        assert a._plan is None  # for all parameters, which would take time and memory for nothing
        b.zero_grad()
        loss(theirs, step).backward()
        b.step()
        for schedule in schedules:
            schedule.step()
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert a.state[p]["step"] == 5


def calls_of_first_backward(parameters: int) -> int:
    """Count the Python and C functions that the first backward calls, which makes all plans and tables."""
    params = [nn.Parameter(torch.ones(3)) for _ in range(parameters)]
    optimizer_in_backward(nn.ParameterList(params), FusedAdamW(params))
    total = torch.stack([p.sum() for p in params]).sum()
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        total.backward()
    finally:
        sys.setprofile(None)
    return calls


def test_the_first_backward_is_linear_in_the_number_of_parameters() -> None:
    few, more, many = (calls_of_first_backward(n) / n for n in (100, 400, 1600))
    assert 0.99 * few < more < 1.01 * few and 0.99 * few < many < 1.01 * few


def test_at_most_two_gradients_exist_at_a_time(path: str) -> None:
    net = nn.Sequential(*[nn.Linear(32, 32) for _ in range(6)])
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in net.parameters()))

    for layer in net[1:]:
        layer.register_full_backward_hook(count)
    net(torch.randn(2, 32)).sum().backward()
    assert most <= 2


def test_a_shared_parameter_is_stepped_once(path: str) -> None:
    net = model()
    net[2].weight = nn.Parameter(torch.eye(16))
    shared = nn.Sequential(net[0], net[2], net[2], net[4])
    optimizer = FusedSGD(shared.parameters(), lr=0.1)
    optimizer_in_backward(shared, optimizer)
    shared(torch.randn(3, 8)).sum().backward()
    assert optimizer.state[net[2].weight]["step"] == 1


def test_remove_stops_stepping_in_backward(path: str) -> None:
    net = model()
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer).remove()
    before = [p.detach().clone() for p in net.parameters()]
    loss(net, 0).backward()
    assert all(torch.equal(p, old) and p.grad is not None for p, old in zip(net.parameters(), before))
    optimizer.step()
    assert not torch.equal(net[0].weight, before[0])


def test_gradients_are_freed(path: str) -> None:
    net = model()
    seen: list[weakref.ref[Tensor]] = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: seen.append(weakref.ref(p.grad)))
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    loss(net, 0).backward()
    gc.collect()
    assert len(seen) == 6 and all(ref() is None for ref in seen)


@pytest.mark.parametrize("after", ["step", "nothing"])
@pytest.mark.parametrize("late", ["unfrozen", "frozen again", "added"])
def test_parameters_that_come_later_are_stepped_like_the_others(path: str, late: str, after: str) -> None:
    """They are unfrozen, or added in a new group with its own learning rate; torch's optimizer is the reference."""

    def trained(ours: bool) -> nn.Module:
        net = model()
        layer = list(net[0].parameters())
        for p in layer:
            p.requires_grad_(False)
        params = [p for p in net.parameters() if late != "added" or all(p is not other for other in layer)]
        optimizer: Any = (FusedAdamW if ours else torch.optim.AdamW)(params, lr=1e-2)
        if ours:
            optimizer_in_backward(net, optimizer)
            assert not any(p.requires_grad for p in layer)
        for step in range(6):
            for p in layer:
                p.requires_grad_(step >= 2 and not (late == "frozen again" and step == 4))
            if late == "added" and step == 2:
                optimizer.add_param_group({"params": layer, "lr": 5e-2})
            loss(net, step).backward()
            assert not ours or all(p.grad is None for p in net.parameters())
            if not ours or after == "step":
                optimizer.step()
            optimizer.zero_grad()
        return net

    for (name, p), q in zip(trained(True).named_parameters(), trained(False).parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7, msg=name)


def test_a_gradient_that_no_backward_made_is_stepped(path: str) -> None:
    net = nn.ParameterList([torch.ones(3), torch.ones(3)])
    optimizer = FusedSGD(net.parameters(), lr=0.25)
    optimizer_in_backward(net, optimizer)
    net[0].grad = torch.ones(3)
    optimizer.step()
    assert net[0].tolist() == [0.75] * 3 and net[1].tolist() == [1.0] * 3


def test_a_parameter_taken_out_of_its_group_is_left_alone(path: str) -> None:
    net = model()
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    loss(net, 0).backward()
    out = optimizer.param_groups[0]["params"].pop(0)
    before = [p.detach().clone() for p in net.parameters()]
    loss(net, 1).backward()
    assert torch.equal(out, before[0]) and out.grad is not None
    assert all(p.grad is None and not torch.equal(p, old) for p, old in [*zip(net.parameters(), before)][1:])


def test_a_parameter_that_changes_groups_has_the_settings_of_the_new_one(path: str) -> None:
    found = []
    for in_backward in (True, False):
        net = model()
        groups = [{"params": list(net[i].parameters()), "lr": lr} for i, lr in ((0, 0.1), (2, 0.01), (4, 0.0))]
        optimizer = FusedSGD(groups, momentum=0.9)
        if in_backward:
            optimizer_in_backward(net, optimizer)
        for step in range(3):
            if step:  # move the first group's weight, then its bias, to the third group
                optimizer.param_groups[2]["params"].append(optimizer.param_groups[0]["params"].pop(0))
            loss(net, step).backward()
            if not in_backward:
                optimizer.step()
                optimizer.zero_grad()
        found.append([p.detach() for p in net.parameters()])
    for p, q in zip(*found):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_parameters_of_integers_are_allowed(path: str) -> None:
    net = model()
    net.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    optimizer_in_backward(net, FusedSGD(net.parameters(), lr=0.1))
    loss(net, 0).backward()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("late", [False, True])
def test_impossible_settings_are_refused_by_the_next_backward(path: str, late: bool) -> None:
    """The error comes before any parameter changes."""
    changes: list[tuple[str, Callable[[FusedAdamW], None]]] = [
        ("must be None .* got 1.0", lambda o: setattr(o.options, "max_grad_norm", 1.0)),
        ("must be None .* got 2.0", lambda o: o.group_options[1].update(max_grad_norm=2.0)),
        ("differentiable must be False", lambda o: o.param_groups[1].update(differentiable=True)),
    ]
    for message, change in changes:
        net = model()
        optimizer = FusedAdamW([{"params": net[:2].parameters()}, {"params": net[2:].parameters()}])
        optimizer_in_backward(net, optimizer)
        if late:
            loss(net, 0).backward()
        before = [p.detach().clone() for p in net.parameters()]
        change(optimizer)
        with pytest.raises(ValueError, match=message):
            loss(net, 1).backward()
        assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before))


def test_groups_that_cannot_be_stepped_are_not_added(path: str) -> None:
    net, further = model(), nn.Linear(2, 2)
    optimizer = FusedAdamW(net.parameters())
    optimizer_in_backward(net, optimizer)
    for option in ({"max_grad_norm": 1.0}, {"differentiable": True}):
        with pytest.raises(ValueError, match=r"all gradients at once; got 1.0|differentiable must be False"):
            optimizer.add_param_group({"params": list(further.parameters()), **option})
    assert len(optimizer.param_groups) == len(optimizer.group_options) == 1
    further(torch.ones(1, 2)).sum().backward()
    assert further.weight.grad is not None


def test_two_handles_at_a_time_are_refused(path: str) -> None:
    net = model()
    optimizer = FusedAdamW(net.parameters())
    handle = optimizer_in_backward(net, optimizer)
    with pytest.raises(ValueError, match=r"optimizer must not step in backward already"):
        optimizer_in_backward(net, optimizer)
    handle.remove()
    again = optimizer_in_backward(net, optimizer)
    handle.remove()
    assert optimizer.steps_in_backward
    again.remove()
    optimizer.add_param_group({"params": [extra := nn.Parameter(torch.ones(2))]})
    extra.sum().backward()
    assert extra.grad is not None and not optimizer.steps_in_backward


def test_a_copy_does_not_step_in_backward(path: str) -> None:
    net = model()
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    loss(net, 0).backward()
    twin = copy.deepcopy(optimizer)
    assert not twin.steps_in_backward
    params = twin.param_groups[0]["params"]
    for p in params:
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in params]
    twin.step()
    assert not any(torch.equal(p, old) for p, old in zip(params, before))


def test_a_plan_for_one_parameter_looks_at_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the first backward would take time quadratic in the number of parameters."""
    looked = 0
    original = Kept.check

    def counted(self: Kept, *args: Any) -> None:
        nonlocal looked
        looked += 1
        original(self, *args)

    def checks_with(count: int) -> int:
        nonlocal looked
        params = nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(count)])
        optimizer = FusedSGD(params.parameters(), lr=0.1, momentum=0.9)
        for p in params:  # states to look at
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer_in_backward(params, optimizer)
        looked = 0
        torch.stack([p.sum() for p in params]).sum().backward()
        return looked

    monkeypatch.setattr(Kept, "check", counted)
    few, many = checks_with(8), checks_with(32)
    assert 0 < many == 4 * few


@pytest.mark.parametrize(("version", "refused"), [("2.12.1+cu130", True), ("2.13.0", False), ("2.14.0+cpu", False)])
def test_gradients_still_being_copied_to_the_cpu_are_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    """CPUOffloadPolicy keeps shards on the CPU although their mesh is of GPUs."""
    monkeypatch.setattr(torch, "__version__", version)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        for kind in ("cuda", "cpu"):
            mesh = DeviceMesh(kind, [0, 1], _init_backend=False)
            meta = TensorMeta(torch.Size([4, 2]), (2, 1), torch.float32)
            piece = DTensor(torch.ones(2, 2), DTensorSpec(mesh, (Shard(0),), meta), requires_grad=False)
            net, plain = nn.Module(), nn.Linear(2, 2)
            net.weight = nn.Parameter(piece)
            whole, added = FusedSGD(net.parameters(), lr=0.1), FusedSGD(plain.parameters(), lr=0.1)
            optimizer_in_backward(plain, added)
            expected: Any = nullcontext()
            if refused and kind == "cuda":
                expected = pytest.raises(ValueError, match=r"CPUOffloadPolicy keeps \(4, 2\).* torch 2.13 or newer")
            with expected:
                optimizer_in_backward(net, whole)
            with expected:
                added.add_param_group({"params": [net.weight]})
            assert len(added.param_groups) == (1 if refused and kind == "cuda" else 2)
    finally:
        torch.distributed.destroy_process_group()


def test_refuses_what_cannot_be_stepped_in_backward() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"max_grad_norm must be None .* got 1.0"):
        optimizer_in_backward(net, FusedAdamW(net.parameters(), max_grad_norm=1.0))
    with pytest.raises(ValueError, match=r"optimizer must have every parameter .* 0.weight is not in it"):
        optimizer_in_backward(net, FusedAdamW(list(net.parameters())[1:]))
    with pytest.raises(ValueError, match="differentiable"):
        optimizer_in_backward(net, FusedAdamW(net.parameters(), differentiable=True))


def test_a_grad_scaler_is_refused() -> None:
    """GradScaler passes its scale to `step`, after backward has stepped."""
    net = model()
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    scaler = torch.amp.GradScaler(DEVICE)
    scaler.scale(loss(net, 0)).backward()
    with pytest.raises(RuntimeError, match="GradScaler does not work with optimizer_in_backward"):
        scaler.step(optimizer)


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel"])
@pytest.mark.parametrize("derived", [False, True])
def test_wrappers_that_reduce_later_are_refused_wherever_they_are(name: str, derived: bool) -> None:
    kind: Any = type(name, (nn.Sequential,), {})
    kind = type("Mine", (kind,), {}) if derived else kind
    for net in (kind(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), kind(nn.Linear(2, 2)))):
        with pytest.raises(
            ValueError, match=f"^{name} reduces gradients after the hooks that would step; use fully_shard"
        ):
            optimizer_in_backward(net, FusedSGD(net.parameters(), lr=0.1))
    net = nn.Sequential(nn.Linear(2, 2))
    assert optimizer_in_backward(net, FusedSGD(net.parameters(), lr=0.1))


def test_frozen_and_complex_parameters_stay_what_they_are(path: str) -> None:
    net = nn.ParameterDict({"a": torch.ones(2), "frozen": torch.ones(2), "z": torch.ones(2, dtype=torch.complex64)})
    net["frozen"].requires_grad_(False)
    other = nn.Parameter(torch.ones(2), requires_grad=False)
    net["of no optimizer"] = other
    optimizer = FusedSGD([p for name, p in net.items() if name != "of no optimizer"], lr=0.5)
    handle = optimizer_in_backward(net, optimizer)
    assert [name for name, p in net.items() if not p.requires_grad] == ["frozen", "of no optimizer"]
    (net["a"].sum() + (net["z"] * net["z"].conj()).real.sum() + net["frozen"].sum()).backward()
    assert net["a"].tolist() == [0.5, 0.5] and net["z"].tolist() == [0, 0]
    assert net["frozen"].tolist() == [1, 1] and all(p.grad is None for p in net.values())
    handle.remove()
    (net["a"].sum()).backward()
    assert net["a"].tolist() == [0.5, 0.5] and net["a"].grad is not None


def test_a_handle_that_was_removed_does_not_end_a_later_one() -> None:
    net = nn.Linear(2, 2)
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    first = optimizer_in_backward(net, optimizer)
    first.remove()
    assert not optimizer.steps_in_backward
    second = optimizer_in_backward(net, optimizer)
    first.remove()
    assert optimizer.steps_in_backward
    second.remove()
    assert not optimizer.steps_in_backward


def test_a_closure_is_called_and_its_loss_returned(path: str) -> None:
    net = model()
    optimizer = FusedSGD(net.parameters(), lr=0.1)
    optimizer_in_backward(net, optimizer)
    before, found = net[0].weight.detach().clone(), []

    def closure() -> Tensor:
        found.append(loss(net, 0))
        found[0].backward()
        return found[0]

    assert optimizer.step(closure) is found[0] and len(found) == 1
    assert not torch.equal(net[0].weight, before) and optimizer.step() is None


TOGETHER: dict[str, list[Any]] = {
    "path": ["plain", "kernels"],
    "cls": [FusedAdamW, FusedAdam, FusedSGD, FusedRMSprop, FusedAdagrad, FusedLion],
    "dtype": [torch.float32, torch.bfloat16, torch.float64],
    "master_weights": [None, "fp32", "split16", "split8", "kahan", "stochastic"],
    "state_dtype": [None, torch.float32, "8bit"],
    "ema_decay": [None, 0.5],
    "zero_grads": [False, True],
    "maximize": [False, True],
    "own": [{}, {"ema_decay": 0.75}, {"state_dtype": torch.float32}, {"master_weights": None}],
    "copied": [False, True],
}


@pytest.mark.parametrize(
    ("path", "case"),
    [pytest.param(c["path"], c, id=f"{i}-{c['cls'].__name__}") for i, c in enumerate(covering(TOGETHER))],
    indirect=["path"],
)
@unrecorded()
def test_any_two_settings_step_in_backward_as_after_it(path: str, case: dict[str, Any]) -> None:
    """Two groups have rates of their own; a state that was saved in the midst goes on either way."""
    names = ("master_weights", "state_dtype", "ema_decay", "zero_grads", "maximize")
    found: list[list[Any]] = []
    for in_backward in (True, False):
        torch.manual_seed(0)
        saved: dict[str, Any] = {}
        net = nn.ParameterList([torch.randn(n).to(case["dtype"]) for n in (200, 3, 40)])
        for attempt in range(1 + case["copied"]):
            groups = [{"params": list(net)[:1]}, {"params": list(net)[1:], "lr": 0.02, **case["own"]}]
            optimizer = case["cls"](groups, lr=0.01, seed=5, **{name: case[name] for name in names})
            if attempt:
                optimizer.load_state_dict(saved)
            if in_backward:
                optimizer_in_backward(net, optimizer)
            for step in range(2):
                x = [
                    torch.randn(p.shape, generator=torch.Generator().manual_seed(7 * step + i))
                    for i, p in enumerate(net)
                ]
                torch.stack([(p.float() * y).square().sum() for p, y in zip(net, x)]).sum().backward()
                assert not in_backward or all(p.grad is None for p in net)
                optimizer.step()
                optimizer.zero_grad()
            saved = copy.deepcopy(optimizer.state_dict())
            net = nn.ParameterList([p.detach().clone() for p in net]) if not attempt and case["copied"] else net
        found.append([*(p.detach() for p in net), saved["state"]])
    (*mine, states), (*theirs, others) = found
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs)) and states.keys() == others.keys()
    for i, state in states.items():
        assert state.keys() == others[i].keys() and all(torch.equal(t, others[i][name]) for name, t in state.items())


@pytest.mark.parametrize("master", ["fp32", "split16", "kahan"])
def test_loaded_bits_that_belong_to_other_weights_are_none_of_these(path: str, master: Any) -> None:
    """Each parameter is looked at when it is first stepped, whichever came before it."""

    def made() -> tuple[nn.ParameterList, FusedAdamW]:
        net = nn.ParameterList([torch.full((4,), 1.0 + i).bfloat16() for i in range(3)])
        return net, FusedAdamW(net.parameters(), lr=1e-3, master_weights=master)

    def backward(net: nn.ParameterList) -> None:
        torch.stack([p.float().square().sum() for p in net]).sum().backward()

    net, source = made()
    backward(net)
    source.step()
    found = []
    for in_backward in (True, False):
        other, optimizer = made()
        optimizer.load_state_dict(copy.deepcopy(source.state_dict()))
        with torch.no_grad():
            for p in other:
                p.mul_(4)
        if in_backward:
            optimizer_in_backward(other, optimizer)
        backward(other)
        optimizer.step()
        found.append([optimizer.master_value(p) for p in other])
    for i, (a, b) in enumerate(zip(*found)):
        assert torch.equal(a, b)
        torch.testing.assert_close(a.float(), torch.full((4,), 4.0 * (1 + i)), rtol=1e-2, atol=0)
