"""Greedy self-speculative decoding: the further heads draft tokens, and the next pass of the trunk verifies them.

    known     t t t t        pass 1: head 0 says a, further heads draft b c
    input     t t t t a b c  pass 2: head 0 says b (right), then x (not c): b and x are kept and new drafts made
    input     t t t t a b x . .      from the row that said x

Every kept token is head 0's own choice after the tokens before it, so the text equals that of plain decoding, greedy or
sampled with the same random numbers (provided that a row's logits do not depend on the number of rows next to it:
rounding can decide a tie). Keys and values are kept, so a pass costs the rows that it adds.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._kinds import expect_kind, expect_tensors, kind_of
from llmfast.models.cache import KeyValues
from llmfast.models.decoder import Trunk, rotation
from llmfast.models.depths import SequentialDepths
from llmfast.models.heads import ParallelHeads
from llmfast.models.sampling import Sampler

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


class Pass(NamedTuple):
    """Outcome of one pass of the trunk."""

    tokens: Tensor  # (accepted + 1,) int64: the drafts that were right, and one more token
    guessed: int  # drafts that were checked, of heads 1, 2, ..., `guessed`
    accepted: int  # how many of these were right, up to the first that was not


@torch.no_grad()
def speculative_passes(
    model: "Decoder", tokens: Tensor, count: int, *, sampler: Sampler | None = None
) -> Iterator[Pass]:
    """Yield passes that together append `count` tokens to `tokens`, (T,) int64: greedily, or as `sampler` says.

    `model` is a decoder with parallel heads or sequential depths; it processes the whole text, however long.

    Raises:
        ValueError: `tokens` is not (T,) with T > 0, `count` is negative, or the model has no heads that can draft.
    """
    expect_tensors(tokens=tokens)
    expect_kind("count", count, kind_of(int))
    expect(tokens.dim() == 1 and len(tokens) > 0, f"tokens must be (T,) with T > 0; got {describe(tokens)}")
    expect(count >= 0, f"count must not be negative; got {count}")
    expect(model.mtp is not None, f"model must have mtp='parallel' or 'sequential'; got {model.config.mtp!r}")
    drafts = _ParallelDrafts(model) if isinstance(model.mtp, ParallelHeads) else _SequentialDrafts(model)
    choose, cache, end, guesses = sampler or Sampler(), model.new_cache(), len(tokens) + count, tokens[:0]
    while len(tokens) < end:
        read = cache[0].rows
        trunk = model.trunk(torch.cat([tokens[read:], guesses])[None], cache=cache)
        hidden = model.next_hidden(trunk, cache)[0, len(tokens) - 1 - read :]
        said = _verified(hidden @ model.unembedding.T, guesses, choose)
        tokens = torch.cat([tokens, said])
        for kept in cache:
            kept.crop(len(tokens) - 1)  # without what followed a wrong draft
        yield Pass(said, len(guesses), len(said) - 1)
        # A pass adds a token of its own, so drafts must leave room for it.
        room = max(0, min(model.config.targets - 1, end - len(tokens) - 1))
        guesses = drafts.guess(trunk, tokens, len(tokens) - 1 - read, room) if room else tokens[:0]


def speculative_generate(model: "Decoder", tokens: Tensor, count: int) -> Speculation:
    """Append to `tokens` (T,) int64 the `count` most likely tokens, in at most `count` passes.

    A pass checks the current drafts, keeps the longest correct prefix and adds one token; see `speculative_passes`,
    whose errors it raises.
    """
    passes = list(speculative_passes(model, tokens, count))
    heads = range(model.config.targets - 1)
    return Speculation(
        torch.cat([tokens, *(each.tokens for each in passes)]),
        len(passes),
        [sum(k < each.guessed for each in passes) for k in heads],
        [sum(k < each.accepted for each in passes) for k in heads],
    )


def _verified(logits: Tensor, guesses: Tensor, choose: Sampler) -> Tensor:
    """Choose a token from each row of logits, (R, V), up to the first that is not the guess for it."""
    said: list[Tensor] = []
    for i, row in enumerate(logits):
        said.append(choose(row))
        if i < len(guesses) and not torch.equal(said[i], guesses[i : i + 1]):
            break
    return torch.cat(said)


class _ParallelDrafts:
    """Drafts of parallel heads, each of which has read all rows but those of drafts."""

    def __init__(self, model: "Decoder") -> None:
        assert isinstance(model.mtp, ParallelHeads)
        self._model, self._heads = model, model.mtp.blocks[1:]
        self._caches = [KeyValues() for _ in self._heads]

    def guess(self, trunk: Trunk, tokens: Tensor, rows: int, count: int) -> Tensor:
        """Draft the `count` tokens after `tokens`, (T,), of which the trunk has read all but the last.

        The first `rows` of `trunk` are new to the heads, and the others are of wrong drafts. `count` never rises from
        one call to the next: heads that do not draft do not read either.
        """
        out, rope = trunk.out[:, :rows], trunk.rope[..., :rows, :]
        heads = [head(out, rope, None, kept)[0, -1] for head, kept in zip(self._heads[:count], self._caches)]
        return _choice(self._model, self._model.norm(torch.stack(heads)))


class _SequentialDrafts:
    """Drafts of sequential depths, each of which reads the draft of the one before it.

    Depth k at row t reads token t + k. Its last k - 1 rows have read drafts, so they are computed again next time.
    """

    def __init__(self, model: "Decoder") -> None:
        assert isinstance(model.mtp, SequentialDepths)
        self._model, self._depths = model, model.mtp
        self._caches = [KeyValues() for _ in range(model.mtp.depths)]
        # What a depth reads again: states of the depth before it, from its own first row without drafts on.
        empty = model.embedding.weight.new_empty(1, 0, model.config.width)
        self._again = [empty for _ in self._caches]

    def guess(self, trunk: Trunk, tokens: Tensor, rows: int, count: int) -> Tensor:
        """Draft as `_ParallelDrafts.guess` does."""
        model, depths, known = self._model, self._depths, len(tokens)
        hidden = (trunk.out if depths.hidden == "pre_norm" else model.norm(trunk.out))[:, :rows]
        for k, kept in enumerate(self._caches[:count], 1):
            hidden, first = torch.cat([self._again[k - 1], hidden], 1), kept.rows
            positions = torch.arange(first, known - 1, dtype=torch.int64, device=tokens.device)[None]
            rope = rotation(positions, model.config.width // model.config.heads, model.config.rope_base)
            embeddings = model.embedding(tokens[None, first + k :])
            given = hidden
            hidden, out = depths.advance(k, given, embeddings, rope, None, kept)
            tokens = torch.cat([tokens, _choice(model, out[0, -1:])])
            kept.crop(max(0, known - k))
            without_drafts = max(0, min(known - 1, known - k + 1))  # rows of the depth before
            self._again[k - 1] = given[:, kept.rows - first : without_drafts - first]
        return tokens[known:]


def _choice(model: "Decoder", hidden: Tensor) -> Tensor:
    """Return the most likely token of each row, (R, D) to (R,)."""
    return (hidden @ model.unembedding.T).argmax(-1)
