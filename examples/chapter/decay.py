"""L2 penalty against decoupled weight decay: the loss over a grid of learning rates and decays."""

from typing import Any

from examples.chapter.drawing import COLORS, band, legend
from examples.chapter.parts import Part
from examples.chapter.runs import Run, grid
from examples.chapter.told import Found, Row, as_good_as_best, best, compared, found

RATES = (0.001, 0.003, 0.01)
DECAYS = {"adam": (1e-5, 1e-4, 1e-3), "adamw": (0.1, 0.3, 1.0)}  # and 0, where both are the same
NAMES = {"adam": "Adam with L2", "adamw": "AdamW"}


def runs() -> list[Run]:
    made = grid({"optimizer": "adamw"}, ("optimizer.name=adamw",), lr=RATES, weight_decay=[0.0])
    for name, decays in DECAYS.items():
        settings = (f"optimizer.name={name}", "optimizer.beta2=0.95")
        made += grid({"optimizer": name}, settings, lr=RATES, weight_decay=decays)
    return made


def at(rows: list[Row], name: str, lr: float, decay: float) -> Found:
    label = f"{NAMES[name]} at lr {lr:g} and decay {decay:g}" if decay else f"no decay at lr {lr:g}"
    return found(rows, label, optimizer=name if decay else "adamw", lr=lr, weight_decay=decay)


def told(rows: list[Row]) -> list[str]:
    tried = {name: [at(rows, name, lr, d) for lr in RATES for d in decays] for name, decays in DECAYS.items()}
    l2, decoupled = best(tried["adam"]), best(tried["adamw"])
    without = best([at(rows, "adamw", lr, 0.0) for lr in RATES])
    sentences = [compared(decoupled, l2), compared(decoupled, without)]
    for name, decays in DECAYS.items():
        if best(tried[name]) in [at(rows, name, lr, decays[-1]) for lr in RATES]:
            sentences.append(f"{NAMES[name]} is best with the largest decay that was tried, so more might be better.")
    for name, decays in DECAYS.items():
        ways = []
        for lr in RATES:
            by_decay = {d: at(rows, name, lr, d) for d in (0.0, *decays)}
            good = as_good_as_best(list(by_decay.values()))
            ways.append(f"{', '.join(f'{d:g}' for d, each in by_decay.items() if each in good)} at lr {lr:g}")
        sentences.append(f"{NAMES[name]}: the decays that cannot be told from the best one are {'; '.join(ways)}.")
    return sentences


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, decays) in zip(panels, DECAYS.items()):
        for lr, color in zip(RATES, COLORS):
            each = [at(rows, name, lr, d) for d in (0.0, *decays)]
            band(axes, range(len(each)), each, color, label=f"lr {lr:g}")
        axes.set_xticks(range(len(decays) + 1), ["0", *(f"{d:g}".replace("e-0", "e-") for d in decays)])
        axes.set(title=NAMES[name], xlabel="weight decay")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("held-out loss, nats per byte")
    legend(figure, panels[0], len(RATES))


PART = Part(
    name="decay",
    title="Weight decay: L2 or decoupled",
    claim="With Adam, weight decay belongs outside the gradient: as an L2 penalty it does less good, and its best "
    "value depends on the learning rate.",
    source="Loshchilov & Hutter 2019 ([arXiv:1711.05101](https://arxiv.org/abs/1711.05101)), on residual networks of "
    "11.6 and 25.6 M parameters for images.",
    runs=runs,
    told=told,
    draw=draw,
    picture="held-out loss over weight decay for three learning rates, for Adam with an L2 penalty and for AdamW",
    command="llmfast train --config examples/chapter/decay.toml --optimizer.name adam --optimizer.weight_decay 0.01",
)
