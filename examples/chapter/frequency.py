"""Loss by how frequent a token is, under SGD and under methods that scale each parameter's step."""

from typing import Any

from benchmarks.report import table
from examples.chapter.drawing import COLORS, band, legend
from examples.chapter.measures import GROUPS, by_frequency
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Found, Row, verdict

WAYS = {
    "SGD": ("optimizer.name=sgd", "optimizer.lr=0.1"),
    "AdaGrad": ("optimizer.name=adagrad", "optimizer.lr=0.1"),
    "Adam": ("optimizer.name=adam", "optimizer.lr=0.003"),
}


def runs() -> list[Run]:
    return [Run({"way": way}, settings) for way, settings in WAYS.items()]


def group(rows: list[Row], way: str, g: int) -> Found:
    values = [row["loss by group"][g] for row in rows if row["way"] == way]
    return Found(way, tuple(float("nan") if value is None else value for value in values))


def told(rows: list[Row]) -> list[str]:
    sizes = rows[0]["tokens by group"]
    body = []
    for g, size in enumerate(sizes):
        sgd, adam = group(rows, "SGD", g), group(rows, "Adam", g)
        cells = [str(group(rows, "AdaGrad", g)), str(sgd), str(adam), verdict(adam, sgd)]
        body.append([f"{g + 1}: {size} tokens", *cells])
    often, rare = (lead(rows, g) for g in (0, GROUPS - 1))
    columns = ["group, frequent to rare", "AdaGrad", "SGD", "Adam", "Adam against SGD"]
    return [
        f"Adam's lead over SGD, in nats, is {rare} for the rarest tokens and {often} for the most frequent: "
        f"{verdict(rare, often)}.",
        table(columns, body),
        "Each group has about a fifth of the held-out text. SGD has momentum; the rates were not tuned for this text.",
    ]


def lead(rows: list[Row], g: int) -> Found:
    """Return by how much Adam's loss is lower than SGD's, with each seed."""
    both = zip(group(rows, "SGD", g).values, group(rows, "Adam", g).values)
    return Found("the lead for the rarest", tuple(sgd - adam for sgd, adam in both))


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    for way, color in zip(WAYS, COLORS):
        band(axes, range(1, GROUPS + 1), [group(rows, way, g) for g in range(GROUPS)], color, label=way)
    axes.set(xlabel="group of tokens, frequent to rare", ylabel="held-out loss, nats per token")
    axes.set_xticks(range(1, GROUPS + 1))
    axes.grid(alpha=0.25)
    legend(figure, axes, len(WAYS))


PART = Part(
    name="frequency",
    title="Rare and frequent tokens",
    claim="SGD learns rare tokens far more slowly than frequent ones. Adaptive methods learn both, which is why they "
    "win on language.",
    source="Kunstner et al. 2024 ([arXiv:2402.19449](https://arxiv.org/abs/2402.19449)), on GPT-2 small and smaller "
    "models.",
    runs=runs,
    told=told,
    draw=draw,
    picture="held-out loss of five groups of tokens, from frequent to rare, for SGD, AdaGrad and Adam",
    command="llmfast train --config examples/chapter/frequency.toml --optimizer.name adam --optimizer.lr 0.003",
    measure=by_frequency,
)
