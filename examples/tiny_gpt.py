"""The model and data shared by the recipes: a small causal transformer, and a Python module as text.

This file contains no llmfast code. The model is ordinary except that `forward` returns hidden states; the loss takes
these together with `model.head.weight`.
"""

import argparse  # the models learn its source
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        attention, ffn = self.norms
        q, k, v = self.qkv(attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, D / heads)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.ffn(ffn(x))


class TinyGPT(nn.Module):
    """Small GPT from bytes to hidden states; `head` maps those to logits."""

    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.tokens = nn.Embedding(256, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def batches(rows: int, device: str = "cpu", context: int = 128, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and targets, (rows, context) each, from random positions of the text, endlessly and by seed."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    windows = text.unfold(0, context + 1, 1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = windows[torch.randint(len(windows), (rows,), generator=generator)].to(device)
        yield chosen[:, :-1], chosen[:, 1:]
