from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.data import IGNORE_INDEX
from llmfast.data.best_fit import BestFitRows, best_fit, pack_best_fit
from llmfast.data.packing import PADDING
from llmfast.losses import mtp_valid_counts

EOT = 99


def arrays(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array(d, dtype=np.int32) for d in documents]


# Documents may be empty, and may contain the end-of-text id themselves.
corpora = st.lists(st.lists(st.integers(0, EOT), max_size=12), max_size=12).filter(any)


def pieces_of(rows: BestFitRows) -> list[list[list[int]]]:
    """Return the pieces of each row, split where documents start, without padding."""
    starts = set(rows.document_starts.tolist())
    found = []
    for row in rows.tokens.reshape(-1, rows.stride).tolist():
        pieces: list[list[int]] = []
        for at, token in enumerate(row, start=len(found) * rows.stride):
            if at in starts:
                pieces.append([])
            pieces[-1].append(token)
        if pieces[-1][0] == PADDING:
            assert set(pieces.pop()) == {PADDING}
        found.append(pieces)
    return found


@given(documents=corpora, seq_len=st.integers(1, 14))
def test_every_token_once_and_cut_only_if_it_must_be(documents: list[list[int]], seq_len: int) -> None:
    rows = pack_best_fit(iter(arrays(documents)), seq_len, EOT)
    capacity = seq_len + 1
    expected = []
    for document in documents:
        whole = [*document, EOT] if document else []
        expected += [whole[i : i + capacity] for i in range(0, len(whole), capacity)]
    found = [piece for row in pieces_of(rows) for piece in row]
    assert sorted(found) == sorted(expected)
    assert all(len(row) > 0 for row in pieces_of(rows))

    longer = [len(d) + 1 for d in documents if len(d) + 1 > capacity]
    assert rows.documents == sum(1 for d in documents if d)
    assert rows.cut == len(longer)
    assert rows.pieces == sum(-(-n // capacity) for n in longer)
    assert rows.padding == int((rows.tokens == PADDING).sum()) == len(rows.tokens) - sum(map(len, expected))
    assert (rows.dropped, rows.stride, rows.seq_len) == (0, capacity, seq_len)
    assert len(rows) * capacity == len(rows.tokens)


@given(documents=corpora, seq_len=st.integers(1, 14))
def test_batches(documents: list[list[int]], seq_len: int) -> None:
    rows = pack_best_fit(arrays(documents), seq_len, EOT)
    batch = rows.batch(range(len(rows)))
    for i, pieces in enumerate(pieces_of(rows)):
        room = rows.stride - sum(map(len, pieces))
        tokens = [token for piece in pieces for token in piece] + [0] * room
        # A label is the next token of the same piece: never a piece's first token, never padding.
        labels = [token for piece in pieces for token in [*piece[1:], IGNORE_INDEX]] + [IGNORE_INDEX] * room
        documents_ = [n for n, piece in enumerate(pieces) for _ in piece] + [len(pieces)] * room
        positions = [n for piece in pieces for n in range(len(piece))] + list(range(room))
        assert batch.tokens[i].tolist() == tokens[:seq_len]
        assert batch.labels[i].tolist() == labels[:seq_len]
        assert batch.document_ids[i].tolist() == documents_[:seq_len]
        assert batch.positions[i].tolist() == positions[:seq_len]
    # A piece of n tokens has n - 1 labels, and one less for each further head that predicts ahead.
    lengths = [len(piece) for row in pieces_of(rows) for piece in row]
    expected = [sum(max(n - 1 - k, 0) for n in lengths) for k in range(3)]
    assert mtp_valid_counts(batch.labels, 3, batch.document_ids).tolist() == expected
    assert batch.num_valid == expected[0]


def test_the_picture_in_the_docstring() -> None:
    rows = pack_best_fit(arrays([[1, 1, 1, 1], [2, 2], [3], [4]]), 4, 0)
    assert rows.tokens.reshape(-1, 5).tolist() == [[1, 1, 1, 1, 0], [2, 2, 0, 3, 0], [4, 0, -1, -1, -1]]
    assert str(rows) == (
        "3 rows of 5 tokens, 20.00% of them padding; 0 of 4 documents cut, into 0 pieces; nothing dropped"
    )
    batch = rows.batch([2])
    assert batch.tokens.tolist() == [[4, 0, 0, 0]]
    assert batch.labels.tolist() == [[0, -100, -100, -100]]
    assert batch.document_ids.tolist() == [[0, 0, 1, 1]]


def test_a_cut_document() -> None:
    rows = pack_best_fit(arrays([[1, 2, 3, 4, 5, 6, 7, 8, 9], [5, 5, 5]]), 3, EOT)
    assert rows.tokens.reshape(-1, 4).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 5, 5, EOT], [9, EOT, -1, -1]]
    assert (rows.documents, rows.cut, rows.pieces, rows.padding) == (2, 1, 3, 2)
    assert rows.padding_share == 2 / 16
    assert rows.batch([1]).positions.tolist() == [[0, 1, 2]]
    assert rows.batch([1]).labels.tolist() == [[6, 7, 8]]


# ---- the bins


def one_at_a_time(sizes: list[int], capacity: int) -> list[int]:
    """Place items one at a time, the largest first, in the tightest bin with room; return the bins' remaining room."""
    room: list[int] = []
    for size in sorted(sizes, reverse=True):
        suffice = [i for i, r in enumerate(room) if r >= size]
        if suffice:
            room[min(suffice, key=lambda i: room[i])] -= size
        else:
            room.append(capacity - size)
    return sorted(room)


def optimum(sizes: list[int], capacity: int) -> int:
    """Find the minimum number of bins by exhaustive search."""

    def fits(left: list[int], room: tuple[int, ...]) -> bool:
        if not left:
            return True
        return any(fits(left[1:], (*room[:i], r - left[0], *room[i + 1 :])) for i, r in enumerate(room) if r >= left[0])

    return next(n for n in range(1, len(sizes) + 1) if fits(sorted(sizes, reverse=True), (capacity,) * n))


@given(capacity=st.integers(1, 40), data=st.data())
def test_best_fit_against_one_item_at_a_time(capacity: int, data: st.DataObject) -> None:
    # Few different sizes, or any.
    size = st.sampled_from(data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=4)))
    sizes = data.draw(st.lists(size | st.integers(1, capacity), min_size=1, max_size=60))
    bins = best_fit(np.array(sizes), capacity)
    room = capacity - np.bincount(bins, weights=sizes)
    assert sorted(room.tolist()) == one_at_a_time(sizes, capacity)
    np.testing.assert_array_equal(best_fit(np.array(sizes), capacity), bins)


@given(sizes=st.lists(st.integers(1, 10), min_size=1, max_size=7))
def test_best_fit_is_near_the_optimum(sizes: list[int]) -> None:
    bins = int(best_fit(np.array(sizes), 10).max()) + 1
    best = optimum(sizes, 10)
    assert best <= bins <= best + 1


def test_many_documents_pad_next_to_nothing() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(np.int64).clip(1, 1023)
    stream = np.arange(1023, dtype=np.uint16)
    rows = pack_best_fit([stream[:n] for n in lengths], 1023, EOT)
    assert rows.cut == 0
    assert rows.padding_share < 1e-3
    assert len(rows) - -(-int((lengths + 1).sum()) // 1024) <= 3  # rows beyond those that the tokens fill


# ---- arguments


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.uint64])
def test_dtypes(dtype: type) -> None:
    rows = pack_best_fit([np.array([1, 2, 3], dtype), np.array([4], np.int16)], 3, EOT)
    assert rows.tokens.dtype == np.int32
    assert rows.tokens.tolist() == [1, 2, 3, EOT, 4, EOT, -1, -1]


def test_errors() -> None:
    ok = np.arange(5)
    for nothing in ([], arrays([[], []])):
        with pytest.raises(ValueError, match="documents must hold at least one"):
            pack_best_fit(nothing, 4, EOT)
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        pack_best_fit([ok], 0, EOT)
    for eot_id in (-1, 2**31):
        with pytest.raises(ValueError, match=rf"eot_id must be in \[0, 2\*\*31\); got {eot_id}"):
            pack_best_fit([ok], 4, eot_id)
    wrong: list[Any] = [ok.astype(np.float32), ok[None]]
    for bad in wrong:
        with pytest.raises(ValueError, match="document 1 must be 1-D integers"):
            pack_best_fit([ok, bad], 2, EOT)
    too_high: list[Any] = [np.array([2**31]), np.array([2**31], np.uint32), np.array([2**64 - 1], np.uint64)]
    for bad in [np.array([-1]), np.array([-1], np.int8), *too_high]:
        with pytest.raises(ValueError, match=r"token ids must be in \[0, 2\*\*31\)"):
            pack_best_fit([ok, bad], 2, EOT)
