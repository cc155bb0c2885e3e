"""Fill-in-the-middle (Bavarian et al. 2022, arXiv:2207.14255): rearrange documents so that a model learns to infill.

A document is cut at two random places into prefix, middle and suffix, any of which can be empty, and the middle is
moved to the end. The end-of-text token after it teaches the model to stop where the suffix continues:

    PSM              <prefix> prefix <suffix> suffix <middle> middle <eot>
    SPM, variant 2   <prefix> <suffix> suffix <middle> prefix middle <eot>
    SPM, variant 1   <suffix> suffix <prefix> prefix <middle> middle <eot>

Context-level FIM (`FIMRows`) rearranges the part of each document within a row, so that a row holds whole examples;
each epoch uses different cuts. Document-level FIM (`FIMDocumentRows`) rearranges documents once, before they are
packed into rows, so that packing cuts some examples in two. The paper finds context-level FIM better.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmfast._checks import expect
from llmfast.data.packing import PADDING, Batch, PackedRows, batch_of, pack
from llmfast.data.tokenizer import SPECIAL_TOKENS, Tokenizer

PREFIX, MIDDLE, SUFFIX = SENTINELS = SPECIAL_TOKENS[1:4]
MIN_TOKENS = 10  # shorter documents, or shorter parts of documents in a row, are not rearranged

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_ADDED = 4  # three sentinels and the end of text
_BROKEN = "\ufffd"  # what `decode` returns for bytes that are not valid UTF-8
_PROBE = "Def f(x):\n    return '\u00e9\u4e2d\U0001f600'  # 1,5"

# Kinds of token, as the cuts distinguish them.
_TEXT, _SILENT, _RESERVED = 0, 1, 2  # decodes to text; decodes to nothing; a sentinel or the end of text


@dataclass(frozen=True, eq=False)
class Rearranged:
    """Result of `FIM` for one document."""

    ids: Ids  # (n,)
    counted: Mask  # (n,): True if the token is a label
    changed: bool  # False if the document was not rearranged; then every token is a label


@dataclass(frozen=True, eq=False)
class _Cut:
    """Three pieces as token ids, and as texts that still have to be encoded."""

    spm: bool
    texts: tuple[str, ...]  # prefix, middle, suffix; empty if the ids are complete
    prefix: Ids
    middle: Ids
    suffix: Ids

    def pieces(self, encoded: Sequence[npt.NDArray[np.integer]]) -> tuple[Ids, Ids, Ids]:
        if not encoded:
            return self.prefix, self.middle, self.suffix
        prefix, middle, suffix = (ids.astype(np.int64) for ids in encoded)
        return np.concatenate([self.prefix, prefix]), middle, np.concatenate([suffix, self.suffix])


@dataclass(frozen=True, eq=False)
class FIM:
    """Rule for rearranging documents. The same (seed, sample, document) gives the same result on every machine.

    Some documents are never rearranged, regardless of the rate: those with fewer than `MIN_TOKENS` tokens, padding, and
    those with a sentinel or an end of text before their end. Text that does not survive decoding (broken UTF-8 inside,
    or other special tokens) is cut between tokens even at `level="char"`, because its pieces could not be encoded
    again. An incomplete character at either end of the text keeps its original tokens.

    Args:
        tokenizer: Must know the three `SENTINELS`. At `level="char"`, the encoded pieces of a text must decode to the
            whole text, which byte-level tokenizers guarantee.
        rate: Share of documents that are rearranged, in [0, 1].
        spm_rate: Share of those that use SPM, in [0, 1]; the others use PSM.
        level: "char" cuts between any two characters and encodes the three pieces separately, like an editor that
            requests a completion. "token" cuts between tokens, so the model never sees an incomplete word.
        spm_variant: 2 keeps prefix and middle together, as most models are trained; 1 does not.
        loss: "all" trains on every part, as in the paper; "middle" trains on the middle and the end of text after it.
        seed: In [0, 2**64).

    Raises:
        ValueError: The tokenizer lacks a sentinel or does not preserve pieces, or an argument is out of range.
    """

    tokenizer: Tokenizer
    rate: float = 0.5
    spm_rate: float = 0.5
    level: Literal["char", "token"] = "char"
    spm_variant: Literal[1, 2] = 2
    loss: Literal["all", "middle"] = "all"
    seed: int = 0
    _kinds: npt.NDArray[np.uint8] = field(init=False, repr=False)  # (vocab_size,)

    def __post_init__(self) -> None:
        _expect_sentinels(self.tokenizer)
        expect(0 <= self.rate <= 1, f"rate must be in [0, 1]; got {self.rate}")
        expect(0 <= self.spm_rate <= 1, f"spm_rate must be in [0, 1]; got {self.spm_rate}")
        expect(self.level in ("char", "token"), f"level must be 'char' or 'token'; got {self.level!r}")
        expect(self.spm_variant in (1, 2), f"spm_variant must be 1 or 2; got {self.spm_variant!r}")
        expect(self.loss in ("all", "middle"), f"loss must be 'all' or 'middle'; got {self.loss!r}")
        is_seed = isinstance(self.seed, int) and 0 <= self.seed < 2**64
        expect(is_seed, f"seed must be an integer in [0, 2**64); got {self.seed}")
        kinds = np.full(self.tokenizer.vocab_size, _TEXT, dtype=np.uint8)
        if self.level == "char":
            _check_pieces(self.tokenizer)
            kinds[[i for i in range(len(kinds)) if not self.tokenizer.decode([i])]] = _SILENT
        known = self.tokenizer.special_ids
        kinds[[self.tokenizer.eot_id, *(known[sentinel] for sentinel in SENTINELS)]] = _RESERVED
        object.__setattr__(self, "_kinds", kinds)

    def rearrange(self, ids: npt.ArrayLike, sample: int, document: int = 0, budget: int | None = None) -> Rearranged:
        """Rearrange one document, with or without its end of text; see `rearrange_many`."""
        return self.rearrange_many([ids], [(sample, document)], None if budget is None else [budget])[0]

    def rearrange_many(
        self, documents: Sequence[npt.ArrayLike], keys: Sequence[tuple[int, int]], budgets: Sequence[int] | None = None
    ) -> list[Rearranged]:
        """Rearrange each document or leave it unchanged, as a pure function of its ids, key and budget.

        Args:
            documents: Token ids, (any length,) integers below `vocab_size`. The last token may be the end of text. A
                rearranged document always ends with it; an unchanged document does so only if it did before.
            keys: One (sample, document) per document, integers in [0, 2**64): with the seed, the key of the random
                numbers.
            budgets: The maximum number of tokens of each result, or None for no limit. A longer document is first cut
                at its end. If the sentinels make it too long again, tokens are dropped from the suffix's end, then from
                the prefix's beginning, and from the middle's beginning only if nothing else is left.

        Raises:
            ValueError: Ids are not 1-D integers below `vocab_size`, a budget is below 1, a key is out of range, or the
                number of keys or budgets differs from the number of documents.
        """
        n = len(documents)
        expect(len(keys) == n, f"keys must be one for each of {n} documents; got {len(keys)}")
        if budgets is not None:
            expect(len(budgets) == n, f"budgets must be one for each of {n} documents; got {len(budgets)}")
            expect(min(budgets, default=1) >= 1, f"budgets must be at least 1; got {min(budgets, default=1)}")
        in_range = all(0 <= number < 2**64 for key in keys for number in key)
        expect(in_range, f"keys must be pairs of integers in [0, 2**64); got {keys}")
        kept = [self._checked(ids)[: None if budgets is None else budgets[i]] for i, ids in enumerate(documents)]
        cuts = [self._cut(ids, *key) for ids, key in zip(kept, keys)]
        # One call for all pieces: the tokenizer may use several cores for them.
        encoded = iter(self.tokenizer.encode_batch([text for cut in cuts if cut is not None for text in cut.texts]))
        results = []
        for i, cut in enumerate(cuts):
            if cut is None:
                results.append(Rearranged(kept[i], np.ones(len(kept[i]), dtype=np.bool_), False))
            else:
                prefix, middle, suffix = cut.pieces(list(islice(encoded, len(cut.texts))))
                results.append(self._join(prefix, middle, suffix, cut.spm, None if budgets is None else budgets[i]))
        return results

    def documents(self, documents: Iterable[npt.ArrayLike]) -> Iterator[Rearranged]:
        """Rearrange whole documents, numbering them as samples, without the end of text that `pack` adds."""
        rest, first = iter(documents), 0
        while several := list(islice(rest, 64)):
            for result in self.rearrange_many(several, [(first + i, 0) for i in range(len(several))]):
                n = len(result.ids) - self._ends(result.ids)
                yield replace(result, ids=result.ids[:n], counted=result.counted[:n])
            first += len(several)

    def undo(self, ids: npt.ArrayLike) -> Ids:
        """Reconstruct the original document from `ids`, (n,), rearranged or not, without the end of text.

        For cuts between tokens, the result is the document's original ids. For cuts between characters, the result
        decodes to the same bytes, but text next to a cut may be tokenized differently. Tokens dropped by a budget
        cannot be restored.

        Raises:
            ValueError: `ids` has sentinels, but not in one of the three orders.
        """
        content = self._checked(ids)
        content = content[: len(content) - self._ends(content)]
        special = self.tokenizer.special_ids
        places = {sentinel: np.flatnonzero(content == special[sentinel]).tolist() for sentinel in SENTINELS}
        if not any(places.values()):
            return content
        first = min(at for found in places.values() for at in found)
        if first == 0 and all(len(found) == 1 for found in places.values()):
            (p,), (m,), (s,) = (places[sentinel] for sentinel in (PREFIX, MIDDLE, SUFFIX))
            if p < s < m:  # PSM, or SPM of variant 2, which here looks like PSM with an empty prefix
                return np.concatenate([content[p + 1 : s], content[m + 1 :], content[s + 1 : m]])
            if s < p < m:
                return np.concatenate([content[p + 1 : m], content[m + 1 :], content[s + 1 : p]])
        raise ValueError(f"ids must be in an order that FIM makes; got sentinels at {places}")

    def _checked(self, ids: npt.ArrayLike) -> Ids:
        array = np.asarray(ids)
        if array.size == 0:
            return np.empty(0, dtype=np.int64)
        ok = array.ndim == 1 and array.dtype.kind in "iu"
        expect(ok, f"a document must be 1-D integers; got {array.shape} {array.dtype}")
        highest, below = int(array.max()), len(self._kinds)
        expect(highest < below, f"a document's ids must be below the tokenizer's vocab_size {below}; got {highest}")
        return array.astype(np.int64)

    def _ends(self, ids: Ids) -> bool:
        return len(ids) > 0 and int(ids[-1]) == self.tokenizer.eot_id

    def _cut(self, ids: Ids, sample: int, document: int) -> _Cut | None:
        """Choose where to cut the document, or return None to leave it unchanged."""
        content = ids[: len(ids) - self._ends(ids)]
        if len(content) < MIN_TOKENS or content.min() < 0:  # PADDING is negative
            return None
        kind = self._kinds[content].max()
        if kind == _RESERVED:
            return None
        chosen, spm, *cuts = _random(self.seed, sample, document)
        if chosen >= self.rate * 2**64:
            return None
        whole = _whole_characters(self.tokenizer, content) if self.level == "char" and kind == _TEXT else None
        start, stop, text = whole or (0, 0, "")
        length = len(content) if whole is None else len(text)
        a, b = sorted(number * (length + 1) >> 64 for number in cuts)  # uniform in 0..length
        is_spm = spm < self.spm_rate * 2**64
        if whole is None:
            return _Cut(is_spm, (), content[:a], content[a:b], content[b:])
        return _Cut(is_spm, (text[:a], text[a:b], text[b:]), content[:start], content[:0], content[stop:])

    def _join(self, prefix: Ids, middle: Ids, suffix: Ids, spm: bool, budget: int | None) -> Rearranged:
        if budget is not None:
            room = budget - _ADDED
            suffix = suffix[: max(0, room - len(prefix) - len(middle))]
            prefix = prefix[max(0, len(prefix) + len(middle) - room) :]
            middle = middle[max(0, len(middle) - room) :]
        before = _before_middle(self.tokenizer, prefix, suffix, self.spm_variant if spm else 0)
        ids = np.concatenate([before, middle, np.array([self.tokenizer.eot_id])])
        counted = np.ones(len(ids), dtype=np.bool_)
        if self.loss == "middle":
            counted[: -len(middle) - 1] = False
        return Rearranged(ids, counted, True)


def fim_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, *, spm_variant: Literal[0, 1, 2] = 0) -> Ids:
    """Return the ids after which a model that was trained on FIM writes what stands between `prefix` and `suffix`.

    Args:
        tokenizer: Must know the three `SENTINELS`.
        prefix: Text before the gap; may be empty, as may `suffix`.
        suffix: Text after the gap.
        spm_variant: 0 is PSM; 1 or 2 is that variant of SPM.

    Raises:
        ValueError: The tokenizer lacks a sentinel, or there is no such variant.
    """
    _expect_sentinels(tokenizer)
    expect(spm_variant in (0, 1, 2), f"spm_variant must be 0, 1 or 2; got {spm_variant!r}")
    before, after = (ids.astype(np.int64) for ids in tokenizer.encode_batch([prefix, suffix]))
    return _before_middle(tokenizer, before, after, spm_variant)


def _expect_sentinels(tokenizer: Tokenizer) -> None:
    known: Mapping[str, int] = tokenizer.special_ids
    missing = [sentinel for sentinel in SENTINELS if sentinel not in known]
    expect(not missing, f"tokenizer has no {', '.join(missing)}, which FIM needs; it has {', '.join(known)}")


def _before_middle(tokenizer: Tokenizer, prefix: Ids, suffix: Ids, spm_variant: int) -> Ids:
    """Arrange sentinels, prefix and suffix; `spm_variant` as in `fim_prompt`."""
    pre, mid, suf = (np.array([tokenizer.special_ids[sentinel]]) for sentinel in SENTINELS)
    orders = ([pre, prefix, suf, suffix, mid], [suf, suffix, pre, prefix, mid], [pre, suf, suffix, mid, prefix])
    return np.concatenate(orders[spm_variant])


@dataclass(frozen=True, eq=False)
class FIMRows:
    """Context-level FIM: rows in which the part of each document is rearranged within its original number of tokens.

    Sentinels and end of text take the place of the suffix's last tokens, so a row loses about four tokens of text per
    document. If the result is shorter than before, the end of the row is padding.
    """

    rows: PackedRows
    fim: FIM

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def seq_len(self) -> int:
        return self.rows.seq_len

    def batch(self, indices: npt.ArrayLike, samples: npt.ArrayLike | None = None) -> Batch:
        """Return the rows with the given indices, (B,) integers in [0, len(self)); IndexError if out of range.

        Args:
            indices: The rows to return.
            samples: (B,) non-negative integers: the number of each row in the whole training, so that the cuts differ
                when a row is repeated. Default: its index.
        """
        windows, documents = self.rows.windows(indices)
        numbers = np.asarray(indices if samples is None else samples)
        ok = numbers.shape == windows.shape[:1] and (numbers.size == 0 or numbers.dtype.kind in "iu")
        expect(ok, f"samples must be {len(windows)} integers, one for each row; got {numbers.shape} {numbers.dtype}")
        expect(numbers.size == 0 or int(numbers.min()) >= 0, f"samples must not be negative; got {numbers}")

        parts = [np.split(window, np.flatnonzero(np.diff(of)) + 1) for window, of in zip(windows, documents)]
        results = self.fim.rearrange_many(
            [part for row in parts for part in row],
            keys=[(int(sample), k) for sample, row in zip(numbers, parts) for k in range(len(row))],
            budgets=[len(part) for row in parts for part in row],
        )
        tokens = np.full_like(windows, PADDING)
        counted = np.zeros(windows.shape, dtype=np.bool_)
        numbered = np.empty_like(documents)
        of_row = iter(results)
        for b, row in enumerate(parts):
            numbered[b] = len(row)  # padding
            begin = 0
            for k, result in enumerate(islice(of_row, len(row))):
                end = begin + len(result.ids)
                tokens[b, begin:end], counted[b, begin:end], numbered[b, begin:end] = result.ids, result.counted, k
                begin = end
        return batch_of(tokens, numbered, counted)


@dataclass(frozen=True, eq=False)
class FIMDocumentRows:
    """Document-level FIM: rows of documents that were rearranged before packing; see `FIMDocumentRows.pack`."""

    rows: PackedRows
    counted: npt.NDArray[np.uint8]  # aligned with rows.tokens: 1 if the token is a label

    @classmethod
    def pack(cls, documents: Iterable[npt.ArrayLike], seq_len: int, fim: FIM) -> "FIMDocumentRows":
        """Rearrange and pack documents like `packing.pack`, with the same errors; a document's number is its sample."""
        counted: list[npt.NDArray[np.uint8]] = []

        def ids() -> Iterator[Ids]:
            for result in fim.documents(documents):
                if len(result.ids) > 0:  # `pack` skips empty documents
                    counted.append(np.append(result.counted, True).astype(np.uint8))  # includes the end of text
                yield result.ids

        rows = pack(ids(), seq_len, fim.tokenizer.eot_id)
        return cls(rows, np.concatenate(counted)[: len(rows.tokens)])

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def seq_len(self) -> int:
        return self.rows.seq_len

    def batch(self, indices: npt.ArrayLike, samples: npt.ArrayLike | None = None) -> Batch:
        """Return the rows with the given indices, (B,) integers in [0, len(self)); `samples` has no effect."""
        counted, _ = replace(self.rows, tokens=self.counted).windows(indices)
        return batch_of(*self.rows.windows(indices), counted == 1)


def _random(seed: int, sample: int, document: int) -> list[int]:
    """Draw four integers in [0, 2**64): one block of Philox, whose raw output NumPy keeps stable."""
    # The other half of the key separates this stream from others with the same seed.
    stream = int.from_bytes(b"fim", "big")
    counter, key = np.array([0, 0, document, sample], np.uint64), np.array([seed, stream], np.uint64)
    return [int(number) for number in np.random.Philox(counter=counter, key=key).random_raw(4)]


def _whole_characters(tokenizer: Tokenizer, ids: Ids) -> tuple[int, int, str] | None:
    """Return (start, stop, text of ids[start:stop]), leaving out incomplete characters at both ends.

    A row may begin and end inside a character, with up to three tokens of it on either side. Returns None if more than
    that is invalid UTF-8. Text that really contains U+FFFD cannot be distinguished from invalid UTF-8.
    """
    text = tokenizer.decode(ids)
    if _BROKEN not in text:
        return 0, len(ids), text
    # A character has at most four bytes, so four tokens show whether one begins or ends here.
    starts = [k for k in range(4) if not tokenizer.decode(ids[k : k + 4]).startswith(_BROKEN)]
    stops = [k for k in range(len(ids), len(ids) - 4, -1) if not tokenizer.decode(ids[k - 4 : k]).endswith(_BROKEN)]
    if not starts or not stops:
        return None
    text = tokenizer.decode(ids[starts[0] : stops[0]])
    return None if _BROKEN in text else (starts[0], stops[0], text)


def _check_pieces(tokenizer: Tokenizer) -> None:
    """Reject tokenizers that change pieces of a text, for example by putting a space before each."""
    text = tokenizer.decode(tokenizer.encode(_PROBE))
    pieces = tokenizer.encode_batch([piece for k in range(len(text) + 1) for piece in (text[:k], text[k:])])
    for k in range(len(text) + 1):
        again = tokenizer.decode(np.concatenate(pieces[2 * k : 2 * k + 2]))
        expect(
            again == text,
            f"tokenizer must keep pieces of a text as they are, for level='char'; {text!r} became {again!r}. Use "
            "level='token'",
        )
