"""Scaling by a number on the device: every pair of dtypes, with and without adding, at the boundaries of its tile."""

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from evidence.dry_run import reserve
from evidence.observers import Launch, Observer, Run, observing
from llmfast._dispatch import kernels_on_cpu
from llmfast_kernels.scale import scale, tile
from support import devices
from support.pairs import covering

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = tile()["BLOCK"]
CASES = covering(
    {
        "dtype": [F32, BF16, F16],
        "out": [None, F32, BF16, F16],
        "add": [False, True],
        "factor": [1.0, -0.375, 0.0, float("inf"), float("nan")],
        "numel": [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK],
        "shape": ["flat", "matrix"],
    },
    lambda case: case.get("out", F32) is not None or not case.get("add"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_element_is_scaled_once(kernels: None, case: dict[str, Any]) -> None:
    """Leave zeros zero whatever the factor is, and everything where it is where nothing is to be done."""
    x = torch.randn(case["numel"]).to(case["dtype"])
    x[::3] = 0.0
    x = x[None] if case["shape"] == "matrix" else x
    before = torch.randn(x.shape).to(case["out"] or case["dtype"])
    wanted = torch.where(x == 0, 0.0, x.double() * case["factor"]) + (before.double() if case["add"] else 0.0)
    given, out = x.clone(), None if case["out"] is None else before.clone()
    found = scale(given, torch.tensor(case["factor"]), out=out, add=case["add"])
    assert found is (given if out is None else out)
    assert found.dtype == before.dtype and found.shape == x.shape
    wide = wanted.to(found.dtype)
    torch.testing.assert_close(found, wide, rtol=torch.finfo(found.dtype).eps, atol=1e-6, equal_nan=True)
    if out is not None:
        assert torch.equal(given, x)


class LastPrograms(Observer):
    """Run the last two programs of a launch, and no others."""

    def launch(self, launch: Launch, programs: Sequence[int], run: Run) -> None:
        run(programs[-2:])


@pytest.mark.cpu("lets kernels read memory that exists only as a promise")
@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not reserved")
def test_elements_past_two_to_the_31() -> None:
    """Scale the end of the weight gradient of a large vocabulary."""
    x = reserve((1 << 31) + 5000, dtype=BF16)
    x[-BLOCK:] = 2.0
    with kernels_on_cpu(), observing(LastPrograms()):
        scale(x, torch.tensor(0.25))
    assert (x[-BLOCK:] == 0.5).all() and (x[: 2 * BLOCK] == 0).all()


def test_nothing_is_launched_for_nothing() -> None:
    with devices.kernels():
        x, out = torch.zeros(0), torch.zeros(0, dtype=BF16)
        assert scale(x, torch.tensor(2.0)) is x and scale(x, torch.tensor(2.0), out=out) is out
