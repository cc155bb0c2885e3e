"""Fill-in-the-middle at several rates: what it costs from left to right, and what it brings for the middle."""

import json
from typing import Any

from benchmarks.report import table
from examples.chapter.drawing import ranges
from examples.chapter.measures import GAP, MOST_FILLED, middles
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
    filled = [json.dumps(row["filled"]) for row in rows if row["way"] == "rate 0.5, both"]
    return [
        listed("The loss from left to right", sentences),
        table(["", *KEYS.values()], body),
        listed("The loss of the middle, with both sides given", [compared(both, unseen), compared(psm, spm)]),
        f"Filled in where the dots are in `{GAP[0]}...{GAP[1]}`, by rate 0.5 with both, each byte drawn by its "
        f"probability, at most {MOST_FILLED} bytes, with each seed: {', '.join(f'`{each}`' for each in filled)}.",
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    ranges(axes, list(WAYS), {name: [found(rows, way, key, way=way) for way in WAYS] for key, name in KEYS.items()})
    axes.set_xlabel("held-out loss, nats per byte")
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
