"""Every kind of multi-token prediction: the next token's loss at equal tokens and time, and what guesses are worth."""

from typing import Any

from benchmarks.report import table
from examples.chapter.drawing import legend, ranges
from examples.chapter.measures import step_time
from examples.chapter.parts import Part
from examples.chapter.runs import SEEDS, Run
from examples.chapter.told import Found, Row, compared, found, joined, listed

PLAIN = "next token only"
TOKENS, TIME = "equal tokens", "equal time"
STEPS = 480
WAYS = {
    PLAIN: (),
    "2 parallel heads": ("model.mtp=parallel", "model.mtp_heads=2"),
    "4 parallel heads": ("model.mtp=parallel", "model.mtp_heads=4"),
    "a sequential depth": ("model.mtp=sequential", "model.mtp_heads=1"),
    "2 targets of shared logits": ("model.mtp=shared", "model.mtp_heads=2"),
}


def run(way: str, at: str, steps: int) -> Run:
    return Run({"way": way, "at": at, "steps": steps}, (*WAYS[way], f"train.steps={steps}"))


def runs() -> list[Run]:
    return [run(way, TOKENS, STEPS) for way in WAYS]


def again(rows: list[Row]) -> list[tuple[Run, int]]:
    """Give each way as many steps as take the time of the plain model's."""
    steps = {way: max(1, round(STEPS / slower(rows, way))) for way in WAYS if way != PLAIN}
    return [(run(way, TIME, count), seed) for way, count in steps.items() for seed in SEEDS]


def timed(rows: list[Row]) -> list[str]:
    """Return the ways that were run at equal time."""
    return [way for way in WAYS if any((row["way"], row["at"]) == (way, TIME) for row in rows)]


def slower(rows: list[Row], way: str) -> float:
    """Return how many times the plain model's processor time a step takes, by the fastest step of all seeds."""
    mine, plain = (
        min(row["step_s"] for row in rows if row["way"] == name and row["at"] == TOKENS) for name in (way, PLAIN)
    )
    return float(mine / plain)


def each(rows: list[Row], way: str, at: str = TOKENS) -> Found:
    name = f"the model with {way}" if way != PLAIN else "the model of the next token only"
    return found(rows, name, way=way, at=at if way != PLAIN else TOKENS)


def told(rows: list[Row]) -> list[str]:
    body, run_again = [], timed(rows)
    for way in WAYS:
        mine = [row for row in rows if row["way"] == way and row["at"] == TOKENS]
        accepted = [sum(x) / len(x) for x in zip(*(row.get("acceptance", []) for row in mine))]
        passes = [row["tokens_per_pass"] for row in mine if "tokens_per_pass" in row]
        body.append(
            [
                way,
                str(each(rows, way)),
                str(each(rows, way, TIME)) if way in (PLAIN, *run_again) else "-",
                f"{slower(rows, way):.2f}",
                ", ".join(f"{share:.0%}" for share in accepted) or "-",
                f"{sum(passes) / len(passes):.2f}" if passes else "-",
            ]
        )
    columns = ["", "loss at equal tokens", "at equal time", "time of a step", "accepted guesses", "tokens per pass"]
    further = {TOKENS: [way for way in WAYS if way != PLAIN], TIME: run_again}
    lists = [
        listed(f"The loss of the next token at {at}", [compared(each(rows, w, at), each(rows, PLAIN)) for w in ways])
        for at, ways in further.items()
        if ways
    ]
    counts = {row["way"]: row["steps"] for row in rows if row["at"] == TIME}
    steps = joined([f"{count} steps of the model with {way}" for way, count in counts.items()] or ["no others"])
    return [
        *lists,
        table(columns, body),
        "The time of a step is its processor time on one core, the fastest step of all seeds, as a multiple of the "
        f"plain model's; it differs between machines. So {STEPS} steps of the plain model take as long as {steps}. "
        "Guesses are of greedy decoding after held-out text, at equal tokens, by head and averaged over seeds.",
    ]


def draw(figure: Any, rows: list[Row], ink: str) -> None:
    axes = figure.subplots()
    drawn = {TOKENS: list(WAYS), TIME: [PLAIN, *timed(rows)]}
    kinds = {at: [each(rows, way, at) if way in ways else None for way in WAYS] for at, ways in drawn.items()}
    ranges(axes, list(WAYS), kinds)
    axes.set_xlabel("held-out loss, nats per byte")
    legend(figure, axes, 2)


PART = Part(
    name="mtp",
    title="Multi-token prediction",
    claim="Predicting several tokens at once makes large models better at the next one and small models worse; the "
    "further heads also speed up decoding.",
    source="Gloeckle et al. 2024 ([arXiv:2404.19737](https://arxiv.org/abs/2404.19737)), on models of 300 M to 13 B "
    "parameters.",
    runs=runs,
    again=again,
    measure=step_time,
    told=told,
    draw=draw,
    picture="held-out loss of the next token for five kinds of multi-token prediction, at equal tokens and equal time",
    command="llmfast train --config examples/chapter/mtp.toml --model.mtp parallel --model.mtp_heads 2",
    height=2.8,
)
