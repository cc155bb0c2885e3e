"""Held-out loss of a small model against what the frequencies of single bytes and of pairs of bytes give away."""

from math import inf
from typing import Any

from docs.figures import BLUE, GREY, ORANGE
from examples.chapter.measures import entropies
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Found, Row, compared, found

NAMES = {
    "unigram": "a model of single bytes, by their frequency in the training text,",
    "bigram": "a model of the next byte given one, by the frequency of pairs,",
}


def runs() -> list[Run]:
    return [Run({"way": "decoder"})]


def counted(rows: list[Row], key: str) -> Found:
    return found(rows, NAMES[key], key=key)


def told(rows: list[Row]) -> list[str]:
    model = found(rows, "the decoder")
    text = [compared(model, counted(rows, key)) for key in NAMES]
    passed = {}
    for key in NAMES:
        at = [next((tokens for tokens, loss in row["held out"] if loss < row[key]), inf) for row in rows]
        passed[key] = "not with every seed" if inf in at else f"within {max(at):,} tokens"
    text.append(f"It passes the model of single bytes {passed['unigram']}, and that of pairs {passed['bigram']}.")
    return text


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    for row in rows:
        tokens, losses = zip(*row["held out"])
        axes.plot(
            [t / 1e3 for t in tokens], losses, color=BLUE, linewidth=1, label="decoder" if not row["seed"] else ""
        )
    for key, color in (("unigram", GREY), ("bigram", ORANGE)):
        axes.axhline(counted(rows, key).mean, color=color, linestyle="--", label=key)
    axes.set(xlabel="thousand tokens", ylabel="held-out loss, nats per byte")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)


PART = Part(
    name="next-token",
    title="Predicting the next token",
    claim="A language model trained on the next token comes to know more than the frequencies of single symbols and of "
    "pairs: its loss falls below both entropies.",
    source="Shannon 1951, *Prediction and entropy of printed English*, by hand, up to 100 letters back.",
    runs=runs,
    told=told,
    draw=draw,
    picture="held-out loss over tokens for three seeds, with the losses of models of single bytes and of pairs",
    command="llmfast train --config examples/chapter/next-token.toml",
    measure=entropies,
)
