import json
import pickle
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from llmfast.data import Batch, BPETokenizer, ByteTokenizer, PackedRows, Rows, Tokenizer, fim, fim_prompt, pack
from llmfast.data.fim import FIM, MIN_TOKENS, SENTINELS, FIMDocumentRows, FIMRows
from llmfast.data.packing import IGNORE_INDEX, PADDING, batch_of

TEXTS = [p.read_text("utf-8") for p in sorted(Path(json.__file__).parent.glob("*.py"))]
BYTES = ByteTokenizer()
PRE, MID, SUF = (BYTES.special_ids[sentinel] for sentinel in SENTINELS)
EOT = BYTES.eot_id
LAST = 2**64 - 1  # of the random numbers: cuts after the last character, and rearranges nothing

ORDERS: list[dict[str, Any]] = [
    {"spm_rate": 0.0},
    {"spm_rate": 1.0},
    {"spm_rate": 1.0, "spm_variant": 1},
]
MODES = [{"level": level, **order} for level in ("char", "token") for order in ORDERS]
odd = [
    "👩‍👩‍👧‍👦",
    "e\u0301",
    "中文",
    "\U0001d518",
    "\ufffd",
    "\x00",
    "<|fim_middle|>",
    "<|endoftext|>",
    "    return x\n",
]
any_text = st.text() | st.lists(st.sampled_from(odd)).map("".join)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    pytest.importorskip("tokenizers")
    return BPETokenizer.train(TEXTS, 600)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return BYTES if request.param == "bytes" else request.getfixturevalue("bpe")


def bytes_of(tokenizer: Tokenizer, ids: np.ndarray) -> bytes:
    """Return the bytes that the ids represent, valid UTF-8 or not."""
    if isinstance(tokenizer, ByteTokenizer):
        return bytes(ids.tolist())
    # Byte-level BPE writes a byte as the letter it is in Latin-1, or, if that cannot be seen, as the next from U+0100.
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in seen}
    byte_of |= {chr(0x100 + i): byte for i, byte in enumerate(b for b in range(256) if b not in seen)}
    backend = tokenizer._backend  # type: ignore[attr-defined]
    return bytes(byte_of[letter] for i in ids.tolist() for letter in backend.id_to_token(i))


def cut_at(monkeypatch: pytest.MonkeyPatch, a: int, b: int, length: int) -> None:
    """Have every document of `length` characters, or tokens, cut at these places."""
    numbers = [place * 2**64 // (length + 1) + 1 for place in (a, b)]
    monkeypatch.setattr(fim, "_random", lambda *key: [0, 0, *numbers])


# One document


@pytest.mark.parametrize("level", ["char", "token"])
@pytest.mark.parametrize("end", [[], [EOT]])
def test_the_three_orders(monkeypatch: pytest.MonkeyPatch, level: Any, end: list[int]) -> None:
    cut_at(monkeypatch, 7, 3, 10)  # in whatever order they are drawn
    document = [*b"aaabbbbccc", *end]
    psm, spm2, spm1 = (
        FIM(BYTES, rate=1.0, level=level, **order).rearrange(document, 0).ids.tolist() for order in ORDERS
    )
    assert psm == [PRE, *b"aaa", SUF, *b"ccc", MID, *b"bbbb", EOT]
    assert spm2 == [PRE, SUF, *b"ccc", MID, *b"aaabbbb", EOT]
    assert spm1 == [SUF, *b"ccc", PRE, *b"aaa", MID, *b"bbbb", EOT]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("a", "b"), [(0, 0), (10, 10), (0, 10), (0, 4), (4, 10), (4, 4)])
def test_empty_parts(monkeypatch: pytest.MonkeyPatch, mode: dict[str, Any], a: int, b: int) -> None:
    cut_at(monkeypatch, a, b, 10)
    f = FIM(BYTES, rate=1.0, **mode)
    result = f.rearrange([*b"0123456789", EOT], 0)
    assert sorted(result.ids.tolist()) == sorted([*b"0123456789", PRE, MID, SUF, EOT])
    middle = list(b"0123456789"[a:b])
    assert result.ids.tolist()[-len(middle) - 1 :] == [*middle, EOT]
    assert bytes(f.undo(result.ids).tolist()) == b"0123456789"


@pytest.mark.parametrize("mode", MODES)
@given(text=any_text, data=st.data(), sample=st.integers(0, 2**64 - 1))
def test_undo(tokenizer: Tokenizer, mode: dict[str, Any], text: str, data: st.DataObject, sample: int) -> None:
    """Recover any part of any text: emoji, and characters cut at its ends."""
    ids = tokenizer.encode(text).astype(np.int64)
    begin, end = (data.draw(st.integers(0, min(4, len(ids)))) for _ in range(2))
    ids = ids[begin : len(ids) - end]
    document = np.append(ids, tokenizer.eot_id) if data.draw(st.booleans()) else ids
    f = FIM(tokenizer, rate=1.0, **mode)
    result = f.rearrange(document, sample)
    assert result.changed == (len(ids) >= MIN_TOKENS)
    assert result.counted.all() and result.counted.shape == result.ids.shape
    if result.changed:
        for special in (*SENTINELS, "<|endoftext|>"):
            assert np.count_nonzero(result.ids == tokenizer.special_ids[special]) == 1, special
        assert result.ids[-1] == tokenizer.eot_id
    else:
        np.testing.assert_array_equal(result.ids, document)
    back = f.undo(result.ids)
    assert bytes_of(tokenizer, back) == bytes_of(tokenizer, ids)
    if mode["level"] == "token":
        np.testing.assert_array_equal(back, ids)


@pytest.mark.parametrize("mode", MODES)
@given(document=st.binary(min_size=MIN_TOKENS), sample=st.integers(0, 1000))
def test_undo_of_bytes_that_are_no_text(mode: dict[str, Any], document: bytes, sample: int) -> None:
    f = FIM(BYTES, rate=1.0, **mode)
    result = f.rearrange(np.frombuffer(document, dtype=np.uint8), sample)
    assert result.changed
    assert bytes(f.undo(result.ids).tolist()) == document


def test_pieces_are_encoded_as_an_editor_would(bpe: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = TEXTS[0]
    a, b = text.index("return") + 3, text.index("import") + 4
    a, b = sorted((a, b))
    cut_at(monkeypatch, a, b, len(text))
    ids = FIM(bpe, rate=1.0, spm_rate=0.0).rearrange(bpe.encode(text), 0).ids
    pre, mid, suf = (bpe.special_ids[sentinel] for sentinel in SENTINELS)
    prefix, middle, suffix = (bpe.encode(piece).tolist() for piece in (text[:a], text[a:b], text[b:]))
    assert ids.tolist() == [pre, *prefix, suf, *suffix, mid, *middle, bpe.eot_id]


def test_incomplete_characters_stay_at_the_ends() -> None:
    """Rows of bytes begin and end inside characters; no cut is inside another one."""
    ids = np.frombuffer("中文字母表中文字母表".encode()[1:-1], dtype=np.uint8)
    f = FIM(BYTES, rate=1.0, spm_rate=0.0)
    for sample in range(50):
        prefix, suffix, middle = bytes_between(f.rearrange(ids, sample).ids)
        assert prefix.startswith(ids[:2].tobytes()) and suffix.endswith(ids[-2:].tobytes())
        for piece in (prefix[2:], middle, suffix[:-2]):
            piece.decode()  # raises if it is no text


@pytest.mark.parametrize("begin", range(4))
@pytest.mark.parametrize("end", range(4))
def test_up_to_three_bytes_of_a_character_stay_at_each_end(begin: int, end: int) -> None:
    """Rows begin and end inside characters of four bytes; every cut is still between characters."""
    text = "\U0001f600\U0001d518" * 4
    ids = np.frombuffer(text.encode()[begin : len(text.encode()) - end], dtype=np.uint8)
    f = FIM(BYTES, rate=1.0, spm_rate=0.0)
    before, after = (0 if begin == 0 else 4 - begin), (0 if end == 0 else 4 - end)
    for sample in range(20):
        prefix, suffix, middle = bytes_between(f.rearrange(ids, sample).ids)
        for piece in (prefix[before:], middle, suffix[: len(suffix) - after]):
            piece.decode()  # raises if it is no text


def bytes_between(psm: np.ndarray) -> tuple[bytes, bytes, bytes]:
    ids = psm.tolist()
    s, m = ids.index(SUF), ids.index(MID)
    return bytes(ids[1:s]), bytes(ids[s + 1 : m]), bytes(ids[m + 1 : -1])


def test_what_does_not_survive_decoding_is_cut_between_tokens() -> None:
    f = FIM(BYTES, rate=1.0)
    pad = BYTES.special_ids["<|pad|>"]
    for document in ([*b"01234", pad, *b"56789"], list(b"01234\xff56789"), list("01234\ufffd56789".encode())):
        for sample in range(20):
            result = f.rearrange(document, sample)
            assert result.changed
            assert f.undo(result.ids).tolist() == document
            np.testing.assert_array_equal(result.ids, replace(f, level="token").rearrange(document, sample).ids)


@pytest.mark.parametrize(
    "document",
    [
        [],
        [EOT],
        [*b"012345678"],
        [*b"012345678", EOT],
        [*b"0123456789", MID, *b"abcdef", EOT],
        [*b"0123456789", EOT, *b"abcdef", EOT],
        [PADDING] * 20,
    ],
)
@pytest.mark.parametrize("level", ["char", "token"])
def test_what_is_left_alone(document: list[int], level: Any) -> None:
    result = FIM(BYTES, rate=1.0, level=level, loss="middle").rearrange(document, 0)
    assert not result.changed and result.ids.tolist() == document
    assert result.counted.tolist() == [True] * len(document)


def test_undo_of_what_was_not_rearranged() -> None:
    f = FIM(BYTES)
    assert f.undo([]).tolist() == f.undo([EOT]).tolist() == []
    assert f.undo([*b"abc", EOT]).tolist() == f.undo(list(b"abc")).tolist() == list(b"abc")
    for wrong in ([MID, 1, PRE, 2, SUF], [1, PRE, 2, SUF, 3, MID], [PRE, 1, SUF, 2], [PRE, SUF, MID, MID]):
        with pytest.raises(ValueError, match="ids must be in an order that FIM makes"):
            f.undo(wrong)


# Random numbers


def test_shares() -> None:
    """Shares are within three standard deviations of the rates, and cuts are uniform."""
    n, length = 3000, 60
    documents = [np.full(length, ord("x"))] * n
    for rate, spm_rate in ((0.5, 0.5), (0.9, 0.2)):
        f = FIM(BYTES, rate=rate, spm_rate=spm_rate, spm_variant=1, seed=1)
        results = [result.ids for result in f.rearrange_many(documents, [(i, 0) for i in range(n)])]
        psm = [ids for ids in results if ids[0] == PRE]
        spm = [ids for ids in results if ids[0] == SUF]
        for count, share in ((len(psm), rate * (1 - spm_rate)), (len(spm), rate * spm_rate)):
            assert abs(count - n * share) < 3 * (n * share * (1 - share)) ** 0.5
        assert sum(len(ids) == length for ids in results) == n - len(psm) - len(spm)
        # Of two uniform numbers, the lower one is 1/3 on average, with a variance of 1/18.
        for i, part in enumerate(("prefix", "suffix", "middle")):
            mean = np.mean([len(bytes_between(ids)[i]) for ids in psm]) / length
            assert abs(mean - 1 / 3) < 3 / (18 * len(psm)) ** 0.5, part
    for rate, changed in ((0.0, 0), (1.0, n)):
        assert (
            sum(r.changed for r in FIM(BYTES, rate=rate).rearrange_many(documents, [(i, 0) for i in range(n)]))
            == changed
        )


def test_the_random_numbers_stay_what_they_are() -> None:
    """Another stream would give a run that is resumed other data: these are never to change."""
    assert fim._random(2**64 - 1, 5, 7)[:2] == [9649348589956686008, 11664745594762437536]
    f = FIM(BYTES, rate=0.75, spm_variant=1, seed=3)
    names = {PRE: "<PRE>", MID: "<MID>", SUF: "<SUF>", EOT: "<EOT>"}
    for document, expected in (
        (0, "<PRE>0123456789a<SUF>cdef<MID>b<EOT>"),
        (1, "0123456789abcdef"),
        (3, "<SUF>6789abcdef<PRE>0123<MID>45<EOT>"),
    ):
        ids = f.rearrange(list(b"0123456789abcdef"), 5, document).ids.tolist()
        assert "".join(names.get(i, chr(i)) for i in ids) == expected


def test_a_pure_function_of_seed_sample_and_document(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXTS[0][:300])
    f = FIM(tokenizer, rate=1.0, seed=5)
    keys = [(sample, document) for sample in range(4) for document in range(4)]
    together = f.rearrange_many([ids] * 16, keys)
    assert len({tuple(result.ids.tolist()) for result in together}) == 16
    for key, result in zip(keys, together):
        np.testing.assert_array_equal(result.ids, f.rearrange(ids, *key).ids)
    again = pickle.loads(pickle.dumps(f)).rearrange_many([ids] * 16, keys[::-1])
    for one, other in zip(together, again[::-1]):
        np.testing.assert_array_equal(one.ids, other.ids)
    assert replace(f, seed=6).rearrange(ids, 0).ids.tolist() != f.rearrange(ids, 0).ids.tolist()


# Budgets


@pytest.mark.parametrize("mode", MODES)
@given(text=any_text.map(lambda text: text + "0123456789"), budget=st.integers(1, 60), sample=st.integers(0, 1000))
def test_budget(tokenizer: Tokenizer, mode: dict[str, Any], text: str, budget: int, sample: int) -> None:
    ids = np.append(tokenizer.encode(text), tokenizer.eot_id)
    f = FIM(tokenizer, rate=1.0, loss="middle", **mode)
    result = f.rearrange(ids, sample, budget=budget)
    assert len(result.ids) <= budget
    if not result.changed:
        np.testing.assert_array_equal(result.ids, ids[:budget])
        return
    assert result.ids[-1] == tokenizer.eot_id
    free = f.rearrange(ids[:budget], sample)
    if np.count_nonzero(free.counted) + 3 <= budget:  # the middle survives
        np.testing.assert_array_equal(result.ids[result.counted], free.ids[free.counted])
    assert bytes_of(tokenizer, f.undo(result.ids)) in bytes_of(tokenizer, ids[:-1])


@pytest.mark.parametrize(
    ("a", "b", "left"),
    [
        (4, 7, ("0123", "", "456")),
        (4, 4, ("0123", "456", "")),
        (8, 10, ("34567", "", "89")),
        (1, 10, ("", "", "3456789")),
    ],
)
def test_what_goes_first(monkeypatch: pytest.MonkeyPatch, a: int, b: int, left: tuple[str, str, str]) -> None:
    """Drop the suffix's end first, then the document's beginning."""
    cut_at(monkeypatch, a, b, 10)
    result = FIM(BYTES, rate=1.0, spm_rate=0.0).rearrange([*b"0123456789", EOT], 0, budget=11)
    assert bytes_between(result.ids) == tuple(piece.encode() for piece in left)


# Rows


def documents_of(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    return [np.asarray(ids, dtype=np.int64) for ids in tokenizer.encode_batch(texts)]


@pytest.fixture
def rows(tokenizer: Tokenizer) -> PackedRows:
    pieces = [text[at : at + n] for text in TEXTS for n in (8, 40, 700, 90) for at in range(0, 2000, 700)]
    return pack(documents_of([*pieces, "中文字母表👩‍👩‍👧‍👦" * 100], tokenizer), 128, tokenizer.eot_id)


def equal(one: Batch, other: Batch) -> None:
    for name in ("tokens", "labels", "document_ids", "positions"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=0, msg=name)
    assert one.num_valid == other.num_valid


@pytest.mark.parametrize("level", ["char", "token"])
@pytest.mark.parametrize("loss", ["all", "middle"])
def test_rows_fragment_by_fragment(tokenizer: Tokenizer, rows: PackedRows, level: Any, loss: Any) -> None:
    f = FIM(tokenizer, rate=0.7, level=level, loss=loss, seed=2)
    ours: Rows = FIMRows(rows, f)
    assert len(ours) == len(rows) and ours.seq_len == rows.seq_len
    indices = np.arange(len(rows))
    batch = ours.batch(indices)
    windows, documents = rows.windows(indices)
    changed = 0
    for b in range(len(rows)):
        tokens, number, counted = [], [], []
        for k, document in enumerate(np.unique(documents[b])):
            fragment = windows[b][documents[b] == document]
            result = f.rearrange(fragment, sample=b, document=k, budget=len(fragment))
            changed += result.changed
            tokens += result.ids.tolist()
            number += [k] * len(result.ids)
            counted += result.counted.tolist()
        missing = rows.seq_len + 1 - len(tokens)
        tokens += [PADDING] * missing
        number += [len(np.unique(documents[b]))] * missing
        counted += [False] * missing
        expected = batch_of(np.array([tokens]), np.array([number]), np.array([counted]))
        for name in ("tokens", "labels", "document_ids", "positions"):
            assert getattr(batch, name)[b].tolist() == getattr(expected, name)[0].tolist(), name
    assert changed > len(rows) / 2


def test_rate_zero_changes_no_row(rows: PackedRows, tokenizer: Tokenizer) -> None:
    indices = np.arange(len(rows))
    equal(FIMRows(rows, FIM(tokenizer, rate=0.0)).batch(indices), rows.batch(indices))


def test_every_middle_in_a_row_ends_with_the_end_of_text(rows: PackedRows, tokenizer: Tokenizer) -> None:
    batch = FIMRows(rows, FIM(tokenizer, rate=1.0)).batch(np.arange(len(rows)))
    mid = tokenizer.special_ids["<|fim_middle|>"]
    found = 0
    for tokens, labels, numbers in zip(batch.tokens, batch.labels, batch.document_ids):
        for number in numbers.unique():
            inside = numbers == number
            if mid in tokens[inside]:
                found += 1
                last = labels[inside][labels[inside] != IGNORE_INDEX][-1]
                assert last == tokenizer.eot_id
                assert int((labels[inside] == tokenizer.eot_id).sum()) == 1
    assert found >= len(rows)


@pytest.mark.parametrize("order", ORDERS)
def test_loss_on_the_middle_only(monkeypatch: pytest.MonkeyPatch, order: dict[str, Any]) -> None:
    """Every token of an unchanged document except the first is a label."""
    cut_at(monkeypatch, 3, 7, 12)
    documents = [np.array(list(document)) for document in (b"0123456789ab", b"plain")]
    batch = FIMRows(pack(documents, 18, EOT), FIM(BYTES, rate=1.0, loss="middle", **order)).batch([0])
    assert batch.labels[batch.labels != IGNORE_INDEX].tolist() == [*b"3456", EOT, *b"lain", EOT]
    assert batch.num_valid == 4 + 1 + 4 + 1


def test_a_row_that_comes_out_shorter_is_padded(bpe: BPETokenizer) -> None:
    """Encode letters that were encoded one by one as words."""
    letters = np.concatenate(bpe.encode_batch(list(TEXTS[0][:257])))
    rows = pack([letters], 256, bpe.eot_id)
    batch = FIMRows(rows, FIM(bpe, rate=1.0, spm_rate=0.0)).batch([0])
    used = int((batch.document_ids[0] == 0).sum())
    assert used < 220
    assert batch.labels[0, used - 1 :].tolist() == [IGNORE_INDEX] * (257 - used)
    assert batch.labels[0, used - 2] == bpe.eot_id
    assert batch.document_ids[0, used:].unique().tolist() == [1] and batch.positions[0, used] == 0
    assert batch.num_valid == used - 1


def test_padding_in_the_rows_stays() -> None:
    tokens = np.array([*b"0123456789", EOT, *[PADDING] * 12], dtype=np.int32)
    rows = PackedRows(tokens, np.array([0, 11]), seq_len=22, dropped=0, stride=23)
    batch = FIMRows(rows, FIM(BYTES, rate=1.0)).batch([0])
    assert batch.tokens[0, 0] == PRE and batch.num_valid == 10
    assert batch.labels[0, 10:].tolist() == [IGNORE_INDEX] * 12


class Steps(Dataset[Batch]):
    def __init__(self, rows: FIMRows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return 6

    def __getitem__(self, step: int) -> Batch:
        samples = np.arange(4 * step, 4 * step + 4)
        return self.rows.batch(samples % len(self.rows), samples)


def test_workers_ranks_and_resuming_change_nothing() -> None:
    rows = pack(documents_of(TEXTS, BYTES), 256, EOT)
    steps = Steps(FIMRows(rows, FIM(BYTES, rate=0.9)))
    alone = [steps[i] for i in range(6)]
    for one, other in zip(alone, DataLoader(steps, batch_size=None, num_workers=2)):
        equal(one, other)
    for step in (5, 3, 4):  # from a checkpoint, in any order
        equal(alone[step], Steps(FIMRows(rows, FIM(BYTES, rate=0.9)))[step])
    ranks = [steps.rows.batch(np.arange(r, 4, 2), np.arange(r, 4, 2)) for r in range(2)]
    torch.testing.assert_close(torch.stack([ranks[i % 2].tokens[i // 2] for i in range(4)]), alone[0].tokens)


def test_another_epoch_gets_other_cuts(rows: PackedRows, tokenizer: Tokenizer) -> None:
    ours = FIMRows(rows, FIM(tokenizer, rate=1.0))
    equal(ours.batch([0, 1]), ours.batch([0, 1], samples=[0, 1]))
    first, second = (ours.batch([0, 1], samples=np.arange(2) + epoch * len(rows)) for epoch in range(2))
    assert (first.tokens != second.tokens).any(dim=1).all()


# Documents


@pytest.mark.parametrize("loss", ["all", "middle"])
def test_document_level(tokenizer: Tokenizer, loss: Any) -> None:
    documents = documents_of([*TEXTS, "", "short", *TEXTS], tokenizer)
    f = FIM(tokenizer, rate=0.6, loss=loss)
    results = list(f.documents(iter(documents)))
    assert len(results) == len(documents) and {result.changed for result in results} == {True, False}
    for i, (document, result) in enumerate(zip(documents, results)):
        whole = f.rearrange(np.append(document, tokenizer.eot_id), sample=i)
        assert [*result.ids.tolist(), tokenizer.eot_id] == whole.ids.tolist()
        assert tokenizer.decode(f.undo(result.ids)) == tokenizer.decode(document)

    ours: Rows = FIMDocumentRows.pack(iter(documents), 64, f)
    plain = pack((result.ids for result in results), 64, tokenizer.eot_id)
    assert len(ours) == len(plain) and ours.seq_len == 64
    batch, expected = ours.batch(np.arange(len(ours))), plain.batch(np.arange(len(plain)))
    equal(ours.batch(np.arange(len(ours)), samples=np.arange(len(ours)) + 1000), batch)
    torch.testing.assert_close(batch.tokens, expected.tokens)
    counted = np.concatenate([[*result.counted, True] for result in results if len(result.ids)])[: len(plain.tokens)]
    labels = np.where(counted[1:].reshape(-1, 64), expected.labels, IGNORE_INDEX)
    assert batch.labels.tolist() == labels.tolist()
    assert batch.num_valid == np.count_nonzero(labels != IGNORE_INDEX)


def test_many_documents_one_after_the_other() -> None:
    f = FIM(BYTES, rate=1.0)
    read = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal read
        while True:
            read += 1
            yield np.arange(20)

    results = list(islice(f.documents(endless()), 150))
    assert read < 300
    for i, result in enumerate(results):
        assert [*result.ids.tolist(), EOT] == f.rearrange(np.arange(20), sample=i).ids.tolist()


# Errors


class WithoutSentinels(ByteTokenizer):
    special_ids: Mapping[str, int] = {"<|endoftext|>": 256, "<|fim_prefix|>": 257}


class WithSpaces(ByteTokenizer):
    """Like tokenizers that begin every text with a space."""

    def encode(self, text: str) -> np.ndarray:
        return super().encode(" " + text)


def test_tokenizers_that_cannot_do_it() -> None:
    with pytest.raises(
        ValueError, match=r"no <\|fim_middle\|>, <\|fim_suffix\|>, which FIM needs; it has <\|endoftext"
    ):
        FIM(WithoutSentinels())
    with pytest.raises(ValueError, match="tokenizer must keep pieces of a text as they are"):
        FIM(WithSpaces())
    FIM(WithSpaces(), level="token")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rate": 1.1}, r"rate must be in \[0, 1\]; got 1.1"),
        ({"rate": float("nan")}, r"rate must be in \[0, 1\]; got nan"),
        ({"spm_rate": -0.1}, r"spm_rate must be in \[0, 1\]; got -0.1"),
        ({"level": "word"}, "level must be 'char' or 'token'; got 'word'"),
        ({"spm_variant": 3}, "spm_variant must be 1 or 2; got 3"),
        ({"loss": "suffix"}, "loss must be 'all' or 'middle'; got 'suffix'"),
        ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\); got -1"),
        ({"seed": 0.5}, r"seed must be an integer in \[0, 2\*\*64\); got 0.5"),
    ],
)
def test_arguments(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FIM(BYTES, **wrong)


def test_documents_keys_and_budgets() -> None:
    f = FIM(BYTES)
    ok = list(b"0123456789")
    bad: list[tuple[Any, str]] = [
        ([[1, 2]], r"a document must be 1-D integers; got \(1, 2\)"),
        ([0.5], "a document must be 1-D integers"),
        ([264], "a document's ids must be below the tokenizer's vocab_size 264; got 264"),
    ]
    for document, message in bad:
        with pytest.raises(ValueError, match=message):
            f.rearrange(document, 0)
    with pytest.raises(ValueError, match=r"keys must be pairs of integers in \[0, 2\*\*64\)"):
        f.rearrange(ok, -1)
    with pytest.raises(ValueError, match="keys must be one for each of 1 documents; got 0"):
        f.rearrange_many([ok], [])
    with pytest.raises(ValueError, match="budgets must be at least 1; got 0"):
        f.rearrange(ok, 0, budget=0)
    with pytest.raises(ValueError, match="budgets must be one for each of 1 documents; got 2"):
        f.rearrange_many([ok], [(0, 0)], [20, 20])
    assert f.rearrange_many([], []) == []


def test_samples() -> None:
    rows = FIMRows(pack([np.arange(40)], 10, EOT), FIM(BYTES))
    wrong: list[Any] = [[1], [[0, 1]], [0.5, 1.0]]
    for samples in wrong:
        shape, dtype = map(re.escape, (str(np.shape(samples)), str(np.asarray(samples).dtype)))
        with pytest.raises(ValueError, match=f"samples must be 2 integers, one for each row; got {shape} {dtype}$"):
            rows.batch([0, 1], samples)
    with pytest.raises(ValueError, match="samples must not be negative"):
        rows.batch([0, 1], [0, -1])
    with pytest.raises(IndexError, match=r"row indices must be in \[0, 4\)"):
        rows.batch([4])
    assert rows.batch(np.array([], dtype=np.int64)).tokens.shape == (0, 10)


# Speed


def test_speed() -> None:
    """Require 0.25 M tokens per second and core in processor time, half of the goal, to allow for busy machines."""
    pytest.importorskip("tokenizers")
    texts = [path.read_text("utf-8") for path in sorted(Path(json.__file__).parents[1].glob("*.py"))[:20]]
    tokenizer = BPETokenizer.train(texts, 4096)
    rows = pack(documents_of(texts, tokenizer), 1024, tokenizer.eot_id)
    ours = FIMRows(rows, FIM(tokenizer, rate=0.9))
    indices = np.arange(48)
    times = []
    for _ in range(3):
        began = time.process_time()  # of all threads: the tokenizer has several
        ours.batch(indices)
        times.append(time.process_time() - began)
    assert 48 * 1024 / min(times) > 0.25e6


@pytest.mark.parametrize(("variant", "order"), [(0, ORDERS[0]), (1, ORDERS[2]), (2, ORDERS[1])])
def test_a_prompt_begins_what_the_model_was_trained_on(variant: Any, order: dict[str, Any], bpe: BPETokenizer) -> None:
    """Rearrange documents, and ask for the middle between the same prefix and suffix."""
    for tokenizer in (BYTES, bpe):
        rule = FIM(tokenizer, rate=1.0, **order)
        special = [tokenizer.special_ids[sentinel] for sentinel in SENTINELS]
        for number in range(5):
            text = TEXTS[0][100 * number : 100 * number + 200]
            found = rule.rearrange(tokenizer.encode(text), number)
            assert found.changed
            # The prompt has three sentinels in the trained order; the middle is what is left of the document.
            length, (pre, mid, suf) = len(found.ids), (found.ids.tolist().index(i) for i in special)
            between = {0: (pre + 1, suf), 1: (pre + 1, mid)}.get(variant)
            suffix = tokenizer.decode(found.ids[suf + 1 : {0: mid, 1: pre, 2: mid}[variant]])
            prefixes = (
                [tokenizer.decode(found.ids[slice(*between)])]
                if between
                else [tokenizer.decode(found.ids[mid + 1 : end]) for end in range(mid + 1, length)]
            )
            prompts = [fim_prompt(tokenizer, prefix, suffix, spm_variant=variant).tolist() for prefix in prefixes]
            assert any(found.ids[: len(prompt)].tolist() == prompt for prompt in prompts)


def test_prompts_that_cannot_be() -> None:
    class Plain(ByteTokenizer):
        special_ids: Mapping[str, int] = {"<|endoftext|>": 256}

    with pytest.raises(ValueError, match=r"tokenizer has no <\|fim_prefix\|>, .*, which FIM needs"):
        fim_prompt(Plain(), "a", "b")
    with pytest.raises(ValueError, match="spm_variant must be 0, 1 or 2; got 3"):
        fim_prompt(BYTES, "a", "b", spm_variant=3)  # type: ignore[arg-type]


def test_half_of_all_documents_are_rearranged_unless_told() -> None:
    """Half of those have the suffix first."""
    rule = FIM(BYTES)
    found = (rule.rate, rule.spm_rate, rule.level, rule.spm_variant, rule.loss, rule.seed)
    assert found == (0.5, 0.5, "char", 2, "all", 0)
    assert fim_prompt(BYTES, "ab", "c").tolist() == [PRE, *b"ab", SUF, *b"c", MID]
    assert FIM(BYTES, seed=LAST).seed == LAST
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*64\)"):
        FIM(BYTES, seed=2**64)
    with pytest.raises(ValueError, match=r"keys must be pairs of integers in \[0, 2\*\*64\)"):
        rule.rearrange([1], 2**64)
