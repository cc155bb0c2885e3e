"""Fill-in-the-middle at several rates: what it costs from left to right, and what it brings for the middle."""

from typing import Any

from benchmarks.report import table
from docs.figures import BLUE, GREEN, ORANGE
from examples.chapter.measures import GAP, middles
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Row, compared, found, listed

WAYS = {
    "no rearranging": (),
    "rate 0.5, PSM": ("data.fim_rate=0.5", "data.fim_spm_rate=0.0"),
    "rate 0.5, SPM": ("data.fim_rate=0.5", "data.fim_spm_rate=1.0"),
    "rate 0.5, both": ("data.fim_rate=0.5",),
    "rate 0.9, both": ("data.fim_rate=0.9",),
}
KEYS = {"loss": "left to right", "middle, PSM": "middle, PSM", "middle, SPM": "middle, SPM"}


def runs() -> list[Run]:
    return [Run({"way": way}, settings) for way, settings in WAYS.items()]


def told(rows: list[Row]) -> list[str]:
    plain = found(rows, "no rearranging", way="no rearranging")
    body = [[way, *(str(found(rows, way, key, way=way)) for key in KEYS)] for way in WAYS]
    psm = found(rows, "PSM alone, asked as PSM,", "middle, PSM", way="rate 0.5, PSM")
    spm = found(rows, "SPM alone, asked as SPM,", "middle, SPM", way="rate 0.5, SPM")
    sentences = [compared(found(rows, way.replace(", ", " with "), way=way), plain) for way in list(WAYS)[1:]]
    both, unseen = (
        found(rows, f"{name}, asked as PSM,", "middle, PSM", way=way)
        for name, way in (("rate 0.5 with both", "rate 0.5, both"), (plain.name, "no rearranging"))
    )
    filled = next(row["filled"] for row in rows if row["way"] == "rate 0.5, both")
    filled = f"`{' '.join(filled.split())}`" if filled.strip() else "nothing"
    return [
        listed("The loss from left to right", sentences),
        table(["", *KEYS.values()], body),
        listed("The loss of the middle, with both sides given", [compared(both, unseen), compared(psm, spm)]),
        f"In `{GAP[0]}...{GAP[1]}`, the model of rate 0.5 with both fills in, greedily and at most 24 bytes, {filled}.",
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    for i, (key, color) in enumerate(zip(KEYS, (BLUE, ORANGE, GREEN))):
        each = [found(rows, way, key, way=way) for way in WAYS]
        place = [y + (i - 1) * 0.18 for y in range(len(each))]
        low, high = zip(*((f.mean - min(f.values), max(f.values) - f.mean) for f in each))
        axes.errorbar(
            [f.mean for f in each], place, xerr=(low, high), fmt="o", color=color, markersize=4, label=KEYS[key]
        )
    axes.set_yticks(range(len(WAYS)), list(WAYS))
    axes.invert_yaxis()
    axes.set_xlabel("held-out loss, nats per byte")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)


PART = Part(
    name="fim",
    title="Fill-in-the-middle",
    claim="Rearranging up to 90 % of the documents for filling in costs nothing from left to right. Prompts with the "
    "suffix first do a little better than those with the prefix first.",
    source="Bavarian et al. 2022 ([arXiv:2207.14255](https://arxiv.org/abs/2207.14255)), on models of 50 M to 6.9 B "
    "parameters.",
    runs=runs,
    told=told,
    draw=draw,
    picture="loss from left to right and of the middle, as PSM and as SPM, for five ways to rearrange documents",
    command="llmfast train --config examples/chapter/fim.toml --data.fim_rate 0.5",
    measure=middles,
)
