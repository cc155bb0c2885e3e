"""Faults planted in the library's own kernels, one at a time: the tier that should find each does.

A kernel file is copied with one line changed and launched as always. Without the change nothing is found.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
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
from llmfast_kernels import cross_entropy, optimizer
from llmfast_kernels.terms import Targets, Terms
from support.budgets import violations

Plant = Callable[[ModuleType, str, str], Any]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Return a function `plant(module, line, changed)` that imports the module with its first such line changed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def make(module: ModuleType, line: str, changed: str) -> Any:
        assert module.__file__ is not None
        source = Path(module.__file__).read_text()
        assert line in source
        name = f"planted_{module.__name__.split('.')[-1]}"
        (tmp_path / f"{name}.py").write_text(source.replace(line, changed, 1))
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        assert spec is not None and spec.loader is not None
        planted = importlib.util.module_from_spec(spec)
        sys.modules[name] = planted
        names.append(name)
        spec.loader.exec_module(planted)
        return planted

    yield make
    for name in names:
        sys.modules.pop(name, None)


def rows(planted: Any, V: int = 1500, dtype: torch.dtype = torch.float32) -> None:
    """Loss and gradient of three rows, one of them ignored."""
    logits, targets = torch.randn(3, V).to(dtype), torch.tensor([0, -100, V - 1])
    planted.cross_entropy(logits, Targets(targets[:, None]), Terms(V), d_logits=torch.empty_like(logits))


def adamw(planted: Any, monkeypatch: pytest.MonkeyPatch, *, offset: int = 0, numel: int = 9000) -> None:
    """Step two parameters; the first lies `offset` elements into its memory."""
    monkeypatch.setattr(optimizer, "update", planted.update)
    memory = np.zeros(numel + 8, dtype=np.float32)  # no tensor's: what lies beside the parameter is nobody's
    parameters = [torch.from_numpy(memory[offset:][:numel]).requires_grad_(), torch.randn(10, requires_grad=True)]
    for p in parameters:
        p.grad = torch.randn_like(p)
    with kernels_on_cpu():
        FusedAdamW(parameters).step()


TAIL_LOAD = "x = read_logits(logits_row, bias_ptr, v, v < row_width, v < V, logit_scale, softcap)"
TAIL_STORE = "tl.store(d_logits_row + v, d.to(d_logits_ptr.dtype.element_ty), mask=v < row_width)"
CHUNK_START = "start = (chunk - tl.load(row + FIRST_CHUNK)) * CHUNK"
ALIGNED = "aligned = ((p | g | s0 | s1 | s2 | low | ema) & 15) == 0"


def test_nothing_is_found_where_nothing_is_planted(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    with sanitizing():
        rows(plant(cross_entropy, TAIL_LOAD, TAIL_LOAD))
        adamw(plant(optimizer, ALIGNED, ALIGNED), monkeypatch, offset=1)


def test_an_off_by_one_mask(plant: Plant) -> None:
    planted = plant(cross_entropy, TAIL_LOAD, TAIL_LOAD.replace("v < row_width", "v <= row_width"))
    with sanitizing(), pytest.raises(Fault, match=r"would load outside logits_ptr, of 4500 elements: element 4500"):
        rows(planted)


def test_a_missing_tail_store(plant: Plant) -> None:
    planted = plant(cross_entropy, TAIL_STORE, "pass")
    with sanitizing(), pytest.raises(Fault, match=r"leaves \d+ of 4500 elements of d_logits_ptr unwritten"):
        rows(planted)


def test_a_racing_accumulation(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every program update the first chunk of its tensor."""
    planted = plant(optimizer, CHUNK_START, "start = (chunk * 0).to(tl.int64)")
    with sanitizing(), pytest.raises(Fault, match=r"update_kernel, program 1 of 4, loads what program 0 stored"):
        adamw(planted, monkeypatch)


def test_an_unaligned_pointer_taken_for_an_aligned_one(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = plant(optimizer, ALIGNED, "aligned = p != 0")
    with sanitizing(), pytest.raises(Fault, match=r"update_kernel, program 0 of 4, would load outside of all tensors"):
        adamw(planted, monkeypatch, offset=1)


@pytest.mark.parametrize(
    ("line", "changed", "problem"),
    [
        # An eighth of the threads, each with eight times the logits.
        (
            '"THREADS": block // elements, "num_warps": warps(block // elements)',
            '"THREADS": 64, "num_warps": 2', "spills ",
        ),
        # Rows that start on 16 bytes, and a compiler that is not told.
        ("logits_ptr + n * (logits_stride_n // VECTOR) * VECTOR", "logits_ptr + n * logits_stride_n", "bits at a time"),
    ],
    ids=["a spill", "narrow accesses"],
)  # fmt: skip
def test_worse_machine_code(plant: Plant, line: str, changed: str, problem: str) -> None:
    def broken_budgets(module: Any) -> list[str]:
        recorder = Recorder()
        with observing(recorder):
            rows(module, V=32768, dtype=torch.bfloat16)
        compiled = compile_launches(list(recorder.kinds.values()), ["sm_90"])
        return [found for c in compiled for found in violations(c)]

    assert broken_budgets(cross_entropy) == []
    assert any(problem in found for found in broken_budgets(plant(cross_entropy, line, changed)))
