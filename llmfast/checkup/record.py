"""Cases, what they find, and the journal in which a worker tells its parent what it does."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

SCHEMA = "llmfast-checkup"
VERSION = 1

Size = Literal["full", "small"]
"""The sizes that users train with, or ones that an interpreter can compute."""

Figures = dict[str, Any]  # numbers, text, truth values, None, or lists of numbers


@dataclass(frozen=True)
class Finding:
    """One line of the results."""

    what: str
    ok: bool | None = None  # None: a figure that is neither right nor wrong
    figures: Figures = field(default_factory=dict)


class Case(NamedTuple):
    """A piece of a section that is run, timed and lost by itself."""

    name: str
    run: Callable[[], Iterable[Finding]]
    seconds: float = 5.0  # that it takes on a GPU at full size, compilation included: an estimate, doubled
    gpu_bytes: int = 1 << 30  # of GPU memory that it needs at most


class Entry(NamedTuple):
    """One line of a journal."""

    kind: Literal["begin", "finding", "end", "skip"]
    case: str
    number: int
    content: dict[str, Any]


class Journal:
    """A file of JSON lines: written by a worker, read by its parent while the worker runs or after it died."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def write(self, kind: str, case: str, number: int, **content: Any) -> None:
        line = json.dumps({"kind": kind, "case": case, "number": number, "content": content})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def new_entries(self) -> Iterator[Entry]:
        """Yield the entries that were written since the last call. A line that is still being written is left."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            file.seek(self._read)
            while (line := file.readline()).endswith("\n"):
                self._read = file.tell()
                yield Entry(**json.loads(line))
