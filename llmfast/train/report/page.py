"""The page of a report: which tables and charts it has, for the template page.html."""

import base64
import hashlib
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files

from jinja2 import Environment

import llmfast
from llmfast._commands import WRITTEN
from llmfast._units import in_bytes, short
from llmfast.train.config import Config
from llmfast.train.report.charts import HEIGHT, WIDTH, Chart, Drawn, Point, Series, Style
from llmfast.train.report.logs import Log, flat

TEXT = ("data.sources", "data.held_out", "data.tokenizer", "data.vocab_size")  # settings that change what is predicted
STYLES: dict[str, Style] = {"source_loss": "training", "validation": "validation"}
Charts = list[Drawn | str | None]  # a sentence instead of a chart of what never changes


@dataclass
class Section:
    """A heading and what is below it; a section without content is left out."""

    key: str
    title: str
    table: Sequence[Sequence[str]] = ()
    notes: list[str] = field(default_factory=list)
    charts: Charts = field(default_factory=list)
    folded: Drawn | None = None
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # run, prompt, text

    def __post_init__(self) -> None:
        self.notes += [chart for chart in self.charts if isinstance(chart, str)]
        self.charts = [chart for chart in self.charts if isinstance(chart, Drawn)]

    def __bool__(self) -> bool:
        return bool(self.table or self.notes or self.charts or self.samples)


def page(logs: Sequence[Log]) -> str:
    """Write the page about runs."""
    sections = [_summary(logs), _loss(logs), _sources(logs), _optimizer(logs), _speed(logs), _heads(logs)]
    sections += [_differences(logs), _samples(logs)]
    more = f" and {len(logs) - 3} more" if len(logs) > 3 else ""
    folder = files("llmfast.train.report")
    text = {name: folder.joinpath(f"page.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    return (
        Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        .from_string(text["html"])
        .render(
            title=", ".join(log.name for log in logs[:3]) + more,
            sections=list(filter(None, sections)),
            style=text["css"],
            width=WIDTH,
            height=HEIGHT,
            script=text["js"],
            digest=base64.b64encode(hashlib.sha256(text["js"].encode()).digest()).decode(),
            written=WRITTEN,
            version=llmfast.__version__,
        )
        + "\n"
    )


def _summary(logs: Sequence[Log]) -> Section:
    differing = _differing(logs) if len(logs) > 1 else []
    guesses = any("acceptance" in log.curves for log in logs)
    head = ["run", "validation loss (nats per token)", *differing, "steps", "tokens", "tokens/s, median", "peak memory"]
    head += ["steps skipped", "loss spikes", *(["guesses accepted", "tokens per pass"] if guesses else [])]
    rows = [head]
    for log in logs:
        last = log.curve("loss")[-1] if log.curve("loss") else Point(0, 0, math.nan)
        planned = f" of {_whole(float(log.setting('train.steps')))}" if log.settings else ""
        speeds, memory, skipped = log.values("tokens_per_s"), log.values("memory_bytes"), log.values("skipped")
        row = [log.name, _last(log.curve("validation_mean"), "{:.3f}"), *map(log.setting, differing)]
        row += [_whole(last.step) + planned, short(last.tokens)]
        row += [_whole(statistics.median(speeds)) if speeds else "-", in_bytes(max(memory)) if memory else "-"]
        row += [_whole(skipped[-1]) if skipped else "0", _whole(sum(log.values("spike")))]
        if guesses:
            heads = log.curves.get("acceptance", {}).values()
            row += [", ".join(f"{100 * head[-1].value:.0f} %" for head in heads) or "-"]
            row += [_last(log.curve("tokens_per_pass"), "{:.2f}")]
        numbers = 2 + len(differing)
        rows.append([*row[:numbers], *(cell.replace(" ", "\u00a0") for cell in row[numbers:])])  # not to wrap
    notes = []
    if others := [key for key in differing if key in TEXT]:
        notes.append(f"The runs differ in {', '.join(others)}: their losses are not of the same tokens.")
    if not any(log.curves for log in logs):
        notes.append("Nothing was logged yet.")
    # A single run reads better from top to bottom.
    return Section("runs", "Runs", table=rows if len(logs) > 1 else list(zip(*rows)), notes=notes)


def _loss(logs: Sequence[Log]) -> Section:
    training = [Series(log.name, i, log.curve("loss"), "training") for i, log in enumerate(logs)]
    validation = [Series(log.name, i, log.curve("validation_mean"), "validation") for i, log in enumerate(logs)]
    chart, legend = Chart("All sources", "nats per token", "tokens"), len(logs) > 1
    whole = chart.draw([*training, *validation], legend=legend)
    if not isinstance(whole, Drawn):
        return Section("loss", "Loss", charts=[whole])
    # The first losses are so large that the last ones, which matter, would look alike.
    begin = max((p.tokens for s in training for p in s.points), default=0) / 5
    late = [*(replace(s, points=_means(s.points)) for s in training), *validation]
    late = [replace(s, points=[p for p in s.points if p.tokens > begin]) for s in late]
    closer = replace(chart, title="After the first fifth, training averaged").draw(late, legend=legend)
    log = replace(chart, title="All sources, on logarithmic axes", log_x=True, log_y=True)
    folded = log.draw([*training, *validation], legend=legend)
    return Section("loss", "Loss", charts=[whole, closer], folded=folded if isinstance(folded, Drawn) else None)


def _means(points: list[Point], count: int = 50) -> list[Point]:
    """Average stretches of a line into `count` points; the mean of a stretch that holds NaN is NaN."""
    size = math.ceil(len(points) / count) or 1
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    found = []
    for stretch in stretches:
        step, tokens, value = (sum(p[i] for p in stretch) / len(stretch) for i in range(3))
        found.append(Point(step, tokens, value, logged=all(p.logged for p in stretch)))
    return found


def _sources(logs: Sequence[Log]) -> Section:
    charts: Charts = []
    if len(_parts(logs, ["source_loss", "validation", "shares"])) > 1:
        share = Chart("Share of the mixture", "%", "steps", from_zero=True, factor=100)
        charts = _split(logs, Chart("Loss", "nats per token", "tokens"), ["source_loss", "validation"])
        charts += _split(logs, share, ["shares"])
    return Section("sources", "Sources", charts=charts)


def _optimizer(logs: Sequence[Log]) -> Section:
    rate = _by_run(logs, Chart("Learning rate", "", "steps", from_zero=True), "lr")
    norm = _by_run(logs, Chart("Gradient norm", "before clipping", "steps", log_y=True), "grad_norm")
    return Section("optimizer", "Optimizer", charts=[rate, norm])


def _speed(logs: Sequence[Log]) -> Section:
    peak = max((value for log in logs for value in log.values("memory_bytes")), default=0)
    unit, size = ("GiB", 2**30) if peak >= 10 * 2**30 else ("MiB", 2**20)
    charts = {
        "tokens_per_s": Chart("Throughput", "tokens per second", "steps", from_zero=True),
        "mfu": Chart("Model FLOPs utilization", "%", "steps", from_zero=True, factor=100),
        "memory_bytes": Chart("Peak memory", unit, "steps", from_zero=True, factor=1 / size),
    }
    drawn = [_by_run(logs, chart, name) for name, chart in charts.items()]
    return Section("speed", "Speed and memory", charts=drawn)


def _heads(logs: Sequence[Log]) -> Section:
    charts = _split(logs, Chart("Loss", "nats per token", "tokens"), ["head_loss"], _head)
    accuracy = Chart("Accuracy", "%", "tokens", from_zero=True, factor=100)
    charts += _split(logs, accuracy, ["head_accuracy"], _head)
    weight = Chart("Weight", "in the objective", "steps", from_zero=True)
    charts += _split(logs, weight, ["head_weights"], _head)
    charts.append(_by_run(logs, Chart("Objective", "weighted sum of the heads' losses", "tokens"), "objective"))
    return Section("heads", "Heads that predict further tokens", charts=charts)


def _head(part: str) -> str:
    return f"{int(part) + 1} tokens ahead" if part.isdecimal() and part != "0" else "next token"


def _differences(logs: Sequence[Log]) -> Section:
    section = Section("settings", "Settings")
    defaults = Log("default", flat(Config()), {}, "")
    keys = _differing(logs if len(logs) > 1 else [defaults, *logs])
    if not keys and any(log.settings for log in logs):
        same = "The runs have the same settings." if len(logs) > 1 else "All settings are the defaults."
        section.notes.append(same)
    elif keys:
        table = [defaults, *logs]
        rows = [[key, *(log.setting(key) for log in table)] for key in keys]
        section.table = [["what differs", *(log.name for log in table)], *rows]
    return section


def _differing(logs: Sequence[Log]) -> list[str]:
    """Return the keys of settings that are not the same in all runs that have settings."""
    known = [log.settings for log in logs if log.settings]
    keys = dict.fromkeys(key for settings in known for key in settings if key not in ("name", "runs"))
    return [key for key in keys if len({settings.get(key) for settings in known}) > 1]


def _samples(logs: Sequence[Log]) -> Section:
    # HTML cannot hold control characters: symbols take their places.
    symbols = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {0x7F: 0x2421}
    found = [
        (log.name, log.settings.get("train.sample_prompt", ""), log.sample.translate(symbols))
        for log in logs
        if log.sample
    ]
    return Section("samples", "Samples", samples=found)


def _by_run(logs: Sequence[Log], chart: Chart, name: str) -> Drawn | str | None:
    return chart.draw([Series(log.name, i, log.curve(name)) for i, log in enumerate(logs)], legend=len(logs) > 1)


def _split(logs: Sequence[Log], chart: Chart, names: Sequence[str], label: Callable[[str], str] = str) -> Charts:
    """Draw one run's parts in one chart, but a chart per part of several runs: lines then differ in one thing only."""
    parts = _parts(logs, names)
    if len(logs) == 1:
        return [chart.draw([s for i, part in enumerate(parts) for s in _series(logs[0], part, names, label(part), i)])]
    charts = [replace(chart, title=f"{chart.title}: {label(part)}") for part in parts]
    return [
        chart.draw([s for i, log in enumerate(logs) for s in _series(log, part, names, log.name, i)])
        for chart, part in zip(charts, parts)
    ]


def _series(log: Log, part: str, names: Sequence[str], label: str, number: int) -> list[Series]:
    return [Series(label, number, log.curve(name, part), STYLES.get(name, "plain")) for name in names]


def _parts(logs: Sequence[Log], names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(part for log in logs for name in names for part in log.curves.get(name, {})))


def _whole(x: float) -> str:
    return f"{x:,.0f}"


def _last(points: Sequence[Point], form: str) -> str:
    return form.format(points[-1].value) if points else "-"
