"""Batches that are 4 times larger, for the same tokens, with three rules for the learning rate."""

from typing import Any

from benchmarks.report import table
from examples.chapter.drawing import COLORS, band, legend
from examples.chapter.parts import Part
from examples.chapter.runs import Run
from examples.chapter.told import Found, Row, differ, found, verdict

BATCH, STEPS, WARMUP = 8, 960, 40  # of the small batch
WAYS = {"SGD": ("optimizer.name=sgd", "optimizer.momentum=0.0"), "Adam": ("optimizer.name=adam",)}
RATES = {"SGD": (0.3, 1.0, 3.0), "Adam": (0.001, 0.003, 0.01)}  # for the small batch
BASE = {"SGD": 1.0, "Adam": 0.003}  # the best of them, which the rules scale
TIMES = (4,)
RULES = {"unchanged": "none", "times sqrt(k)": "sqrt", "times k": "linear"}


def run(way: str, k: int, rule: str, lr: float) -> Run:
    settings = (
        f"optimizer.lr={lr}",
        f"optimizer.lr_scaling={RULES[rule]}",
        f"optimizer.base_batch_size={BATCH}",
        f"optimizer.warmup_steps={WARMUP // k}",
        f"train.batch_size={BATCH * k}",
        f"train.steps={STEPS // k}",
        f"train.log_every={max(1, 20 // k)}",
    )
    return Run({"way": way, "k": k, "rule": rule, "lr": lr}, (*WAYS[way], *settings))


def runs() -> list[Run]:
    small = [run(way, 1, "unchanged", lr) for way in WAYS for lr in RATES[way]]
    return small + [run(way, k, rule, BASE[way]) for way in WAYS for k in TIMES for rule in RULES]


def base(rows: list[Row], way: str) -> Found:
    return found(rows, f"a batch of {BATCH}", way=way, k=1, lr=BASE[way])


def scaled(rows: list[Row], way: str, k: int, rule: str) -> Found:
    return found(rows, "the larger", way=way, k=k, rule=rule)


def told(rows: list[Row]) -> list[str]:
    sentences, body = [], []
    for way in WAYS:
        begun, holds = base(rows, way), []
        for k in TIMES:
            ends = {rule: scaled(rows, way, k, rule) for rule in RULES}
            body += [[way, k, rule, str(each), str(begun), verdict(each, begun)] for rule, each in ends.items()]
            kept = [rule for rule, each in ends.items() if each.mean <= begun.mean or not differ(each, begun)]
            how = f"a rate {' or '.join(kept)} keeps" if kept else "no rule keeps"
            holds.append(f"at {k} times the batch, {how} the loss of the small one")
        sentences.append(f"{way}, from lr {BASE[way]:g}: {'; '.join(holds)}.")
    columns = ["", "batch, times", "learning rate", "loss", f"loss with {BATCH} rows", "the larger batch"]
    other = [f"{way} {each:g}: {found(rows, way=way, k=1, lr=each)}" for way in WAYS for each in RATES[way]]
    steps = " and ".join(f"{STEPS // k} of {BATCH * k}" for k in TIMES)
    return [
        *sentences,
        table(columns, body),
        f"With equal tokens, {STEPS} steps of {BATCH} rows become {steps}.",
        f"The rates tried for the batch of {BATCH} rows: {'; '.join(other)}.",
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    panels = figure.subplots(1, 2)
    for axes, way in zip(panels, WAYS):
        begun = base(rows, way)
        axes.axhspan(min(begun.values), max(begun.values), color=ink, alpha=0.15, linewidth=0)
        for rule, color in zip(RULES, COLORS):
            each = [begun, *(scaled(rows, way, k, rule) for k in TIMES)]
            band(axes, (1, *TIMES), each, color, label=rule)
        axes.set_xscale("log", base=4)
        axes.set_xticks((1, *TIMES), [str(BATCH * k) for k in (1, *TIMES)])
        axes.minorticks_off()
        axes.set(title=way, xlabel="rows per step, equal tokens")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out loss, nats per byte")
    legend(figure, panels[0], 3)


PART = Part(
    name="batch",
    title="Learning rates for larger batches",
    claim="With k times the batch, multiply the learning rate of SGD by k, and Adam's by the square root of k.",
    source="Goyal et al. 2017 ([arXiv:1706.02677](https://arxiv.org/abs/1706.02677)) for SGD, on ResNet-50 up to 8,192 "
    "images per batch; Malladi et al. 2022 ([arXiv:2205.10287](https://arxiv.org/abs/2205.10287)) for Adam, on image "
    "models and RoBERTa.",
    runs=runs,
    told=told,
    draw=draw,
    picture="held-out loss over the rows per step at equal tokens, with three rules for the rate, for SGD and for Adam",
    command="llmfast train --config examples/chapter/batch.toml --train.batch_size 32 --train.steps 240 \\\n"
    "    --optimizer.name adam --optimizer.lr_scaling sqrt --optimizer.base_batch_size 8 --optimizer.lr 0.003",
)
