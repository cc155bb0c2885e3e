"""Pictures of fits: how close the runs are to the law, and what it predicts beyond them. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmfast._checks import expect
from llmfast._commands import WRITTEN
from llmfast._units import short
from llmfast.plan.fit import Fit, distinct
from llmfast.plan.laws import ChinchillaLaw, PowerLaw

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEYOND = 10.0  # the frontier is drawn up to this many times the largest run's budget
# Supported formats, each with its metadata field for the program that wrote the file.
FIELDS = {".png": "Software", ".svg": "Creator", ".pdf": "Creator"}


def expect_format(picture: Path) -> None:
    """Check the suffix: matplotlib would add .png to a name without one, which may be another file's name."""
    expect(picture.suffix.lower() in FIELDS, f"a picture's name must end in .png, .svg or .pdf; got {str(picture)!r}")


def plot_chinchilla(
    fit: Fit[ChinchillaLaw],
    N: Sequence[float],  # (runs,)
    D: Sequence[float],  # (runs,)
    loss: Sequence[float],  # (runs,)
    picture: Path,
) -> None:
    """Plot loss over FLOPs: the runs, the law for each model size, and the lowest loss that each budget can buy.

    Args:
        N, D, loss: as they were given to `fit_chinchilla`.
        picture: the file to write: .png, .svg or .pdf.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator, NullLocator

    expect_format(picture)
    expect(len(N) == len(fit.residuals), f"N must be of the fit's {len(fit.residuals)} runs; got {len(N)}")
    n, d, law = np.asarray(N, dtype=float), np.asarray(D, dtype=float), fit.law
    flops = 6 * n * d
    figure, axes, below = _figure()
    colour = LogNorm(n.min() / 1.2, n.max() * 1.2)
    sizes = distinct(n)
    for size in range(sizes.max() + 1):
        own = sizes == size
        middle = float(np.exp(np.log(n[own]).mean()))
        budgets = np.geomspace(flops[own].min() / 1.5, flops[own].max() * 1.5, 100)
        curve = [law.spent(middle, c).loss for c in budgets]
        axes.plot(budgets, curve, color=_viridis(colour(middle)), linewidth=1, zorder=1)
    points = axes.scatter(
        flops, loss, c=n, norm=colour, cmap="viridis", s=22, zorder=3, edgecolors="white", linewidth=0.4
    )
    budgets = np.geomspace(flops.min(), flops.max() * BEYOND, 100)
    axes.plot(budgets, [law.optimal(c).loss for c in budgets], "--", color="black", label="compute-optimal", zorder=2)
    least = law.optimal(budgets[-1]).loss
    _floor(axes, law.E, f"E = {law.E:.3g}")
    _mark(axes, fit, flops, loss)
    axes.set(xscale="log", yscale="log", ylabel="loss (nats per token)")
    terms = rf"{_scientific(law.A)}\,/\,N^{{{law.alpha:.3f}}} + {_scientific(law.B)}\,/\,D^{{{law.beta:.3f}}}"
    axes.set_title(rf"$L = {law.E:.3g} + {terms}$", fontsize=11)
    _ticks(axes, loss, least, law.E)
    bar = figure.colorbar(points, ax=[axes, below], label="parameters N", pad=0.02)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter(lambda v, _: short(v))
    below.scatter(flops, 100 * fit.residuals, c=n, norm=colour, cmap="viridis", s=14)
    below.set(xlabel="FLOPs, 6 N D", xscale="log", xlim=axes.get_xlim(), ylabel="fit off by, %")
    _save(figure, picture)


def plot_power(
    fit: Fit[PowerLaw],
    x: Sequence[float],  # (runs,)
    loss: Sequence[float],  # (runs,)
    picture: Path,
    *,
    xlabel: str,
) -> None:
    """Plot loss over x: the runs, the law, and its floor.

    Args:
        x, loss: as they were given to `fit_power`.
        picture: the file to write: .png, .svg or .pdf.
        xlabel: what x is.
    """
    expect_format(picture)
    expect(len(x) == len(fit.residuals), f"x must be of the fit's {len(fit.residuals)} runs; got {len(x)}")
    points, law = np.asarray(x, dtype=float), fit.law
    figure, axes, below = _figure()
    along = np.geomspace(points.min() / 1.5, points.max() * BEYOND, 200)
    axes.plot(along, [law.loss(v) for v in along], "--", color="black", linewidth=1, label="fit")
    axes.scatter(points, loss, s=22, zorder=3)
    _floor(axes, law.floor, f"floor {law.floor:.3g}")
    _mark(axes, fit, points, loss)
    axes.set(xscale="log", yscale="log", ylabel="loss (nats per token)")
    axes.set_title(rf"$L = {law.floor:.3g} + ({_scientific(law.scale)}\,/\,x)^{{{law.exponent:.3f}}}$", fontsize=11)
    _ticks(axes, loss, law.loss(along[-1]), law.floor)
    below.scatter(points, 100 * fit.residuals, s=14)
    below.set(xlabel=xlabel, xscale="log", xlim=axes.get_xlim(), ylabel="fit off by, %")
    _save(figure, picture)


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes, below = figure.subplots(2, 1, height_ratios=[4, 1])
    for each in (axes, below):
        each.grid(alpha=0.2)
    below.axhline(0, color="black", linewidth=0.8)
    return figure, axes, below


def _save(figure: Any, picture: Path) -> None:
    figure.savefig(picture, dpi=120, metadata={FIELDS[picture.suffix.lower()]: WRITTEN})


def _mark(axes: "Axes", fit: Fit[Any], x: "np.typing.NDArray[np.float64]", loss: Sequence[float]) -> None:
    """Draw rings around outliers, and the legend."""
    far = fit.outliers
    if far:
        axes.scatter(
            x[far], np.asarray(loss)[far], s=110, facecolors="none", edgecolors="tab:red", label="outliers", zorder=4
        )
    axes.legend(frameon=False, fontsize=9)


def _floor(axes: "Axes", floor: float, label: str) -> None:
    if floor > 0:
        axes.axhline(floor, linestyle=":", color="0.4", linewidth=1, label=label)


def _ticks(axes: "Axes", loss: Sequence[float], least: float, floor: float) -> None:
    """Label the loss axis at 1, 1.5, 2, ... as losses span less than a decade; include the floor if it is near."""
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = 0.97 * (floor if floor > 0.4 * least else least), 1.05 * max(loss)
    wanted = [0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30]
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(FixedLocator([v for v in wanted if low <= v <= high]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:g}")


def _viridis(value: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](value)


def _scientific(x: float) -> str:
    if 1e-2 <= x < 1e5:
        return f"{x:.3g}" if x < 1000 else f"{x:.0f}"
    mantissa, exponent = f"{x:.1e}".split("e")
    return rf"{mantissa} \cdot 10^{{{int(exponent)}}}"
