import inspect
import json
import warnings
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
    dataset,
    is_held_out,
    load,
    open_token_file,
    prepare,
    write_ds,
)
from llmfast.data.dataset import source_name
from llmfast.data.fim import FIMRows


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
    with pytest.raises(ValueError, match=r"need the tokenizer.json they were written with; got tokenizer='bytes'"):
        prepare(sources, tokenizer="bytes", seq_len=16)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_texts_begin_as_their_tokenizer_says(packing: Any, folders: list[str], tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    BPETokenizer.train(["lorem ipsum dolor sit amet"], 300).save(path)
    plain = prepare(folders, tokenizer=str(path), seq_len=32, packing=packing)
    backend = tokenizers.Tokenizer.from_file(str(path))
    backend.add_special_tokens(["<s>"])
    begin = backend.token_to_id("<s>")
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    backend.save(str(path))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    data = prepare(folders, tokenizer=str(path), seq_len=512, packing=packing)
    for rows in (*data.train.values(), *data.validation.values()):
        batch = rows.batch(range(len(rows)))
        starts = (batch.positions == 0) & (batch.labels != -100)
        assert (batch.tokens[starts] == begin).sum() >= starts.sum() - len(rows)  # rows may begin within a text
        assert (batch.tokens == begin).sum() > 2
    assert not any((rows.batch(range(len(rows))).tokens == begin).any() for rows in plain.train.values())


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
    """A sequence's number in the training decides how it is cut, not its place in the batch."""
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


def small(tmp_path: Path, files: int, characters: int, line_breaks: bool = True) -> tuple[str, list[str]]:
    """Write a folder of files that share no word, none of which is held out by its name's hash."""
    folder = tmp_path / f"{files}-files"
    folder.mkdir()
    texts = []
    for i in range(files):
        words = (f"w{i}x{j}" for j in range(characters))
        texts.append(("\n" if line_breaks else " ").join(words)[:characters])
        (folder / f"{15 + i}.txt").write_text(texts[-1])
    return str(folder), texts


def text_of(rows: Rows, tokenizer: Tokenizer) -> str:
    return "".join(stream_text(rows, tokenizer))


@pytest.mark.parametrize(
    ("files", "characters", "line_breaks"),
    [(1, 100_000, True), (1, 100_000, False), (1, 3000, True), (2, 3000, True), (10, 400, True), (30, 200, False)],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_few_documents_are_a_source(
    files: int, characters: int, line_breaks: bool, tokenizer: str, tmp_path: Path
) -> None:
    """No text is in both parts: every word occurs once here."""
    folder, texts = small(tmp_path, files, characters, line_breaks)
    said: list[str] = []
    data = prepare([folder], tokenizer=tokenizer, seq_len=64, say=said.append)
    assert data.split == {folder: "end"}
    (line,) = said
    assert line.startswith(f"{folder}: validating on the last ") and "% of its text; it has too few documents" in line
    # The cut is moved by at most half the share that is wanted: a fifth, 4,000 characters or held_out.
    share = float(line.partition("the last ")[2].partition("%")[0]) / 100
    wanted = max(0.05, min(0.2, 4000 / (files * characters)))
    assert wanted / 2 - 0.002 <= share <= 1.5 * wanted + 0.002
    words = [set(text_of(part[folder], data.tokenizer).split()) for part in (data.train, data.validation)]
    cut_short = 4  # words at the ends of parts and of rows
    assert len(words[0] & words[1]) <= cut_short
    assert len(words[0] | words[1]) >= len(set(" ".join(texts).split())) - (70 if tokenizer == "bytes" else 40)
    again = prepare([folder], tokenizer=tokenizer, seq_len=32, split=data.split, say=said.append)
    assert said[1:] == [line.partition(";")[0]]
    assert (
        text_of(again.validation[folder], again.tokenizer)[:300]
        == text_of(data.validation[folder], data.tokenizer)[:300]
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_one_row_is_a_source(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"one{suffix}"
    text = " ".join(f"w{i}" for i in range(3000))
    if suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.table({"body": [text]}), path)
    else:
        path.write_text(json.dumps({"body": text}))
    data = prepare([str(path)], tokenizer="bytes", seq_len=64, text_column="body", say=[].append)
    train, held = (text_of(part[str(path)], data.tokenizer) for part in (data.train, data.validation))
    assert text.startswith(train) and text.index(held[:1000]) > len(train) - 1


def test_a_large_source_beside_a_small_one_keeps_its_split(folders: list[str], tmp_path: Path) -> None:
    folder, _ = small(tmp_path, 1, 5000)
    options: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 16, "held_out": 0.2}
    data = prepare([folders[0], folder], say=[].append, **options)
    assert data.split == {folders[0]: "documents", folder: "end"}
    alone = prepare(folders[:1], **options)
    np.testing.assert_array_equal(
        data.validation[folders[0]].batch([0, 1]).tokens, alone.validation[folders[0]].batch([0, 1]).tokens
    )


def test_whole_documents_that_are_too_short_for_a_row_are_not_enough(folders: list[str]) -> None:
    """Hold out 8 of 40 files, which used to be an error."""
    one, said = folders[0], []
    data = prepare([one], tokenizer="bytes", seq_len=2600, held_out=0.1, say=said.append)
    assert data.split == {one: "end"} and len(said) == 1
    with pytest.raises(ValueError, match="validation part is too small"):  # and is one where they were asked for
        prepare([one], tokenizer="bytes", seq_len=2600, held_out=0.1, split={one: "documents"})


def test_advice_works(tmp_path: Path) -> None:
    folder, _ = small(tmp_path, 3, 100)
    options: dict[str, Any] = {"tokenizer": "bytes", "say": [].append}
    with pytest.raises(ValueError, match=r"training part is too small: .* needs 1025 tokens, and it has 243; ") as e:
        prepare([folder], **options)
    most = int(str(e.value).rpartition("a seq_len of at most ")[2])
    assert len(prepare([folder], seq_len=most, **options).validation[folder]) == 1
    with pytest.raises(ValueError, match="too small"):
        prepare([folder], seq_len=most + 1, **options)


@pytest.mark.parametrize("documents", [1, 10])
def test_few_documents_of_tokens_are_a_source(documents: int, tmp_path: Path) -> None:
    tokenizer, path = ByteTokenizer(), tmp_path / "few.ds"
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = [f"{i}" * 3000 for i in range(documents)]
    write_ds(path, tokenizer.encode_batch(texts), vocab_size=264, eot_id=tokenizer.eot_id)
    said: list[str] = []
    data = prepare([str(path)], tokenizer=str(tmp_path / "tokenizer.json"), seq_len=64, say=said.append)
    assert data.split == {str(path): "end"}
    assert [line.partition("% ")[2] for line in said] == [
        "of its tokens; it has too few documents to hold out whole ones"
    ]
    _, validation = open_token_file(path, vocab_size=264).split(0.05, "end")
    share = validation.num_tokens / sum(len(text) + 1 for text in texts)
    assert said == [f"{path}: validating on the last {share:.1%} {said[0].partition('% ')[2]}"]
    kept, held = (part[str(path)].batch(range(len(part[str(path)]))).tokens for part in (data.train, data.validation))
    total = sum(len(text) + 1 for text in texts)
    assert total - 3 * 64 <= kept.numel() + held.numel() <= total
    assert 64 <= held.numel() <= max(0.05 * total, 1500)
    whole = np.fromfile(path, "<u2")
    np.testing.assert_array_equal(kept.numpy().ravel(), whole[: kept.numel()])


def test_errors_name_the_argument(folders: list[str]) -> None:
    one = folders[:1]
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "sources must name at least one"),
        ("code", {}, "sources must be a list of names; got the string 'code'"),
        (one * 2, {}, "sources must not repeat"),
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
        (one, {"held_out": 1 - 1e-9}, "training part is too small"),
        (one, {"split": {"two": "end"}}, r"split must use names of sources \(.*\); got 'two'"),
        (one, {"split": {one[0]: "ends"}}, "must be one of 'documents', 'end'; got 'ends'"),
        (one, {"split": {one[0]: "documents"}, "held_out": 1e-9}, "has no document for validation .* split='end' hold"),
    ]
    usual: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 16, "held_out": 0.2}
    for sources, options, match in cases:
        with pytest.raises(ValueError, match=match):
            prepare(sources, **(usual | options))


def test_defaults_are_what_the_reference_says() -> None:
    parameters = inspect.signature(prepare).parameters
    assert {name: p.default for name, p in parameters.items() if name != "sources"} == {
        **{"tokenizer": "bpe", "vocab_size": 8192, "seq_len": 1024, "held_out": 0.05, "packing": "concat"},
        **{"fim": None, "fim_unit": "context", "text_column": "text", "split": None, "say": None},
    }


@pytest.mark.parametrize(
    ("source", "name", "where"),
    [
        ("web=/data/web", "web", "/data/web"),
        ("my-web_2=x", "my-web_2", "x"),
        ("web=a=b", "web", "a=b"),
        ("/data/web", "/data/web", "/data/web"),
        *((path, path, path) for path in ("/data/a=b", "a b=c", "a.b=c", "=x", "code")),
    ],
)
def test_a_name_of_a_source_is_a_word_before_its_place(source: str, name: str, where: str) -> None:
    assert source_name(source) == (name, where)


@pytest.mark.parametrize("fim", [None, partial(FIM, rate=1.0)])
def test_both_parts_are_packed_as_asked(fim: Any, folders: list[str]) -> None:
    """Only training rows are rearranged, whatever they are packed by."""
    for packing, kind in (("concat", PackedRows), ("best_fit", BestFitRows)):
        options: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 600, "held_out": 0.2, "fim": fim}
        data = prepare(folders, packing=packing, **options)  # type: ignore[arg-type]
        for folder in folders:
            train: Any = data.train[folder]
            assert type(train) is (kind if fim is None else FIMRows) and type(data.validation[folder]) is kind
            assert fim is None or type(train.rows) is kind


def test_files_of_tokens_are_rearranged_in_their_rows_alone(folders: list[str], tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.save(tmp_path / "tokenizer.json")
    texts = [d.text for d in load(folders[0])]
    write_ds(tmp_path / "x.ds", tokenizer.encode_batch(texts), vocab_size=264, eot_id=tokenizer.eot_id)
    options: dict[str, Any] = {"tokenizer": str(tmp_path / "tokenizer.json"), "seq_len": 64, "fim": FIM}
    name = str(tmp_path / "x.ds")
    data = prepare([name], held_out=0.25, **options)
    assert isinstance(data.train[name], FIMRows) and isinstance(data.validation[name], PackedRows)
    whole = prepare([name], held_out=0, **options)
    assert (
        whole.validation == {} and len(whole.train[name]) == (sum(len(text.encode()) + 1 for text in texts) - 1) // 64
    )
    with pytest.raises(ValueError, match="fim_unit='document' needs texts; token files support fim_unit='context'"):
        prepare([name], fim_unit="document", **options)
    with pytest.raises(ValueError, match="fim_unit must be 'context' or 'document'; got 'row'"):
        prepare(folders, fim_unit="row", seq_len=16)  # type: ignore[arg-type]


def test_nothing_held_out_is_nothing_at_the_end_either(folders: list[str]) -> None:
    one, said = folders[0], list[str]()
    data = prepare([one], tokenizer="bytes", seq_len=16, held_out=0, split={one: "end"}, say=said.append)
    assert data.validation == {} and said == []
    assert len(stream_text(data.train[one], data.tokenizer)) == 40


def test_what_there_is_to_say_is_a_warning_unless_somebody_listens(tmp_path: Path) -> None:
    folder, _ = small(tmp_path, 1, 5000)
    Path(folder, "x.pdf").touch()
    options: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 64}
    with pytest.warns(UserWarning, match="left out|validating") as warned:
        prepare([folder], **options)
    told = [str(w.message) for w in warned]
    said: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare([folder], say=said.append, **options)
    assert said == told and len(said) == 2
    assert "1 file of another kind is left out: .pdf (1)" in said[0] and ": validating on the last " in said[1]


def test_a_folder_with_the_suffix_of_tokens_holds_texts(tmp_path: Path) -> None:
    for suffix in (".ds", ".bin"):
        (folder := tmp_path / f"x{suffix}").mkdir()
        (folder / "a.txt").write_text("some text " * 30)
        data = prepare([str(folder)], tokenizer="bytes", seq_len=16, held_out=0)
        assert text_of(data.train[str(folder)], data.tokenizer).startswith("some text")


@pytest.mark.parametrize(("text", "advice"), [("a", ""), ("ab", ", or use a seq_len of at most 2")])
def test_only_a_length_that_is_possible_is_advised(text: str, advice: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ValueError, match=rf"it has {len(text) + 1}; give it more text{advice}$"):
        prepare([str(tmp_path / "a.txt")], tokenizer="bytes", seq_len=8, held_out=0)


def test_documents_that_are_all_held_out_leave_nothing_to_train_on(folders: list[str]) -> None:
    one = folders[0]
    options: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 16, "split": {one: "documents"}}
    with pytest.raises(ValueError, match=r"has no document for training at held_out=0\.9999999; split='end' holds out"):
        prepare([one], held_out=1 - 1e-7, **options)


def test_a_unit_without_a_rule_is_of_no_meaning(folders: list[str]) -> None:
    data = prepare(folders, tokenizer="bytes", seq_len=600, held_out=0, packing="best_fit", fim_unit="document")
    assert all(isinstance(rows, BestFitRows) for rows in data.train.values())


def test_what_is_just_allowed_is_taken(folders: list[str]) -> None:
    """The size of a new vocabulary is of no meaning to another tokenizer."""
    pytest.importorskip("tokenizers")
    one = folders[0]
    usual: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 16, "held_out": 0}
    assert prepare([one], **usual | {"seq_len": 2}).train[one].batch([0]).tokens.shape == (1, 2)
    assert prepare([one], **usual, vocab_size=1).tokenizer.vocab_size == 264
    assert prepare([one], **usual | {"tokenizer": "bpe"}, vocab_size=261).tokenizer.vocab_size == 261
    for wrong, message in (
        ({"tokenizer": "bpe", "vocab_size": 260}, "got 260"),
        ({"held_out": -0.1}, "held_out must be in"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare([one], **usual | wrong)


def test_each_source_is_split_by_its_own_choice(folders: list[str], tmp_path: Path) -> None:
    """The end is held out of one that asks for it, of one file, and of two whose second is too short for a row."""
    (one := tmp_path / "file").mkdir()
    (two := tmp_path / "files").mkdir()
    (one / "0.txt").write_text("one text " * 600)
    (two / "0.txt").write_text("another text " * 500)
    (two / "14.txt").write_text("abc")  # which is held out by its name
    asked, usual = folders
    sources, said = [asked, usual, str(one), str(two)], list[str]()
    options: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 64, "held_out": 0.1}
    data = prepare(sources, split={asked: "end"}, say=said.append, **options)
    assert data.split == {asked: "end", usual: "documents", str(one): "end", str(two): "end"}
    few = "; it has too few documents to hold out whole ones"
    told = {asked: "", str(one): few, str(two): few}
    assert [(line.partition(": ")[0], line.partition("% of its text")[2]) for line in said] == [*told.items()]
    for source, how in data.split.items():
        alone = prepare([source], split={source: how}, say=[].append, **options)
        for part, same in ((data.train, alone.train), (data.validation, alone.validation)):
            assert text_of(part[source], data.tokenizer) == text_of(same[source], data.tokenizer)


def test_tokens_need_the_tokenizer_that_they_are_of(tmp_path: Path) -> None:
    tokenizer, path = ByteTokenizer(), tmp_path / "x.ds"
    tokenizer.save(tmp_path / "tokenizer.json")
    write_ds(path, [np.array([1, 2, 300])] * 40, vocab_size=8192, eot_id=tokenizer.eot_id)
    options: dict[str, Any] = {"seq_len": 16, "held_out": 0}
    for named in ("bpe", "bytes"):
        with pytest.raises(ValueError, match=rf"the tokenizer\.json they were written with; got tokenizer='{named}'"):
            prepare([str(path)], tokenizer=named, **options)
    with pytest.raises(ValueError, match=r"is 300; ids must be in \[0, vocab_size=264\)"):
        prepare([str(path)], tokenizer=str(tmp_path / "tokenizer.json"), **options)


def test_a_split_of_nothing_is_by_documents(folders: list[str], tmp_path: Path) -> None:
    """Also of a single file, which would be cut if any of it were held out; there is nothing to say of that."""
    folder, _ = small(tmp_path, 1, 5000)
    for sources in ([folder], [*folders, folder]):
        said: list[str] = []
        data = prepare(sources, tokenizer="bytes", seq_len=16, held_out=0, say=said.append)
        assert data.split == dict.fromkeys(sources, "documents") and data.validation == {} and said == []


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_text_begins_with_the_tokenizers_own_ids(
    kind: str, packing: Any, folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts for training as for validation; of an empty one there is nothing."""
    tokenizer: Tokenizer = BPETokenizer.train(["lorem ipsum"] * 2, 270) if kind == "bpe" else ByteTokenizer()
    tokenizer.save(path := tmp_path / "tokenizer.json")
    options: dict[str, Any] = {"tokenizer": str(path), "seq_len": 600, "packing": packing, "held_out": 0.3}
    plain = prepare(folders, **options)
    start = (1, 2)
    monkeypatch.setattr(dataset, "load_tokenizer", lambda name: starting(tokenizer, start))
    begun = prepare(folders, **options)
    for folder in folders:
        for part, same in ((begun.train, plain.train), (begun.validation, plain.validation)):
            found, wanted = (documents_of(rows[folder]) for rows in (part, same))
            assert [d[:2] for d in found] == [[*start]] * len(found)
            n = min(len(found), len(wanted)) - 1
            if packing == "concat":
                assert n > 1 and [d[2:] for d in found[:n]] == wanted[:n]
    assert [ids.tolist() for ids in dataset._encoded(["", "a"], starting(ByteTokenizer(), start))] == [[], [1, 2, 97]]


def starting(tokenizer: Tokenizer, start: tuple[int, ...]) -> Tokenizer:
    tokenizer.start_ids = start  # type: ignore[misc]
    return tokenizer


def documents_of(rows: Rows) -> list[list[int]]:
    assert isinstance(rows, PackedRows)
    found = [part.tolist() for part in np.split(rows.tokens, rows.document_starts[1:])]
    return [ids for ids in found if ids[0] >= 0]
