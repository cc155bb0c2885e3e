"""Faults planted in the library's own kernels, one at a time: the tier that should find each does.

The package of kernels is copied with one line changed and launched as always. Without the change nothing is found.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from evidence.compiler import compile_launches
from evidence.launches import Recorder
from evidence.observers import observing
from evidence.sanitizer import Fault, sanitizing
from llmfast._dispatch import kernels_on_cpu
from llmfast.optim import FusedAdamW
from llmfast_kernels import cross_entropy, optimizer, row
from llmfast_kernels.optimizer import step
from llmfast_kernels.terms import Targets, Terms
from support.budgets import violations

KERNELS = "llmfast_kernels"
Plant = Callable[[ModuleType, str, str], str]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Make copies of the package: `plant(module, line, changed)` returns the name of one with that line changed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "planted_kernels"

    def make(module: ModuleType, line: str, changed: str) -> str:
        folder = Path(import_module(KERNELS).__path__[0])
        for file in folder.rglob("*.py"):
            source = file.read_text()
            if module.__file__ is not None and file.samefile(module.__file__):
                assert line in source
                source = source.replace(line, changed, 1)
            copy = tmp_path / name / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source.replace(KERNELS, name))
        return name

    yield make
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def rows(package: str, V: int = 1500, dtype: torch.dtype = torch.float32) -> None:
    """Compute loss and gradient of three rows, one of them ignored."""
    logits, targets = torch.randn(3, V).to(dtype), torch.tensor([0, -100, V - 1])
    launcher: Any = import_module(f"{package}.cross_entropy")
    launcher.cross_entropy(logits, Targets(targets[:, None]), Terms(V), d_logits=torch.empty_like(logits))


def adamw(
    package: str, monkeypatch: pytest.MonkeyPatch, *, offset: int = 0, grad_offset: int = 0, numel: int = 9000
) -> None:
    """Step two parameters; the first, and its gradient, lie so many elements into their memory."""
    planted: Any = import_module(f"{package}.optimizer")
    monkeypatch.setattr(optimizer, "update", planted.update)
    # Not a tensor's memory, so that no tensor owns what surrounds the parameter.
    memory, grads = np.zeros((2, numel + 8), dtype=np.float32)
    parameters = [torch.from_numpy(memory[offset:][:numel]).requires_grad_(), torch.randn(10, requires_grad=True)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    parameters[0].grad = torch.from_numpy(grads[grad_offset:][:numel])
    with kernels_on_cpu():
        FusedAdamW(parameters).step()


TAIL_LOAD = "readable = v < row.width if TAIL else None"
STORE = "tl.store(out.d_logits + v, d.to(out.d_logits.dtype.element_ty), mask=readable)"
CHUNK_START = "start = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK"
ALIGNED = "((p | s0 | s1 | s2 | low | ema) & 15) == 0"
GRAD_ALIGNED = "(g & 15) == 0"


def test_nothing_is_found_where_nothing_is_planted(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    with sanitizing():
        rows(plant(row, TAIL_LOAD, TAIL_LOAD))
        adamw(plant(step, ALIGNED, ALIGNED), monkeypatch, offset=1, grad_offset=1)


def test_an_off_by_one_mask(plant: Plant) -> None:
    planted = plant(row, TAIL_LOAD, TAIL_LOAD.replace("v < row.width", "v <= row.width"))
    with sanitizing(), pytest.raises(Fault, match=r"would load outside logits_ptr, of 4500 elements: element 4500"):
        rows(planted)


def test_a_missing_tail_store(plant: Plant) -> None:
    planted = plant(row, STORE, "if not TAIL:\n        " + STORE)
    with sanitizing(), pytest.raises(Fault, match=r"leaves \d+ of 4500 elements of gradient.d_logits unwritten"):
        rows(planted)


def test_a_racing_accumulation(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every program update the first chunk of its tensor."""
    planted = plant(step, CHUNK_START, "start = (chunk * 0).to(tl.int64)")
    with sanitizing(), pytest.raises(Fault, match=r"update_kernel, program 1 of 4, loads what program 0 stored"):
        adamw(planted, monkeypatch)


@pytest.mark.parametrize(("line", "name"), [(ALIGNED, "offset"), (GRAD_ALIGNED, "grad_offset")])
def test_an_unaligned_pointer_taken_for_an_aligned_one(
    plant: Plant, monkeypatch: pytest.MonkeyPatch, line: str, name: str
) -> None:
    planted = plant(step, line, "p != 0")
    with sanitizing(), pytest.raises(Fault, match=r"update_kernel, program 0 of 4, would load outside of all tensors"):
        adamw(planted, monkeypatch, **{name: 1})


def broken_budgets(package: str) -> list[str]:
    recorder = Recorder()
    with observing(recorder):
        rows(package, V=32768, dtype=torch.bfloat16)
    compiled = compile_launches(list(recorder.kinds.values()), ["sm_90"])
    return [found for c in compiled for found in violations(c)]


@functools.cache
def broken_budgets_without_a_fault() -> list[str]:
    return broken_budgets(KERNELS)


@pytest.mark.parametrize(
    ("module", "line", "changed", "problem"),
    [
        # An eighth of the threads, each with eight times the logits.
        (
            cross_entropy,
            '"THREADS": block // elements, "num_warps": warps(block // elements)',
            '"THREADS": 64, "num_warps": 2',
            "spills ",
        ),
        # Rows that start on 16 bytes, and a compiler that is not told.
        (row, "return x // VECTOR * VECTOR", "return x", "bits at a time"),
    ],
    ids=["a spill", "narrow accesses"],
)
def test_worse_machine_code(plant: Plant, module: ModuleType, line: str, changed: str, problem: str) -> None:
    assert broken_budgets_without_a_fault() == []
    assert any(problem in found for found in broken_budgets(plant(module, line, changed)))
