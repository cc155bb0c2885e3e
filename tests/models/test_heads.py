"""Parallel heads: every block reads the trunk."""

import pytest
import torch
from torch import nn

from llmfast.mtp import ParallelHeads


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor, shift: float) -> torch.Tensor:
        return x * self.gain + shift


def test_heads_are_blocks_side_by_side() -> None:
    heads, x = ParallelHeads(Scale, 3), torch.randn(2, 5, 4)
    out = heads(x, 2.0)
    assert out.shape == (3, 2, 5, 4)
    for head, block in zip(out, heads.blocks):
        assert torch.equal(head, block(x, 2.0))


def test_refuses_no_heads() -> None:
    with pytest.raises(ValueError, match="n must be at least 1; got 0"):
        ParallelHeads(Scale, 0)
