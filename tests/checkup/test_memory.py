"""Memory that a check-up measures, here by pretended figures: of which call, against which plan, with which slack."""

from typing import Any

import pytest
import torch

from llmfast.checkup import clock, memory
from llmfast.checkup.shapes import MODELS
from llmfast.losses import LinearCrossEntropyPlan
from llmfast.models.memory import PRECISIONS
from llmfast.optim import FusedAdamW

CPU = torch.device("cpu")
N, D, V = 1000, 16, 520
BUDGET = N * V // 4
GIVEN: dict[str, dict[str, Any]] = {
    "the default budget": {},
    "a small budget": {"memory_budget": BUDGET},
    "a small budget, losses per token": {"memory_budget": BUDGET, "reduction": "none"},
    "a small budget, float32 logits": {"memory_budget": BUDGET, "slab_dtype": torch.float32},
}


def measured(monkeypatch: pytest.MonkeyPatch, peak: int) -> None:
    """Let each run take this many bytes."""
    monkeypatch.setattr(clock, "gpu_peak_bytes", lambda run: (run(), peak)[1])


def test_full_cases_are_called_by_what_they_measure() -> None:
    found: dict[str, Any] = {case.name: case.run for case in memory.cases(CPU, "full")}
    wanted: dict[str, tuple[Any, ...]] = {}
    for model, (width, classes) in MODELS.items():
        shape = 8192, width, classes
        wanted |= {f"linear_cross_entropy, {model}, {mode}": (memory.linear, shape, mode, CPU) for mode in GIVEN}
        wanted[f"cross_entropy, {model}"] = memory.rows, shape, CPU
    for precision in PRECISIONS:
        shapes = (4096, 4096), (50257, 768), (768,)
        wanted[f"AdamW, {precision.name}"] = memory.optimizer, precision, shapes, CPU
    assert {name: (run.func, *run.args) for name, run in found.items()} == wanted


@pytest.mark.parametrize("mode", GIVEN)
def test_a_linear_loss_is_held_to_the_plan_of_its_own_options(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small budget is one that needs several slabs of logits."""
    given: list[dict[str, Any]] = []
    right = memory.linear_cross_entropy

    def noting(hidden: Any, weight: Any, targets: Any, **options: Any) -> Any:
        assert hidden.grad is None and weight.grad is None
        given.append(options)
        return right(hidden, weight, targets, **options)

    monkeypatch.setattr(memory, "linear_cross_entropy", noting)
    plan = LinearCrossEntropyPlan.make(N, D, V, device=CPU, **GIVEN[mode])
    assert (len(list(plan)) > 1) == ("memory_budget" in GIVEN[mode])
    most = int(1.02 * plan.peak_bytes + 64 * N)
    for peak in (most, most + 1):
        measured(monkeypatch, peak)
        (found,) = memory.linear((N, D, V), mode, CPU)
        assert (found.what, found.ok) == ("peak", peak == most)
        figures = {"measured_bytes": peak, "planned_bytes": plan.peak_bytes, "ratio": peak / plan.peak_bytes}
        assert found.figures == figures | {"mode": plan.mode}
    assert given == [GIVEN[mode]] * 4, "each is measured in its second run"


@pytest.mark.parametrize(("rows", "slack"), [(1000, 64_000), (1001, 16 << 20)])
def test_a_loss_of_logits_may_take_a_gradient_of_their_size(
    rows: int, slack: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = 2 * rows * 5
    most = int(1.02 * planned + slack)
    for peak in (most, most + 1):
        measured(monkeypatch, peak)
        (found,) = memory.rows((rows, 7, 5), CPU)
        assert (found.what, found.ok) == ("forward and backward", peak == most)
        assert found.figures == {"measured_bytes": peak, "planned_bytes": planned, "ratio": peak / planned}


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda precision: precision.name)
def test_states_of_each_precision_and_what_a_step_takes(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FusedAdamW] = []
    monkeypatch.setattr(
        memory, "FusedAdamW", lambda *args, **options: made.append(FusedAdamW(*args, **options)) or made[-1]
    )
    for peak, right in ((1 << 16, True), ((1 << 16) + 1, False)):
        measured(monkeypatch, peak)
        states, step = memory.optimizer(precision, ((300,), (4, 5)), CPU)
        (optimizer,) = made
        assert {p.dtype for group in optimizer.param_groups for p in group["params"]} == {precision.parameters}
        options = optimizer.options
        assert (options.master_weights, options.state_dtype) == (precision.master_weights, precision.state_dtype)
        assert (states.what, states.ok) == ("states", True)
        assert states.figures["planned_bytes"] == optimizer.state_bytes()
        assert abs(states.figures["measured_bytes"] - optimizer.state_bytes()) <= 16, "counters of steps"
        assert (step.what, step.ok, step.figures) == ("a step", right, {"bytes": peak})
        made.clear()
    monkeypatch.setattr(FusedAdamW, "state_bytes", lambda self: 0)
    monkeypatch.setattr(memory, "compared", lambda what, kept, planned, slack: (what, planned, slack))
    assert next(memory.optimizer(precision, ((300,),), CPU)) == ("states", 0, 1024)
