"""The page and its pictures, from the results alone."""

import json
import math
from pathlib import Path
from typing import Any

from docs.figures import PLOT_WIDTH, paint
from examples.chapter.parts import Part, parts
from examples.chapter.runs import HERE
from examples.chapter.told import Row

RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "chapter.md"
PICTURES = PAGE.with_suffix("")  # a folder

HEAD = """# The chapter, measured

Textbooks make statements about training language models. Each part of this page tests one of them with small models, in
minutes on two CPU cores: a file of settings, a command, a picture and what was seen. The models are far smaller than
those of the papers, so a statement that is not confirmed here may still hold at their size.

Losses are in nats per byte or token of held-out text. Unless a part says otherwise, runs that are compared were made
with three seeds; a seed sets both the initial weights and the order of the text. A figure like 2.700 (2.690 to 2.710)
is the mean and the range over the seeds. A difference is reported only if it is larger than the width of both ranges;
otherwise no difference was seen.

```sh
make chapter                # all parts; resumes after an interruption
make chapter ARGS="decay"   # one part
```

The text is that of Python's own sources and documentation, so another version of Python gives slightly different
numbers. This page is written from `examples/chapter/results/` by the same command.
"""
START = (
    2.0  # seconds of a run besides its steps: reading the text, the evaluations before and after, a picture of the loss
)
CORES = 2


def read(part: Part, folder: Path = RESULTS) -> dict[str, Any]:
    """Read a part's results."""
    found: dict[str, Any] = json.loads((folder / f"{part.name}.json").read_text(encoding="utf-8"))
    return found


def finished(folder: Path = RESULTS) -> list[Part]:
    """Return the parts that have results, in the page's order."""
    return [part for part in parts().values() if (folder / f"{part.name}.json").exists()]


def minutes(rows: list[Row]) -> float:
    """Return how long the runs take on `CORES`.

    Rows from before processor time was recorded are estimated: `START`, and their tokens at the run's highest speed.
    """
    seconds = [row.get("seconds") or START + row["tokens"] / row.get("tokens_per_s", math.inf) for row in rows]
    return sum(seconds) / CORES / 60


def section(part: Part, results: dict[str, Any]) -> str:
    """Return a part's section of the page."""
    rows: list[Row] = results["rows"]
    about, largest = results["about"], max(row["parameters"] for row in rows if row["loss"] is not None)
    tokens = max(row["tokens"] for row in rows)
    first, *further = part.told(rows)
    links = [f"![{part.picture}](chapter/{part.name}-{theme}.svg#only-{theme})" for theme in ("light", "dark")]
    extent = (
        f"{len(rows)} runs of up to {tokens:,} tokens, with models of up to {largest:,} parameters; Python "
        f"{about['python']}, torch {about['torch']}."
    )
    return "\n\n".join(
        [
            f"## {part.title}",
            f"**The statement.** {part.claim}",
            f"**Where it is from.** {part.source}",
            f"**Here.** {extent}",
            f"**What was seen.** {first}",
            "\n".join(links),
            *further,
            f"```sh\n{part.command}\n```",
        ]
    )


def page(folder: Path = RESULTS) -> str:
    """Return the whole page."""
    results = {part: read(part, folder) for part in finished(folder)}
    each = {part: minutes(found["rows"]) for part, found in results.items()}
    total, slowest = sum(each.values()), max(each, key=lambda part: each[part])
    duration = (
        f"All parts take about {total:.0f} minutes on {CORES} cores, estimated from the runs' recorded processor time, "
        f"or their speed where that is missing; {slowest.name} alone takes {each[slowest]:.0f}."
    )
    return "\n\n".join([HEAD.rstrip(), duration, *(section(*part) for part in results.items())]) + "\n"


def publish(page_at: Path = PAGE, folder: Path = RESULTS) -> None:
    """Write the page, and the pictures in a folder next to it."""
    pictures = page_at.with_suffix("")  # a folder
    pictures.mkdir(parents=True, exist_ok=True)
    for part in finished(folder):
        paint(part.draw, read(part, folder)["rows"], pictures / part.name, (PLOT_WIDTH, part.height))
    page_at.write_text(page(folder), encoding="utf-8")
