"""Greedy decoding of a Hugging Face model with the heads of `add_mtp`: they draft tokens, the model's next pass checks.

The heads run on the rows of the model's own pass, with the arguments of its last layer and caches of their own. What
followed a wrong draft is removed from all caches.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmfast._checks import describe, expect
from llmfast.integrations import cache_argument, require
from llmfast.integrations.mtp import WithHeads, hidden_of
from llmfast.integrations.stand_ins import split_input
from llmfast.integrations.transformers import unchanged
from llmfast.mtp import ParallelHeads, Speculation

transformers = require("transformers", extra="hf")


def speculative_generate(model: nn.Module, tokens: Tensor, count: int) -> Speculation:
    """Append to `tokens` (T,) int64 the `count` most likely tokens, in at most `count` passes of the model.

    A pass checks the drafts of the heads, keeps the longest correct prefix and adds one token, so the text is that of
    `model.generate(do_sample=False)` without a stop at the end of text. The model runs in eval mode, on one sequence.

    Raises:
        ValueError: `tokens` is not (T,) with T > 0, `count` is negative, or the model has no heads of `add_mtp`, or a
            state from which no token can be removed.
    """
    lm: Any = model
    name = type(lm).__name__
    expect(isinstance(lm, WithHeads), f"model must have heads of add_mtp; this {name} has none")
    expect(
        not lm._is_stateful, f"model must keep keys and values, from which drafts can be removed; {name} keeps a state"
    )
    expect(tokens.dim() == 1 and len(tokens) > 0, f"tokens must be (T,) with T > 0; got {describe(tokens)}")
    expect(count >= 0, f"count must not be negative; got {count}")
    heads = lm.config.llmfast_mtp["heads"]
    guessed, accepted, passes = [0] * heads, [0] * heads, 0
    with unchanged(lm), _watched(lm) as seen:
        drafts = _Drafts(lm, seen)
        end, guesses = len(tokens) + count, tokens[:0]
        while len(tokens) < end:
            said = drafts.check(tokens, guesses)
            tokens, passes = torch.cat([tokens, said]), passes + 1
            for k in range(len(guesses)):
                guessed[k] += 1
                accepted[k] += k < len(said) - 1
            if len(tokens) < end:  # a pass adds a token of its own, for which drafts must leave room
                guesses = drafts.make(tokens)[: end - len(tokens) - 1]
    return Speculation(tokens, passes, guessed, accepted)


class _Seen:
    """The input, the other arguments and the output of the model's last layer in its latest pass."""

    x: Tensor  # (1, R, D)
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor


@contextmanager
def _watched(lm: Any) -> Iterator[_Seen]:
    seen, layer = _Seen(), lm.get_submodule(lm.config.llmfast_mtp["layer"])

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.x, seen.args, seen.kwargs = split_input(args, kwargs, module)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.out = hidden_of(output)

    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


class _Drafts:
    """The model with its heads, and the keys and values of the rows that all of them have read."""

    def __init__(self, lm: Any, seen: _Seen) -> None:
        self._lm, self._seen, self._told = lm, seen, lm.config.llmfast_mtp
        # A depth reads drafts in its last rows, which must be read again when these tokens are known.
        self._again = 0 if self._told["kind"] == "parallel" else self._told["heads"] - 1
        self._cache = transformers.DynamicCache()
        self._caches = [transformers.DynamicCache() for _ in range(self._told["heads"])]
        self._rows = 0  # in all caches
        self._given: dict[str, Any] = {cache_argument(lm): self._cache, "use_cache": True}
        self._keeps = "logits_to_keep" in inspect.signature(type(lm).forward).parameters

    def check(self, tokens: Tensor, guesses: Tensor) -> Tensor:
        """Read what is new of `tokens` (T,) and the guesses; return those that are right, and one more token."""
        new = torch.cat([tokens[self._rows :], guesses])[None]
        few = {"logits_to_keep": len(guesses) + 1} if self._keeps else {}
        logits: Tensor = self._lm(input_ids=new, **self._given, **few).logits
        choice = logits[0, -len(guesses) - 1 :].argmax(-1)
        right = int((choice[:-1] == guesses).long().cumprod(0).sum())
        return choice[: right + 1]

    def make(self, tokens: Tensor) -> Tensor:
        """Draft what follows `tokens` (T,), of which the model has read all but the last in the latest pass."""
        x, last = self._seen.x, len(tokens) - 2 - self._rows
        read = x.shape[1]
        lm, drafted = self._lm, tokens
        if isinstance(lm.mtp, ParallelHeads):
            hidden = torch.cat([head(x, *given)[:, last] for head, given in zip(lm.mtp.blocks, self._arguments())])
            drafted = torch.cat([tokens, self._choice(self._norm(hidden))])
        else:
            hidden = self._norm(self._seen.out) if lm.mtp.hidden == "post_norm" else self._seen.out
            for k, given in enumerate(self._arguments(), 1):
                ahead = drafted[self._rows + k :][:read]
                ahead = torch.cat([ahead, ahead.new_zeros(read - len(ahead))])  # rows of wrong drafts, soon removed
                hidden, out = lm.mtp.advance(k, hidden, lm.get_input_embeddings()(ahead[None]), *given)
                drafted = torch.cat([drafted, self._choice(out[:, last])])
        kept = max(0, len(tokens) - 1 - self._again)
        for cache in (self._cache, *self._caches):
            for layer in cache.layers:
                if (surplus := layer.get_seq_length() - kept) > 0:
                    layer.crop(-surplus)
        self._rows = kept
        return drafted[len(tokens) :]

    def _arguments(self) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Yield the last layer's arguments for each head, with the head's cache."""

        def own(value: Any, cache: Any) -> Any:
            return cache if isinstance(value, transformers.Cache) else value

        for cache in self._caches:
            yield (
                tuple(own(value, cache) for value in self._seen.args),
                {name: own(value, cache) for name, value in self._seen.kwargs.items()},
            )

    def _norm(self, hidden: Tensor) -> Tensor:
        made: Tensor = self._lm.get_submodule(self._told["norm"])(hidden) if self._told["norm"] else hidden
        return made

    def _choice(self, hidden: Tensor) -> Tensor:
        """Return the most likely token of each row, (R, D) to (R,); scales and caps of logits do not change it."""
        choice: Tensor = self._lm.get_output_embeddings()(hidden).argmax(-1)
        return choice
