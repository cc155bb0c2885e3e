"""Every kind of multi-token prediction: the next token's loss at equal tokens, and what the guesses are worth."""

from typing import Any

from benchmarks.report import table
from examples.chapter.drawing import ranges
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Found, Row, compared, found, listed

PLAIN = "next token only"
WAYS = {
    PLAIN: (),
    "2 parallel heads": ("model.mtp=parallel", "model.mtp_heads=2"),
    "4 parallel heads": ("model.mtp=parallel", "model.mtp_heads=4"),
    "a sequential depth": ("model.mtp=sequential", "model.mtp_heads=1"),
    "2 targets of shared logits": ("model.mtp=shared", "model.mtp_heads=2"),
}


def runs() -> list[Run]:
    return [Run({"way": way}, settings) for way, settings in WAYS.items()]


def each(rows: list[Row], way: str) -> Found:
    return found(rows, f"the model with {way}" if way != PLAIN else "the model of the next token only", way=way)


def told(rows: list[Row]) -> list[str]:
    body = []
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way]
        accepted = [sum(x) / len(x) for x in zip(*(row.get("acceptance", []) for row in mine))]
        passes = [row["tokens_per_pass"] for row in mine if "tokens_per_pass" in row]
        body.append(
            [
                way,
                str(each(rows, way)),
                ", ".join(f"{share:.0%}" for share in accepted) or "-",
                f"{sum(passes) / len(passes):.2f}" if passes else "-",
            ]
        )
    sentences = [compared(each(rows, way), each(rows, PLAIN)) for way in WAYS if way != PLAIN]
    return [
        listed("The loss of the next token at equal tokens", sentences),
        table(["", "loss of the next token", "accepted guesses by head", "tokens per pass"], body),
        "Guesses are of greedy decoding after held-out text, averaged over seeds. Speed is not compared here: see "
        "`make bench-mtp`.",
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    ranges(axes, list(WAYS), {"": [each(rows, way) for way in WAYS]})
    axes.set_xlabel("held-out loss, nats per byte")


PART = Part(
    name="mtp",
    title="Multi-token prediction",
    claim="Predicting several tokens at once makes large models better at the next one and small models worse; the "
    "further heads also speed up decoding.",
    source="Gloeckle et al. 2024 ([arXiv:2404.19737](https://arxiv.org/abs/2404.19737)), on models of 300 M to 13 B "
    "parameters.",
    runs=runs,
    told=told,
    draw=draw,
    picture="held-out loss of the next token for five kinds of multi-token prediction, with the range over seeds",
    command="llmfast train --config examples/chapter/mtp.toml --model.mtp parallel --model.mtp_heads 2",
    height=2.4,
)
