"""Greedy self-speculative decoding: the further heads draft tokens, and the next pass of the trunk verifies them.

    known     t t t t        pass 1: head 0 says a, further heads draft b c
    input     t t t t a b c  pass 2: head 0 says b (right), then x (not c): b and x are kept and new drafts made
    input     t t t t a b x . .      from the row that said x

Every kept token is head 0's own choice after the tokens before it, so the text equals that of plain greedy decoding
(provided that a row's logits do not depend on the number of rows after it: rounding can decide a tie).
Meant for measuring acceptance rates: one sequence, no key-value cache.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast.models.depths import SequentialDepths
from llmfast.models.heads import ParallelHeads

if TYPE_CHECKING:
    from llmfast.models import Decoder


@dataclass(frozen=True, eq=False)
class Speculation:
    """Decoded text, and how often the drafts were right."""

    tokens: Tensor  # (T + count,) int64: the prompt and its continuation
    passes: int  # passes of the trunk; plain decoding takes one per token
    guessed: list[int]  # per head 1, 2, ...: drafts that a pass checked
    accepted: list[int]  # how many of these became text: they and all nearer ones were right

    @property
    def acceptance(self) -> list[float]:
        """Return accepted / guessed for heads 1, 2, ...; NaN for a head that never guessed."""
        return [a / g if g else math.nan for a, g in zip(self.accepted, self.guessed)]


@torch.no_grad()
def speculative_generate(model: "Decoder", tokens: Tensor, count: int) -> Speculation:
    """Append to `tokens` (T,) int64 the `count` most likely tokens, in at most `count` passes.

    A pass checks the current drafts, keeps the longest correct prefix and adds one token. `model` is a decoder with
    parallel heads or sequential depths; it processes the whole text, however long.

    Raises:
        ValueError: `tokens` is not (T,) with T > 0, `count` is negative, or the model has no heads that can draft.
    """
    expect(tokens.dim() == 1 and len(tokens) > 0, f"tokens must be (T,) with T > 0; got {describe(tokens)}")
    expect(count >= 0, f"count must not be negative; got {count}")
    expect(model.mtp is not None, f"model must have mtp='parallel' or 'sequential'; got {model.config.mtp!r}")
    read = _ParallelPass if isinstance(model.mtp, ParallelHeads) else _SequentialPass
    most = model.config.targets - 1  # drafts per pass
    guessed, accepted, passes = [0] * most, [0] * most, 0
    end = len(tokens) + count
    guesses = tokens[:0]
    while len(tokens) < end:
        current = read(model, torch.cat([tokens, guesses]))
        passes += 1
        said = _choice(model, current.hidden[len(tokens) - 1 :])
        right = int((said[:-1] == guesses).long().cumprod(0).sum())
        for k in range(len(guesses)):
            guessed[k] += 1
            accepted[k] += k < right
        tokens = torch.cat([tokens, said[: right + 1]])
        # A pass adds a token of its own, so drafts must leave room for it.
        guesses = current.guess(tokens, max(0, min(most, end - len(tokens) - 1)))
    return Speculation(tokens, passes, guessed, accepted)


class _ParallelPass:
    def __init__(self, model: "Decoder", text: Tensor) -> None:
        self._model = model
        self._heads = model(text[None], all_heads=True)[:, 0]  # (K, T, D)
        self.hidden = self._heads[0]  # (T, D)

    def guess(self, tokens: Tensor, count: int) -> Tensor:
        """Draft the `count` tokens after `tokens`, whose last one comes from this pass and was not in its input."""
        return _choice(self._model, self._heads[1 : count + 1, len(tokens) - 2])


class _SequentialPass:
    def __init__(self, model: "Decoder", text: Tensor) -> None:
        self._model = model
        self._trunk = model.trunk(text[None])
        self._normed = model.norm(self._trunk.out)
        self.hidden: Tensor = self._normed[0]

    def guess(self, tokens: Tensor, count: int) -> Tensor:
        """Draft as above; depth k reads the draft of depth k - 1."""
        model, depths, rows = self._model, self._model.mtp, len(tokens) - 1
        assert isinstance(depths, SequentialDepths)
        hidden = (self._trunk.out if depths.hidden == "pre_norm" else self._normed)[:, :rows]
        rope = self._trunk.rope[..., :rows, :]
        for k in range(1, count + 1):
            hidden, out = depths.advance(k, hidden, model.embedding(tokens[None, k:]), rope, None)
            tokens = torch.cat([tokens, _choice(model, out[0, -1:])])
        return tokens[rows + 1 :]


def _choice(model: "Decoder", hidden: Tensor) -> Tensor:
    """Return the most likely token of each row, (R, D) to (R,)."""
    return (hidden @ model.unembedding.T).argmax(-1)
