"""What all commands do alike: a user's mistake in one line, columns, and no file of anybody else's written over."""

import sys
from collections.abc import Sequence
from pathlib import Path

MISTAKE = 2
"""The exit code of a user's mistake."""
WRITTEN = "written by llmfast"
"""In the first or last bytes of every file that a command writes where `--out` says."""
_MARKED = 4096  # how many those are


def fail(message: str) -> int:
    """Say it on stderr; returns the exit code."""
    print(f"llmfast: error: {' '.join(message.split())}", file=sys.stderr)  # names of files may have line breaks
    return MISTAKE


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of aligned cells below a head: the first column to the left and those of words; numbers to the right."""
    _, *body = rows
    lines = [""] * len(rows)
    for i, cells in enumerate(zip(*rows)):
        width = max(map(len, cells))
        words = i == 0 or any(row[i][:1].isalpha() for row in body)
        lines = [
            f"{line}{'   ' if i else ''}{cell.ljust(width) if words else cell.rjust(width)}"
            for line, cell in zip(lines, cells)
        ]
    return [line.rstrip() for line in lines]


def expect_replaceable(out: Path) -> None:
    """FileExistsError where a file is already, unless it is empty or a command wrote it: a name is easily wrong."""
    if not out.is_file() or out.stat().st_size == 0:
        return
    with out.open("rb") as file:
        ends = file.read(_MARKED)
        file.seek(max(0, out.stat().st_size - _MARKED))
        ends += file.read()
    if WRITTEN.encode() not in ends:
        raise FileExistsError(f"{out} exists and was not {WRITTEN}: remove it first, or choose another --out")
