"""A parameter of more than 2^31 elements, in memory that is promised and, but for its end, never touched."""

import sys

import pytest
import torch

from evidence.dry_run import reserve
from llmfast._dispatch import kernels_on_cpu
from llmfast.optim import FusedSGD
from llmfast_kernels.optimizer.table import FIRST_CHUNK

NUMEL = (1 << 31) + 5000


@pytest.mark.skipif(sys.platform != "linux", reason="needs memory that is not reserved")
def test_elements_past_two_to_the_31() -> None:
    p, g = (reserve(NUMEL, dtype=torch.bfloat16) for _ in range(2))
    end = slice(NUMEL - 5000, None)
    p[end], g[end] = 1.0, 2.0
    p.requires_grad_()
    p.grad = g
    optimizer = FusedSGD([p], lr=0.25)
    with kernels_on_cpu(), torch.no_grad():
        plan, gradients = optimizer.make_plan()
        (table,) = plan.tables
        # Of its programs, the last two alone.
        table.table[0, FIRST_CHUNK.value] = 2 - len(table.chunk_tensor)
        table.chunk_tensor = table.chunk_tensor[-2:]
        optimizer.follow(plan, gradients)
    assert (p[end] == 0.5).all()
    assert (p[:4096] == 0).all() and (p[(1 << 31) - 4096 : 1 << 31] == 0).all()
