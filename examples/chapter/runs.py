"""Runs of the chapter: what a part trains, and what is kept of it.

A run gives one row of a part's results: its labels, its seed, losses, and what the part measures of the trained model.
The row is also kept in the run's folder, which is named after the settings: a run is repeated only if these change.
"""

import hashlib
import itertools
import json
import math
import multiprocessing
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from llmfast.train import Config, continued_config, load_config, train
from llmfast.train.config import dump_config
from llmfast.train.metrics import read_metrics
from llmfast.train.trainer import NonFinite

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
# A few steps of a tiny model, on text that is read at once: this shows that a part works, and nothing else.
QUICK_TEXT = f"data.sources=['prose={HERE.parents[1] / 'docs'}', 'code={HERE.parent}']"
QUICK = (
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "data.seq_len=32",
    "train.steps=2",
    "train.batch_size=2",
    "train.eval_rows=2",
    "train.log_every=1",
)

Row = dict[str, Any]
Measure = Callable[[Path, Config], dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One run of a part, to be made with each seed."""

    labels: dict[str, Any]
    settings: tuple[str, ...] = ()  # section.key=value, over those of the part's file; {texts} is the part's folder
    after: "Run | None" = None  # continues from this run, as `llmfast continue` does
    options: dict[str, Any] = field(default_factory=dict)  # of `continued_config`


@dataclass(frozen=True)
class Task:
    """A run with one seed, the folder for all runs, and what to measure."""

    part: str
    run: Run
    seed: int
    folder: Path
    quick: bool = False
    measure: Measure | None = None
    last: bool = True  # False: others continue from it

    @property
    def file(self) -> Path:
        return HERE / f"{self.part}.toml"

    @property
    def settings(self) -> list[str]:
        seed = f"train.seed={self.seed}"
        return [QUICK_TEXT, *self.run.settings, *QUICK, seed] if self.quick else [*self.run.settings, seed]

    @property
    def here(self) -> list[str]:
        """The settings, with the folders of this machine."""
        texts = str(self.place.parent / "texts")
        place = [f"runs={json.dumps(str(self.place.parent))}", f"name={json.dumps(self.place.name)}"]
        return [setting.replace("{texts}", texts) for setting in self.settings] + place

    @cached_property
    def before(self) -> "Task | None":
        """The task whose weights this one begins with."""
        return replace(self, run=self.run.after, measure=None, last=False) if self.run.after else None

    @cached_property
    def name(self) -> str:
        """The name of the run's folder, from all settings."""
        begun = self.before.name if self.before else ""
        text = json.dumps([dump_config(load_config(self.file, self.settings)), begun, self.run.options])
        return "-".join([*map(str, self.run.labels.values()), hashlib.sha256(text.encode()).hexdigest()[:8]])

    @property
    def place(self) -> Path:
        return self.folder / self.part / self.name.replace(" ", "-").replace("/", "-")


def grid(labels: dict[str, Any], settings: Sequence[str] = (), **axes: Iterable[Any]) -> list[Run]:
    """Make a run for each combination of values of some of the optimizer's settings."""
    found = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        changes = [f"optimizer.{name}={value}" for name, value in chosen.items()]
        found.append(Run(labels | chosen, (*settings, *changes)))
    return found


def rows_of(tasks: Sequence[Task], jobs: int) -> Iterator[Row]:
    """Yield a row for each task, in their order; make the runs that are missing, `jobs` at a time."""
    before = {before.place: before for before in (task.before for task in tasks) if before}
    if jobs == 1:
        for task in before.values():
            execute(task)
        yield from map(execute, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        for _ in pool.map(execute, before.values()):
            pass
        yield from pool.map(execute, tasks)


def execute(task: Task) -> Row:
    """Return the task's row, after training if its run is not there yet."""
    kept = task.place / "row.json"
    if kept.exists():
        row: Row = json.loads(kept.read_text(encoding="utf-8"))
        return row
    started, config = time.process_time(), config_of(task)
    with suppress(NonFinite):  # then the row has no loss
        train(config, overwrite=True, console=Console(quiet=True))
    row = {**task.run.labels, "seed": task.seed, **losses(task.place)}
    if task.measure is not None and row["loss"] is not None:
        row |= task.measure(task.place, config)
    row["seconds"] = round(time.process_time() - started, 1)  # of a processor: what it waits for others is not counted
    if task.last:
        for checkpoint in task.place.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    kept.write_text(json.dumps(row), encoding="utf-8")
    return row


def config_of(task: Task) -> Config:
    """Return the settings of a task's run."""
    if task.before is None:
        return load_config(task.file, task.here)
    return continued_config(task.before.place, overrides=task.here, **task.run.options)


def losses(run: Path) -> Row:
    """Read a run's losses and its size. A run that has diverged has no loss."""
    lines = read_metrics(run / "metrics.jsonl")
    held_out = [line for line in lines if "validation" in line]
    weights = run / "model.safetensors"
    ended = weights.exists() and all(map(math.isfinite, held_out[-1]["validation"].values()))
    row: Row = {"loss": None, "tokens": lines[-1]["tokens"]}
    if ended:
        row["loss"] = round(held_out[-1]["validation_mean"], 5)
        row["parameters"] = sum(t.numel() for t in load_file(str(weights)).values())
        row["by source"] = [
            {name: round(loss, 5) for name, loss in line["validation"].items()} for line in (held_out[0], held_out[-1])
        ]
        row["curve"] = [[line["tokens"], round(line["loss"], 4)] for line in lines if "loss" in line]
        row["tokens_per_s"] = round(max(line["tokens_per_s"] for line in lines if "loss" in line))
        guesses = next((line for line in lines if "tokens_per_pass" in line), {})
        row |= {key: guesses[key] for key in ("acceptance", "tokens_per_pass") if guesses}
    return row


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write a part's results, one line per row."""
    about = {"python": platform.python_version(), "torch": torch.__version__.partition("+")[0]}
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n', encoding="utf-8")
