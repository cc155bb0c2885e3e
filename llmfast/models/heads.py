"""Parallel heads over one trunk (Gloeckle 2024, arXiv:2404.19737)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmfast._checks import expect
from llmfast._kinds import expect_kind, expect_tensors, kind_of


class ParallelHeads(nn.Module):
    """Blocks that each read the trunk's output; the unembedding they share belongs to the model.

    Block k's output at row t is for token t + 1 + k. With n = 1 this is one more layer of an ordinary model.
    """

    def __init__(self, make_block: Callable[[], nn.Module], n: int) -> None:
        super().__init__()
        expect_kind("n", n, kind_of(int))
        expect(n >= 1, f"n must be at least 1; got {n}")
        self.blocks = nn.ModuleList([make_block() for _ in range(n)])

    def forward(self, trunk_out: Tensor, *args: Any) -> Tensor:
        """Map (B, T, D) to (n, B, T, D); `args` go to every block."""
        expect_tensors(trunk_out=trunk_out)
        return torch.stack([block(trunk_out, *args) for block in self.blocks])
