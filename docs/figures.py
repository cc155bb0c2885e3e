"""Figures of the documentation, drawn from counted results and from the plan's numbers.

python -m docs.figures     # writes docs/figures/*.svg, each for light and for dark pages

Each figure contains the SHA-256 of its numbers, so that a test can tell whether it is up to date. The results are in
benchmarks/results/results.json, which `make bench` writes.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.report import GROUPS, SHOWN, bytes_per_parameter, chosen
from evidence.roofline import H100
from llmfast.losses import LinearCrossEntropyPlan
from llmfast.losses.plan import row_width
from llmfast_kernels.cross_entropy import tile

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "figures"
RESULTS = ROOT / "benchmarks" / "results" / "results.json"

# Okabe and Ito's colours are distinguishable for colour-blind readers; these four are visible on white and black.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#d55e00", "#009e73", "#cc79a7"
GREY = "#999999"
INK = {"light": "#222222", "dark": "#dddddd"}
WIDTH = 5.4  # inches, width of a diagram
PLOT_WIDTH = 4.6  # inches; at this width a point is about a pixel on a phone
SMALL = 9  # points, small font of a diagram

ELEMENT = 2  # bytes per bfloat16


# The numbers to draw.


def results() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text())["rows"]
    return rows


def bytes_per_logit() -> dict[str, Any]:
    """Return bytes per logit of each implementation at `SHOWN`, grouped by operation."""
    logits = SHOWN["N"] * SHOWN["V"]
    ways = {}
    for row in chosen(results(), section="real sizes", operation="linear_cross_entropy", size=SHOWN):
        left, parts = dict(row["by_name"]), {}
        for group, belongs in GROUPS.items():
            names = [name for name in left if belongs(name)]
            parts[group] = round(sum(left.pop(name) for name in names) / logits, 2)
        ways[row["way"]] = {"parts": parts, "asked": round(row["moved"] / logits, 1)}
    return ways


def gradient_bytes(N: int, D: int, V: int) -> int:
    return ELEMENT * (N * D + V * D)


def curve() -> dict[str, dict[str, list[float]]]:
    """Return GiB held beyond inputs and gradients, and modelled ms: ours for all budgets, others' as counted."""
    found = {}
    for name, options in {"llmfast": {}, "llmfast, bfloat16 sums": {"accumulate_dtype": torch.bfloat16}}.items():
        plans = LinearCrossEntropyPlan.make(**SHOWN, memory_budget=8 << 30, **options).curve
        found[name] = [(plan.held_bytes, plan.seconds) for plan in plans if plan.held_bytes >= 10 << 20]
    for row in chosen(results(), section="real sizes", operation="linear_cross_entropy", size=SHOWN):
        if not row["way"].startswith("llmfast"):
            found[row["way"]] = [(row["peak_bytes"] - gradient_bytes(**SHOWN), row["seconds"][H100.name])]
    return {
        name: {"GiB": [round(held / 2**30, 4) for held, _ in points], "ms": [round(s * 1e3, 2) for _, s in points]}
        for name, points in found.items()
    }


def optimizer_bytes() -> dict[str, float]:
    """Return counted bytes per parameter on GPT-2 for each mode of AdamW and for other libraries."""
    found = {}
    for row in chosen(results(), section="optimizers", size={"parameters": "124M"}):
        if row["operation"] == "adamw" and row["way"] in ("llmfast", "torch fused", "torch foreach", "optimi"):
            if row["dtype"] == "float32":
                found[f"{row['way']}, fp32"] = bytes_per_parameter(row)
        elif row["operation"] == "adamw, bfloat16 with more bits":
            found[row["way"].replace(", ", ", bf16, ", 1).replace("8-bit states", "8-bit")] = bytes_per_parameter(row)
    return {name: round(value, 2) for name, value in found.items()}


def row_of_logits() -> dict[str, int]:
    """Return how the row kernel tiles a row of GPT-2's vocabulary in the library's own buffer."""
    V = 50257
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):  # otherwise the GPU is asked for its warp size
        shape = tile(V)
    return {
        "V": V,
        "row_width": row_width(V, torch.bfloat16, kernels=True, filtered=False),
        "tile": shape["BLOCK_V"],
        "threads": shape["THREADS"],
        "whole": V // shape["BLOCK_V"],
        "rest": V % shape["BLOCK_V"],
    }


def chunks() -> dict[str, Any]:
    """Return the chunks and bytes of the plan at `SHOWN`."""
    plan = LinearCrossEntropyPlan.make(**SHOWN)
    return {
        "size": SHOWN,
        "mode": plan.mode,
        "rows": [part.stop - part.start for part in plan],
        "slab": plan.slab_bytes,
        "weight": SHOWN["V"] * SHOWN["D"] * 4,
        "all": SHOWN["N"] * SHOWN["V"] * ELEMENT,
    }


# The drawings.


def draw_bytes(figure: Any, ways: dict[str, Any], ink: str) -> None:
    axes = figure.subplots()
    left = [0.0] * len(ways)
    for group, color in zip(GROUPS, (BLUE, ORANGE, GREY)):
        widths = [way["parts"][group] for way in ways.values()]
        axes.barh(list(ways), widths, left=left, color=color, label=group)
        left = [a + b for a, b in zip(left, widths)]
    for y, (total, way) in enumerate(zip(left, ways.values())):
        asked = f", requests {way['asked']:.0f}" if way["asked"] > 2 * total else ""
        axes.text(total, y, f" {total:.1f}{asked}", va="center", color=ink)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("bytes per logit, counted")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, handlelength=1, columnspacing=1)


def draw_curve(figure: Any, found: dict[str, dict[str, list[float]]], ink: str) -> None:
    axes = figure.subplots()
    for (name, points), style in zip(found.items(), [(BLUE, "-"), (GREEN, "--")]):
        axes.plot(points["GiB"], points["ms"], style[1], color=style[0], label=name)
    markers = "sDv^<>Pp*X"
    others = [(name, points) for name, points in found.items() if not name.startswith("llmfast")]
    for (name, points), marker in zip(others, markers, strict=False):
        color = ORANGE if name.startswith("Liger") else PURPLE if name.startswith("cut") else GREY
        axes.plot(points["GiB"], points["ms"], marker, color=color, markersize=6, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([2.0**k for k in range(-9, 6, 2)], ["2 MiB", "8", "32", "128", "512 MiB", "2 GiB", "8", "32 GiB"])
    axes.minorticks_off()
    axes.set_xlabel("held beyond inputs and gradients")
    axes.set_ylabel(f"ms, modelled on an {H100.name}")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


def draw_optimizers(figure: Any, found: dict[str, float], ink: str) -> None:
    axes = figure.subplots()
    axes.barh(list(found), list(found.values()), color=[BLUE if n.startswith("llmfast") else GREY for n in found])
    for y, value in enumerate(found.values()):
        axes.text(value, y, f" {value:.1f}", va="center", color=ink)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("bytes per parameter, counted")


def blank(figure: Any, height: float) -> Any:
    """Create frameless axes in points, with the origin at the lower left corner."""
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH * 72), ylim=(0, height * 72))
    axes.axis("off")
    return axes


def box(axes: Any, x: float, y: float, w: float, h: float, color: str, fill: float = 0.25, **style: Any) -> None:
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), w, h, facecolor=to_rgba(color, fill), edgecolor=color, linewidth=1, **style))


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.2})


def draw_row(figure: Any, row: dict[str, int], ink: str) -> None:
    """Draw one row, processed forwards for the sums and backwards for the gradient."""
    axes = blank(figure, ROW_HEIGHT)
    left, width, high = 14, WIDTH * 72 - 28, 26
    scale = width / row["row_width"]

    def tiles(y: float, color: str) -> None:
        for i in range(row["whole"]):
            box(axes, left + i * row["tile"] * scale, y, row["tile"] * scale, high, color)
        start = row["whole"] * row["tile"]
        box(axes, left + start * scale, y, row["rest"] * scale, high, color, 0.1, linestyle="--")

    def say(x: float, y: float, text: str, **style: Any) -> None:
        axes.text(x, y, text, color=ink, va="center", **style)

    say(left, 246, f"a row: V = {row['V']:,} logits in a buffer of {row['row_width']:,}")
    tiles(206, GREY)
    for i in range(row["whole"]):
        say(left + (i + 0.5) * row["tile"] * scale, 219, f"{row['tile']:,}", ha="center", fontsize=SMALL)
    say(left + width, 196, f"last tile, masked: {row['rest']:,}", ha="right", fontsize=SMALL)
    say(left, 176, f"1. forwards: {row['threads']:,} threads, each with its own sums")
    tiles(136, BLUE)
    arrow(axes, (left, 128), (left + width, 128), BLUE)
    say(left, 106, "combined once, after the loop: peak, sum of exponentials → lse, loss")
    say(left, 78, "2. backwards: gradient written over the logits")
    tiles(38, ORANGE)
    arrow(axes, (left + width, 30), (left, 30), ORANGE)
    say(left, 12, "starts with the elements read last, which are still in the caches")


def draw_chunks(figure: Any, plan: dict[str, Any], ink: str) -> None:
    """Draw the chunks of hidden states, the slab they share and the gradient they accumulate."""
    axes = blank(figure, CHUNK_HEIGHT)
    top, high = 200, 150
    total, y = sum(plan["rows"]), float(top)

    def say(x: float, y: float, text: str, **style: Any) -> None:
        axes.text(x, y, text, color=ink, **{"va": "center", "ha": "center", **style})

    say(45, top + 34, "hidden")
    say(45, top + 19, f"{total:,} x {plan['size']['D']:,}", fontsize=SMALL)
    say(185, top + 34, "one slab of logits, reused")
    say(185, top + 19, f"{plan['rows'][0]:,} x {plan['size']['V']:,}, {plan['slab'] / 2**30:.2f} GiB", fontsize=SMALL)
    say(335, top + 34, "weight gradient")
    say(335, top + 19, f"float32, {plan['weight'] / 2**30:.2f} GiB", fontsize=SMALL)
    for i, rows in enumerate(plan["rows"]):
        h = high * rows / total
        y -= h
        box(axes, 15, y, 60, h - 3, BLUE, 0.6 if i == 1 else 0.2)
        say(45, y + (h - 3) / 2, f"{rows:,}", fontsize=SMALL)
        if i == 1:
            slab = h - 3
            box(axes, 115, y, 140, slab, ORANGE, 0.4)
            say(185, y + slab / 2, "logits, then their gradient", fontsize=SMALL)
            arrow(axes, (78, y + slab / 2), (112, y + slab / 2), ink)
            arrow(axes, (258, y + slab / 2), (292, y + slab / 2), ink)
            arrow(axes, (185, y - 3), (185, y - 28), ink)
            say(185, y - 40, "gradient of these hidden states", fontsize=SMALL)
    box(axes, 295, top - high + 30, 80, high - 33, GREEN, 0.3)
    say(335, top - high / 2 + 14, "+=", fontsize=12)
    never = f"All {total:,} rows of logits would take {plan['all'] / 2**30:.2f} GiB, and their gradient the same."
    say(WIDTH * 36, 22, never, fontsize=SMALL)


ROW_HEIGHT, CHUNK_HEIGHT = 3.6, 3.5
FIGURES: dict[str, tuple[Callable[[], Any], Callable[[Any, Any, str], None], float]] = {
    "bytes": (bytes_per_logit, draw_bytes, 3.2),
    "curve": (curve, draw_curve, 4.2),
    "optimizers": (optimizer_bytes, draw_optimizers, 4.2),
    "row": (row_of_logits, draw_row, ROW_HEIGHT),
    "chunks": (chunks, draw_chunks, CHUNK_HEIGHT),
}


def digest(name: str) -> str:
    """Return the SHA-256 of the numbers in a figure."""
    return digest_of(FIGURES[name][0]())


def digest_of(numbers: Any) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def draw(name: str, folder: Path) -> None:
    numbers, how, height = FIGURES[name]
    if how in DIAGRAMS:
        paint(how, numbers(), folder / name, (WIDTH, height), font=10.5, layout="none")
    else:
        paint(how, numbers(), folder / name, (PLOT_WIDTH, height))


def paint(
    how: Callable[[Any, Any, str], None],
    numbers: Any,
    path: Path,
    size: tuple[float, float],
    *,
    font: float = 9.5,
    layout: str = "constrained",
) -> None:
    """Draw numbers as `path`-light.svg and `path`-dark.svg, which contain their digest."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    for theme, ink in INK.items():
        colors = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        # Without a date or random names, the same numbers give the same file.
        fixed = {"svg.hashsalt": "llmfast", "svg.fonttype": "none", "font.family": "sans-serif"}
        style = {"font.size": font, "axes.spines.top": False, "axes.spines.right": False}
        with matplotlib.rc_context({**fixed, **colors, **style}):
            figure = pyplot.figure(figsize=size, layout=layout)
            how(figure, numbers, ink)
            about = {"Date": None, "Creator": "docs.figures", "Description": digest_of(numbers)}
            figure.savefig(path.with_name(f"{path.name}-{theme}.svg"), transparent=True, metadata=about)
            pyplot.close(figure)


DIAGRAMS = (draw_row, draw_chunks)


def drawn_from(picture: str) -> str:
    """Return the digest stored in an SVG, or an empty string if there is none."""
    found = re.search(r"<dc:description>(\w+)</dc:description>", picture)
    return found[1] if found else ""


if __name__ == "__main__":
    for each in FIGURES:
        draw(each, FOLDER)
