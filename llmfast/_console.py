"""What all commands print alike: a user's mistake in one line, and columns."""

import sys
from collections.abc import Sequence

MISTAKE = 2
"""The exit code of a user's mistake."""


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
