"""Read files as datatrove documents. datatrove reads no plain text, and silently skips invalid JSONL."""

# mypy: disable-error-code="import-not-found,import-untyped"
# pyright: reportMissingImports=false

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

from datatrove.data import Document
from datatrove.utils.stats import Stats

from llmfast._checks import is_unicode
from llmfast.data.reader import Record, read

LOST = "lost-value-"  # prefix of the counters of lost values, followed by the column
_DEEPEST = 200  # levels of lists and objects; orjson, with which datatrove writes, accepts 254


class Reader:
    """First step of a pipeline: yields readable documents, and writes off the others."""

    def __init__(self, root: Path, names: list[str], text_column: str, exclusion_writer: Any) -> None:
        self.root, self.names, self.text_column, self.exclusion_writer = root, names, text_column, exclusion_writer
        self.stats = Stats("found")  # datatrove sums them over processes

    def __call__(self, data: None, rank: int, world_size: int) -> Iterator[Document]:
        with self.exclusion_writer as writer:
            for name in self.names[rank::world_size]:
                shown = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # JSON holds nothing else
                for record in read(self.root / name, shown, self.text_column, whole=True):
                    document = self._document(record)
                    self.stats["bytes"].update(len(document.text.encode("utf-8")))
                    if record.fault is not None:
                        document.metadata["filter_reason"] = record.fault
                        writer.write(document, rank)
                    else:
                        yield document

    def _document(self, record: Record) -> Document:
        if record.fault not in (None, "blank"):
            return Document(record.text, record.name)
        columns = {}
        for column, value in record.columns.items():
            lost: list[Any] = []
            name = column.encode("utf-8", "replace").decode("utf-8")
            columns[name] = _storable(value, lost)
            if lost:
                self.stats[LOST + name].update(len(lost))
        identity = columns.pop("id", None)
        # Not at the top level, where datatrove would use a "rank" or "filter_reason" as its own.
        metadata = {"input": columns} if columns else {}
        return Document(record.text, record.name if identity is None else str(identity), metadata=metadata)


class Count:
    """Step that counts documents and their UTF-8 bytes between two other steps."""

    def __init__(self, name: str) -> None:
        self.stats = Stats(name)

    def __call__(self, data: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        for document in data:
            self.stats["bytes"].update(len(document.text.encode("utf-8")))
            yield document


def _storable(value: Any, lost: list[Any], depth: int = 0) -> Any:
    """Convert a value to what JSON can hold; a value that it cannot hold is added to `lost` and becomes None."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and is_unicode(value):
        return value
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal | UUID):
        return str(value)
    if isinstance(value, list | tuple) and depth < _DEEPEST:
        return [_storable(item, lost, depth + 1) for item in value]
    if isinstance(value, Mapping) and depth < _DEEPEST:
        return {
            str(key).encode("utf-8", "replace").decode("utf-8"): _storable(item, lost, depth + 1)
            for key, item in value.items()
        }
    lost.append(value)
    return None
