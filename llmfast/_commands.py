"""Behaviour shared by all commands: one-line user errors, aligned columns, and protection of existing files."""

import sys
from collections.abc import Sequence
from pathlib import Path

MISTAKE = 2
"""Exit code for a user error."""
WRITTEN = "written by llmfast"
"""Marker in the first or last bytes of every file that a command writes to `--out`."""
_MARKED = 4096  # bytes searched at either end


def fail(message: str) -> int:
    """Print an error to stderr and return the exit code."""
    print(f"llmfast: error: {' '.join(message.split())}", file=sys.stderr)  # file names may contain line breaks
    return MISTAKE


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align cells below a header: the first column and columns of words to the left, numbers to the right."""
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
    """Raise FileExistsError if a file exists, unless it is empty or a command wrote it: a name is easily mistyped."""
    if not out.is_file() or out.stat().st_size == 0:
        return
    with out.open("rb") as file:
        ends = file.read(_MARKED)
        file.seek(max(0, out.stat().st_size - _MARKED))
        ends += file.read()
    if WRITTEN.encode() not in ends:
        raise FileExistsError(f"{out} exists and was not {WRITTEN}: remove it first, or choose another --out")
