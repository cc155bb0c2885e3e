"""Messages of errors, word for word: they are all that a user is told."""

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfast.data import (
    FIM,
    BPETokenizer,
    ByteTokenizer,
    Mixture,
    load,
    load_tokenizer,
    pack_best_fit,
    prepare,
    sources,
)
from llmfast.data.fim import SENTINELS
from llmfast.data.mixture import continued_weights
from llmfast.data.token_files import read_ds, read_megatron, write_ds

PRE, MID, SUF = (ByteTokenizer.special_ids[sentinel] for sentinel in SENTINELS)


class Prefixed(ByteTokenizer):
    """A tokenizer that begins every text with a space."""

    def encode(self, text: str) -> np.ndarray:
        return super().encode(" " + text)


def says(message: str) -> str:
    return f"^{re.escape(message)}$"


def written(path: Path, **options: Any) -> Any:
    return write_ds(path / "x.ds", [np.array([1, 2])], **{"vocab_size": 1000, "eot_id": 999, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prepare([]), "sources must name at least one source; got none"),
        (lambda: prepare(["code"] * 2), "sources must not repeat; got ['code', 'code']"),
        (
            lambda: prepare(["code"], fim=FIM, fim_unit="document", packing="best_fit"),
            "fim_unit='document' needs packing='concat'; got packing='best_fit'",
        ),
        (lambda: load("nowhere"), "a file or folder that exists (of a folder, .md, .py, .rst, .txt, .jsonl, "),
        (lambda: continued_weights([], ["old"]), "target must name at least one source; got none"),
        (lambda: continued_weights([], ["old"], replay=False), "target must name at least one source; got none"),
        (lambda: continued_weights(["new"], []), "general must name at least one source to replay; got none"),
        (lambda: Mixture({"a": 3}, {}, total=9).resumed({"rows": 1}, 3), "this is not the state of a mixture: {'rows'"),
        (
            lambda: Mixture({"a": 3}, {}, total=9).sequences(2, 1),
            "start and stop must satisfy 0 <= start <= stop; got 2 and 1",
        ),
        (
            lambda: FIM(ByteTokenizer()).undo([PRE, 1, SUF]),
            "ids must be in an order that FIM makes; got sentinels at {",
        ),
        (lambda: FIM(Prefixed()), "tokenizer must keep pieces of a text as they are, for level='char'; \" Def f(x)"),
        (lambda: FIM(Prefixed()), "1,5\". Use level='token'"),
        (lambda: BPETokenizer.train(["", ""]), "texts must hold at least one non-empty text"),
        (lambda: BPETokenizer.train("text"), "texts must be an iterable of strings; got one string"),
        (lambda: pack_best_fit([np.arange(3)], 0, 9), "seq_len must be at least 1; got 0"),
    ],
)
def test_what_is_wrong_with_an_argument(call: Callable[[], object], message: str) -> None:
    pytest.importorskip("tokenizers")
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value)


def test_why_a_source_cannot_be_split(tmp_path: Path) -> None:
    (file := tmp_path / "a.txt").write_text("some text")
    usual: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 16, "split": {str(file): "documents"}}
    for held_out, part in ((1 - 1e-7, "training"), (1e-9, "validation")):
        wanted = f"source '{file}' has no document for {part} at held_out={held_out}; split='end' holds out a part of "
        with pytest.raises(ValueError, match=says(wanted + "its text")):
            prepare([str(file)], held_out=held_out, **usual)
    with pytest.raises(
        ValueError,
        match=says(
            f"source '{file}': its training part is too small: one row of seq_len=16 needs 17 tokens, and it has 10; "
            "give it more text, or use a seq_len of at most 9"
        ),
    ):
        prepare([str(file)], held_out=0, **usual)


def test_a_python_without_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing: Mapping[str, Callable[[], Iterator[Any]]] = {"code": lambda: iter([])}
    monkeypatch.setattr(sources, "BUILT_IN", nothing)
    with pytest.raises(
        ValueError, match=says("source 'code' is empty: this Python has no sources in its standard library folder")
    ):
        load("code")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_where_a_file_is_broken(name: str, tmp_path: Path) -> None:
    pytest.importorskip({"zst": "zstandard", "parquet": "pyarrow"}.get(name.rpartition(".")[2], "gzip"))
    whole = gzip.compress(json.dumps({"text": "x" * 99}).encode())
    (file := tmp_path / name).write_bytes(whole[:-9] if name.endswith("gz") else b"neither")
    kind, place = {"gz": ("gzip", "line"), "zst": ("zstd", "line"), "parquet": ("Parquet", "row")}[name.split(".")[-1]]
    with pytest.raises(ValueError, match=says(f"{file} is damaged, broken {kind} from here on: {name}, {place} 1")):
        load(str(file))


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("{", None, "{file} is not a tokenizer file: Expecting"),
        ("{}", None, "{file} is not a tokenizer file: "),
        ("", "{", "{folder}/tokenizer_config.json is not a tokenizer's settings: Expecting"),
        ("", '{"eos_token": 5}', "{folder}/tokenizer_config.json must name its eos_token; got 5"),
    ],
)
def test_what_is_wrong_with_a_tokenizer(content: str, settings: str | None, message: str, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    BPETokenizer.train(["some text"], 261).save(file := tmp_path / "tokenizer.json")
    if content:
        file.write_text(content)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_tokenizer(file)
    assert str(caught.value).startswith(message.format(file=file, folder=tmp_path))


def test_a_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(
        ImportError, match=says("the BPE tokenizer needs `tokenizers`: pip install 'llmfast-torch[data]'")
    ):
        BPETokenizer.train(["a"])


def test_what_is_wrong_with_a_file_of_tokens(tmp_path: Path) -> None:
    file = written(tmp_path)
    loss = Path(f"{file.path}.loss")
    for call, message in (
        (lambda: written(tmp_path, tokenizer_name="a|b"), "tokenizer_name must be one line without |; got 'a|b'"),
        (lambda: file.split(0.5, "rows"), "how must be one of 'documents', 'end'; got 'rows'"),
        (lambda: file.split(0.5), "held_out=0.5 of 1 documents leaves a part without any"),
        (lambda: file.split(0.9), "held_out=0.9 of 1 documents leaves a part without any"),
        (lambda: file.rows(0), "seq_len must be at least 1; got 0"),
        (lambda: file.rows(3), f"one row of seq_len=3 needs 4 tokens; the documents of {file.path} have 3"),
    ):
        with pytest.raises(ValueError, match=says(message)):
            call()
    loss.touch()
    without = f"{loss}: loss masks are not read; without that file, every token is trained on"
    with pytest.raises(ValueError, match=says(without)):
        read_ds(file.path, vocab_size=1000)
    earlier = f"{loss} must not exist: it masks the tokens of an earlier file; remove it first"
    with pytest.raises(ValueError, match=says(earlier)):
        written(tmp_path)


def test_where_an_index_of_megatron_contradicts_itself(tmp_path: Path) -> None:
    counts = (2).to_bytes(8, "little") + (3).to_bytes(8, "little")
    (index := tmp_path / "x.idx").write_bytes(b"MMIDIDX\0\0" + (1).to_bytes(8, "little") + bytes([8]) + counts)
    (tmp_path / "x.bin").touch()
    message = f"{index} says 2 sequences at byte 18 and 3 document bounds at byte 26, so it must end at byte 82; it "
    with pytest.raises(ValueError, match=says(message + "ends at 34")):
        read_megatron(tmp_path / "x.bin", vocab_size=9)
