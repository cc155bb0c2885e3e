"""Batches of every kind, mapped and moved."""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from llmfast.train.batch import map_tensors, on_device


class Pair(NamedTuple):
    a: Tensor
    b: Any


@dataclasses.dataclass(frozen=True)
class Rows:
    tokens: Tensor
    inner: Any
    count: int = 3


def plus_one(t: Tensor) -> Tensor:
    return t + 1


ONE, TWO = torch.tensor([1]), torch.tensor([2])


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ({"x": ONE, "y": [ONE, "text", None, 5]}, dict),
        (OrderedDict(x=ONE, y=(ONE, 2.5)), dict),
        (MappingProxyType({"x": ONE}), dict),
        ([ONE, (ONE,), {"x": ONE}], list),
        ((ONE, 1), tuple),
        (Pair(ONE, [ONE]), Pair),
        (Rows(ONE, {"x": Pair(ONE, Rows(ONE, None, 7))}), Rows),
    ],
)
def test_every_tensor_is_replaced_and_all_else_is_kept(batch: Any, kind: type) -> None:
    def same(found: Any, given: Any) -> bool:
        if isinstance(given, Tensor):
            return torch.equal(found, given + 1)
        if dataclasses.is_dataclass(given):
            return all(same(getattr(found, f.name), getattr(given, f.name)) for f in dataclasses.fields(given))
        if isinstance(given, Mapping):
            return list(found) == list(given) and all(same(found[key], given[key]) for key in given)
        if isinstance(given, list | tuple):
            return len(found) == len(given) and all(map(same, found, given))
        return bool(found == given)

    found = map_tensors(batch, plus_one)
    assert type(found) is kind and same(found, batch) and torch.equal(ONE, torch.tensor([1]))


def test_what_is_no_batch_is_returned_as_it_is() -> None:
    for value in (None, "text", 3, Rows, Pair, int):
        assert map_tensors(value, plus_one) is value
    assert map_tensors(ONE, plus_one) == TWO


@pytest.mark.parametrize(("device", "pins"), [("cuda", 1), ("cpu", 0), ("meta", 0)])
@pytest.mark.parametrize("there", [False, True])
def test_only_copies_to_a_gpu_are_pinned_and_only_copies_to_a_device_do_not_wait(
    device: str, pins: int, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: done.append("pinned") or t)
    monkeypatch.setattr(Tensor, "to", lambda t, device, *, non_blocking: done.append((device, non_blocking)) or t)
    meta = torch.empty(1, device="meta")
    where = torch.device(device)
    assert on_device({"x": ONE}, where)["x"] is ONE
    assert done == ["pinned"] * pins + [(where, device != "cpu")]  # a copy to the host may be read at once
    on_device(meta, where)
    assert done[pins + 1 :] == [(where, device != "cpu")]  # what is on a device cannot be pinned
