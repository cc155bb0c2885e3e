"""Every kind of file gives the same documents, and what is not read is said."""

import builtins
import codecs
import gzip
import json
import math
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from llmfast.data import Document, load, reader, text_files
from llmfast.data.reader import SUFFIXES, find, read

pyarrow = pytest.importorskip("pyarrow")
pyarrow_parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = ["first\n", "zweiter é", "third <|endoftext|>"]


def zst(content: bytes) -> bytes:
    """Compress into two frames, like concatenated files."""
    half = len(content) // 2
    return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))


def parquet(path: Path, **columns: Any) -> None:
    pyarrow_parquet.write_table(pyarrow.table(columns), path)


PACKED: dict[str, Callable[[bytes], bytes]] = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zst}


def write_table(path: Path, texts: list[str], column: str = "text") -> None:
    """Write a file with columns, of the kind given by its suffix."""
    if path.suffix == ".parquet":
        parquet(path, **{column: texts, "n": range(len(texts))})
        return
    lines = "".join(json.dumps({column: text, "n": n}) + "\n" for n, text in enumerate(texts))
    path.write_bytes(PACKED["".join(path.suffixes)](lines.encode()))


def say_nothing(text: str) -> None:
    pytest.fail(text)


@pytest.mark.parametrize("suffix", [*PACKED, ".parquet"])
def test_a_row_is_a_document(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / f"a{suffix}", TEXTS)
    expected = [Document(f"a{suffix}/{i}", text) for i, text in enumerate(TEXTS)]
    assert load(str(tmp_path), say=say_nothing) == expected == load(str(tmp_path / f"a{suffix}"), say=say_nothing)


@pytest.mark.parametrize("suffix", [*PACKED, ".parquet"])
def test_another_column_can_be_the_text_and_a_wrong_one_is_told_the_columns(suffix: str, tmp_path: Path) -> None:
    write_table(tmp_path / f"a{suffix}", TEXTS, column="content")
    assert [d.text for d in load(str(tmp_path), text_column="content", say=say_nothing)] == TEXTS
    for where in (tmp_path, tmp_path / f"a{suffix}"):
        with pytest.raises(ValueError, match=r"no text in a column 'text' .*whose columns are 'content', 'n'"):
            load(str(where))


def test_columns_are_told_of_the_line_that_has_them(tmp_path: Path) -> None:
    # unsloth#7195: a line may be any JSON, and a string may contain the name of the column.
    (tmp_path / "a.jsonl").write_text('"some text"\n["text"]\n42\nnull\n{"text": "kept"}\n{"Text": "x"}\n')
    said: list[str] = []
    assert load(str(tmp_path), say=said.append) == [Document("a.jsonl/4", "kept")]
    assert said == [
        f"{tmp_path}: 5 documents are left out: no text (5, the first in a.jsonl, line 1; the columns of a.jsonl, "
        "line 6 are 'Text')"
    ]


def test_without_a_text_column_files_with_columns_are_left_out(tmp_path: Path) -> None:
    write_table(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.txt").write_text("b")
    said: list[str] = []
    assert load(str(tmp_path), text_column="", say=said.append) == [Document("b.txt", "b")]
    assert said == [f"{tmp_path}: 1 file of another kind is left out: .jsonl (1)"]


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".parquet"])
def test_a_byte_order_mark_is_no_content(suffix: str, tmp_path: Path) -> None:
    mark, path = b"\xef\xbb\xbf", tmp_path / f"a{suffix}"
    if suffix in PACKED:  # also in the middle, where two files were joined
        path.write_bytes(PACKED[suffix](b"".join(mark + json.dumps({"text": t}).encode() + b"\r\n" for t in TEXTS)))
    else:
        path.write_bytes(mark + TEXTS[0].encode())
    expected = TEXTS if suffix in PACKED else TEXTS[:1]
    assert [document.text for document in load(str(tmp_path), say=say_nothing)] == expected


def test_a_broken_line_costs_that_line_and_is_called_what_it_is(tmp_path: Path) -> None:
    lines = [
        b'{"text": "kept", "score": NaN, "other": "\\ud800", "many": ' + b"9" * 5000 + b"}",
        b"{broken",
        b"",
        b'["a list"]',
        b'{"text": 7}',
        b'{"text": " "}',
        b'{"text": "half \\udc00 a pair"}',
        b'{"text": "latin \xe9"}',
        b'{"text": "x", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"{broken too",
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    said: list[str] = []
    assert load(str(tmp_path), say=said.append) == [Document("a.jsonl/0", "kept")]
    assert said == [
        f"{tmp_path}: 8 documents are left out: not JSON (2, the first in a.jsonl, line 2), "
        "no text (2, the first in a.jsonl, line 4), blank (1, a.jsonl, line 6), lone surrogate (1, a.jsonl, line 7), "
        "not UTF-8 (1, a.jsonl, line 8), nested too deeply (1, a.jsonl, line 9)"
    ]


def test_a_broken_row_costs_that_row(tmp_path: Path) -> None:
    bad = pyarrow.array([b"kept", b"\xff", None, b" "], pyarrow.binary())
    column = pyarrow.Array.from_buffers(pyarrow.string(), 4, bad.buffers())  # nobody checks that it is UTF-8
    parquet(tmp_path / "a.parquet", text=column)
    said: list[str] = []
    assert load(str(tmp_path), say=said.append) == [Document("a.parquet/0", "kept")]
    assert "3 documents are left out: not UTF-8 (1, a.parquet, row 2), no text (1, a.parquet, row 3" in said[0]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_a_file_that_is_cut_off_is_an_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_table(path, [f"{i} {os.urandom(50).hex()}" for i in range(3000)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=rf"a{suffix} is damaged, broken .* from here on: a{suffix}, (line|row) \d+"):
        load(str(tmp_path))
    path.write_bytes(b"neither")
    with pytest.raises(ValueError, match=rf"a{suffix} is damaged, .*: a{suffix}, (line|row) 1$"):
        load(str(tmp_path))


def test_what_a_folder_holds_besides_is_counted_once(tmp_path: Path) -> None:
    for name in ("a.txt", "x.pdf", "deep/y.pdf", "deep/z.docx", "Makefile", "blank.md", "deep/blank.txt", ".git/x.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text" if "blank" not in name else "\n")
    (tmp_path / "elsewhere").symlink_to(tmp_path.parent)
    (tmp_path / "gone.txt").symlink_to("nowhere")
    with pytest.warns(UserWarning, match="left out") as warned:
        assert list(text_files(tmp_path)) == [Document("a.txt", "text")]
    assert [str(w.message) for w in warned] == [
        f"{tmp_path}: 6 files of other kinds are left out: .pdf (2), (none) (1), .docx (1), link to a folder (1), "
        "neither file nor folder (1)",
        f"{tmp_path}: 2 documents are left out: blank (2, the first in blank.md)",
    ]
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"no text in .*\.parquet; 6 files of other kinds are left out: \.pdf \(2\)"):
        load(str(tmp_path))


def test_of_a_cleaned_folder_only_what_was_kept_is_read(tmp_path: Path) -> None:
    cleaned = tmp_path / "in" / "cleaned"
    for name in ("text/00000.jsonl", "removed/c4/00000.jsonl", "logs/x.txt", "report.json", "report.md"):
        (cleaned / name).parent.mkdir(parents=True, exist_ok=True)
        (cleaned / name).write_text(json.dumps({"text": name}))
    said: list[str] = []
    for where in (cleaned, cleaned.parent):
        assert [document.text for document in load(str(where), say=said.append)] == ["text/00000.jsonl"]
    assert said == [
        f"{cleaned}: it was written by llmfast clean; of that only text/ is read",
        f"{cleaned.parent}: cleaned was written by llmfast clean; of that only text/ is read",
    ]


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scandir = os.scandir

    def refuse(path: Any) -> Any:  # root may read all
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="closed"):
        find(tmp_path, SUFFIXES)


def test_skipped_folders_are_not_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own folder holds all installed packages, which can be tens of thousands of files."""
    for name in ("a.py", "in/b.py", "in/site-packages/deep/c.py", "site-packages/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1")
    entered, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(Path(path)) or scandir(path))
    assert [name for name, _ in find(tmp_path, (".py",), {"site-packages"}).files] == ["a.py", "in/b.py"]
    assert entered == [tmp_path, tmp_path / "in"]


@pytest.mark.parametrize(("suffix", "package"), [(".parquet", "pyarrow"), (".jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_with_its_extra(
    suffix: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table(tmp_path / f"a{suffix}", TEXTS)
    monkeypatch.setitem(sys.modules, package, None)
    for where in (tmp_path, tmp_path / f"a{suffix}"):
        with pytest.raises(ImportError, match=rf"needs {package}: pip install 'llmfast-torch\[formats\]'"):
            load(str(where))


def test_other_columns_are_read_only_where_they_are_wanted(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", TEXTS)
    assert [r.columns for r in read(tmp_path / "a.parquet", "a.parquet")] == [{}] * 3
    assert [r.columns for r in read(tmp_path / "a.parquet", "a.parquet", whole=True)] == [{"n": i} for i in range(3)]


@pytest.mark.parametrize(
    ("encoding", "name", "by"),
    [
        ("latin-1", "Latin-1", "WINDOWS-1252"),
        ("cp1252", "Latin-1", "WINDOWS-1252"),
        ("utf-16", "UTF-16", "UTF-16"),
        ("utf-16-le", "UTF-16", "UTF-16LE"),  # without a byte order mark, this text is also UTF-8
        ("utf-16-be", "UTF-16", "UTF-16BE"),
        ("utf-32", "UTF-32", "UTF-32"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".py"])
def test_files_in_other_encodings_are_told_with_the_command_that_converts_them(
    suffix: str, encoding: str, name: str, by: str, tmp_path: Path
) -> None:
    text = "plain text in lines\n" * 20 if encoding.startswith("utf-16-") else "café au lait, déjà vu\n"
    folder = tmp_path / "a folder"
    folder.mkdir()
    (old := folder / f"a{suffix}").write_bytes(text.encode(encoding))
    for where in (folder, old):
        with pytest.raises(ValueError, match=r"is not UTF-8 text: a\.") as caught:
            load(str(where))
        command = f"iconv -f {by} -t UTF-8 '{old}' > NEW"
        assert str(caught.value).endswith(f"; if it is {name}, convert it: {command}; or leave it out")
    if shutil.which("iconv"):
        converted = subprocess.run(command.removesuffix(" > NEW"), shell=True, capture_output=True, check=True).stdout
        old.write_bytes(converted)
        assert [document.text for document in load(str(folder))] == [text]


def test_a_binary_file_is_called_one(tmp_path: Path) -> None:
    (program := tmp_path / "program.txt").write_bytes(
        b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x03\0\x3e\0\x01\0\0\0" * 20
    )
    with pytest.raises(ValueError, match=r"is not UTF-8 text: .*; it looks like a binary file: leave it out$"):
        load(str(program))


@pytest.mark.parametrize(("encoding", "by"), [("utf-16", "UTF-16"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32")])
def test_lines_of_wide_characters_are_an_error_of_the_file(encoding: str, by: str, tmp_path: Path) -> None:
    # datasets#5969: as broken lines they were left out of a folder whose other files were read.
    (tmp_path / "a.txt").write_text("a")
    (old := tmp_path / "b.jsonl").write_bytes('{"text": "b"}\n{"text": "c"}\n'.encode(encoding))
    with pytest.raises(ValueError, match=rf"b\.jsonl, line 1; .* iconv -f {by} -t UTF-8 {old} > NEW"):
        load(str(tmp_path))


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le"])
def test_lines_of_wide_characters_are_known_by_their_mark_if_few_are_latin(encoding: str, tmp_path: Path) -> None:
    (old := tmp_path / "b.jsonl").write_bytes(f'\ufeff{{"text": "{"本" * 300}"}}\n'.encode(encoding))
    with pytest.raises(
        ValueError, match=rf"b\.jsonl, line 1; if it is UTF-16, .* iconv -f UTF-16 -t UTF-8 {old} > NEW"
    ):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("encoding", "faults"), [("utf-16", "not UTF-8, not JSON"), ("utf-16-le", "not JSON, not JSON")]
)
def test_a_compressed_file_of_wide_characters_gets_no_command_for_what_it_contains(
    encoding: str, faults: str, tmp_path: Path
) -> None:
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress('{"text": "b"}\n'.encode(encoding)))
    found = [(r.place, r.fault, r.damaged) for r in read(tmp_path / "b.jsonl.gz", "b.jsonl.gz")]
    wanted = [(f"b.jsonl.gz, line {i}", fault, False) for i, fault in enumerate(faults.split(", "), 1)]
    assert found == wanted


def test_a_later_line_of_wide_characters_costs_that_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + '{"text": "b"}'.encode("utf-16-le") + b'\n{"text": "c"}\n')
    said: list[str] = []
    assert [document.text for document in load(str(tmp_path), say=said.append)] == ["a", "c"]
    assert said == [f"{tmp_path}: 1 document is left out: not JSON (1, a.jsonl, line 2)"]


def test_few_null_characters_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a null, \0, and more text")
    assert [document.text for document in load(str(tmp_path))] == ["a null, \0, and more text"]


def test_unknown_encodings_are_told(tmp_path: Path) -> None:
    for declared in ("nonsense", "rot13"):  # the second is one, but not of text
        (tmp_path / "a.py").write_text(f"# -*- coding: {declared} -*-\n")
        with pytest.raises(
            ValueError, match=r"a\.py is not UTF-8 text: a\.py.*; correct the encoding that it declares"
        ):
            load(str(tmp_path))


def test_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    real = builtins.open

    def keep(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(real(self, *args, **kwargs))
        return opened[-1]

    write_table(tmp_path / "a.jsonl.zst", TEXTS)
    monkeypatch.setattr(Path, "open", keep)
    load(str(tmp_path))
    assert opened and all(file.closed for file in opened)


def test_line_ends_of_every_kind_become_line_feeds(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"old\rdos\r\nunix\n\r\rend")
    assert load(str(tmp_path)) == [Document("a.txt", "old\ndos\nunix\n\n\nend")]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_suffixes_may_be_written_in_capitals(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    if suffix in (*PACKED, ".parquet"):
        write_table(path, TEXTS)
    else:
        path.write_text(TEXTS[0], encoding="utf-8")
    upper = path.rename(tmp_path / f"A{suffix.upper()}")
    expected = TEXTS if suffix in (*PACKED, ".parquet") else TEXTS[:1]
    for where in (tmp_path, upper):
        assert [document.text for document in load(str(where), say=say_nothing)] == expected


def test_rows_of_a_long_table_are_counted_through(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", text=[f"text {i}" if i != 2100 else " " for i in range(2500)])
    found = list(read(tmp_path / "a.parquet", "a.parquet"))
    assert [record.name for record in found] == [f"a.parquet/{i}" for i in range(2500)]
    assert (found[2100].fault, found[2100].place) == ("blank", "a.parquet, row 2101")


@pytest.mark.parametrize(("suffix", "told"), [(".jsonl.gz", "gzip"), (".jsonl.zst", "zstd"), (".parquet", "Parquet")])
def test_damage_is_called_by_the_format(suffix: str, told: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"neither")
    *_, last = read(tmp_path / f"a{suffix}", f"a{suffix}")
    assert (last.fault, last.damaged, last.name) == (f"broken {told} from here on", True, f"a{suffix}/0")


@pytest.mark.parametrize("count", [20, 21, 23])
def test_at_most_twenty_columns_are_named(count: int, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({f"c{i}": i for i in range(count)}))
    names = ", ".join(f"'c{i}'" for i in range(20)) + (f" and {count - 20} more" if count > 20 else "")
    with pytest.raises(ValueError, match=rf"whose columns are {names}\)$"):
        load(str(tmp_path))


@pytest.mark.parametrize("missing", [None, "text", "logs", "report.json", "report.md"])
def test_a_folder_is_a_cleaned_one_if_it_has_all_its_parts(missing: str | None, tmp_path: Path) -> None:
    for name in ("text/a.txt", "logs/a.txt", "mine.txt", "report.json", "report.md"):
        if name.partition("/")[0] != missing:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("x")
    found = find(tmp_path, SUFFIXES)
    assert (found.cleaned == ["."]) == (missing is None)
    assert [name for name, _ in found.files if name == "mine.txt"] == ([] if missing is None else ["mine.txt"])


@pytest.mark.parametrize(("nulls", "fault"), [(2, None), (3, "not UTF-8")])
def test_up_to_one_null_in_eight_characters_is_text(nulls: int, fault: str | None, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * (16 - nulls) + "\0" * nulls)
    (record,) = read(tmp_path / "a.txt", "a.txt")
    assert record.fault == fault and record.place == ("a.txt" if fault is None else f"a.txt, byte {16 - nulls}")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x"}) + " " * (3 - nulls) + "\0" * nulls)
    assert [record.damaged for record in read(tmp_path / "a.jsonl", "a.jsonl")] == [nulls == 3]


def test_names_that_start_with_a_dot_are_not_counted(tmp_path: Path) -> None:
    for name in (".notes.txt", ".x.pdf", "in/.y.txt", "in/z.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    found = find(tmp_path, SUFFIXES)
    assert [name for name, _ in found.files] == ["in/z.txt"] and not found.others


def test_a_record_says_what_its_line_was(tmp_path: Path) -> None:
    """Cleaning writes the other columns again, and what was wrong with a line as it stood."""
    lines = ['{"a": 1, "body": "x", "b": [2]}', "{broken", '{"a": 1}', '{"body": " ", "a": 1}', "3"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = [(r.text, dict(r.columns), r.fault) for r in read(tmp_path / "a.jsonl", "a.jsonl", "body")]
    assert found == [
        ("x", {"a": 1, "b": [2]}, None),
        (lines[1] + "\n", {}, "not JSON"),
        (lines[2] + "\n", {"a": 1}, "no text"),
        (" ", {"a": 1}, "blank"),
        (lines[4], {}, "no text"),
    ]


@pytest.mark.parametrize(
    ("names", "missing", "message"),
    [
        (["a.parquet", "a.jsonl.zst"], ["pyarrow"], r"\.parquet files needs pyarrow: "),
        (["a.parquet", "a.jsonl.zst"], ["zstandard"], r"\.zst files needs zstandard: "),
        (["A.PARQUET", "A.JSONL.ZST"], ["zstandard", "pyarrow"], r"\.parquet, \.zst files needs pyarrow, zstandard: "),
        (["a.jsonl", "b.txt"], ["zstandard", "pyarrow"], ""),
        (["a.parquet"], ["zstandard"], ""),
    ],
)
def test_missing_packages_are_told_with_what_they_read(
    names: list[str], missing: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "find_spec", lambda package: None if package in missing else object())
    with pytest.raises(ImportError, match=rf"^reading {message}pip install") if message else nullcontext():
        reader.expect_packages(names)


def test_another_column_that_is_broken_costs_itself_alone(tmp_path: Path) -> None:
    bad = pyarrow.array([b"\xff", b"a", b"\xff"], pyarrow.binary())
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 3, bad.buffers())
    texts = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, pyarrow.array([b"kept", b"\xff", b"\xff"], pyarrow.binary()).buffers()
    )
    parquet(tmp_path / "a.parquet", before=broken, text=texts, after=broken)
    found = [(r.text, dict(r.columns), r.fault) for r in read(tmp_path / "a.parquet", "a.parquet", whole=True)]
    assert found[0] == ("kept", {"before": None, "after": None}, None)
    assert [fault for _, _, fault in found[1:]] == ["not UTF-8"] * 2 and found[1][1]["after"] == "a"


@pytest.mark.parametrize(("count", "told"), [(1, "1 file of another kind is"), (2, "2 files of other kinds are")])
def test_files_are_counted_in_good_english(count: int, told: str) -> None:
    assert reader.others_left_out({".b": count}) == f"{told} left out: .b ({count})"
    kinds = reader.others_left_out({".b": count, ".a": count, ".c": 9}).rpartition(": ")[2]
    assert kinds == f".c (9), .a ({count}), .b ({count})"


def test_a_frame_may_look_back_further_than_usual(tmp_path: Path) -> None:
    """Read a frame by hand, with a window of 256 MiB, as `zstd --long=28` writes it, and one block that is stored."""
    content = json.dumps({"text": "far"}).encode()
    block = (len(content) << 3 | 1).to_bytes(3, "little")
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd\x00\x90" + block + content)
    assert load(str(tmp_path)) == [Document("a.jsonl.zst/0", "far")]


def test_what_cannot_be_opened_is_not_called_damaged(tmp_path: Path) -> None:
    for suffix in (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"):
        with pytest.raises(FileNotFoundError):
            list(read(tmp_path / f"gone{suffix}", f"gone{suffix}"))


@pytest.mark.parametrize("fault", [gzip.BadGzipFile, zlib.error])
def test_damage_within_a_file_is_told_with_its_place(fault: type[Exception], tmp_path: Path) -> None:
    """Lines before it are documents. Damage is found by the checksum at the end, or by a block that cannot be."""
    lines = b"".join(json.dumps({"text": f"line {i}"}).encode() + b"\n" for i in range(3))
    whole = gzip.compress(lines, mtime=0)
    # A block of deflate has type 0, 1 or 2.
    broken = whole[:-8] + bytes(8) if fault is gzip.BadGzipFile else whole[:10] + b"\x07" + whole[11:]
    with pytest.raises(fault):
        gzip.decompress(broken)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes((whole if fault is zlib.error else b"") + broken)
    *texts, last = read(path, path.name)
    assert [record.text for record in texts] == [f"line {i}" for i in range(len(texts))] and len(texts) <= 3
    place = f"a.jsonl.gz, line {len(texts) + 1}"
    assert (last.fault, last.damaged, last.place) == ("broken gzip from here on", True, place)
    with pytest.raises(ValueError, match=rf"a\.jsonl\.gz is damaged, broken gzip from here on: {place}$"):
        load(str(path))


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        (codecs.BOM_UTF32_LE, "UTF-32"),
        (codecs.BOM_UTF32_BE, "UTF-32"),
        (codecs.BOM_UTF16_LE + b"ab", "UTF-16"),
        (codecs.BOM_UTF16_BE + b"ab", "UTF-16"),
        (b"a\0b\0c\0", "UTF-16LE"),
        (b"\0a\0b\0c", "UTF-16BE"),
        (b"a\0b\0c\0d\0\0e", "UTF-16LE"),  # one of five on the other side
        (b"a\0b\0c\0\0e", "binary"),
        (b"\0\0\0\0", "binary"),
        (b"abcdef\xe9\0", "WINDOWS-1252"),  # one null in eight
        (b"abcdef\xe9\0\0", "binary"),
        (b"\xe9", "WINDOWS-1252"),
        (b"abc", "declares"),
        (b"", "declares"),
    ],
)
def test_how_to_convert_a_file_follows_from_its_content(content: bytes, advice: str, tmp_path: Path) -> None:
    (file := tmp_path / "a.txt").write_bytes(content)
    told = {"binary": "it looks like a binary file: ", "declares": "correct the encoding that it declares, "}
    found = reader.in_utf8(file)
    assert found.startswith(told[advice]) if advice in told else f"iconv -f {advice} -t UTF-8 {file} > NEW" in found


def test_columns_are_told_with_the_lines_without_text_alone(tmp_path: Path) -> None:
    """The first of several lines without the column tells its columns."""
    lines = ["{broken", '{"b": 1, "c": 2}', '{"text": " "}', '{"d": 1}', '{"text": "kept"}', "{broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    said: list[str] = []
    assert [document.text for document in load(str(tmp_path), say=said.append)] == ["kept"]
    assert said == [
        f"{tmp_path}: 5 documents are left out: not JSON (2, the first in a.jsonl, line 1), no text (2, the first in "
        "a.jsonl, line 2, whose columns are 'b', 'c'), blank (1, a.jsonl, line 3)"
    ]


def test_a_link_to_a_file_is_the_file(tmp_path: Path) -> None:
    """Links to folders are counted, but for those that would not be entered."""
    (tmp_path / "there").mkdir()
    (real := tmp_path / "real.txt").write_text("text")
    (root := tmp_path / "in").mkdir()
    (root / "a.txt").symlink_to(real)
    for name in ("folder", ".hidden", "skipped"):
        (root / name).symlink_to(tmp_path / "there")
    found = find(root, SUFFIXES, ("skipped",))
    assert found.files == [("a.txt", root / "a.txt")] and found.others == {"link to a folder": 1}


def test_of_a_line_that_cannot_be_used_as_much_is_kept_as_can_be(tmp_path: Path) -> None:
    """Cleaning writes it to what was removed, where each character that cannot be is replaced."""
    digits = b"9" * 5000
    lines = {
        b'{"body": "\\udc00", "n": 1}': ('{"body": "\\udc00", "n": 1}\n', {"n": 1}, "lone surrogate"),
        b'{"body": "caf\xe9"}': ('{"body": "caf\ufffd"}\n', {}, "not UTF-8"),
        b'{"body": "x", "n": ' + digits + b"}": ("x", {"n": math.inf}, None),  # more than Python converts
        b'{"n": ' + digits + b"}": ('{"n": ' + digits.decode() + "}\n", {"n": math.inf}, "no text"),
        b"[" * 100_000: ("[" * 100_000 + "\n", {}, "nested too deeply"),
        b'{"body": null, "n": 1}': ('{"body": null, "n": 1}\n', {"body": None, "n": 1}, "no text"),
        b'{"body": "\\n"}': ("\n", {}, "blank"),
    }
    (tmp_path / "a.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
    found = list(read(tmp_path / "a.jsonl", "a.jsonl", "body"))
    assert [(r.text, dict(r.columns), r.fault) for r in found] == list(lines.values())
    assert [r.place for r in found] == [f"a.jsonl, line {i + 1}" for i in range(len(lines))]


@pytest.mark.parametrize("content", [b"caf\xe9", b"# coding: nonsense\n\xe9", b"a\0b\0"])
def test_a_file_that_is_no_text_is_read_as_far_as_it_goes(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(content)
    (record,) = read(tmp_path / "a.py", "a.py")
    assert (record.fault, record.damaged, record.text) == ("not UTF-8", True, content.decode("utf-8", "replace"))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 17])
def test_a_frame_may_be_longer_than_what_is_read_at_a_time(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{i} text {i * i}" for i in range(200)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    content = zstandard.compress(lines)
    assert len(content) > 7 and zst(lines) != content
    monkeypatch.setattr(reader, "_CHUNK", chunk)
    for name, frames in (("one.jsonl.zst", content), ("two.jsonl.zst", zst(lines)), ("more.jsonl.zst", content * 2)):
        (tmp_path / name).write_bytes(frames)
        assert [document.text for document in load(str(tmp_path / name))] == texts * (1 + (name[0] == "m"))
