"""A cache by content: what is kept, for how long, and that damage does no harm."""

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmfast.data import BPETokenizer, prepare
from llmfast.data import cache as module
from llmfast.data.cache import cached_ids, cached_texts


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMFAST_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(module, "LEAST_CHARACTERS", 5)
    return tmp_path / "kept"


def lengths(texts: list[str], how: str = "a") -> tuple[list[list[int]], bool]:
    """Return each text's code points by way of the cache, and whether they were computed."""
    made: list[int] = []

    def make() -> list[Any]:
        made.append(1)
        return [np.array([ord(c) for c in text], dtype=np.int32) for text in texts]

    return [part.tolist() for part in cached_ids(texts, how, make)], bool(made)


def test_the_same_content_is_computed_once(kept: Path) -> None:
    texts = ["abc", "", "déjà vu"]
    expected = [[ord(c) for c in text] for text in texts]
    assert lengths(texts) == (expected, True) and lengths(texts) == (expected, False)
    for other in (["abc", "déjà vu", ""], ["abcd", "", "éjà vu"], ["abc", "déjà vu"]):
        assert lengths(other) == ([[ord(c) for c in text] for text in other], True)
    assert lengths(texts, "b") == (expected, True)
    made = ["x", "", "é\ud800"]
    assert cached_texts(texts, "c", lambda: made) == made == cached_texts(texts, "c", lambda: [])


def test_damaged_entries_are_computed_again(kept: Path) -> None:
    expected, _ = lengths(["abcdef"])
    (entry,) = kept.iterdir()
    content = bytearray(entry.read_bytes())
    content[content.index(b"f\0\0\0")] += 1
    for damaged in (bytes(content), b"", b"PK", bytes(content[:100])):
        entry.write_bytes(damaged)
        assert lengths(["abcdef"]) == (expected, True)
        assert lengths(["abcdef"]) == (expected, False)


def test_nothing_is_kept_of_short_texts_or_without_a_folder(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lengths(["abcd"])[1] and lengths(["abcd"])[1] and not kept.exists()
    monkeypatch.setenv("LLMFAST_CACHE", "")
    assert lengths(["abcdef"])[1] and lengths(["abcdef"])[1] and not kept.exists()


def test_a_disk_that_is_full_keeps_nothing_of_an_entry(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert lengths(["abcdef"])[1] and lengths(["abcdef"])[1]
    assert list(kept.iterdir()) == []


def test_a_folder_that_cannot_be_written_does_no_harm(kept: Path) -> None:
    kept.write_text("a file")
    assert lengths(["abcdef"])[1] and lengths(["abcdef"])[1] and kept.read_text() == "a file"


def test_the_least_recently_used_entries_go(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, text in enumerate(("first one", "second one", "third one")):
        lengths([text])
        (newest,) = (path for path in kept.iterdir() if path.stat().st_mtime > 1000)
        os.utime(newest, (i, i))
    lengths(["first one"])  # used again
    size = max(path.stat().st_size for path in kept.iterdir())
    monkeypatch.setattr(module, "MOST_BYTES", 2 * size + size // 2)
    lengths(["fourth one"])
    assert [path.suffix for path in kept.iterdir()] == [".npz"] * 2
    assert not lengths(["fourth one"])[1] and not lengths(["first one"])[1] and lengths(["second one"])[1]


def test_files_of_others_stay_and_what_a_kill_left_goes(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`LLMFAST_CACHE` may name a folder with other files, which must not be taken for old entries."""
    monkeypatch.setattr(module, "MOST_BYTES", 1 << 20)
    (kept / "folder").mkdir(parents=True)
    for name in ("weights.npz", "thesis.txt", f"{'a' * 40}.npz", f"{'b' * 40}.x1_y.partial"):
        (kept / name).write_bytes(bytes(1 << 20))
        os.utime(kept / name, (1, 1))
    lengths(["a text"])
    others = {path.name for path in kept.iterdir()}
    assert {"folder", "weights.npz", "thesis.txt"} < others and len(others) == 4


def test_another_vocabulary_is_another_tokenizer(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("".join(f"Line {i} is about the number {i}.\n" for i in range(400)))
    source = f"mine={tmp_path / 'text.txt'}"
    sizes = [prepare([source], vocab_size=n, seq_len=16, held_out=0.1).tokenizer.vocab_size for n in (300, 320, 300)]
    assert sizes == [300, 320, 300] and len(list(kept.iterdir())) > 0


def test_data_are_the_same_from_the_cache(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"Document {i} is about the number {i}. " * 5)

    def rows() -> list[Any]:
        data = prepare([f"mine={tmp_path / 'texts'}"], vocab_size=300, seq_len=16, held_out=0.1)
        parts = [part["mine"] for part in (data.train, data.validation)]
        return [part.batch(np.arange(len(part))).tokens.tolist() for part in parts] + [
            data.tokenizer.encode("about it")
        ]

    monkeypatch.setenv("LLMFAST_CACHE", "")
    *expected, ids = rows()
    monkeypatch.setenv("LLMFAST_CACHE", str(kept))
    assert rows()[:2] == expected and len(list(kept.iterdir())) == 3

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(BPETokenizer, "train", never)
    encode = BPETokenizer.encode_batch
    monkeypatch.setattr(
        BPETokenizer, "encode_batch", lambda self, texts: encode(self, texts) if len(texts) == 1 else never()
    )
    *again, same = rows()
    assert again == expected and same.tolist() == ids.tolist()


def test_how_much_is_kept() -> None:
    assert (module.LEAST_CHARACTERS, module.MOST_BYTES) == (1_000_000, 20 * 2**30)


def test_a_text_of_just_enough_characters_is_kept(kept: Path) -> None:
    assert lengths(["abc", "de"])[1] and not lengths(["abc", "de"])[1]


def test_the_cache_is_in_the_home_unless_told(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMFAST_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert lengths(["abcdef"])[1] and not lengths(["abcdef"])[1]
    assert [path.suffix for path in (tmp_path / "home" / ".cache" / "llmfast").iterdir()] == [".npz"]
    assert not kept.exists()


def test_what_a_kill_leaves_is_known_by_its_name(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(os, "replace", lambda partial, file: names.append(Path(partial).name))
    lengths(["abcdef"])
    assert [path.name for path in kept.iterdir()] == names and module._ENTRY.fullmatch(names[0])


def test_texts_of_half_a_character_are_told_apart(kept: Path) -> None:
    for text in ("abcd\ud800", "abcd\ud801"):
        assert lengths([text]) == ([[*map(ord, text)]], True) and not lengths([text])[1]


def test_entries_that_just_fit_stay(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("first one", "again one"):
        lengths([text])
    monkeypatch.setattr(module, "MOST_BYTES", 3 * max(path.stat().st_size for path in kept.iterdir()))
    lengths(["third one"])  # each takes as much
    assert len(list(kept.iterdir())) == 3


def test_ids_of_another_tokenizer_are_others(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts are encoded with tokenizers that differ in their merges alone."""
    (tmp_path / "text.txt").write_text("".join(f"Line {i} is about the number {i}.\n" for i in range(200)))
    files = [str(tmp_path / f"{name}.json") for name in ("one", "other")]
    for file, text in zip(files, ("is about the number", "tuoba si rebmun eht")):
        BPETokenizer.train([text] * 9, 280).save(file)

    def rows(file: str) -> Any:
        data = prepare([f"mine={tmp_path / 'text.txt'}"], tokenizer=file, seq_len=16, held_out=0.1, say=[].append)
        return data.train["mine"].batch([0, 1, 2]).tokens.tolist()

    found = [rows(file) for file in files]
    monkeypatch.setenv("LLMFAST_CACHE", "")
    assert found == [rows(file) for file in files] and found[0] != found[1]


def test_another_version_of_the_tokenizers_trains_and_encodes_again(
    kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("".join(f"Line {i} is about the number {i}.\n" for i in range(200)))

    def entries() -> int:
        prepare([str(tmp_path / "text.txt")], vocab_size=280, seq_len=16, held_out=0.1, say=[].append)
        return len(list(kept.iterdir()))

    first = entries()
    assert entries() == first == 3  # the tokenizer, and the ids of both parts
    monkeypatch.setattr(BPETokenizer, "recipe", lambda *_: "another")
    assert entries() == 2 * first
