"""Files to datatrove's documents. datatrove reads no plain text, and skips what it cannot parse in JSONL unseen."""

# mypy: disable-error-code="import-not-found,import-untyped"
# pyright: reportMissingImports=false

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson
from datatrove.data import Document
from datatrove.utils.stats import Stats


class Reader:
    """First step of a pipeline: yields what can be read, and writes off what cannot."""

    def __init__(self, root: Path, names: list[str], exclusion_writer: Any) -> None:
        self.root, self.names, self.exclusion_writer = root, names, exclusion_writer
        self.stats = Stats("found")  # datatrove adds them up over processes

    def __call__(self, data: None, rank: int, world_size: int) -> Iterator[Document]:
        with self.exclusion_writer as writer:
            for name in self.names[rank::world_size]:
                shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # no other is JSON
                for document, fault in _documents(self.root / name, shown):
                    self.stats["bytes"].update(len(document.text.encode("utf-8")))
                    if fault:
                        document.metadata["filter_reason"] = fault
                        writer.write(document, rank)
                    else:
                        yield document


class Count:
    """Counts documents and their UTF-8 bytes on their way from one step to the next."""

    def __init__(self, name: str) -> None:
        self.stats = Stats(name)

    def __call__(self, data: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        for document in data:
            self.stats["bytes"].update(len(document.text.encode("utf-8")))
            yield document


def _documents(path: Path, name: str) -> Iterator[tuple[Document, str | None]]:
    """Documents, and what is wrong with them if something is."""
    if not name.lower().endswith((".jsonl", ".gz")):
        yield _text(path.read_bytes(), name)
        return
    i = -1
    try:
        with gzip.open(path) if name.lower().endswith(".gz") else path.open("rb") as lines:
            for i, line in enumerate(lines):
                if line.strip():
                    yield _record(line, f"{name}/{i}")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        yield Document("", f"{name}/{i + 1}"), "broken gzip from here on"


def _text(content: bytes, name: str) -> tuple[Document, str | None]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return Document(content.decode("utf-8", "replace"), name), "not UTF-8"
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as text mode does
    return Document(text, name), None if text.strip() else "blank"


def _record(line: bytes, where: str) -> tuple[Document, str | None]:
    broken = Document(line.decode("utf-8", "replace"), where)
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return broken, "not JSON"
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        return broken, "no text"
    text, identity = record.pop("text"), record.pop("id", where)
    # Not at the top, where datatrove would take a "rank" or "filter_reason" for its own.
    metadata = {"input": record} if record else {}
    return Document(text, str(identity), metadata=metadata), None if text.strip() else "blank"
