"""Logging and display of a run: metrics.jsonl, the progress bar, loss.png and the closing table."""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from llmfast._checks import expect
from llmfast._output import Lasting, going_on
from llmfast.train.durable import write_whole

PLAIN_SECONDS = 15.0  # between lines, or one step if that is longer, where the output is not a terminal
FEW = 25  # up to this many evaluations are drawn as dots, without lines between them


class MetricsFile:
    """A file with one JSON object per line, each written at once, and optional events for TensorBoard."""

    def __init__(self, path: Path, *, resume_at: int = 0, tensorboard: bool = False) -> None:
        """Keep the lines up to step `resume_at` (after a crash there may be more) and append to them."""
        kept = [line for line in read_metrics(path) if line["step"] <= resume_at] if path.exists() and resume_at else []
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
        self._path = path
        self._events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(str(path.parent / "events"), purge_step=resume_at + 1)

    def write(self, **values: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")
        if self._events is not None:
            for name, value in _scalars(values):
                if name not in ("step", "tokens"):
                    self._events.add_scalar(name, value, values["step"])

    def close(self) -> None:
        """Close the events; more may be written afterwards."""
        if self._events is not None:
            self._events.close()


def _scalars(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers in a value, under names like head_loss/0."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _scalars(item, f"{name}/{key}" if name else key)
    elif isinstance(value, list):
        yield from _scalars(dict(enumerate(value)), name)
    elif isinstance(value, int | float):
        yield name, float(value)


def read_metrics(path: Path, *, losses: bool = True) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl, except one that a crash cut short.

    Raises:
        ValueError: it is not text, a line lacks the numbers step and tokens, or, unless `losses` is false, a loss is
            no number.
    """
    lines = []
    try:
        texts = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not text: {e}") from e
    for text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        expect(
            isinstance(line, dict) and all(math.isfinite(number(line.get(key))) for key in ("step", "tokens")),
            f"{path}: a line must be an object with the numbers step and tokens; got {line!r:.80}",
        )
        lines.append(line)
        if not losses:
            continue
        sources = line.get("validation", {})
        expect(
            isinstance(sources, dict) and all(map(_is_number, sources.values())),
            f"{path}: validation must be an object of numbers; got {sources!r:.80}",
        )
        for key in ("loss", "validation_mean"):
            expect(_is_number(line.get(key, 0)), f"{path}: {key} must be a number; got {line.get(key)!r:.80}")
    return lines


def number(value: Any) -> float:
    """Return a logged number; NaN for anything else, and for an integer too large to be meant."""
    if isinstance(value, int) and abs(value) >= 2**63:  # perhaps too large for a float as well
        return math.nan
    return float(value) if isinstance(value, int | float) else math.nan


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or not math.isnan(number(value))  # a loss may be NaN


class ProgressDisplay:
    """A live progress bar on a terminal; anywhere else a line for the first `log_every` steps, then at even steps.

    How far lines are apart depends on the speed: 1, 2, 10, 20, 100, ... times `log_every`.
    """

    def __init__(self, console: Console, steps: int, done: int, log_every: int = 1) -> None:
        self._console, self._steps = console, steps
        magnitudes = [10**k for k in range(len(str(steps)) + 1)]
        self._spaces = [log_every * times * size for size in magnitudes for times in (1, 2)]  # of lines, in steps
        self._every = log_every
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tok/s"),
            TextColumn("lr {task.fields[lr]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=done, loss="-", speed="-", lr="-")
        self._start, self._start_step = time.monotonic(), done
        self._line_step, self._since_line = done, 0.0

    def __enter__(self) -> "ProgressDisplay":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def show(self, step: int, loss: float, lr: float, speed: float, seconds: float) -> None:
        """Show what was logged about the steps since the last call, in which so many seconds were spent on them."""
        self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", lr=f"{lr:.1e}", speed=f"{speed:,.0f}")
        self._since_line += seconds
        first = self._line_step == self._start_step
        if self._console.is_terminal or not (first or step % self._every == 0 or step == self._steps):
            return
        left = (time.monotonic() - self._start) / max(1, step - self._start_step) * (self._steps - step)
        say(
            self._console,
            f"step {step}/{self._steps}  loss {loss:.3f}  {speed:,.0f} tok/s  lr {lr:.1e}  {left:.0f} s left",
        )
        if step > self._line_step:
            self._space_lines(self._since_line / (step - self._line_step))
        self._line_step, self._since_line = step, 0.0

    def _space_lines(self, seconds: float) -> None:
        """Choose the steps between lines for a step of so many seconds; they become fewer only if the run is slow."""
        if seconds * self._every > 4 * PLAIN_SECONDS:
            self._every = self._spaces[0]
        self._every = max(n for n in self._spaces if n <= self._every or seconds * n <= PLAIN_SECONDS)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process: the GPU's memory on a GPU, else the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def say(console: Console, text: str) -> None:
    """Print a line as it is: nothing in it is markup, and terminals may wrap it."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def outliving(console: Console) -> Iterator[None]:
    """Let a console whose output fails go quiet, and say so on stderr, instead of ending the work that it tells of."""
    given, file = console._file, console.file

    def lost(error: Exception) -> None:
        console.quiet = True
        going_on(error)

    if isinstance(file, Lasting):  # of the command line, or of a caller
        yield
        return
    console.file = cast(TextIO, Lasting(file, lost))
    try:
        yield
    finally:
        console._file = given  # without one, a console prints to what sys.stdout is at the time


def print_table(console: Console, rows: Sequence[tuple[str, ...]]) -> None:
    """Print rows as aligned columns."""
    table = Table(show_header=False, box=None, padding=(0, 2))
    for _ in rows[0]:
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    console.print(table)


def plot_loss(metrics: Path, picture: Path, *, unigram_entropy: float) -> None:
    """Plot training and validation loss over tokens, and the entropy of held-out token frequencies as a baseline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    unit, size = ("million", 1e6) if max((x["tokens"] for x in lines), default=0) >= 1e6 else ("thousand", 1e3)
    train = [(line["tokens"] / size, line["loss"]) for line in lines if "loss" in line]
    if train:
        axes.plot(*zip(*train), color="0.65", linewidth=1, label="training")
    for source in sorted({name for line in lines for name in line.get("validation", {})}):
        points = [(x["tokens"] / size, x["validation"][source]) for x in lines if source in x.get("validation", {})]
        form = "o" if len(points) <= FEW else "o-"
        axes.plot(*zip(*points), form, markersize=4, label=f"validation: {source}")
    axes.axhline(unigram_entropy, linestyle=":", color="black", linewidth=1, label="unigram entropy of held-out text")
    axes.set(title=metrics.parent.name, xlabel=f"{unit} tokens", ylabel="loss (nats per token)")
    axes.grid(alpha=0.2)
    labels = axes.get_legend_handles_labels()[1]
    columns = max(1, min(len(labels) // 4, 96 // (max(map(len, labels)) + 6)))  # 8 inches are about 96 characters wide
    rows = -(-len(labels) // columns)
    figure.set_size_inches(8, 3.9 + 0.21 * rows)  # the axes are as high with many sources as with few
    figure.legend(frameon=False, loc="outside lower center", ncols=columns)  # where it hides nothing
    figure.savefig(picture, dpi=120)


def weighted_mean(values: dict[str, tuple[float, int]]) -> float:
    """Return the token-weighted mean of {source: (loss, tokens)}."""
    return sum(loss * n for loss, n in values.values()) / max(1, sum(n for _, n in values.values()))
