"""A model of prose goes on with code: without a replay of the prose, with one, and with shares that move."""

from typing import Any

from benchmarks.report import table
from examples.chapter.drawing import COLORS
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Found, Row, compared, listed

SHARES = ("data.weights.prose=1", "data.weights.code=0")
BEFORE = Run({"way": "prose"}, SHARES)
TEXTS: dict[str, Any] = {"target": ["code"], "general": ["prose"]}
WAYS: dict[str, dict[str, Any]] = {
    "code only": {"replay": False},
    "half prose, half code": {"start": 0.5, "end": 0.5},
    "code from 0.1 to 0.9": {"start": 0.1, "end": 0.9},
}


def runs() -> list[Run]:
    return [
        Run({"way": way}, ("train.steps=240",), after=BEFORE, options=TEXTS | options) for way, options in WAYS.items()
    ]


def risen(rows: list[Row], way: str, source: str, name: str = "") -> Found:
    """Return by how much the loss of a source has risen since the end of the first run."""
    mine = [row["by source"] for row in rows if row["way"] == way]
    return Found(name or way, tuple(last[source] - first[source] for first, last in mine))


def told(rows: list[Row]) -> list[str]:
    body = [[way, str(risen(rows, way, "prose")), str(risen(rows, way, "code"))] for way in WAYS]
    only, replay, curriculum = WAYS
    pairs = [(only, replay), (only, curriculum), (replay, curriculum)]
    sentences = {
        source: [compared(risen(rows, a, source), risen(rows, b, source)) for a, b in pairs]
        for source in ("prose", "code")
    }
    return [
        listed("The change of the loss on the old text, prose", sentences["prose"]),
        listed("The change of the loss on the new text, code", sentences["code"]),
        table(["changes of the loss while reading", "of prose", "of code"], body),
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    for way, color in zip(WAYS, COLORS):
        x, y = risen(rows, way, "code"), risen(rows, way, "prose")
        axes.plot(x.values, y.values, "o", color=color, markersize=5, label=way)
    axes.axhline(0, color=ink, linewidth=0.8)
    axes.set(xlabel="change of the loss on code: learned", ylabel="change on prose: forgotten")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


PART = Part(
    name="continued",
    title="Continued pretraining",
    claim="A model that goes on with new text forgets the old. A replay of some of it prevents most of that, and costs "
    "little of what is learned.",
    source="Ibrahim et al. 2024 ([arXiv:2403.08763](https://arxiv.org/abs/2403.08763)), on models of 405 M and 10 B "
    "parameters.",
    runs=runs,
    told=told,
    draw=draw,
    picture="change of the loss on prose over the change on code, per seed, for three ways to continue",
    command="llmfast train --config examples/chapter/continued.toml --name prose \\\n"
    "    --set data.weights.prose=1 --set data.weights.code=0\n"
    "llmfast continue runs/prose --target code --general prose --start 0.1 --end 0.9 --train.steps 240",
)
