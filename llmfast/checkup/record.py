"""Cases of a check-up, their findings, and the journal through which a worker reports to its parent process."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

SCHEMA = "llmfast-checkup"
VERSION = 1

Size = Literal["full", "small"]
"""Size of the tensors: "full" is what users train with, "small" is what Triton's interpreter can compute."""

Figures = dict[str, Any]  # numbers, text, truth values, None, or lists of numbers


@dataclass(frozen=True)
class Finding:
    """One result of a case."""

    what: str
    ok: bool | None = None  # None if the finding only reports figures, which are neither right nor wrong
    figures: Figures = field(default_factory=dict)


class Case(NamedTuple):
    """A part of a section. It is run and timed separately; if it crashes or hangs, the others still run."""

    name: str
    run: Callable[[], Iterable[Finding]]
    seconds: float = 5.0  # twice the time estimated on a GPU at full size, including compilation
    gpu_bytes: int = 1 << 30  # the most GPU memory that it needs


class Entry(NamedTuple):
    """One line of a journal."""

    kind: Literal["begin", "finding", "end", "skip"]
    case: str
    number: int
    content: dict[str, Any]


class Journal:
    """A file of JSON lines. A worker writes it; its parent reads it while the worker runs and after it has ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def write(self, kind: str, case: str, number: int, **content: Any) -> None:
        line = json.dumps({"kind": kind, "case": case, "number": number, "content": content})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def new_entries(self) -> Iterator[Entry]:
        """Yield the entries written since the last call. A line that is not complete yet is left for the next call."""
        if not self.path.exists():
            return
        with self.path.open(encoding="utf-8") as file:
            file.seek(self._read)
            while (line := file.readline()).endswith("\n"):
                self._read = file.tell()
                yield Entry(**json.loads(line))
