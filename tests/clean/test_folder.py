"""Arguments of a cleaning, without running it; tests/test_clean.py runs it."""

import re
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from llmfast.clean import Stage, clean, folder
from llmfast.data.tokenizer import BPETokenizer, ByteTokenizer

for needed in folder.NEEDED:
    pytest.importorskip(needed)
pipelines = pytest.importorskip("llmfast.clean.pipelines")


def test_the_report_says_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no more processes than files, and places are the real ones, where links lead."""
    BPETokenizer.train(["some text"], 261).save(tokenizer := tmp_path / "tokenizer.json")
    asked: list[Any] = []

    def run_nothing(self: Any, root: Path, names: list[str], language: str, model: Any) -> list[Stage]:
        asked.append((self.workers, self.text_column, root, names, language, model))
        return [Stage("read", "", 2, 2, 9, bytes_out=9, reasons={}, samples={})]

    monkeypatch.setattr(pipelines.Pipelines, "run", run_nothing)
    (corpus := tmp_path / "in").mkdir()
    (tmp_path / "link").symlink_to(corpus)
    for name in ("a.txt", "b.txt", "model"):
        (corpus / name).touch()
    own: dict[str, Any] = {"tokenizer": tokenizer, "language": "de"}
    for options, settings, workers, passed in (
        (own, {"tokenizer": str(tokenizer), "language": "de"}, 1, ("de", None)),
        ({"workers": 5, "text_column": "body"}, {"workers": "5"}, 2, ("en", None)),
        (
            {"language_model": tmp_path / "link/model"},
            {"language_model": f"{corpus}/model"},
            1,
            ("en", corpus / "model"),
        ),
    ):
        report = clean(tmp_path / "link", tmp_path / f"out{len(asked)}", **options)
        usual = {"language": "en", "language_model": "py3langid", "tokenizer": "none", "workers": "1"}
        assert report.settings == {
            **{"inputs": str(corpus), "datatrove": metadata.version("datatrove")},
            **usual,
            **settings,
        }
        column = options.get("text_column", "text")
        assert asked[-1] == (workers, column, corpus, ["a.txt", "b.txt"], *passed) and report.documents == 2
    # Another model may know a language that py3langid does not.
    other = clean(corpus, tmp_path / "other", language="frr", language_model=corpus / "model")
    assert other.settings["language"] == "frr" and asked[-1][-2:] == ("frr", corpus / "model")


@pytest.mark.parametrize(
    ("there", "overwrite", "refused"),
    [
        ({"report.json": "file", "logs": "folder"}, False, "use overwrite to replace it"),
        ({"report.json": "file", "logs": "folder"}, True, ""),
        ({"report.json": "file"}, True, "llmfast clean did not write it"),
        ({"logs": "folder"}, True, "llmfast clean did not write it"),
        ({"report.json": "folder", "logs": "folder"}, True, "llmfast clean did not write it"),
        ({"report.json": "file", "logs": "file"}, True, "llmfast clean did not write it"),
        ({"notes.txt": "file"}, False, "llmfast clean did not write it"),
        ({}, False, ""),
    ],
)
def test_what_is_replaced_was_written_by_it(
    there: dict[str, str], overwrite: bool, refused: str, tmp_path: Path
) -> None:
    (output := tmp_path / "out").mkdir()
    (source := tmp_path / "a.txt").write_text("x")
    for name, kind in there.items():
        (output / name).touch() if kind == "file" else (output / name).mkdir()
    with pytest.raises(FileExistsError, match=f"^output exists: {output}; {refused}") if refused else nullcontext():
        folder._check_folders(source, output, overwrite)
    (file := tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=f"^output exists: {file}; llmfast clean did not write it"):
        folder._check_folders(source, file, overwrite)
    folder._check_folders(source, tmp_path / "new", overwrite)


def test_what_is_wrong_with_an_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages are whole; nothing is written."""
    (source := tmp_path / "in").mkdir()
    (source / "a.txt").write_text("x")
    (other := tmp_path / "other").mkdir()
    (other / "mine").touch()
    monkeypatch.setattr(folder.os.path, "ismount", lambda path: Path(path).name == "mounted")
    byte = tmp_path / "bytes.json"
    ByteTokenizer().save(byte)
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("new", {"text_column": ""}, "text_column must name a column; got ''"),
        ("new", {"workers": 0}, "workers must be at least 1; got 0"),
        ("in/new", {}, f"output and inputs must not contain each other; got {source}/new and {source}"),
        ("mounted", {}, f"output must be a folder that is not a mount point; got {tmp_path}/mounted"),
        ("new", {"language_model": tmp_path / "no.bin"}, f"no such file: language_model {tmp_path}/no.bin"),
        ("other", {}, f"output exists: {other}; llmfast clean did not write it and will not replace it"),
        (
            *("new", {"tokenizer": byte}),
            f"tokenizer must be a tokenizer.json that `tokenizers` reads; {byte} is llmfast's byte tokenizer",
        ),
    ]
    for output, options, message in cases:
        with pytest.raises((ValueError, OSError), match=f"^{re.escape(message)}$"):
            clean(source, tmp_path / output, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bytes.json", "in", "other"]
