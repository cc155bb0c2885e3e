"""A watch notices every change of parameters and states that would make a plan wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llmfast.optim import watch as watch_module
from llmfast.optim.watch import Watch

Groups = list[dict[str, Any]]
State = dict[Any, dict[str, Any]]


def watched() -> tuple[Groups, State]:
    params = [torch.zeros(4) for _ in range(3)]
    groups = [{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.1}]
    return groups, {p: {"step": torch.zeros(()), "exp_avg": torch.zeros(4)} for p in params}


def first(state: State) -> dict[str, Any]:
    return next(iter(state.values()))


CHANGES: dict[str, Callable[[Groups, State], Any]] = {
    "a group is added": lambda groups, state: groups.append({"params": []}),
    "a group is removed": lambda groups, state: groups.pop(),
    "a parameter is added": lambda groups, state: groups[0]["params"].append(torch.zeros(4)),
    "a parameter is removed": lambda groups, state: groups[0]["params"].pop(),
    "parameters swap": lambda groups, state: groups[0]["params"].reverse(),
    "a parameter is another": lambda groups, state: groups[0].update(params=[torch.zeros(4), groups[0]["params"][1]]),
    "a parameter has other memory": lambda groups, state: setattr(groups[0]["params"][0], "data", torch.zeros(4)),
    "a parameter is cut short": lambda groups, state: groups[0]["params"][0].resize_(2),
    "a state has other memory": lambda groups, state: first(state).update(exp_avg=torch.ones(4)),
    "a state is added": lambda groups, state: first(state).update(more=torch.ones(4)),
    "a state is removed": lambda groups, state: first(state).pop("step"),
    "all states are gone": lambda groups, state: state.clear(),
    "a state is no tensor": lambda groups, state: first(state).update(step=5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_noticed(change: str) -> None:
    groups, state = watched()
    watch = Watch(groups, state, None)
    groups[0]["lr"] = 0.2
    groups[0]["params"][0] += 1
    first(state)["exp_avg"] += 1
    assert watch.holds(groups, state)  # what kernels read each time may change
    kept = [list(group["params"]) for group in groups], list(state.values())  # memory must not be used again
    CHANGES[change](groups, state)
    assert not watch.holds(groups, state) and kept


def test_one_parameter_alone_is_watched() -> None:
    groups, state = watched()
    p, other = groups[0]["params"]
    watch = Watch(groups, state, p)
    groups.append({"params": []})
    other.data, state[other] = torch.zeros(9), {}
    assert watch.holds(groups, state)
    before = state[p]["step"]
    state[p]["step"] = torch.ones(())
    assert not watch.holds(groups, state) and before == 0
    assert not Watch(groups, state, p).holds(groups, {})


def test_states_that_are_no_tensors_are_told_apart() -> None:
    groups, state = watched()
    one, two = object(), object()
    first(state)["more"] = one
    watch = Watch(groups, state, None)
    assert watch.holds(groups, state)
    first(state)["more"] = two
    assert not watch.holds(groups, state)
    first(state)["more"] = one
    assert watch.holds(groups, state)


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("what", ["nothing", "of the parameter", "of its state", "of another"])
def test_pieces_of_tensors_are_watched_instead_of_them(what: str, only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece that is another tensor at the same address may have another shape; that of a state is an address."""
    groups, state = watched()
    (p, other), average = groups[0]["params"], first(state)["exp_avg"]
    pieces = {id(t): torch.zeros(2) for t in (p, other, average)}
    monkeypatch.setattr(watch_module, "is_dtensor", lambda t: id(t) in pieces)
    monkeypatch.setattr(watch_module, "local", lambda t: pieces.get(id(t), t))
    watch = Watch(groups, state, p if only else None)
    average.set_(torch.ones(4))  # type: ignore[call-overload]  # whose own memory nothing reads
    assert watch.holds(groups, state)
    kept = dict(pieces)
    if what == "of the parameter":
        pieces[id(p)] = kept[id(p)].view(2)
    elif what == "of its state":
        pieces[id(average)] = torch.zeros(2)
    elif what == "of another":
        pieces[id(other)] = kept[id(other)].view(2)
    assert watch.holds(groups, state) == (what == "nothing" or (only and what == "of another"))
