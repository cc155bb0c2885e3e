"""The same number of tokens of dirty text, of what cleaning makes of it, and of the text before the dirt."""

from pathlib import Path
from typing import Any

from benchmarks.report import table
from examples.chapter.dirt import losses_of_held_out, prepare_texts
from examples.chapter.drawing import ranges
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Found, Row, compared, found, listed

WAYS = {"dirty text": "dirty.jsonl", "cleaned text": "dirty-cleaned", "text before the dirt": "plain.jsonl"}
KEYS = {"all held out": "all documents", "kept held out": "those that cleaning keeps"}
FEW = 60  # documents for a quick try


def runs() -> list[Run]:
    return [Run({"way": way}, (f'data.sources=["text={{texts}}/{file}"]',)) for way, file in WAYS.items()]


def prepare(folder: Path, quick: bool) -> None:
    prepare_texts(folder, FEW if quick else None)


def each(rows: list[Row], key: str) -> list[Found]:
    return [found(rows, way, key, way=way) for way in WAYS]


def told(rows: list[Row]) -> list[str]:
    sentences = []
    for key, name in KEYS.items():
        dirty, cleaned, plain = each(rows, key)
        sentences.append(listed(f"Held out: {name}", [compared(cleaned, dirty), compared(cleaned, plain)]))
    counts, body = rows[0], []
    for i, way in enumerate(WAYS):
        body.append([way, *(str(each(rows, key)[i]) for key in KEYS)])
    plain = {"there": counts["documents"] - counts["dirt"], "kept": counts["documents kept"] - counts["dirt kept"]}
    first, *further = sentences
    return [
        first,
        *further,
        table(["trained on", *(f"loss on {name}" for name in KEYS.values())], body),
        f"The dirt: menus around each of {plain['there']} documents, and {counts['dirt']} that are copies, tables of "
        f"letters without a meaning, or one line again and again. `llmfast clean` keeps {counts['dirt kept']} of the "
        f"latter, and {plain['kept']} of the former. So the cleaned text is read more often than the others: a pass "
        f"is {counts['characters kept']:,} characters, where the dirty text has {counts['characters']:,}.",
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    ranges(axes, list(WAYS), {name: each(rows, key) for key, name in KEYS.items()})
    axes.set_xlabel("held-out loss, nats per byte")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


PART = Part(
    name="dirty",
    title="Cleaned text",
    claim="A model learns more from text that has been filtered and has no duplicates than from the same number of "
    "tokens of the text as it was found.",
    source="Penedo et al. 2024 ([arXiv:2406.17557](https://arxiv.org/abs/2406.17557)), on models of 1.8 B parameters "
    "and text from the web. The dirt here is made, and the text is sentences from Python's documentation.",
    runs=runs,
    told=told,
    draw=draw,
    picture="held-out loss after dirty text, after cleaned text and after the text before the dirt",
    command="llmfast clean runs/chapter/dirty/texts/dirty.jsonl cleaned\n"
    "llmfast train --config examples/chapter/dirty.toml --set 'data.sources=[\"text=cleaned\"]'",
    measure=losses_of_held_out,
    prepare=prepare,
    height=2.4,
)
