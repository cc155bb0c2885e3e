"""Read files as documents, for `prepare` and `llmfast clean`.

    .md .py .rst .txt              the file is a document
    .jsonl .jsonl.gz .jsonl.zst    each line is one: an object with the text in one of its columns
    .parquet                       each row is one

Text is UTF-8 (a .py file may declare another encoding). A byte order mark is removed. Line ends become line feeds, but
text in a column is taken as it is.
Records that cannot be read are yielded too, with the reason, so that the caller can report what it skipped.
"""

# pyarrow and zstandard are optional.
# mypy: disable-error-code="import-not-found,import-untyped"
# pyright: reportMissingImports=false

import contextlib
import gzip
import io
import json
import os
import shlex
import tokenize
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from llmfast._checks import is_unicode

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")
TABLE_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
TEXT_COLUMN = "text"
NO_TEXT = "no text"  # fault of a line or row whose text column is missing or not a string

_NEEDED = {".parquet": "pyarrow", ".zst": "zstandard"}  # packages of the extra `formats`
_CLEANED = {"report.json", "report.md", "logs", "text"}  # always written by `llmfast clean`
_CHUNK = 1 << 17  # compressed bytes read at a time
_MANY_NULLS = 8  # a file is not UTF-8 text if more than one in so many of its characters is null
_NAMED_COLUMNS = 20  # maximum number in a message


@dataclass(frozen=True)
class Record:
    """Document, or the place of an unreadable one with the reason."""

    name: str  # unique within the source: "deep/x.md", or "more.jsonl/17" for the line or row counted from 0
    place: str  # for a message: "more.jsonl, line 18"
    text: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # the others of its line or row
    fault: str | None = None  # such as "not JSON"
    damaged: bool = False  # True if the rest of the file cannot be read either


@dataclass(frozen=True)
class Found:
    """Files below a folder."""

    files: list[tuple[str, Path]]  # files to read, sorted by name, such as "json/decoder.py"
    others: Counter[str]  # number of files that are not read, by kind
    cleaned: list[str]  # folders written by `llmfast clean`; only their text/ is read


def find(root: Path, suffixes: tuple[str, ...], skipped: Collection[str] = ()) -> Found:
    """Search a folder recursively for files with one of the suffixes. Names that start with a dot are skipped.

    Folders named in `skipped` are not entered.

    Raises:
        OSError: A folder cannot be read.
        ImportError: A file needs a package that is not installed.
    """
    files, others, cleaned = [], Counter[str](), []
    for place, folders, names in os.walk(root, onerror=_raise):
        folder, relative = Path(place), Path(place).relative_to(root)
        if {*folders, *names} >= _CLEANED:
            cleaned.append(relative.as_posix())
            folders[:], names = ["text"], []
        folders[:] = [name for name in folders if not (name.startswith(".") or name in skipped)]
        others["link to a folder"] += sum(os.path.islink(os.path.join(place, name)) for name in folders)
        for name in names:
            if name.startswith("."):
                continue
            if not os.path.isfile(os.path.join(place, name)):  # faster than Path for thousands of files
                others["neither file nor folder"] += 1  # a dangling link, a socket, a device
            elif name.lower().endswith(suffixes):
                files.append(((relative / name).as_posix(), folder / name))
            else:
                others[os.path.splitext(name)[1] or "(none)"] += 1
    expect_packages(name for name, _ in files)
    return Found(sorted(files), +others, cleaned)


def expect_packages(names: Iterable[str]) -> None:
    """Raise ImportError if a file needs a package that is not installed."""
    needed = {package for name in names for suffix, package in _NEEDED.items() if name.lower().endswith(suffix)}
    missing = sorted(package for package in needed if find_spec(package) is None)
    if missing:
        suffixes = ", ".join(suffix for suffix, package in _NEEDED.items() if package in missing)
        raise ImportError(f"reading {suffixes} files needs {', '.join(missing)}: pip install 'llmfast-torch[formats]'")


def suffixes(text_column: str) -> tuple[str, ...]:
    """Return the suffixes of files to read; without a text column, only those of text files."""
    return SUFFIXES if text_column else TEXT_SUFFIXES


def read(path: Path, name: str, text_column: str = TEXT_COLUMN, *, whole: bool = False) -> Iterator[Record]:
    """Yield the documents of one file. A file that is not a table is one document, whatever its suffix.

    Args:
        path: The file.
        name: Its name in the source.
        text_column: The column of a table that holds the text; "" reads a table as text too.
        whole: Also read the other columns of a table.
    """
    lower = name.lower()
    if not text_column or not lower.endswith(TABLE_SUFFIXES):
        return iter([_file(path, name)])
    if lower.endswith(".parquet"):
        return _rows(path, name, text_column, whole)
    return _lines(path, name, text_column)


def read_text(path: Path) -> str:
    """Read a text file.

    Raises:
        UnicodeDecodeError: The text is not in the expected encoding.
        SyntaxError, LookupError: The file is a .py file that declares an unknown encoding.
    """
    content, encoding = path.read_bytes(), "utf-8-sig"
    if path.suffix.lower() == ".py":
        encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
    return content.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


class LeftOut:
    """Counter of skipped records, summarised in one sentence per kind of fault."""

    def __init__(self, text_column: str) -> None:
        self._text_column = text_column
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self.columns = ""  # columns of the first line or row that has some, and lacks the text column
        self._with_columns = ""  # its place

    def add(self, record: Record) -> None:
        """Count a record that has a fault."""
        assert record.fault is not None
        self._counts[record.fault] += 1
        self._first.setdefault(record.fault, record.place)
        if record.fault == NO_TEXT and not self.columns and self._text_column not in record.columns:
            shown = [repr(column) for column in list(record.columns)[:_NAMED_COLUMNS]]
            more = len(record.columns) - len(shown)
            self.columns = ", ".join(shown) + (f" and {more} more" if more else "")
            self._with_columns = record.place

    @property
    def only_blank(self) -> bool:
        return not self._counts.keys() - {"blank"}

    def sentences(self, found: Found) -> Iterator[str]:
        """Describe the counted records and the files of other kinds."""
        for folder in found.cleaned:
            yield f"{'it' if folder == '.' else folder} was written by llmfast clean; of that only text/ is read"
        if found.others:
            yield others_left_out(found.others)
        if self._counts:
            n = self._counts.total()
            columns = f", whose columns are {self.columns}" if self.columns else ""
            if columns and self._with_columns != self._first[NO_TEXT]:  # a line need not be an object
                columns = f"; the columns of {self._with_columns} are {self.columns}"
            kinds = [
                f"{fault} ({count}, {'the first in ' if count > 1 else ''}{self._first[fault]}"
                f"{columns if fault == NO_TEXT else ''})"
                for fault, count in self._counts.most_common()
            ]
            yield f"{n} {'documents are' if n > 1 else 'document is'} left out: {', '.join(kinds)}"


def others_left_out(others: Mapping[str, int]) -> str:
    """Describe how many files of which kinds are not read."""
    n = sum(others.values())
    kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items(), key=lambda kind: (-kind[1], kind)))
    return f"{n} {'files of other kinds are' if n > 1 else 'file of another kind is'} left out: {kinds}"


def _file(path: Path, name: str) -> Record:
    try:
        text = read_text(path)
    except (UnicodeDecodeError, SyntaxError, LookupError) as error:
        place = f"{name}, byte {error.start}" if isinstance(error, UnicodeDecodeError) else f"{name}: {error}"
        return Record(name, place, path.read_bytes().decode("utf-8", "replace"), fault="not UTF-8", damaged=True)
    if text.count("\0") > len(text) // _MANY_NULLS:  # UTF-16 without a byte order mark is often also UTF-8
        return Record(name, f"{name}, byte {path.read_bytes().index(0)}", text, fault="not UTF-8", damaged=True)
    return Record(name, name, text, fault=None if text.strip() else "blank")


def _is_wide(text: bytes) -> bool:
    """Return True for UTF-16 and UTF-32: none of its lines can be read by itself."""
    return text.startswith((BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE)) or text.count(0) > len(text) // _MANY_NULLS


def in_utf8(path: Path) -> str:
    """Say how to convert a file that is not UTF-8, by the encoding that its content suggests."""
    content = path.read_bytes()
    if content.startswith((BOM_UTF32_LE, BOM_UTF32_BE)):
        encoding, name = "UTF-32", "UTF-32"
    elif content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        encoding, name = "UTF-16", "UTF-16"
    elif content.count(0) > len(content) // _MANY_NULLS:
        even, odd = content[::2].count(0), content[1::2].count(0)
        if min(even, odd) > max(even, odd) // 4:  # letters of UTF-16 have them on one side
            return "it looks like a binary file: leave it out"
        encoding, name = ("UTF-16BE" if even > odd else "UTF-16LE"), "UTF-16"
    else:
        with contextlib.suppress(UnicodeDecodeError):
            content.decode("utf-8")
            return "correct the encoding that it declares, or leave it out"
        encoding, name = "WINDOWS-1252", "Latin-1"  # the former has all printable characters of the latter
    old = shlex.quote(str(path))
    return f"if it is {name}, convert it: iconv -f {encoding} -t UTF-8 {old} > NEW; or leave it out"


def _lines(path: Path, name: str, text_column: str) -> Iterator[Record]:
    compression, i = Path(name).suffix.lower().removeprefix(".jsonl").removeprefix("."), -1
    try:
        with _OPENERS[compression](path) as lines:
            for i, line in enumerate(lines):
                if i == 0 and not compression and _is_wide(line):
                    yield Record(f"{name}/0", f"{name}, line 1", "", fault="not UTF-8", damaged=True)
                    return
                line = line.removeprefix(BOM_UTF8)  # also where files were concatenated
                if line.strip():
                    yield _line(line, f"{name}/{i}", f"{name}, line {i + 1}", text_column)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        fault = f"broken {'gzip' if compression == 'gz' else 'zstd'} from here on"
        yield Record(f"{name}/{i + 1}", f"{name}, line {i + 2}", "", fault=fault, damaged=True)


def _line(line: bytes, name: str, place: str, text_column: str) -> Record:
    try:
        columns = _parsed(line.decode("utf-8"))
    except UnicodeDecodeError:
        fault = "not UTF-8"
    except RecursionError:
        fault = "nested too deeply"
    except ValueError:
        fault = "not JSON"
    else:
        record = _record(columns if isinstance(columns, dict) else {}, name, place, text_column)
        if record.fault in (None, "blank"):
            return record
        return Record(name, place, line.decode("utf-8"), record.columns, record.fault)
    return Record(name, place, line.decode("utf-8", "replace"), fault=fault)


def _parsed(line: str) -> Any:
    """Parse JSON. NaN, which JSON does not have, is accepted as in Python."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # an integer with more digits than Python converts
        return json.loads(line, parse_int=float)


def _record(columns: dict[str, Any], name: str, place: str, text_column: str) -> Record:
    text = columns.get(text_column)
    if not isinstance(text, str):
        return Record(name, place, "", columns, NO_TEXT)
    rest = {column: value for column, value in columns.items() if column != text_column}
    if not is_unicode(text):
        return Record(name, place, text.encode("utf-8", "replace").decode("utf-8"), rest, "lone surrogate")
    return Record(name, place, text, rest, None if text.strip() else "blank")


def _rows(path: Path, name: str, text_column: str, whole: bool) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    i = -1
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if text_column not in columns:
                yield Record(name, name, "", dict.fromkeys(columns), NO_TEXT)
                return
            for batch in file.iter_batches(batch_size=1000, columns=None if whole else [text_column]):
                for row in range(batch.num_rows):
                    i += 1
                    yield _row(batch, row, f"{name}/{i}", f"{name}, row {i + 1}", text_column)
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        yield Record(f"{name}/{i + 1}", f"{name}, row {i + 2}", "", fault="broken Parquet from here on", damaged=True)


def _row(batch: Any, row: int, name: str, place: str, text_column: str) -> Record:
    columns, broken = {}, False
    for column, values in zip(batch.schema.names, batch.columns):
        try:
            columns[column] = values[row].as_py()
        except UnicodeDecodeError:  # Parquet strings may hold bytes that were never validated
            columns[column], broken = None, broken or column == text_column
    if broken:
        return Record(name, place, "", columns, "not UTF-8")
    return _record(columns, name, place, text_column)


class _Zstandard(io.RawIOBase):
    """Decompressed stream that detects truncation, which the package's own streams take for the end of the file."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._error, self._file = zstandard.ZstdError, path.open("rb")
        self._frame: Any = None
        self._ready, self._compressed = memoryview(b""), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._compressed = self._compressed or self._file.read(_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the file ends within a frame")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._ready = memoryview(self._frame.decompress(self._compressed))
            except self._error as error:
                raise EOFError(str(error)) from error
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


_OPENERS: dict[str, Callable[[Path], AbstractContextManager[Iterable[bytes]]]] = {
    "": lambda path: path.open("rb"),
    "gz": gzip.open,
    "zst": lambda path: io.BufferedReader(_Zstandard(path), _CHUNK),
}


def _raise(error: OSError) -> NoReturn:
    raise error
