"""Greedy self-speculative decoding: the further heads guess, the next pass of the trunk checks.

    known     t t t t        pass 1: head 0 says a, further heads guess b c
    input     t t t t a b c  pass 2: head 0 says b (right), then x (not c): b and x are kept, and new guesses come
    input     t t t t a b x . .      from the row that said x

Every token that is kept is head 0's own choice after the tokens before it, so the text is that of plain greedy decoding
(as far as a row's logits do not depend on how many rows follow it: rounding can turn a tie).
For measuring what heads are worth: one sequence, no cache of keys and values.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast.mtp.depths import SequentialDepths
from llmfast.mtp.heads import ParallelHeads

if TYPE_CHECKING:
    from llmfast.models import Decoder


@dataclass(frozen=True, eq=False)
class Speculation:
    """What was decoded and how often the guesses were right."""

    tokens: Tensor  # (T + count,) int64: the prompt and what follows it
    passes: int  # of the trunk; plain decoding takes one a token
    guessed: list[int]  # of heads 1, 2, ...: guesses that a pass checked
    accepted: list[int]  # of these, those that became text: they were right, and so were all nearer ones

    @property
    def acceptance(self) -> list[float]:
        """Accepted / guessed of heads 1, 2, ...; NaN for a head that never guessed."""
        return [a / g if g else math.nan for a, g in zip(self.accepted, self.guessed)]


@torch.no_grad()
def speculative_generate(model: "Decoder", tokens: Tensor, count: int) -> Speculation:
    """`tokens` (T,) int64 followed by the `count` that `model` finds most likely, in at most `count` passes.

    A pass checks the guesses so far and keeps the longest right part of them and one token more. `model` is a decoder
    with parallel heads or sequential depths; it sees the whole text, however long.

    Raises:
        ValueError: `tokens` is not (T,) with T > 0, `count` is negative, or the model has no heads that can guess.
    """
    expect(tokens.dim() == 1 and len(tokens) > 0, f"tokens must be (T,) with T > 0; got {describe(tokens)}")
    expect(count >= 0, f"count must not be negative; got {count}")
    expect(model.mtp is not None, f"model must have mtp='parallel' or 'sequential'; got {model.config.mtp!r}")
    read = _ParallelPass if isinstance(model.mtp, ParallelHeads) else _SequentialPass
    most = model.config.targets - 1  # guesses a pass
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
        # A pass adds a token of its own, so no more guesses than leave room for it.
        guesses = current.guess(tokens, max(0, min(most, end - len(tokens) - 1)))
    return Speculation(tokens, passes, guessed, accepted)


class _ParallelPass:
    def __init__(self, model: "Decoder", text: Tensor) -> None:
        self._model = model
        self._heads = model(text[None], all_heads=True)[:, 0]  # (K, T, D)
        self.hidden = self._heads[0]  # (T, D)

    def guess(self, tokens: Tensor, count: int) -> Tensor:
        """What comes after `tokens`, (count,); the last of them is what this pass said, so it was not in the text."""
        return _choice(self._model, self._heads[1 : count + 1, len(tokens) - 2])


class _SequentialPass:
    def __init__(self, model: "Decoder", text: Tensor) -> None:
        self._model = model
        self._trunk = model.trunk(text[None])
        self._normed = model.norm(self._trunk.out)
        self.hidden: Tensor = self._normed[0]

    def guess(self, tokens: Tensor, count: int) -> Tensor:
        """As above; depth k reads the guess of depth k - 1."""
        model, depths, rows = self._model, self._model.mtp, len(tokens) - 1
        assert isinstance(depths, SequentialDepths)
        hidden = (self._trunk.out if depths.hidden == "pre_norm" else self._normed)[:, :rows]
        rope = self._trunk.rope[..., :rows, :]
        for k in range(1, count + 1):
            hidden, out = depths.advance(k, hidden, model.embedding(tokens[None, k:]), rope, None)
            tokens = torch.cat([tokens, _choice(model, out[0, -1:])])
        return tokens[rows + 1 :]


def _choice(model: "Decoder", hidden: Tensor) -> Tensor:
    """The likeliest token of each row, (R, D) to (R,)."""
    return (hidden @ model.unembedding.T).argmax(-1)
