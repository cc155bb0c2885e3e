"""The rules by which a check-up calls a figure right or wrong, on both sides of each bound."""

import math
from typing import Any

import pytest
import torch

from llmfast.checkup import behaviour, comparing, memory, training
from llmfast.models import Decoder, DecoderConfig
from llmfast.optim import FusedAdamW

EPS = torch.finfo(torch.float32).eps
COARSE = torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    ("planned", "slack", "most"), [(1000, 5, 1025), (0.5e9, 0, 510_000_000), (1000, None, 1020 + (16 << 20))]
)
def test_memory_may_pass_its_plan_by_a_fiftieth_and_the_slack(planned: int, slack: int | None, most: int) -> None:
    options = {} if slack is None else {"slack": slack}
    for measured in (most, most + 1):
        found = memory.compared("peak", measured, int(planned), **options)
        assert found.what == "peak" and found.ok is (measured == most)
        figures = {"measured_bytes": measured, "planned_bytes": int(planned), "ratio": measured / int(planned)}
        assert found.figures == figures


@pytest.mark.parametrize(
    ("truth", "torchs", "scale", "right", "wrong"),
    [
        (1.0, 1.0, 0.0, 1 + EPS, 1 + 2 * EPS),
        (4.0, 4.0, 0.0, 4 - 4 * EPS, 4 - 8 * EPS),
        (1.0, 1.25, 0.0, 0.75 - EPS, 0.75 - 2 * EPS),
        (1.0, 1.0, 100.0, 1 + 400 * EPS, 1 + 402 * EPS),
        (0.0, 0.0, 0.0, 0.9e-9, 1.1e-9),
    ],
)
def test_a_number_may_be_off_by_torchs_error_and_a_rounding(
    truth: float, torchs: float, scale: float, right: float, wrong: float
) -> None:
    def excess(ours: float, dtype: torch.dtype = torch.float32) -> float:
        exact, plain = torch.tensor([truth, 1.0]).double(), torch.tensor([torchs, 1.0])
        return comparing.excess(torch.tensor([ours, 1.0], dtype=dtype), plain, exact, scale)

    assert excess(right) <= 0 < excess(wrong)
    if truth == torchs == 4.0:  # a rounding is one of the result's own dtype
        assert excess(4 + 4 * COARSE, torch.bfloat16) <= 0 < excess(4 + 8 * COARSE, torch.bfloat16)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_must_be_where_the_truth_has_it(odd: float) -> None:
    for ours, truth, by in (([odd], [1.0], math.inf), ([1.0], [odd], math.inf), ([odd], [odd], 0.0)):
        assert comparing.excess(torch.tensor(ours), torch.tensor(truth), torch.tensor(truth)) == by
    finite = torch.ones(1)
    assert comparing.excess_in_norm(torch.tensor([odd]), finite, finite) == math.inf


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_norm_may_be_off_by_more_than_torchs(factor: float) -> None:
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    torchs, slack = truth + torch.tensor([0.0, 0.1]), 2e-6 * 5 + 1e-6
    options = {} if factor == 1.5 else {"factor": factor}
    for more in (-1e-6, 1e-6):
        ours = truth + torch.tensor([factor * 0.1 + slack + more, 0.0], dtype=torch.float64)
        assert comparing.excess_in_norm(ours, torchs.double(), truth, **options) == pytest.approx(more, abs=2e-8)


@pytest.mark.parametrize("at", range(3))
def test_the_worst_of_several_tensors_counts_and_nan_is_the_worst(at: int) -> None:
    wanted = [torch.full((4,), 2.0) for _ in range(3)]
    for by, error in ((0.5, 0.25), (math.nan, math.nan)):
        ours = [t + by * (i == at) if i == at else t.clone() for i, t in enumerate(wanted)]
        found = behaviour.close("step", ours, wanted, 0.2)
        assert found.ok is False and found.figures == {"relative_error": approx(error), "allowed": 0.2}
        assert behaviour.close("step", ours, wanted, 0.25).ok is (error == 0.25)
        found = behaviour.equal("step", ours, wanted)
        assert found.ok is False and found.figures == {"elements_that_differ": 4, "largest_difference": approx(by)}
    assert behaviour.equal("step", wanted, wanted).ok is True


def approx(x: float) -> Any:
    return pytest.approx(x, nan_ok=True)


def test_a_comparison_says_how_far_apart_they_are() -> None:
    ours, truth = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    for by in (-1.0, 0.0, 1e-9):
        found = comparing.told("loss", by, ours, truth)
        assert (found.what, found.ok) == ("loss", by <= 0)
        assert found.figures == {"excess": by, "relative_error": pytest.approx(0.1)}


@pytest.mark.parametrize(("apart", "right"), [(0.0499, True), (-0.0499, True), (0.0501, False), (-0.0501, False)])
def test_curves_may_part_by_little_at_their_ends(apart: float, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends are means over the last tenth of the steps."""

    def trained(ours: bool, *args: Any) -> tuple[list[float], float]:
        curve = [5.0, *[1.0] * 17, 3.0 + apart * ours, 2.0 + apart * ours]
        return curve, 2.0 if ours else 4.0

    monkeypatch.setattr(training, "trained", trained)
    last, learns, curves, times = training.curves(None, 20, 1, 1, torch.device("cpu"))  # type: ignore[arg-type]
    assert (last.what, last.ok) == ("last losses", right)
    wanted = {"ours": 2.5 + apart, "plain_torch": 2.5, "apart": abs(apart), "allowed": 0.05}
    assert last.figures == pytest.approx(wanted)
    assert learns.ok is True and learns.figures == {"first": 5.0, "last": pytest.approx(2.5 + apart)}
    assert curves.figures == {"ours": trained(True)[0], "plain_torch": trained(False)[0]} and curves.ok is None
    assert times.figures == {"seconds": 2.0, "plain_torch_seconds": 4.0, "ours_to_plain": 0.5} and times.ok is None


def test_a_run_that_learns_nothing_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "trained", lambda *args: ([2.0, 2.0, 2.0], 1.0))
    found = training.curves(None, 3, 1, 1, torch.device("cpu"))  # type: ignore[arg-type]
    assert [one.ok for one in found] == [True, False, None, None]


@pytest.mark.parametrize(("steps", "warm"), [(3, 1), (8, 4), (24, 10)])
@pytest.mark.parametrize("ours", [True, False])
def test_a_step_is_timed_without_those_of_warming_up(
    ours: bool, steps: int, warm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Train on the same bytes, by the same settings, whichever kernels compute."""
    made: list[tuple[str, dict[str, Any]]] = []
    data = [torch.full((1, 5), step) for step in range(steps)]
    seen: list[int] = []
    in_time: list[int] = []

    def timed(run: Any) -> float:
        before = len(seen)
        run()
        in_time.append(len(seen) - before)
        return 6.0

    class Model(Decoder):
        def forward(self, tokens: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            seen.append(int(tokens[0, 0]))
            assert tokens.shape == (1, 4)
            return super().forward(tokens, *args, **options)

    def noting(name: str, make: Any) -> Any:
        return lambda parameters, **options: made.append((name, options)) or make(parameters, **options)

    monkeypatch.setattr(training, "batches", lambda *args: iter(data))
    monkeypatch.setattr(training, "Decoder", Model)
    monkeypatch.setattr(training.clock, "timed", timed)
    monkeypatch.setattr(training, "FusedAdamW", noting("ours", FusedAdamW))
    monkeypatch.setattr(torch.optim, "AdamW", noting("torch", torch.optim.AdamW))
    config = DecoderConfig(256, width=8, layers=1, heads=2)
    losses, seconds = training.trained(ours, config, steps, 1, 4, torch.device("cpu"))
    assert len(losses) == steps and seen == list(range(steps))
    assert in_time == [steps - warm] and seconds == 6.0 / (steps - warm)
    settings = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    assert made == [("ours", settings) if ours else ("torch", {"fused": True, **settings})]


def test_both_trainings_read_the_same_bytes_of_pythons_sources() -> None:
    first, second = (list(training.batches(3, 2, 7, torch.device("cpu"))) for _ in range(2))
    assert [batch.shape for batch in first] == [(2, 8)] * 3
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and not torch.equal(first[0], first[1])
    text = "".join(map(chr, torch.cat([batch.flatten() for batch in first]).tolist()))
    assert text.isascii() and torch.cat(first).max() > 32
