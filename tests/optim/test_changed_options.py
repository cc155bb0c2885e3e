"""Options that are changed between steps: the next step is that of a run that is resumed with the new ones."""

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdamW, FusedOptimizer, FusedSGD
from support.launched import unrecorded
from support.training import Options, through_a_file

BF16, F32 = torch.bfloat16, torch.float32
VALUES: dict[str, list[Any]] = {
    "master_weights": [None, "fp32", "split16", "split8", "kahan", "stochastic"],
    "state_dtype": [None, F32, "8bit"],
    "ema_decay": [None, 0.75, 0.5],
    "max_grad_norm": [None, 0.5, 0.25],
}
MASTERS = VALUES["master_weights"]
PAIRS = [
    *(("master_weights", *pair) for pair in [*((None, m) for m in MASTERS[1:]), *((m, None) for m in MASTERS[1:])]),
    ("master_weights", "split8", "fp32"),
    *(
        (name, before, now)
        for name in ("state_dtype", "ema_decay", "max_grad_norm")
        for before, now in product(VALUES[name], VALUES[name])
        if before != now and (before, now) != (F32, None)  # states that need not have a dtype keep theirs
    ),
]
# Each change is made for the optimizer and for a group; with kernels, the first of each option.
CHANGES = [
    pytest.param(path, *pair, own, id=f"{path}-{'-'.join(map(str, pair))}-{'group' if own else 'whole'}")
    for i, pair in enumerate(PAIRS)
    for path, own in product(("plain", "kernels"), (False, True))
    if path == "plain" or (i == [other[0] for other in PAIRS].index(pair[0]))
]


def parameters() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator).to(BF16).requires_grad_() for n in (200, 9)]


def step(optimizer: FusedOptimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step()


@pytest.mark.parametrize(("path", "name", "before", "now", "own"), CHANGES, indirect=["path"])
@pytest.mark.filterwarnings("ignore:the state has")
@unrecorded()
def test_a_changed_option_is_that_of_a_run_resumed_with_it(
    path: str, name: str, before: Any, now: Any, own: bool
) -> None:
    """The option is changed for the optimizer, or for the second of its groups alone."""

    def made(value: Any, params: list[Tensor]) -> FusedOptimizer:
        groups: list[Options] = [{"params": params[:1]}, {"params": params[1:]}]
        if own:
            groups[1][name] = value
        return FusedAdamW(groups, lr=0.01, **({} if own else {name: value}))

    optimizer = made(before, parameters())
    for number in (1, 2):
        step(optimizer, number)
    params = [p.detach().clone().requires_grad_() for group in optimizer.param_groups for p in group["params"]]
    resumed = made(now, params)
    resumed.load_state_dict(through_a_file(optimizer.state_dict()))
    if own:
        optimizer.group_options[1][name] = now
    else:
        setattr(optimizer.options, name, now)
    for number in (3, 4):
        for each in (optimizer, resumed):
            step(each, number)
    found, wanted = (each.state_dict()["state"] for each in (optimizer, resumed))
    assert [state.keys() for state in found.values()] == [state.keys() for state in wanted.values()]
    for mine, theirs in zip(found.values(), wanted.values()):
        for key, t in mine.items():
            assert t.dtype == theirs[key].dtype and torch.equal(t, theirs[key]), key
    mine = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(torch.equal(p, q) for p, q in zip(mine, params))
    torch.testing.assert_close(optimizer.grad_norm, resumed.grad_norm, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "value"), [("zero_grads", True), ("seed", 7)])
def test_options_of_the_whole_may_change_too(path: str, name: str, value: Any) -> None:
    found = []
    for changed in (False, True):
        params = parameters()
        optimizer = FusedSGD(params, lr=0.01, master_weights="stochastic", **{} if changed else {name: value})
        if changed:
            setattr(optimizer.options, name, value)
        step(optimizer, 1)
        found.append([*(p.detach() for p in params), *(p.grad for p in params)])
    assert all(torch.equal(a, b) for a, b in zip(*found))
