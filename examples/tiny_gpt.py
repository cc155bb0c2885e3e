"""The model and data shared by the recipes: a small causal transformer, and a Python module as text.

This file contains no llmfast code. The model is ordinary except that `forward` returns hidden states; the loss takes
these together with `model.head.weight`.
"""

import argparse  # the models learn its source
from collections.abc import Iterator, Sequence
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

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # (B, T, D) -> (B, T, D)
        attention, ffn = self.norms
        q, k, v = self.qkv(attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)  # (B, heads, T, D / heads)
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

    def forward(self, tokens: Tensor, packing: "Packing | None" = None) -> Tensor:  # (B, T) -> (B, T, D)
        places, mask = slice(tokens.shape[1]), None
        if packing is not None:
            places, mask = packing.places, packing.mask
        x = self.tokens(tokens) + self.positions.weight[places]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class Packing:
    """Several sequences in one row, which do not see each other: no padding, and one pass of the model for all."""

    def __init__(self, sequences: Sequence[Tensor], prompts: Sequence[int]) -> None:
        """Pack `sequences` of tokens; `prompts` are the numbers of their first tokens, which are not predicted."""
        device, each = sequences[0].device, [torch.arange(len(s), device=s.device) for s in sequences]
        ids = [
            s.roll(-1).masked_fill((at < n - 1) | (at == len(s) - 1), -100)
            for s, at, n in zip(sequences, each, prompts)
        ]
        self.tokens = torch.cat([*sequences])[None]  # (1, T)
        self.ids = torch.cat(ids)[None]  # (1, T): what each token is to predict, -100 within prompts and at ends
        self.places = torch.cat(each)  # (T,): the position of each token in its sequence
        lengths = torch.tensor([len(s) for s in sequences], device=device)
        self.sequence = torch.arange(len(sequences), device=device).repeat_interleave(
            lengths
        )  # (T,): the sequence of each token
        self.count = len(sequences)
        self.mask = (self.sequence[:, None] == self.sequence) & (self.places[:, None] >= self.places)

    def sums(self, values: Tensor) -> Tensor:
        """Sum (1, T) numbers of tokens for each sequence, (count,)."""
        return values.new_zeros(self.count).index_add(0, self.sequence, values[0])


def batches(rows: int, device: str = "cpu", context: int = 128, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield tokens and targets, (rows, context) each, from random positions of the text, endlessly and by seed."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    windows = text.unfold(0, context + 1, 1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = windows[torch.randint(len(windows), (rows,), generator=generator)].to(device)
        yield chosen[:, :-1], chosen[:, 1:]
