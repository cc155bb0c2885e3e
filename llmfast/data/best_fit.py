"""Best-fit-decreasing packing, which fills rows of one length without cutting any document that fits into a row.

    documents  a a a a #   b b #   c #   d #     # ends a document (eot_id)
    row 0      a a a a #                         seq_len = 4: a row holds five tokens, four inputs and four labels
    row 1      b b # c #
    row 2      d # . . .                         . is PADDING

`pack` lets a document continue in the next row; `pack_best_fit` pads instead, and very little if there are many
documents of varied lengths. Only documents longer than a row are cut, into full rows and a remainder. The method is
that of "Fewer Truncations Improve Language Modeling" (Ding et al. 2024, arXiv:2404.10830).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmfast._checks import expect
from llmfast.data.packing import PADDING, PackedRows, one_stream


@dataclass(frozen=True, eq=False)
class BestFitRows(PackedRows):
    """Rows that share no token, with statistics of the packing; `str` summarises them in one line.

    Nothing is dropped. Rows do not overlap, so the first token of a piece is an input but not a label.
    """

    documents: int  # documents that were not empty
    cut: int  # documents longer than a row
    pieces: int  # pieces that the cut documents make
    padding: int  # tokens that are PADDING

    @property
    def padding_share(self) -> float:
        return self.padding / len(self.tokens)

    def __str__(self) -> str:
        return (
            f"{len(self):,} rows of {self.stride:,} tokens, {self.padding_share:.2%} of them padding; "
            f"{self.cut:,} of {self.documents:,} documents cut, into {self.pieces:,} pieces; nothing dropped"
        )


def pack_best_fit(documents: Iterable[npt.NDArray[np.integer]], seq_len: int, eot_id: int) -> BestFitRows:
    """Pack documents, each followed by `eot_id`, into few rows of `seq_len + 1` tokens.

    Each document that fits stays whole. A longer one is cut into full rows and a remainder that is packed like a
    document; `document_ids` and `positions` restart with each piece. The longest pieces are placed first. Each goes
    into the row with the least room that is enough for it. The same documents always give the same rows.

    Args:
        documents: Token ids, (any length,) integers in [0, 2**31). Empty ones are skipped.
        seq_len: Inputs per row.
        eot_id: The id that ends a document, in the same range.

    Raises:
        ValueError: There are no documents, or an argument is out of range.
    """
    expect(seq_len >= 1, f"seq_len must be at least 1; got {seq_len}")
    capacity = seq_len + 1
    stream, lengths = one_stream(documents, eot_id)

    # Pieces in the order of the stream: the full rows of each document, then its remainder.
    counts = -(-lengths // capacity)  # pieces per document
    last = np.cumsum(counts) - 1
    sizes = np.full(int(counts.sum()), capacity, dtype=np.int64)
    sizes[last] = lengths - (counts - 1) * capacity
    sources = np.cumsum(sizes) - sizes

    rows = best_fit(sizes, capacity)
    # Sort the pieces of each row by their order in the stream.
    order = np.argsort(rows, kind="stable")
    rows, sizes, sources = rows[order], sizes[order], sources[order]
    used = np.bincount(rows, weights=sizes).astype(np.int64)  # tokens per row
    before = np.cumsum(used) - used  # tokens of earlier rows
    starts = rows * capacity + np.cumsum(sizes) - sizes - before[rows]

    tokens = np.full(len(used) * capacity, PADDING, dtype=np.int32)
    for start, source, size in zip(starts.tolist(), sources.tolist(), sizes.tolist()):
        tokens[start : start + size] = stream[source : source + size]
    padding = np.arange(len(used)) * capacity + used  # position of the padding, which counts as a separate document
    cut = counts > 1
    return BestFitRows(
        tokens=tokens,
        document_starts=np.sort(np.concatenate([starts, padding[used < capacity]])),
        seq_len=seq_len,
        dropped=0,
        stride=capacity,
        documents=len(lengths),
        cut=int(np.count_nonzero(cut)),
        pieces=int(counts[cut].sum()),
        padding=int(len(tokens) - len(stream)),
    )


def best_fit(sizes: npt.NDArray[np.integer], capacity: int) -> npt.NDArray[np.int64]:
    """Pack items by best-fit-decreasing and return each item's bin, (n,), counted from 0.

    Sizes are small integers, so bins with equal room are interchangeable and items of one size are placed in groups.
    After an item of size s is put in the tightest bin, that bin remains the tightest for the next item of size s until
    it is full. It therefore takes room // s of them at a time.

    Args:
        sizes: (n,) integers in [1, capacity].
        capacity: The capacity of every bin.
    """
    bins_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # indexed by room
    rooms = 0  # bit r is set if bins_with[r] is not empty: the least room that suffices is found in one step
    chosen: list[int] = []  # bin of each item, the largest item first
    bins = 0
    of_size = np.bincount(sizes, minlength=capacity + 1).tolist()
    for size in range(capacity, 0, -1):
        left = of_size[size]
        while left:
            suffices = rooms >> size
            room = (suffices & -suffices).bit_length() - 1 + size if suffices else capacity
            each = room // size
            wanted = max(left // each, 1)  # bins that get `each` items; one bin takes all if fewer are left
            each = min(each, left)
            if suffices:
                taken = bins_with[room][-wanted:]
                del bins_with[room][-wanted:]
                if not bins_with[room]:
                    rooms ^= 1 << room
            else:
                taken = list(range(bins, bins + wanted))
                bins += wanted
            chosen += taken if each == 1 else [b for b in taken for _ in range(each)]
            left -= each * len(taken)
            remains = room - each * size
            bins_with[remains] += taken
            rooms |= 1 << remains
    result = np.empty(len(chosen), np.int64)
    result[np.argsort(-np.asarray(sizes), kind="stable")] = chosen
    return result
