"""Concatenate documents of any length into rows of one length.

    stream   a a a # b b # c c c c c #        # ends a document (eot_id)
    row 0    a a a # b                        seq_len = 4: four inputs and, one to the right, four labels
    row 1            b b # c c
    row 2                    c c c c #        rows share one token, so every token but the first is a label once

There is no padding and no document is truncated. `document_ids` and `positions` let attention and positions restart
with each document.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmfast._checks import expect

IGNORE_INDEX = -100
"""The label of a position without a target: the default of torch and of the losses."""
PADDING = -1  # as a token: an arbitrary input in its own document, never a label


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as CPU tensors, ready for a model and a loss."""

    tokens: Tensor  # (B, T) int64
    labels: Tensor  # (B, T) int64: the next token, or IGNORE_INDEX if it begins another document
    document_ids: Tensor  # (B, T) int32, counted from 0 in each row
    positions: Tensor  # (B, T) int64, counted from 0 at each document's first token in the row
    num_valid: int  # labels that are not IGNORE_INDEX, counted on the host
    sources: Tensor | None = None  # (B,) int64: source of each row, if there are several


class Rows(Protocol):
    """Rows of one source, as training reads them."""

    @property
    def seq_len(self) -> int: ...

    def __len__(self) -> int: ...

    def batch(self, indices: npt.ArrayLike, samples: npt.ArrayLike | None = None) -> Batch:
        """Return the rows at `indices`, (B,), each as in the training sequence whose number is in `samples`, (B,)."""
        ...


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of `seq_len` inputs and labels over one stream of tokens; see `pack`."""

    tokens: npt.NDArray[np.integer]  # (any,), possibly memory-mapped; PADDING where a row has no token
    document_starts: npt.NDArray[np.int64]  # (documents,) ascending, the first is 0
    seq_len: int
    dropped: int  # tokens in no row
    stride: int  # distance between the first tokens of successive rows: seq_len, or seq_len + 1 if rows share no token

    def __len__(self) -> int:
        return (len(self.tokens) - self.seq_len - 1) // self.stride + 1

    def batch(self, indices: npt.ArrayLike, samples: npt.ArrayLike | None = None) -> Batch:
        """Return the rows with the given indices, (B,) integers in [0, len(self)); IndexError if out of range.

        `samples` is for rows that differ each time (see `Rows`); these never change.
        """
        return batch_of(*self.windows(indices))

    def windows(self, indices: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return inputs and labels as one window, and the document number of each token: twice (B, T + 1)."""
        rows = np.asarray(indices)
        expect(rows.ndim == 1 and rows.dtype.kind in "iu", f"indices must be 1-D integers; got {_describe(rows)}")
        rows = rows.astype(np.int64)
        if ((rows < 0) | (rows >= len(self))).any():
            raise IndexError(f"row indices must be in [0, {len(self)}); got {rows.min()} to {rows.max()}")
        where = rows[:, None] * self.stride + np.arange(self.seq_len + 1)  # (B, T + 1), into the stream
        return self.tokens[where].astype(np.int64), np.searchsorted(self.document_starts, where, side="right") - 1


def batch_of(
    window: npt.NDArray[np.int64],  # (B, T + 1), PADDING where there is no token
    document: npt.NDArray[np.int64],  # (B, T + 1), ascending in a row
    counted: npt.NDArray[np.bool_] | None = None,  # (B, T + 1): False for a token that is never a label
) -> Batch:
    """Split windows of tokens into inputs and labels, using the document of each token."""
    same = document[:, 1:] == document[:, :-1]
    valid = same & (window[:, 1:] != PADDING)
    if counted is not None:
        valid &= counted[:, 1:]
    at = np.arange(document.shape[1] - 1)
    starts = np.where(np.concatenate([np.ones_like(same[:, :1]), ~same[:, :-1]], axis=1), at, 0)
    return Batch(
        tokens=torch.from_numpy(np.maximum(window[:, :-1], 0)),
        labels=torch.from_numpy(np.where(valid, window[:, 1:], IGNORE_INDEX)),
        document_ids=torch.from_numpy((document - document[:, :1])[:, :-1].astype(np.int32)),
        positions=torch.from_numpy(at - np.maximum.accumulate(starts, axis=1)),
        num_valid=int(np.count_nonzero(valid)),
    )


def joined(parts: Sequence[Batch], order: npt.NDArray[np.int64]) -> Batch:
    """Concatenate batches and reorder the rows: row i of the result is row order[i] of all parts."""
    at = torch.from_numpy(order)
    tensors = zip(*((p.tokens, p.labels, p.document_ids, p.positions) for p in parts))
    tokens, labels, document_ids, positions = (torch.cat(t)[at] for t in tensors)
    return Batch(tokens, labels, document_ids, positions, sum(part.num_valid for part in parts))


def pack(documents: Iterable[npt.NDArray[np.integer]], seq_len: int, eot_id: int) -> PackedRows:
    """Concatenate the documents, each followed by `eot_id`, and split the stream into rows.

    Args:
        documents: Token ids, (any length,) integers in [0, 2**31). Empty ones are skipped.
        seq_len: Inputs per row. Tokens at the end of the stream that do not fill a row are dropped; `dropped` counts
            them.
        eot_id: The id that ends a document, in the same range.

    Raises:
        ValueError: There are no documents, an argument is out of range, or there are fewer than `seq_len + 1` tokens.
    """
    expect(seq_len >= 1, f"seq_len must be at least 1; got {seq_len}")
    stream, lengths = one_stream(documents, eot_id)
    starts = np.cumsum(lengths) - lengths
    rows = (len(stream) - 1) // seq_len
    expect(rows > 0, f"one row of seq_len={seq_len} needs {seq_len + 1} tokens; the documents have {len(stream)}")
    used = rows * seq_len + 1
    return PackedRows(
        tokens=stream[:used],
        document_starts=starts[starts < used],
        seq_len=seq_len,
        dropped=len(stream) - used,
        stride=seq_len,
    )


def one_stream(
    documents: Iterable[npt.NDArray[np.integer]], eot_id: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Join all non-empty documents, each followed by `eot_id`; return the stream and the documents' lengths in it."""
    expect(0 <= eot_id < 2**31, f"eot_id must be in [0, 2**31); got {eot_id}")
    eot = np.array([eot_id], dtype=np.int32)
    parts: list[npt.NDArray[np.integer]] = []
    for i, document in enumerate(documents):
        ids = np.asarray(document)
        if ids.size:
            if ids.ndim != 1 or ids.dtype.kind not in "iu":  # `expect` would format the message each time
                raise ValueError(f"document {i} must be 1-D integers; got {_describe(ids)}")
            parts += [ids, eot]
    expect(bool(parts), "documents must hold at least one that is not empty")
    narrow = all(np.can_cast(dtype, np.int32) for dtype in {part.dtype for part in parts})
    stream = np.concatenate(parts, dtype="i4" if narrow else "i8", casting="same_kind")
    lowest, highest = int(stream.min()), int(stream.max())
    expect(0 <= lowest <= highest < 2**31, f"token ids must be in [0, 2**31); got {lowest} to {highest}")
    return stream.astype(np.int32, copy=False), np.array([len(part) for part in parts]).reshape(-1, 2).sum(axis=1)


def unigram_entropy(tokens: npt.ArrayLike, vocab_size: int) -> float:
    """Compute the entropy of the tokens' distribution in nats per token: the loss of a model that ignores context.

    `IGNORE_INDEX` is not counted, so labels can be passed directly.
    """
    ids = np.asarray(tokens).ravel()
    ids = ids[ids != IGNORE_INDEX]
    expect(ids.size > 0, "tokens must hold at least one that is not ignored")
    lowest, highest = ids.min(), ids.max()
    expect(lowest >= 0 and highest < vocab_size, f"tokens must be in [0, {vocab_size}); got {lowest} to {highest}")
    counts = np.bincount(ids)
    share = counts[counts > 0] / ids.size
    return float(-(share * np.log(share)).sum())


def _describe(array: npt.NDArray[Any]) -> str:
    return f"{array.shape} {array.dtype}"
