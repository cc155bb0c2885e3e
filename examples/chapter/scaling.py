"""A scaling law of six small runs against a larger run that it has not seen, and three models for the same FLOPs."""

from typing import Any

from docs.figures import BLUE, GREEN, ORANGE
from examples.chapter.drawing import band
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Found, Row, compared, found, listed
from llmfast.plan import ChinchillaLaw, Fit, fit_chinchilla

SMALL = ((16, 240), (16, 480), (16, 960), (32, 240), (32, 480), (64, 240))  # width and steps
LARGE = (64, 960)
SAME_FLOPS = {"too small": (16, 1590), "between": (32, 480), "too large": (64, 160)}
COLORS = {16: BLUE, 32: ORANGE, 64: GREEN}


def runs() -> list[Run]:
    sizes = dict.fromkeys([*SMALL, LARGE, *SAME_FLOPS.values()])
    return [
        Run({"width": width, "steps": steps}, (f"model.width={width}", f"train.steps={steps}"))
        for width, steps in sizes
    ]


def of(rows: list[Row], size: tuple[int, int], name: str = "") -> Found:
    return found(rows, name or f"width {size[0]}", width=size[0], steps=size[1])


def size_of(rows: list[Row], size: tuple[int, int]) -> tuple[float, float]:
    """Return parameters and tokens of a kind of run."""
    row = next(row for row in rows if (row["width"], row["steps"]) == size)
    return row["parameters"], row["tokens"]


def law(rows: list[Row]) -> Fit[ChinchillaLaw]:
    """Fit a law to the small runs with every seed; ValueError if they do not determine one."""
    small = [row for row in rows if (row["width"], row["steps"]) in SMALL]
    N, D, loss = ([row[key] for row in small] for key in ("parameters", "tokens", "loss"))
    return fit_chinchilla(N, D, loss, resamples=100)


def predicted(rows: list[Row]) -> str:
    """Say what a law of the small runs predicts for the large one, and what that came to."""
    large, (N, D) = of(rows, LARGE), size_of(rows, LARGE)
    try:
        fit = law(rows)
    except ValueError as e:
        return f"No law could be fitted to the {len(SMALL)} small runs: {e}. The larger run ends at {large}."
    low, high = fit.interval(lambda law: law.loss(N, D))
    inside = "within" if low <= large.mean <= high else "outside"
    return (
        f"The law of the {len(SMALL)} small runs predicts {fit.law.loss(N, D):.3f} for the larger one, and {low:.3f} "
        f"to {high:.3f} is the middle 95 % of resampled laws. That run ends at {large}: {inside} that range."
    )


def told(rows: list[Row]) -> list[str]:
    names = {
        name: f"the model of {size_of(rows, size)[0]:,} parameters on {size_of(rows, size)[1]:,} tokens"
        for name, size in SAME_FLOPS.items()
    }
    small, between, large = (of(rows, size, names[name]) for name, size in SAME_FLOPS.items())
    return [
        predicted(rows),
        listed("With the same FLOPs, 6 per parameter and token", [compared(between, small), compared(between, large)]),
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    for width, color in COLORS.items():
        sizes = sorted(size for size in {*SMALL, LARGE, *SAME_FLOPS.values()} if size[0] == width)
        place = [size_of(rows, size)[1] / 1e3 for size in sizes]
        band(axes, place, [of(rows, size) for size in sizes], color, label=f"{size_of(rows, sizes[0])[0]:,} parameters")
    axes.plot([size_of(rows, LARGE)[1] / 1e3], [of(rows, LARGE).mean], "*", color=GREEN, markersize=14)
    axes.set(xscale="log", xlabel="thousand tokens; the star is not fitted", ylabel="held-out loss, nats per byte")
    ticks = [200, 500, 1000, 2000]
    axes.set_xticks(ticks, labels=[str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)


PART = Part(
    name="scaling",
    title="Scaling laws",
    claim="A law E + A / N^alpha + B / D^beta of small runs predicts the loss of larger ones, and for given FLOPs "
    "there is a best size: larger and smaller models end higher.",
    source="Hoffmann et al. 2022 ([arXiv:2203.15556](https://arxiv.org/abs/2203.15556)), on models of 70 M to 16 B "
    "parameters.",
    runs=runs,
    told=told,
    draw=draw,
    picture="held-out loss over tokens for models of three sizes, among them the larger run that was predicted",
    command="llmfast train --config examples/chapter/scaling.toml --name small --model.width 16 --train.steps 240\n"
    "llmfast train --config examples/chapter/scaling.toml --name large --model.width 64 --train.steps 960",
)
