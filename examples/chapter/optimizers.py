"""Eight optimizers, each at the best learning rate of a sweep, and the widths of their ranges of good rates."""

from typing import Any

from benchmarks.report import table
from examples.chapter.drawing import STYLES, band, legend
from examples.chapter.parts import Part
from examples.chapter.runs import SEEDS, Run, grid
from examples.chapter.told import Found, Row, best, compared, found, listed

GOOD = 0.1  # a rate is good up to this many nats above the best loss, or up to the spread over seeds if that is larger
WAYS: dict[str, tuple[tuple[str, ...], tuple[float, ...]]] = {
    "SGD": (("name=sgd", "momentum=0.0"), (0.1, 0.3, 1.0, 3.0)),
    "momentum": (("name=sgd",), (0.03, 0.1, 0.3, 1.0)),  # the trainer's default, 0.9
    "Nesterov": (("name=sgd", "nesterov=true"), (0.03, 0.1, 0.3, 1.0, 3.0)),
    "AdaGrad": (("name=adagrad",), (0.01, 0.03, 0.1, 0.3)),
    "RMSProp": (("name=rmsprop",), (0.001, 0.003, 0.01, 0.03)),
    "Adam": (("name=adam",), (0.001, 0.003, 0.01, 0.03)),
    "AdamW": (("name=adamw",), (0.003, 0.01, 0.03, 0.1)),
    "Lion": (("name=lion",), (0.0003, 0.001, 0.003, 0.01, 0.03)),
}
PAIRS = (("momentum", "SGD"), ("Nesterov", "momentum"), ("Adam", "RMSProp"), ("AdamW", "Adam"), ("Lion", "AdamW"))


def runs() -> list[Run]:
    made = []
    for way, (settings, rates) in WAYS.items():
        made += grid({"way": way}, [f"optimizer.{setting}" for setting in settings], lr=rates)
    return made


def again(rows: list[Row]) -> list[tuple[Run, int]]:
    """Choose each optimizer's best rate, to repeat it with the other seeds."""
    rates = {way: min(tried, key=lambda lr: tried[lr].mean) for way in WAYS for tried in [sweep(rows, way)]}
    chosen = [run for run in runs() if rates[run.labels["way"]] == run.labels["lr"]]
    return [(run, seed) for run in chosen for seed in SEEDS[1:]]


def repeated(rows: list[Row], way: str) -> dict[float, Found]:
    """Return the losses at the rates that have all seeds."""
    return {lr: each for lr, each in sweep(rows, way).items() if len(each.values) == len(SEEDS)}


def sweep(rows: list[Row], way: str) -> dict[float, Found]:
    return {lr: found(rows, way, way=way, lr=lr) for lr in WAYS[way][1]}


def told(rows: list[Row]) -> list[str]:
    least, body = {}, []
    for way in WAYS:
        tried = sweep(rows, way)
        least[way] = best(list(repeated(rows, way).values()))
        good = [lr for lr, each in tried.items() if each.mean <= least[way].mean + max(GOOD, least[way].spread)]
        rate = next(lr for lr, each in tried.items() if each == least[way])
        edge = ", an end of the sweep" if rate in (min(tried), max(tried)) else ""
        body.append(
            [way, f"{rate:g}{edge}", str(least[way]), f"{min(good):g} to {max(good):g}", f"{max(good) / min(good):.0f}"]
        )
    columns = ["", "best rate", "loss at the best rate", "good rates", "largest / smallest good rate"]
    sgd = best([least[way] for way in ("SGD", "momentum", "Nesterov")])
    adaptive = [least[way] for way in WAYS if way not in ("SGD", "momentum", "Nesterov")]
    worst = max(adaptive, key=lambda each: each.mean)
    return [
        listed(
            "The best and the worst adaptive method, against the best of SGD, momentum and Nesterov",
            [compared(best(adaptive), sgd), compared(worst, sgd)],
        ),
        table(columns, body),
        listed("Each method against the one that it refines", [compared(least[a], least[b]) for a, b in PAIRS]),
        f"A rate is good if its loss is at most {GOOD} nats, or the range over seeds if that is larger, above that of "
        "the same optimizer's best rate. Rates are about three times apart. The sweep has one seed; each optimizer's "
        "best rate was repeated with two more seeds.",
        "Chen et al. 2023 ([arXiv:2302.06675](https://arxiv.org/abs/2302.06675)), who introduced Lion, report their "
        "best results at 4,096 images per batch for Lion and 256 for AdamW. Here a batch is 16 rows of 64 bytes.",
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    left, right = figure.subplots(1, 2)
    for way, (color, line) in zip(WAYS, STYLES):
        tried = sweep(rows, way)
        band(left, list(tried), list(tried.values()), color, line, way)
        rate = min(ended := repeated(rows, way), key=lambda lr: ended[lr].mean)
        curves = [row["curve"] for row in rows if row["way"] == way and row["lr"] == rate and row["loss"] is not None]
        tokens = [tokens / 1e3 for tokens, _ in curves[0]]
        right.plot(tokens, [sum(x) / len(x) for x in zip(*([y for _, y in c] for c in curves))], line, color=color)
    left.set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats per byte")
    right.set(xlabel="thousand tokens", ylabel="training loss at the best rate")
    for axes in (left, right):
        axes.grid(alpha=0.25)
    legend(figure, left, 3)


PART = Part(
    name="optimizers",
    title="Optimizers at their best learning rates",
    claim="Language models need adaptive methods: SGD ends higher, while the adaptive methods differ little at their "
    "best learning rates and are about equally easy to tune.",
    source="Zhao et al. 2024 ([arXiv:2407.07972](https://arxiv.org/abs/2407.07972)), on language models of 150 M to "
    "1.2 B parameters.",
    runs=runs,
    seeds=SEEDS[:1],
    again=again,
    told=told,
    draw=draw,
    picture="held-out loss over the learning rate for eight optimizers, and training loss over tokens at the best rate",
    command="llmfast train --config examples/chapter/optimizers.toml --optimizer.name lion --optimizer.lr 0.001",
    height=4.0,
)
