"""Our optimizers on every configuration, flag, scheduler and error in torch's own test database of optimizers."""

import copy
import functools
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedOptimizer, FusedRMSprop, FusedSGD
from support.launched import unrecorded
from support.training import LATE, Options, gradients, parameters

OURS = (FusedAdagrad, FusedAdam, FusedAdamW, FusedRMSprop, FusedSGD)
STEPS = range(LATE - 1, LATE + 3)  # the scalar's first gradient comes among them


@functools.cache
def database() -> dict[str, Any]:
    """Return torch's database by name. Importing it takes seconds, and forbids setting torch.backends flags."""
    allowed = torch.backends.__allow_nonbracketed_mutation_flag
    try:
        from torch.testing._internal.common_optimizers import optim_db
    finally:
        torch.backends.__allow_nonbracketed_mutation_flag = allowed
    return {info.name: info for info in optim_db}


def info_of(ours: type[FusedOptimizer]) -> Any:
    return database()[ours.__name__.removeprefix("Fused")]


def configurations(ours: type[FusedOptimizer]) -> Iterator[tuple[str, Options]]:
    """Return the configurations for CPUs, and those that torch has only for GPUs."""
    found = {c.desc: c.kwargs for device in ("cpu", "cuda") for c in info_of(ours).optim_inputs_func(device=device)}
    assert len(found) >= 7
    yield from found.items()


def torchs(ours: type[FusedOptimizer], params: Any, options: Options, **more: Any) -> torch.optim.Optimizer:
    """Create torch's optimizer with its plain loop, without `capturable`, which changes no result and needs a GPU."""
    kept = {name: copy.deepcopy(value) for name, value in options.items() if name != "capturable"}
    return info_of(ours).optim_cls(params, foreach=False, **kept, **more)


def test_torch_has_no_lion() -> None:
    assert not hasattr(torch.optim, "Lion") and FusedLion not in OURS


def assert_same(ours: Any, theirs: Any, mine: list[Tensor], yours: list[Tensor], what: str) -> None:
    for p, q in zip(mine, yours):
        loose = {"rtol": 2e-6, "atol": 1e-6} if q.dtype in (torch.float32, torch.complex64) else {}
        torch.testing.assert_close(p, q, msg=lambda text: f"{what}: {text}", **loose)
        for name, value in theirs.state[q].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(ours.state[p][name], value, msg=f"{what}: {name}", **loose)


def params_of(kind: str) -> list[Tensor]:
    if kind == "complex":
        return [torch.complex(p.detach(), 2 * p.detach()).requires_grad_() for p in parameters()]
    return parameters(torch.float64 if kind == "float64" else torch.float32)


@pytest.mark.parametrize("kind", ["float32", "float64", "complex"])
@pytest.mark.parametrize("ours", OURS)
@unrecorded()
def test_every_configuration(path: str, ours: type[FusedOptimizer], kind: str) -> None:
    assert kind != "complex" or info_of(ours).supports_complex
    for what, options in configurations(ours):
        mine, yours = params_of(kind), params_of(kind)
        a, b = ours(mine, **copy.deepcopy(options)), torchs(ours, yours, options)
        assert isinstance(a, type(b))
        for step in STEPS:
            gradients(step, mine), gradients(step, yours)
            a.step(), b.step()
        assert_same(a, b, mine, yours, what)
        a.load_state_dict(copy.deepcopy(b.state_dict()))  # continue from torch's state
        gradients(1, mine), gradients(1, yours)
        a.step(), b.step()
        assert_same(a, b, mine, yours, what)


@pytest.mark.parametrize("ours", OURS)
@unrecorded()
def test_every_implementation_that_torch_offers(path: str, ours: type[FusedOptimizer]) -> None:
    """Flags that choose torch's implementation (`foreach`, `fused`, `differentiable`) change no result of ours."""
    ways = info_of(ours).supported_impls
    assert {"foreach", "differentiable"} <= set(ways)
    for (what, options), way in itertools.product(configurations(ours), ways):
        # In torch, "differentiable" takes no parameter that requires a gradient of its own.
        mine, yours = ([p.detach() for p in parameters()] for _ in range(2))
        a, b = ours(mine, **copy.deepcopy(options), **{way: True}), torchs(ours, yours, options)
        for step in STEPS[:2]:
            gradients(step, mine), gradients(step, yours)
            a.step(), b.step()
        assert_same(a, b, mine, yours, f"{what}, {way}")


@pytest.mark.parametrize("ours", OURS)
@unrecorded()
def test_every_scheduler(path: str, ours: type[FusedOptimizer]) -> None:
    for number, constructors in enumerate(info_of(ours).scheduler_inputs):
        mine, yours = parameters(), parameters()
        a, b = ours(mine), torchs(ours, yours, {})
        schedules = [[make(o) for make in constructors] for o in (a, b)]
        for step in STEPS:
            gradients(step, mine), gradients(step, yours)
            a.step(), b.step()
            for schedule in itertools.chain(*schedules):
                needs = isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau)
                schedule.step(1.0) if needs else schedule.step()
        assert [g["lr"] for g in a.param_groups] == [g["lr"] for g in b.param_groups]
        assert_same(a, b, mine, yours, f"scheduler {number}")


@pytest.mark.parametrize("ours", OURS)
@unrecorded()
def test_sparse_gradients_where_torch_takes_them(path: str, ours: type[FusedOptimizer]) -> None:
    info = info_of(ours)
    for options in [info.metadata_for_sparse[0], {**info.metadata_for_sparse[0], "maximize": True}]:
        mine, yours = ([torch.ones(5, 3, requires_grad=True)] for _ in range(2))
        a, b = ours(mine, **options), torchs(ours, yours, options)
        for step in range(3):
            rows = torch.tensor([[step, 4, 4]])
            for p in (*mine, *yours):
                p.grad = torch.sparse_coo_tensor(rows, torch.arange(9.0).view(3, 3), (5, 3), check_invariants=True)
            if not info.supports_sparse:
                with pytest.raises(ValueError, match=r"sparse; give that parameter to torch.optim.SparseAdam"):
                    a.step()
                break
            a.step(), b.step()
        assert info.supports_sparse == ours.takes_sparse
        if info.supports_sparse:
            assert_same(a, b, mine, yours, f"sparse {options}")


# Errors of torch's implementations `foreach` and `capturable`. Our optimizers accept these arguments.
NOT_REFUSED = {
    "lr as Tensor doesn't work with foreach & not capturable",
    "betas[0] as a Tensor is not supported for capturable=False and foreach=True",
}


@pytest.mark.parametrize("ours", OURS)
def test_every_error(ours: type[FusedOptimizer]) -> None:
    errors = info_of(ours).optim_error_inputs_func(device="cpu", dtype=torch.float32)
    assert len(errors) >= 7
    for error in errors:
        given = error.optimizer_error_input
        params = [torch.nn.Parameter(torch.ones(1))] if given.params is None else given.params
        assert error.error_on.name == "CONSTRUCTION_ERROR"
        if re.sub(r"\\", "", given.desc) in NOT_REFUSED:
            ours(params, **given.kwargs)
        elif error.error_type is UserWarning:
            with pytest.warns(UserWarning, match=error.error_regex):
                ours(params, **given.kwargs)
        else:
            with pytest.raises(error.error_type, match=error.error_regex):
                ours(params, **given.kwargs)
