import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.data import IGNORE_INDEX, PackedRows, pack, pack_best_fit, unigram_entropy
from llmfast.data.packing import joined

EOT = 99


def arrays(documents: list[list[int]]) -> list[np.ndarray]:
    return [np.array(d, dtype=np.int32) for d in documents]


# Documents may be empty, and may contain the end-of-text id themselves.
corpora = st.lists(st.lists(st.integers(0, EOT), max_size=12), max_size=12)


def slow_rows(documents: list[list[int]], seq_len: int) -> list[dict[str, list[int]]]:
    """Pack with one Python step per token."""
    stream = [(token, i) for i, d in enumerate(documents) if d for token in [*d, EOT]]
    rows = []
    for first in range(0, len(stream) - seq_len, seq_len):
        row: dict[str, list[int]] = {"tokens": [], "labels": [], "document_ids": [], "positions": []}
        document_id, position = 0, 0
        for t in range(first, first + seq_len):
            (token, document), (label, next_document) = stream[t], stream[t + 1]
            row["tokens"].append(token)
            row["labels"].append(label if next_document == document else IGNORE_INDEX)
            row["document_ids"].append(document_id)
            row["positions"].append(position)
            position += 1
            if next_document != document:
                document_id, position = document_id + 1, 0
        rows.append(row)
    return rows


@settings(deadline=None)
@given(documents=corpora, seq_len=st.integers(1, 20))
def test_rows_against_one_step_per_token(documents: list[list[int]], seq_len: int) -> None:
    length = sum(len(d) + 1 for d in documents if d)
    if length <= seq_len:
        message = rf"needs {seq_len + 1} tokens; the documents have {length}$" if length else "documents must hold"
        with pytest.raises(ValueError, match=message):
            pack(arrays(documents), seq_len, EOT)
        return
    packed = pack(iter(arrays(documents)), seq_len, EOT)
    expected = slow_rows(documents, seq_len)
    assert len(packed) == len(expected)
    batch = packed.batch(range(len(packed)))
    for name in ("tokens", "labels", "document_ids", "positions"):
        assert getattr(batch, name).tolist() == [row[name] for row in expected], name
    assert batch.num_valid == sum(label != IGNORE_INDEX for row in expected for label in row["labels"])
    assert batch.num_valid == int((batch.labels != IGNORE_INDEX).sum())


@settings(deadline=None)
@given(documents=corpora.filter(any), seq_len=st.integers(1, 20), data=st.data())
def test_rows_put_together_are_the_stream(documents: list[list[int]], seq_len: int, data: st.DataObject) -> None:
    stream = [token for d in documents if d for token in [*d, EOT]]
    seq_len = min(seq_len, len(stream) - 1)
    packed = pack(arrays(documents), seq_len, EOT)
    used = len(packed) * seq_len + 1
    assert packed.dropped == len(stream) - used and 0 <= packed.dropped < seq_len
    assert packed.document_starts[0] == 0 and packed.document_starts[-1] < used == len(packed.tokens)
    tokens = packed.batch(np.arange(len(packed))).tokens.flatten().tolist()
    assert [*tokens, int(packed.tokens[-1])] == stream[:used]
    # Any choice of rows, in any order and with repeats, is those rows.
    chosen = data.draw(st.lists(st.integers(0, len(packed) - 1), max_size=5))
    several = packed.batch(np.array(chosen, dtype=np.int64))
    assert several.tokens.shape == (len(chosen), seq_len)
    for i, row in enumerate(chosen):
        torch.testing.assert_close(several.labels[i], packed.batch([row]).labels[0], rtol=0, atol=0)
        torch.testing.assert_close(several.positions[i], packed.batch([row]).positions[0], rtol=0, atol=0)


def test_the_picture_in_the_docstring() -> None:
    packed = pack(arrays([[1, 1, 1], [2, 2], [3, 3, 3, 3, 3]]), 4, 0)
    batch = packed.batch([0, 1, 2])
    assert batch.tokens.tolist() == [[1, 1, 1, 0], [2, 2, 0, 3], [3, 3, 3, 3]]
    assert batch.labels.tolist() == [[1, 1, 0, -100], [2, 0, -100, 3], [3, 3, 3, 0]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch.positions.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert (batch.num_valid, packed.dropped) == (10, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, np.uint64])
def test_dtypes(dtype: type) -> None:
    packed = pack([np.array([1, 2, 3], dtype)] * 4, 3, EOT)
    assert packed.tokens.dtype == np.int32
    batch = packed.batch(np.array([1, 0], dtype=np.uint8))
    assert batch.tokens.dtype == batch.labels.dtype == batch.positions.dtype == torch.int64
    assert batch.document_ids.dtype == torch.int32 and isinstance(batch.num_valid, int)
    for name in ("tokens", "labels", "document_ids", "positions"):
        assert getattr(batch, name).is_contiguous()


def test_batches_do_not_share_memory_with_the_rows() -> None:
    packed = pack(arrays([[1, 2, 3, 4, 5]]), 2, EOT)
    packed.batch([0]).tokens.fill_(7)
    assert packed.batch([0]).tokens.tolist() == [[1, 2]]


@pytest.fixture
def packed() -> PackedRows:
    return pack(arrays([list(range(10))]), 3, EOT)


@pytest.mark.parametrize("indices", [[3], [-1], [0, 1, 2, 3]])
def test_row_out_of_range(packed: PackedRows, indices: list[int]) -> None:
    assert len(packed) == 3
    with pytest.raises(IndexError, match=r"row indices must be in \[0, 3\)"):
        packed.batch(indices)


@pytest.mark.parametrize("indices", [0, [[0]], [0.5], [True]])
def test_indices_that_are_none(packed: PackedRows, indices: Any) -> None:
    with pytest.raises(ValueError, match="indices must be 1-D integers"):
        packed.batch(indices)


def test_pack_errors() -> None:
    ok = np.arange(5)
    with pytest.raises(ValueError, match=r"seq_len=6 needs 7 tokens; the documents have 6"):
        pack([ok], 6, EOT)
    for nothing in ([], arrays([[], []])):
        with pytest.raises(ValueError, match="documents must hold at least one"):
            pack(nothing, 4, EOT)
    with pytest.raises(ValueError, match="seq_len must be at least 1"):
        pack([ok], 0, EOT)
    wrong: list[Any] = [ok.astype(np.float32), ok[None]]
    for bad in wrong:
        with pytest.raises(ValueError, match="document 1 must be 1-D integers"):
            pack([ok, bad], 2, EOT)
    for low, high in ((-100, 99), (0, 2**31)):
        with pytest.raises(ValueError, match=r"token ids must be in \[0, 2\*\*31\)"):
            pack([ok, np.array([low, high])], 2, EOT)
    for eot in (-1, 2**31):
        with pytest.raises(ValueError, match=rf"eot_id must be in \[0, 2\*\*31\); got {eot}"):
            pack([ok], 2, eot)


@pytest.mark.parametrize("pack_texts", [pack, pack_best_fit])
def test_a_row_may_be_one_token(pack_texts: Callable[..., PackedRows]) -> None:
    packed = pack_texts(arrays([[5], [6]]), 1, EOT)
    batch = packed.batch(range(len(packed)))
    assert batch.tokens[batch.labels == EOT].tolist() == [5, 6] and batch.num_valid == 2


def test_unigram_entropy() -> None:
    assert unigram_entropy(np.arange(8), 8) == pytest.approx(math.log(8))
    assert unigram_entropy([5, 5, 5], 8) == 0
    assert unigram_entropy([0, 1, 1, 1], 2) == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    labels = torch.tensor([[0, 1, IGNORE_INDEX], [1, 0, IGNORE_INDEX]])
    assert unigram_entropy(labels, 2) == pytest.approx(math.log(2))
    for bad in ([8], [-1], [], [IGNORE_INDEX]):
        with pytest.raises(ValueError, match="tokens must"):
            unigram_entropy(bad, 8)


def test_batches_joined_in_any_order() -> None:
    rng = np.random.default_rng(0)
    packed = pack(arrays([[i] * i for i in range(1, 12)]), 6, EOT)
    where = rng.permutation(len(packed))
    source = rng.integers(0, 3, len(where))  # as if from three sources
    parts = [packed.batch(where[source == d]) for d in range(3)]
    mixed, whole = joined(parts, np.argsort(np.argsort(source, kind="stable"))), packed.batch(where)
    for name in ("tokens", "labels", "document_ids", "positions", "num_valid"):
        assert np.array_equal(getattr(mixed, name), getattr(whole, name)), name
