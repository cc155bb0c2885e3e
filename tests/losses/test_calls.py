"""The way from a loss's function to its kernel: few calls, each of which does something."""

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from evidence.observers import Launch, Observer, Run, observing
from llmfast.losses import cross_entropy, linear_cross_entropy

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (str(ROOT / "llmfast"), str(ROOT / "kernels"))

LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "cross_entropy": (lambda x, y: cross_entropy(x, y), 4),
    "in place": (lambda x, y: cross_entropy(x * 1.0, y, inplace=True), 4),
    "linear_cross_entropy": (lambda x, y: linear_cross_entropy(x, torch.ones(9, 9, requires_grad=True), y), 5),
    "of valid rows": (lambda x, y: linear_cross_entropy(x, torch.ones(9, 9), y, num_valid=2, memory_budget=2000), 5),
}


class Calls(Observer):
    """Records the functions of ours on the way to the first launch, the public one first."""

    def __init__(self) -> None:
        self.frames: list[FrameType] = []

    def launch(self, launch: Launch, programs: Any, run: Run) -> None:
        if not self.frames:
            self.frames = [f for f in self._stack() if f.f_code.co_filename.startswith(FOLDERS)][::-1]
        run(programs)

    @staticmethod
    def _stack() -> Iterator[FrameType]:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            yield frame
            frame = frame.f_back


@pytest.mark.parametrize("name", LOSSES)
def test_few_calls_lead_to_the_kernel(kernels: None, name: str) -> None:
    loss, most = LOSSES[name]
    calls = Calls()
    with observing(calls):
        loss(torch.randn(3, 9, requires_grad=True), torch.tensor([0, -100, 2]))
    names = [frame.f_code.co_name for frame in calls.frames]
    assert names[0] in ("cross_entropy", "linear_cross_entropy")
    assert len(names) <= most, names  # also the number of calls: the first was called from here, the last launches
    for frame in calls.frames:
        source = ast.parse(inspect.cleandoc("\n" + inspect.getsource(frame.f_code))).body[0]
        assert isinstance(source, ast.FunctionDef)
        statements = [s for s in source.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        assert len(statements) > 1, f"{source.name} only passes its arguments on"
