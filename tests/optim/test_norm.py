"""The norm kernel where gradients are few elements, begin anywhere, or are missing; and sums of many chunks."""

import math

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedSGD
from llmfast_kernels.optimizer.norm import ROUNDS, add_up, sum_tile

# Fewer elements than lie before the next 16 bytes, as many, and chunks that are full, or not by one.
SIZES = [1, 2, 3, 5, 8, 9, 2047, 2048, 2049, 4096, 4097, 4096 + 2049]
SHIFTS = {torch.float32: (0, 1, 3), torch.bfloat16: (0, 1, 7), torch.float16: (5,)}  # in elements


@pytest.mark.parametrize("dtype", SHIFTS, ids=str)
def test_every_size_is_measured_wherever_it_begins(kernels: None, dtype: torch.dtype) -> None:
    """Lay out gradients one behind the other, with large numbers around each, and measure each alone."""
    for shift in SHIFTS[dtype]:
        params: list[Tensor] = []
        expected: list[float] = []
        for n in SIZES:
            buffer = torch.full((shift + n + 32,), 1e3, dtype=dtype)
            buffer[shift : shift + n] = torch.randn(n).to(dtype)
            p = torch.zeros(n, dtype=dtype, requires_grad=True)
            p.grad = buffer[shift : shift + n]
            assert p.grad.data_ptr() % 16 == shift * dtype.itemsize
            params.append(p)
            expected.append(p.grad.double().square().sum().item())
        optimizer = FusedSGD(params, lr=0.0, max_grad_norm=math.inf)
        with torch.no_grad():
            plan, gradients = optimizer.make_plan()
            optimizer.follow(plan, gradients)
        (table,) = plan.tables
        measured = table.squares.double()
        rows = table.chunk_tensor.long()
        sums = torch.zeros(len(SIZES), dtype=torch.float64).index_add_(0, rows, measured)
        torch.testing.assert_close(sums, torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.item() == pytest.approx(math.sqrt(sum(expected)), rel=1e-6)


def test_a_parameter_that_has_no_gradient_any_more_adds_nothing(kernels: None) -> None:
    params = [torch.zeros(n, requires_grad=True) for n in (4097, 3, 5000)]
    optimizer = FusedSGD(params, lr=0.0, max_grad_norm=math.inf)
    for missing in ((), (0,), (1, 2), (2,)):
        for i, p in enumerate(params):
            p.grad = None if i in missing else torch.full((p.numel(),), 2.0)
        optimizer.step()
        there = sum(p.numel() for i, p in enumerate(params) if i not in missing)
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.item() == pytest.approx(2.0 * math.sqrt(there), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sums_are_exact_to_float64_at_every_boundary(kernels: None, dtype: torch.dtype) -> None:
    """Add up one large number and many small ones, which float32 would lose, in one launch and in two."""
    block = sum_tile()["BLOCK"]
    for count in (1, block - 1, block, block + 1, ROUNDS * block, ROUNDS * block + 1, 2 * ROUNDS * block + block + 1):
        numbers = torch.full((count,), 2.0**-3, dtype=dtype)
        numbers[count // 2] = 2.0**30
        total = torch.zeros((), dtype=torch.float64)
        add_up(numbers, total)
        assert total.item() == 2.0**30 + (count - 1) * 2.0**-3
