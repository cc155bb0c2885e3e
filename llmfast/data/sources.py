"""Real text without a download: the running Python's own sources and manual, or a folder of yours.

A source is a list of documents in a fixed order. Which text the built-in sources hold depends on the version of the
interpreter that runs, and on nothing else.
"""

import ast
import difflib
import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from llmfast._checks import expect

TEXT_SUFFIXES = (".md", ".py", ".rst", ".txt")

# Whole folders of the standard library that are no code people write by hand: tests, third-party packages, the manual.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data"}
_CHARACTER_TABLE = re.compile(r"^decoding_(table|map) *=", re.MULTILINE)
_MIN_DOCSTRING_CHARACTERS = 200


@dataclass(frozen=True)
class Document:
    """One text and the name that tells it apart within its source, such as "json/decoder.py"."""

    name: str
    text: str


def python_code() -> Iterator[Document]:
    """The standard library's sources, sorted by path: about 11 MB, 600 files.

    Left out: tests, installed packages, the generated build configuration, the generated character tables of
    `encodings`, and files that do not decode.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for name, path in _files(root, (".py",)):
        if _SKIPPED_FOLDERS.intersection(name.split("/")) or name.startswith("_sysconfigdata"):
            continue
        try:
            text = _read(path)
        except (UnicodeDecodeError, SyntaxError):  # SyntaxError: an unknown encoding is declared
            continue
        if text.strip() and not (name.startswith("encodings/") and _CHARACTER_TABLE.search(text)):
            yield Document(name, text)


def python_prose() -> Iterator[Document]:
    """English about Python: the language reference ("topics/<name>"), then the docstrings ("docstrings/<path>").

    The docstrings of a file are one document, in the order of the file, unindented; files with less than 200
    characters of them are left out.
    """
    yield from _topics()
    for code in python_code():
        text = _docstrings(code.text)
        if len(text) >= _MIN_DOCSTRING_CHARACTERS:
            yield Document(f"docstrings/{code.name}", text)


def text_files(path: str | PathLike[str]) -> Iterator[Document]:
    """The text files under a folder, sorted by path, or one file of any suffix.

    Folders are searched recursively for .md, .py, .rst and .txt; names that start with a dot are skipped, and so are
    blank files. Text is UTF-8 (a .py file may declare another encoding); line ends become "\\n".

    Raises:
        FileNotFoundError: `path` does not exist.
        ValueError: nothing but blank files was found, or a file does not decode.
    """
    root = Path(path)
    if not root.exists():
        raise FileNotFoundError(f"no such file or folder: {root}")
    found = False
    for name, file in [(root.name, root)] if root.is_file() else _files(root, TEXT_SUFFIXES):
        try:
            text = _read(file)
        except (UnicodeDecodeError, SyntaxError) as error:
            raise ValueError(f"{file} is not UTF-8 text: {error}") from error
        if text.strip():
            found = True
            yield Document(name, text)
    looked_for = "" if root.is_file() else f"; looked for {', '.join(TEXT_SUFFIXES)}"
    expect(found, f"no text in {root}{looked_for}")


BUILT_IN: dict[str, Callable[[], Iterator[Document]]] = {"code": python_code, "prose": python_prose}


def load(name: str) -> list[Document]:
    """All documents of "code", "prose", or of the folder or file called `name` ("./code" is a folder called code).

    Raises:
        ValueError: `name` is none of these, or holds no text.
    """
    if name in BUILT_IN:
        documents = list(BUILT_IN[name]())
        expect(bool(documents), f"source {name!r} is empty: this Python has no sources in its standard library folder")
        return documents
    if name and Path(name).exists():
        return list(text_files(name))
    close = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    choices = ", ".join(map(repr, BUILT_IN))
    raise ValueError(f"unknown source {name!r}: expected {choices}, or a file or folder that exists{hint}")


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether the document belongs to the validation part, which holds about `fraction` of all files.

    Decided by a hash of the file's name alone, so it never changes as files come and go, and a larger fraction only
    adds files. "docstrings/json/decoder.py" goes where "json/decoder.py" goes: its text is in both.
    """
    expect(0 <= fraction < 1, f"fraction must be in [0, 1); got {fraction}")
    key = document.name.removeprefix("docstrings/").encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") < fraction * 2.0**64


def _files(root: Path, suffixes: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Name ("json/decoder.py") and path of each file under `root`, sorted by name."""
    found = []
    for path in root.rglob("*"):
        relative = path.relative_to(root)
        if path.suffix.lower() in suffixes and path.is_file() and not any(p.startswith(".") for p in relative.parts):
            found.append((relative.as_posix(), path))
    return sorted(found)


def _read(path: Path) -> str:
    if path.suffix.lower() == ".py":
        with tokenize.open(path) as file:  # honours `# -*- coding: ... -*-`
            return file.read()
    return path.read_text(encoding="utf-8-sig")


def _topics() -> Iterator[Document]:
    """The language reference by topic, without the topics that only repeat a part of a longer one (a fifth of it).

    A repeated passage could otherwise be trained on in one document and validated in the other.
    """
    from pydoc_data.topics import topics  # 0.7 MB of text: not at import

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
