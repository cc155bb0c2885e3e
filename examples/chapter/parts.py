"""The parts of the chapter, in their order on the page."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.chapter.runs import SEEDS, Measure, Run
from examples.chapter.told import Row


@dataclass(frozen=True)
class Part:
    """One statement of textbooks: the runs that test it, and how their rows are told and drawn."""

    name: str  # of its file of settings, its results and its picture
    title: str
    claim: str  # what textbooks say
    source: str  # the paper, and the size at which it was found there
    runs: Callable[[], list[Run]]
    told: Callable[[list[Row]], list[str]]  # sentences and tables, from the rows alone
    draw: Callable[[Any, list[Row], str], None]  # on a figure of matplotlib, in an ink
    picture: str  # what the picture shows
    command: str  # one of the runs as a user would start it
    measure: Measure | None = None
    prepare: Callable[[Path, bool], None] | None = None  # writes texts into a folder; few of them for a quick try
    seeds: tuple[int, ...] = SEEDS  # of these runs
    again: Callable[[list[Row]], list[tuple[Run, int]]] | None = None  # what their rows ask for: further runs and seeds
    height: float = 3.2  # of the picture, in inches

    def first(self) -> list[tuple[Run, int]]:
        """Return the runs to begin with, and their seeds."""
        return [(run, seed) for run in self.runs() for seed in self.seeds]

    def further(self, rows: list[Row]) -> list[tuple[Run, int]]:
        """Return the runs that the rows of the first ones ask for, and their seeds."""
        return self.again(rows) if self.again else []

    def few(self) -> list[Run]:
        """Choose runs for a quick try: the first, one in the middle and the last."""
        runs = self.runs()
        return [runs[i] for i in sorted({0, len(runs) // 2, len(runs) - 1})]


def parts() -> dict[str, Part]:
    """Return all parts by name."""
    from examples.chapter import (
        batch,
        continued,
        decay,
        dirty,
        fim,
        frequency,
        mixture,
        mtp,
        next_token,
        optimizers,
        scaling,
    )

    order = (next_token, fim, mtp, continued, mixture, optimizers, decay, frequency, batch, scaling, dirty)
    return {module.PART.name: module.PART for module in order}
