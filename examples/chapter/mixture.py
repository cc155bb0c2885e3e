"""Shares of two sources against the loss on each, and the same shares in another order."""

from typing import Any

from benchmarks.report import table
from docs.figures import BLUE, ORANGE
from examples.chapter.drawing import band
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Found, Row, compared, listed

SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
ORDERS = {"code last": "0->1", "code first": "1->0"}
EVEN = "code 0.5"
COLORS = {"prose": BLUE, "code": ORANGE}


def runs() -> list[Run]:
    weights = {f"code {share:g}": str(share) for share in SHARES} | ORDERS
    return [
        Run({"way": way}, (f"data.weights.code={weight}", "data.weights.prose=rest")) for way, weight in weights.items()
    ]


def of(rows: list[Row], way: str, source: str) -> Found:
    values = [row["by source"][1][source] for row in rows if row["way"] == way]
    return Found(f"{source} with {'the shares even throughout' if way == EVEN else way}", tuple(values))


def told(rows: list[Row]) -> list[str]:
    ways = [f"code {share:g}" for share in SHARES]
    body = [[way, *(str(of(rows, way, source)) for source in COLORS)] for way in (*ways, *ORDERS)]
    low, high = ways[0], ways[-1]
    sentences = [compared(of(rows, high, source), of(rows, low, source)) for source in COLORS]
    orders = [compared(of(rows, way, source), of(rows, EVEN, source)) for way in ORDERS for source in COLORS]
    return [
        listed("By share", sentences),
        table(["share of code", *(f"loss on {source}" for source in COLORS)], body),
        listed("By order, with half of the text from each source", orders),
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    for source, color in COLORS.items():
        band(axes, SHARES, [of(rows, f"code {share:g}", source) for share in SHARES], color, label=source)
        for way, marker in zip(ORDERS, "^v"):
            values = of(rows, way, source).values
            axes.plot(
                [0.5] * len(values),
                values,
                marker,
                color=color,
                markersize=6,
                fillstyle="none",
                label=f"{source}, {way}",
            )
    axes.set(xlabel="share of code in the text", ylabel="held-out loss, nats per byte")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


PART = Part(
    name="mixture",
    title="Mixtures of sources",
    claim="The loss on a source falls with its share of the text. In which order the same text comes matters little, "
    "except that what comes last is known best.",
    source="Ye et al. 2024 ([arXiv:2403.16952](https://arxiv.org/abs/2403.16952)) for the shares, on models of 70 M to "
    "1 B parameters.",
    runs=runs,
    told=told,
    draw=draw,
    picture="held-out loss on prose and on code over the share of code, and for the same shares in two orders",
    command="llmfast train --config examples/chapter/mixture.toml \\\n"
    "    --set data.weights.code=0.3 --set data.weights.prose=rest",
)
