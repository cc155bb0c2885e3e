"""Decoders whose settings are combined so that any two values meet, against their formulas in float64."""

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from llmfast.models import Decoder, DecoderConfig
from support.pairs import Case, covering

KINDS = get_type_hints(DecoderConfig)
SETTINGS: dict[str, list[Any]] = {
    "width": [24, 32],
    "layers": [1, 2, 3],
    "heads": [2, 4],
    "ffn_width": [0, 20],
    "rope_base": [10_000.0, 50.0],
    "norm_eps": [1e-5, 0.3],
    "tie_embeddings": [True, False],
    "mtp": list(get_args(KINDS["mtp"])),
    "mtp_heads": [0, 1, 3],
    "mtp_concat": list(get_args(KINDS["mtp_concat"])),
    "mtp_hidden": list(get_args(KINDS["mtp_hidden"])),
    "mtp_repeated_layer": [False, True],
    "mtp_detach": [False, True],
}
GIVEN: dict[str, list[Any]] = {"packed": [False, True], "positions": [False, True]}


def possible(case: Case) -> bool:
    heads, mtp = case.get("mtp_heads"), case.get("mtp")
    return mtp is None or heads is None or (heads == 0) == (mtp == "none")


class ByHand:
    """One row of tokens through a decoder, from its weights and settings alone."""

    def __init__(self, model: Decoder, tokens: Tensor, positions: Tensor, documents: Tensor) -> None:
        self.c, self.w = model.config, {name: t.double() for name, t in model.state_dict().items()}
        self.tokens, self.documents = tokens, documents
        half = self.c.width // self.c.heads // 2
        self.angles = positions.double()[:, None] / self.c.rope_base ** (torch.arange(half).double() / half)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.c.norm_eps).sqrt() * self.w[f"{name}.weight"]

    def turned(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        cos, sin = self.angles.cos(), self.angles.sin()
        return torch.cat([a * cos - b * sin, a * sin + b * cos], 1)

    def block(self, x: Tensor, name: str) -> Tensor:
        D = self.c.width // self.c.heads
        seen = (self.documents[:, None] == self.documents).tril()
        heads = []
        read = self.times(self.norm(x, f"{name}.attention_norm"), f"{name}.attention.qkv")
        for q, k, v in zip(*(part.split(D, 1) for part in read.chunk(3, 1)), strict=True):
            scores = (self.turned(q) @ self.turned(k).T / D**0.5).masked_fill(~seen, -torch.inf)
            heads.append(scores.softmax(1) @ v)
        x = x + self.times(torch.cat(heads, 1), f"{name}.attention.out")
        gate, up = self.times(self.norm(x, f"{name}.ffn_norm"), f"{name}.ffn.gate_up").chunk(2, 1)
        return x + self.times(gate * gate.sigmoid() * up, f"{name}.ffn.out")

    def times(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T

    def all_heads(self) -> Tensor:
        c, w = self.c, self.w
        embedded = x = w["embedding.weight"][self.tokens]
        parallel = c.mtp == "parallel"
        for i in range(c.layers - parallel):
            x = self.block(x, f"blocks.{i}")
        if parallel:
            return torch.stack([self.norm(self.block(x, f"mtp.blocks.{k}"), "norm") for k in range(c.mtp_heads)])
        outs = [self.norm(x, "norm")]
        state = x if c.mtp_hidden == "pre_norm" else outs[0]
        for k in range(1, 1 + (c.mtp_heads if c.mtp == "sequential" else 0)):
            name = f"mtp.layers.{0 if c.mtp_repeated_layer else k - 1}"
            later = torch.zeros_like(embedded)
            for t in range(len(x) - k):
                if self.documents[t] == self.documents[t + k]:
                    later[t] = embedded[t + k]
            pair = [self.norm(later, f"{name}.enorm"), self.norm(state, f"{name}.hnorm")]
            pair = pair if c.mtp_concat == "embedding_first" else pair[::-1]
            state = self.block(self.times(torch.cat(pair, 1), f"{name}.eh_proj"), f"{name}.block")
            outs.append(self.norm(state, f"{name}.norm"))
            state = state if c.mtp_hidden == "pre_norm" else outs[-1]
        return torch.stack(outs)


CASES = covering(SETTINGS | GIVEN, possible)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_any_two_settings_give_the_formulas(case: Case) -> None:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(50, **{name: case[name] for name in SETTINGS})).double()
    for p in model.parameters():  # gains are not 1, and each name has weights of its own
        torch.nn.init.normal_(p, std=0.4) if p.dim() > 1 else torch.nn.init.uniform_(p, 0.5, 1.5)
    tokens = torch.randint(0, 50, (2, 9))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [4] * 8 + [5]]) if case["packed"] else None
    positions = torch.randint(0, 30, (2, 9)) if case["positions"] else None
    given = {"positions": positions, "document_ids": documents}
    wanted = torch.stack(
        [
            ByHand(
                model,
                tokens[b],
                torch.arange(9) if positions is None else positions[b],
                torch.zeros(9) if documents is None else documents[b],
            ).all_heads()
            for b in range(2)
        ],
        1,
    )
    found = model(tokens, all_heads=True, **given)
    torch.testing.assert_close(found if case["mtp"] != "shared" else found[None], wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens, **given), wanted[0], rtol=1e-5, atol=1e-5)
    assert model.config.targets == (case["mtp_heads"] if case["mtp"] == "shared" else len(wanted))
    state = model.state_dict()
    assert ("head.weight" in state) != case["tie_embeddings"]
    assert torch.equal(model.unembedding, state["embedding.weight" if case["tie_embeddings"] else "head.weight"])
    if documents is None:  # in parts, whose keys and values are kept
        cache = model.new_cache()
        at = [None] * 3 if positions is None else positions.split([4, 1, 4], 1)
        parts = [model(part, cache=cache, positions=p) for part, p in zip(tokens.split([4, 1, 4], 1), at)]
        torch.testing.assert_close(torch.cat(parts, 1), wanted[0], rtol=1e-5, atol=1e-5)


def test_every_setting_is_among_them() -> None:
    assert {field.name for field in fields(DecoderConfig)} - {"vocab_size"} == SETTINGS.keys()
