"""Tests of what observers are told, in which order, and of which launches and accesses."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for a run of this file without a conftest

from collections import namedtuple
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from evidence import interpreter, observers
from evidence.observers import Access, Launch, Observer, dtype_name, observing, run_launch, unobserved

interpreter.install()


@pytest.fixture(autouse=True)
def _unrecorded() -> Iterator[None]:
    with unobserved():  # by the suite's own recorder
        yield


def launch_of(grid: tuple[int, int, int] = (2, 3, 5), **arguments: Any) -> Launch:
    return Launch("package.module:kernel", arguments, frozenset(), frozenset(), frozenset(), {}, grid)


def access(addresses: list[int], size: int = 4) -> Access:
    return Access(np.array(addresses, dtype=np.int64), len(addresses), size, None)


class Notes(Observer):
    """Writes down under its name what it is told."""

    def __init__(self, name: str, notes: list[str]) -> None:
        self.name, self.notes = name, notes

    def launch(self, launch: Launch, programs: Any, run: Any) -> None:
        self.notes.append(f"{self.name} before {list(programs)}")
        run(programs)
        self.notes.append(f"{self.name} after")


class Computing(Notes):
    def compute(self, operation: str, elements: int, dtype: str) -> None:
        self.notes.append(operation)


def test_a_launch_has_a_name_and_all_programs_of_its_grid() -> None:
    launch = launch_of()
    assert (launch.name, launch.programs) == ("kernel", 30)


def test_every_tensor_of_a_launch_is_named() -> None:
    x, y, z, u = (torch.zeros(i + 1) for i in range(4))
    Pair = namedtuple("Pair", "first second")
    given = {"x": x, "n": 3, "pair": Pair(y, (None, z)), "described": SimpleNamespace(base=u), "text": "x"}
    found = dict(launch_of(**given).tensors())
    assert found.keys() == {"x", "pair.first", "pair.second[1]", "described"}
    assert [len(t) for t in found.values()] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("addresses", "consecutive"),
    [([64], True), ([64, 68, 72], True), ([64, 72, 68], False), ([72, 68, 64], False), ([64, 64], False),
     ([64, 72], False), ([64, 68, 68, 76], False)],
)  # fmt: skip
def test_consecutive_elements_are_told_from_others(addresses: list[int], consecutive: bool) -> None:
    found = access(addresses)
    assert found.consecutive == consecutive and found.ends == (addresses[0], addresses[-1])
    assert access([]).consecutive


def test_the_latest_observer_is_innermost_and_each_is_told_once() -> None:
    notes: list[str] = []
    with observing(Notes("first", notes)), observing(Notes("second", notes)):
        run_launch(launch_of((2, 1, 1)), lambda programs: notes.append(f"run {list(programs)}"))
    inner = ["second before [0, 1]", "run [0, 1]", "second after"]
    assert notes == ["first before [0, 1]", *inner, "first after"]


def test_who_no_longer_observes_is_not_told_when_programs_run_again() -> None:
    notes: list[str] = []

    class Again(Observer):
        def launch(self, launch: Launch, programs: Any, run: Any) -> None:
            run(programs)
            with unobserved():
                assert observers.active == observers.computing == []
                run(programs)

    with observing(Again()), observing(Notes("inner", notes)):
        run_launch(launch_of((1, 1, 1)), lambda programs: notes.append("run"))
        assert len(observers.active) == 2  # again after `unobserved`
    assert notes == ["inner before [0]", "run", "inner after", "run"]


def test_observers_leave_one_by_one_and_on_errors() -> None:
    first, second = Notes("first", []), Computing("second", [])
    with observing(first):
        with suppress(KeyError), observing(second):
            assert observers.active == [first, second] and observers.computing == [second]
            raise KeyError
        assert observers.active == [first] and observers.computing == []
    assert observers.active == []


def test_names_of_types_are_torchs() -> None:
    names = {tl.bfloat16: "bfloat16", tl.float16: "float16", tl.float32: "float32", tl.float64: "float64"}
    for kind, name in (names | {tl.int32: "int32", tl.int1: "int1"}).items():
        block = SimpleNamespace(dtype=tl.block_type(kind, [4]))
        assert dtype_name(SimpleNamespace(dtype=kind)) == dtype_name(block) == name
    assert dtype_name(3) == "None"


@triton.jit
def every_access_kernel(x_ptr, y_ptr, count_ptr, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + 2 * i, mask=i < n)
    tl.store(y_ptr + i, x, mask=i < n)
    tl.atomic_add(count_ptr, 1, sem="relaxed")
    tl.atomic_add(count_ptr, 1)
    tl.atomic_cas(count_ptr, 5, 6, sem="relaxed")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float32, torch.int64])
def test_every_access_is_told_with_its_lanes_size_argument_and_values(dtype: torch.dtype) -> None:
    told: list[tuple[Any, ...]] = []

    class Watch(Observer):
        def load(self, access: Access) -> None:
            told.append(("load", access))

        def loaded(self, access: Access, values: Any) -> None:
            assert access is told[-1][1]
            told.append(("loaded", values))

        def store(self, access: Access, values: Any) -> None:
            told.append(("store", access, values))

        def atomic(self, access: Access, ordered: bool) -> None:
            told.append(("atomic", access, ordered))

        def program(self, index: int) -> None:
            told.append(("program", index))

    x, y, count = torch.arange(32).to(dtype), torch.zeros(16, dtype=dtype), torch.zeros(1, dtype=torch.int32)
    with observing(Watch()):
        every_access_kernel[(1,)](x, y, count, 3, BLOCK=16)
    words = y[:3].view(torch.int16).numpy().view(np.uint16) if dtype == torch.bfloat16 else y[:3].numpy()
    kinds = [entry[0] for entry in told]
    assert kinds == ["program", "load", "loaded", "store", "atomic", "atomic", "atomic"]
    for entry, name, pointer, step in ((told[1], "x_ptr", x, 2), (told[3], "y_ptr", y, 1)):
        found = entry[1]
        assert (found.lanes, found.size, found.argument) == (16, dtype.itemsize, name)
        assert found.addresses.tolist() == [pointer.data_ptr() + step * i * dtype.itemsize for i in range(3)]
    assert told[2][1].tolist() == told[3][2].tolist() == words.tolist()
    assert [entry[2] for entry in told[4:]] == [False, True, False]
    assert {(e[1].argument, e[1].size, e[1].addresses.tolist()[0]) for e in told[4:]} == {
        ("count_ptr", 4, count.data_ptr())
    }
