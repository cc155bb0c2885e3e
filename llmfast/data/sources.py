"""Real text without a download: the running Python's own sources and manual, or a folder of your own.

A source is a list of documents in a fixed order. The text of the built-in sources depends only on the version of the
running interpreter.
"""

import ast
import difflib
import hashlib
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from llmfast._checks import expect
from llmfast.data.cache import cached_texts
from llmfast.data.reader import TEXT_COLUMN, Found, LeftOut, expect_packages, find, in_utf8, read, read_text, suffixes

# Folders of the standard library that are not hand-written code: tests, third-party packages, the manual.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_CHARACTER_TABLE = re.compile(r"^decoding_(table|map) *=", re.MULTILINE)
_MIN_DOCSTRING_CHARACTERS = 200


@dataclass(frozen=True)
class Document:
    """Text with a name that is unique within its source, such as "json/decoder.py"."""

    name: str
    text: str


def python_code() -> Iterator[Document]:
    """Yield the standard library's sources, sorted by path: about 11 MB, 600 files.

    Skips tests, installed packages, the generated build configuration, the generated character tables of `encodings`,
    and files that cannot be decoded.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for name, path in find(root, (".py",), _SKIPPED_FOLDERS).files:
        if name.startswith("_sysconfigdata"):
            continue
        try:
            text = read_text(path)
        except (UnicodeDecodeError, SyntaxError, LookupError):
            continue
        if text.strip() and not (name.startswith("encodings/") and _CHARACTER_TABLE.search(text)):
            yield Document(name, text)


def python_prose() -> Iterator[Document]:
    """Yield English about Python: the language reference ("topics/<name>"), then the docstrings ("docstrings/<path>").

    The docstrings of a file form one document, in the order of the file, unindented. Files with fewer than 200
    characters of docstrings are skipped.
    """
    yield from _topics()
    sources = list(python_code())
    codes = [code.text for code in sources]
    texts = cached_texts(codes, f"docstrings {sys.version}", lambda: [*map(_docstrings, codes)])
    for code, text in zip(sources, texts):
        if len(text) >= _MIN_DOCSTRING_CHARACTERS:
            yield Document(f"docstrings/{code.name}", text)


def text_files(
    path: str | PathLike[str], *, text_column: str = TEXT_COLUMN, say: Callable[[str], None] | None = None
) -> Iterator[Document]:
    """Read the texts under a folder, sorted by path, or those of one file.

    Folders are searched recursively; names that start with a dot are skipped. A .md, .py, .rst or .txt file is a
    document, and so is a line of .jsonl, .jsonl.gz or .jsonl.zst and a row of .parquet. A single file may have any
    suffix: another one is read as plain text. In a folder written by `llmfast clean`, only `text/` is read. Text is
    UTF-8 (a .py file may declare another encoding). Line ends become line feeds, and a byte order mark is removed.

    Args:
        path: The folder or file.
        text_column: The column that holds the text; "" skips files with columns.
        say: Receives one line for each kind of skipped input (files of other kinds, blank files, invalid lines), with
            the number and the first position, and one if a file is read as plain text for want of a known suffix. By
            default, these lines are warnings.

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: There is no text, or a file is damaged or not UTF-8.
        ImportError: A file needs a package that is not installed.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    kinds = suffixes(text_column)
    if root.is_file():
        expect_packages([root.name])
        found = Found([(root.name, root)], Counter(), [])
        if not root.name.lower().endswith(kinds):
            (say or warn)(f"{root} is read as plain text: its suffix is none of {', '.join(kinds)}")
    else:
        found = find(root, kinds)
    left, some = LeftOut(text_column), False
    for name, file in found.files:
        for record in read(file, name, text_column):
            if record.fault is None:
                some = True
                yield Document(record.name, record.text)
            elif record.damaged:
                if record.fault == "not UTF-8":
                    raise ValueError(f"{file} is not UTF-8 text: {record.place}; {in_utf8(file)}")
                raise ValueError(f"{file} is damaged, {record.fault}: {record.place}")
            else:
                left.add(record)
    if not some:
        column = f" in a column {text_column!r} (text_column names another)" if left.columns else ""
        looked_for = [] if root.is_file() else [f"looked for {', '.join(kinds)}"]
        why = [] if root.is_file() and left.only_blank else left.sentences(found)
        raise ValueError("; ".join([f"no text{column} in {root}", *looked_for, *why]))
    for sentence in left.sentences(found):
        (say or warn)(f"{root}: {sentence}")


BUILT_IN: dict[str, Callable[[], Iterator[Document]]] = {"code": python_code, "prose": python_prose}


def load(name: str, *, text_column: str = TEXT_COLUMN, say: Callable[[str], None] | None = None) -> list[Document]:
    """Load all documents of "code", "prose", or the folder or file `name` ("./code" is a folder called code).

    `text_column` and `say` are those of `text_files`.

    Raises:
        ValueError: `name` is none of these, or holds no text.
    """
    if name in BUILT_IN:
        documents = list(BUILT_IN[name]())
        expect(bool(documents), f"source {name!r} is empty: this Python has no sources in its standard library folder")
        return documents
    if name and Path(name).exists():
        return list(text_files(name, text_column=text_column, say=say))
    close = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    if len(several := [part.strip() for part in name.split(",")]) > 1:
        hint = f"; several sources are a list, {several}"
    choices, kinds = ", ".join(map(repr, BUILT_IN)), ", ".join(suffixes(text_column))
    raise ValueError(
        f"unknown source {name!r}: expected {choices}, or a file or folder that exists (of a folder, {kinds} are read)"
        f"{hint}"
    )


def is_held_out(document: Document, fraction: float) -> bool:
    """Return True if the document belongs to the validation part, which holds about `fraction` of all files.

    The decision depends only on a hash of the file's name. It never changes when files are added or removed, and a
    larger fraction only adds files. "docstrings/json/decoder.py" is in the same part as "json/decoder.py", which
    contains its text.
    """
    expect(0 <= fraction < 1, f"fraction must be in [0, 1); got {fraction}")
    key = document.name.removeprefix("docstrings/").encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < fraction * 2.0**64


def warn(text: str) -> None:
    """Emit a warning, the default of `say`."""
    warnings.warn(text, stacklevel=2)


def _topics() -> Iterator[Document]:
    """Yield the language reference by topic, without topics that only repeat part of a longer one (a fifth of it).

    A repeated passage could otherwise be in one training document and in one validation document.
    """
    from pydoc_data.topics import topics  # 0.7 MB of text, so not at import

    seen: set[str] = set()
    kept = []
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(p.split()) for p in topics[name].split("\n\n") if p.strip()}
        if len(paragraphs & seen) <= len(paragraphs) / 2:
            kept.append(name)
        seen |= paragraphs
    for name in sorted(kept):
        if topics[name].strip():
            yield Document(f"topics/{name}", topics[name])


def _docstrings(source: str) -> str:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # a module has no line
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
