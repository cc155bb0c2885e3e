"""Choose the validation text: whole documents, or the end of a source that has too few of them."""

import re
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from llmfast.data.sources import Document, is_held_out

Split = Literal["documents", "end"]
SPLITS = ("documents", "end")

LEAST_CHARACTERS = 4000  # minimum length of a held-out end, unless this exceeds LEAST_SHARE of the source
LEAST_TOKENS = 1000
LEAST_SHARE = 0.2

_BOUNDARIES = (re.compile(r"\n\s*\n"), re.compile(r"\n"), re.compile(r"\s"))  # boundaries of paragraphs, lines, words


def by_document(documents: Sequence[Document], held_out: float) -> tuple[list[str], list[str]]:
    """Split texts into training and validation, deciding for each document by its name only; see `is_held_out`."""
    parts: tuple[list[str], list[str]] = [], []
    for document in documents:
        parts[is_held_out(document, held_out)].append(document.text)
    return parts


def by_end(documents: Sequence[Document], held_out: float) -> tuple[list[str], list[str]]:
    """Split off the end of the source for validation. The result depends only on the texts and `held_out`.

    The end is `held_out` of all characters, but at least `LEAST_CHARACTERS` or `LEAST_SHARE` of all, whichever is less.
    It begins with a document if one begins near there, or else with a paragraph, line or word.
    """
    texts = [document.text for document in documents]
    starts = [0, *accumulate(map(len, texts))]
    cut, near = end(starts[-1], held_out, LEAST_CHARACTERS)
    closest = min(starts, key=lambda start: abs(start - cut))
    if abs(closest - cut) <= near:
        cut = closest
    else:
        across = max(i for i, start in enumerate(starts) if start < cut)
        cut = starts[across] + _boundary(texts[across], cut - starts[across], near)
    train = [text[: max(cut - start, 0)] for text, start in zip(texts, starts)]
    held = [text[max(cut - start, 0) :] for text, start in zip(texts, starts)]
    return [text for text in train if text], [text for text in held if text]


def end(total: int, held_out: float, least: int) -> tuple[int, int]:
    """Return where the held-out end of `total` characters or tokens begins, and how far its start may be moved."""
    wanted = max(round(held_out * total), min(least, round(LEAST_SHARE * total)), 1)
    cut = max(total - wanted, min(1, total - 1))
    return cut, min(cut, total - cut) // 2


def _boundary(text: str, cut: int, near: int) -> int:
    """Find the start of a paragraph, line or word closest to `cut`; return `cut` if there is none within `near`."""
    first, last = max(cut - near, 1), min(cut + near, len(text) - 1)
    for pattern in _BOUNDARIES:
        found = [match.end() for match in pattern.finditer(text, first - 1, last) if match.end() >= first]
        if found:
            return min(found, key=lambda i: abs(i - cut))
    return cut
