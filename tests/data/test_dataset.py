from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfast.data import (
    FIM,
    BestFitRows,
    BPETokenizer,
    ByteTokenizer,
    Mixed,
    Mixture,
    PackedRows,
    Rows,
    Tokenizer,
    is_held_out,
    load,
    prepare,
    write_ds,
)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    words = ["lorem", "ipsum", "dolor", "sit", "amet", "été", "<|endoftext|>"]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for i in range(40):
            text = " ".join(rng.choice(words, size=60)) + f" {folder}-{i}\n"
            (tmp_path / folder / f"{i}.txt").write_text(text, "utf-8")
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def stream_text(rows: Rows, tokenizer: Tokenizer) -> list[str]:  # by document, the last one perhaps cut
    assert isinstance(rows, PackedRows)
    documents = np.split(rows.tokens, rows.document_starts[1:])
    return [tokenizer.decode(d) for d in documents]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_every_file_is_on_its_side(folders: list[str], kind: str) -> None:
    if kind == "bpe":
        pytest.importorskip("tokenizers")
    data = prepare(folders, tokenizer=kind, vocab_size=300, seq_len=16, held_out=0.2)
    assert list(data.train) == list(data.validation) == folders
    documents = {f: load(f) for f in folders}
    for held, part in ((False, data.train), (True, data.validation)):
        for folder, rows in part.items():
            expected = [d.text for d in documents[folder] if is_held_out(d, 0.2) == held]
            assert stream_text(rows, data.tokenizer)[:-1] == expected[:-1]
            assert rows.seq_len == 16


def test_the_tokenizer_never_sees_validation_text(folders: list[str], tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    data = prepare(folders, vocab_size=300, seq_len=16, held_out=0.2)
    train = [d.text for f in folders for d in load(f) if not is_held_out(d, 0.2)]
    BPETokenizer.train(train, 300).save(tmp_path / "train.json")
    data.tokenizer.save(tmp_path / "prepared.json")
    assert (tmp_path / "prepared.json").read_bytes() == (tmp_path / "train.json").read_bytes()

    again = prepare(folders, tokenizer=str(tmp_path / "prepared.json"), seq_len=16, held_out=0.2)
    for name, rows in data.train.items():
        assert stream_text(again.train[name], again.tokenizer) == stream_text(rows, data.tokenizer)


def test_nothing_held_out(folders: list[str]) -> None:
    data = prepare(folders[:1], tokenizer="bytes", seq_len=16, held_out=0)
    assert data.validation == {} and isinstance(data.tokenizer, ByteTokenizer)
    assert len(stream_text(data.train[folders[0]], data.tokenizer)) == 40


def test_sequences_come_from_the_sources_they_should(folders: list[str]) -> None:
    one, two = folders
    data = prepare([f"first={one}", f"second={two}"], tokenizer="bytes", seq_len=16, held_out=0)
    assert list(data.train) == ["first", "second"]
    mixture = Mixture({name: len(rows) for name, rows in data.train.items()}, {}, total=100)
    source, row = mixture.sequences(7, 27)
    batch = data.batch(source, row, first=7)
    for i, (d, r) in enumerate(zip(source, row)):
        alone = list(data.train.values())[d].batch([r])
        for name in ("tokens", "labels", "document_ids", "positions"):
            assert getattr(batch, name)[i].tolist() == getattr(alone, name)[0].tolist(), name
    assert batch.num_valid == int((batch.labels >= 0).sum())


def test_files_of_tokens_are_sources_too(folders: list[str], tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = [d.text for d in load(folders[0])]
    write_ds(tmp_path / "one.ds", tokenizer.encode_batch(texts), vocab_size=264, eot_id=tokenizer.eot_id)
    sources = [f"tokens={tmp_path / 'one.ds'}", f"texts={folders[1]}"]
    data = prepare(sources, tokenizer=str(tmp_path / "tokenizer.json"), seq_len=16, held_out=0.25)
    found = stream_text(data.train["tokens"], tokenizer), stream_text(data.validation["tokens"], tokenizer)
    assert (found[0][:-1], found[1][:-1]) == (texts[:29], texts[30:39])
    with pytest.raises(ValueError, match=r"need the tokenizer.json they were made with; got tokenizer='bytes'"):
        prepare(sources, tokenizer="bytes", seq_len=16)


@pytest.mark.parametrize("unit", ["context", "document"])
def test_training_rows_are_rearranged_and_validation_is_not(folders: list[str], unit: Any) -> None:
    fim = partial(FIM, rate=1.0)
    data = prepare(folders, tokenizer="bytes", seq_len=64, held_out=0.2, fim=fim, fim_unit=unit)
    middle = ByteTokenizer.special_ids["<|fim_middle|>"]
    for rows in data.train.values():
        batch, again = rows.batch([0, 1, 2], samples=[3, 4, 5]), rows.batch([0, 1, 2], samples=[6, 7, 8])
        assert (batch.tokens == middle).any()
        assert (batch.tokens != again.tokens).any() == (unit == "context")  # another cut when it comes again
    assert not any((rows.batch(range(len(rows))).tokens == middle).any() for rows in data.validation.values())


def test_a_sequence_is_the_same_in_whatever_batch_it_is_read(folders: list[str]) -> None:
    """Its number in the training decides how it is cut, and not its place in the batch."""
    data = prepare(folders, tokenizer="bytes", seq_len=64, held_out=0, fim=partial(FIM, rate=1.0))
    mixture = Mixture({name: len(rows) for name, rows in data.train.items()}, {}, total=100)
    mixed = Mixed(data, mixture)
    together = mixed.batch(5, 12)
    for i, (source, row) in enumerate(zip(*mixture.sequences(5, 17))):
        alone, direct = mixed.batch(5 + i, 1), data.train[folders[source]].batch([row], samples=[5 + i])
        for name in ("tokens", "labels", "document_ids", "positions"):
            assert getattr(together, name)[i].tolist() == getattr(alone, name)[0].tolist(), name
            assert getattr(together, name)[i].tolist() == getattr(direct, name)[0].tolist(), name
        assert together.sources is not None and alone.sources is not None
        assert together.sources[i] == alone.sources[0] == source


def test_best_fit_rows_keep_documents_whole(folders: list[str]) -> None:
    data = prepare(folders, tokenizer="bytes", seq_len=600, held_out=0.2, packing="best_fit")
    for folder, rows in data.train.items():
        assert isinstance(rows, BestFitRows) and rows.cut == 0 and "padding" in str(rows)
        texts = {d.text for d in load(folder) if not is_held_out(d, 0.2)}
        batch = rows.batch(range(len(rows)))
        found = {
            data.tokenizer.decode(tokens[of == document].numpy())
            for tokens, of in zip(batch.tokens, batch.document_ids)
            for document in of.unique()
        }
        assert texts <= found


def test_errors_name_the_argument(folders: list[str]) -> None:
    one = folders[:1]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "sources must name at least one"),
        ("code", {}, "sources must be a list of names; got the string 'code'"),
        (one * 2, {}, "sources must differ"),
        ([f"a={f}" for f in folders], {}, "sources must have different names; got 'a' twice"),
        (["cod"], {}, "did you mean 'code'"),
        (one, {"seq_len": 1}, "seq_len must be at least 2; got 1"),
        (one, {"held_out": 1.0}, r"held_out must be in \[0, 1\); got 1.0"),
        (one, {"tokenizer": "bpe", "vocab_size": 256}, "vocab_size must be at least 261; got 256"),
        (one, {"tokenizer": "byte"}, "unknown tokenizer 'byte': expected 'bpe', 'bytes'"),
        (one, {"packing": "best"}, "packing must be 'concat' or 'best_fit'; got 'best'"),
        (one, {"fim": FIM, "fim_unit": "document", "packing": "best_fit"}, "needs packing='concat'"),
        (one, {"seq_len": 10**6}, "training part is too small: .*needs 1000001 tokens"),
        (one, {"seq_len": 6000, "held_out": 0.1}, "validation part is too small"),
        (one, {"held_out": 1e-9}, "has no file to validate on at held_out=1e-09; try more, or 0"),
        (one, {"held_out": 1 - 1e-9}, "has no file left to train on"),
    ]
    usual: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 16, "held_out": 0.2}
    for sources, options, match in cases:
        with pytest.raises(ValueError, match=match):
            prepare(sources, **(usual | options))
