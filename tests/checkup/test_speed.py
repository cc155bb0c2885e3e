"""Figures of a check-up's times, from pretended times: shares, ratios, and whose failures are ours."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from llmfast._gpus import H100
from llmfast.checkup import clock, speed
from llmfast.checkup.clock import Timing
from llmfast.checkup.shapes import MODELS, PARAMETERS
from llmfast.losses import LinearCrossEntropyPlan
from llmfast.optim import FusedAdamW

N, D, V = 64, 16, 520
SHAPES: list[tuple[int, ...]] = [(33, 7), (300,)]
NUMEL = 33 * 7 + 300


def failing(*args: Any) -> Any:
    raise RuntimeError("x" * 1000)


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let each way take four seconds, and return the names of those that were timed."""
    names: list[list[str]] = []

    def race(runs: dict[str, Callable[[], object]]) -> dict[str, Timing]:
        names.append(list(runs))
        for run in runs.values():
            run()
        return dict.fromkeys(runs, Timing(4.0, 1.5, 0.25))

    monkeypatch.setattr(speed, "race", race)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1000.0)
    monkeypatch.setattr(clock, "linear_layer_seconds", lambda hidden, weight: 0.5)
    monkeypatch.setattr(clock, "kernel_seconds", lambda run: 2.0)
    monkeypatch.setattr(clock, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return names


def given(monkeypatch: pytest.MonkeyPatch, **ways: Callable[..., Any]) -> list[Any]:
    """Let there be these ways, and return what is asked for."""
    asked: list[Any] = []

    def of(*arguments: Any) -> dict[str, Any]:
        asked.append(arguments)
        return {name.replace("_", " "): SimpleNamespace(run=run) for name, run in ways.items()}

    monkeypatch.setattr(speed, "implementations", of)
    return asked


def test_the_linear_loss_next_to_its_products_and_its_model(
    raced: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    grads: list[bool] = []

    def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert hidden.shape == (N, D) and weight.shape == (V, D) and hidden.dtype == weight.dtype == torch.bfloat16
        grads.append(hidden.grad is None and weight.grad is None)
        return F.cross_entropy(hidden @ weight.T, targets)

    asked = given(monkeypatch, llmfast=plain, Other=plain, broken=failing, torch_compiled=failing)
    failed, ours, other = speed.linear("tiny", N, D, V)
    assert asked == [("linear_cross_entropy", "gpu")] and raced == [["llmfast", "Other"]] and all(grads)
    assert (failed.what, failed.ok) == ("broken", None)
    assert failed.figures == {"error": ("RuntimeError: " + "x" * 1000)[:500]}
    figures = {"seconds": 4.0, "ours_to_this": 1.5, "spread": 0.25}
    figures |= {"matrix_products_seconds": 0.5, "times_matrix_products": 8.0}
    assert (other.what, other.ok, other.figures) == ("Other", None, figures)
    modelled = LinearCrossEntropyPlan.make(N, D, V, device="cpu", gpu=H100).seconds
    figures |= {"modelled_seconds": modelled, "measured_to_modelled": 4.0 / modelled, "modelled_on": H100.name}
    assert (ours.what, ours.ok, ours.figures) == ("llmfast", None, figures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_as_a_share_of_copying_seven_values(
    dtype: torch.dtype, raced: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = given(monkeypatch, llmfast=FusedAdamW, torch=torch.optim.AdamW, broken=failing, torch_one_by_one=failing)
    failed, *found = speed.adamw(SHAPES, dtype)
    assert asked == [("adamw", "gpu", dtype)] and raced == [["llmfast", "torch"]]
    assert failed.ok is None and [one.what for one in found] == ["llmfast", "torch"]
    share = 7 * NUMEL * dtype.itemsize / 1000.0 / 4.0
    for one in found:
        assert one.ok is None
        assert one.figures == {
            "seconds": 4.0,
            "ours_to_this": 1.5,
            "spread": 0.25,
            "share_of_copy_of_7_values": pytest.approx(share),
        }
    asked = given(monkeypatch, llmfast=FusedAdamW)
    assert [one.what for one in speed.formats(SHAPES)] == ["llmfast"]
    assert asked == [("adamw, bfloat16 with more bits", "gpu", torch.bfloat16)]


def test_a_failure_of_ours_is_wrong(raced: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, llmfast=failing)
    (found,) = speed.linear("tiny", N, D, V)
    assert (found.what, found.ok) == ("llmfast", False)
    given(monkeypatch, llmfast_kahan=failing)
    (found,) = speed.formats(SHAPES)
    assert (found.what, found.ok) == ("llmfast kahan", False)


def test_a_large_step_is_judged_by_what_it_must_move(raced: list[list[str]]) -> None:
    (found,) = speed.one_optimizer(SHAPES)
    least = 7 * 2 * NUMEL
    assert found.figures == {"seconds": 2.0, "least_bytes": least, "share_of_copy": least / 2.0 / 1000.0}
    assert found.ok is (least / 2000.0 >= 0.5)
    assert speed.adamw_step(10, torch.bfloat16).least_bytes == 140
    assert speed.adamw_step(10, torch.float32).least_bytes == 280


def test_what_a_call_costs_the_host_next_to_torch(raced: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([3.0, 2.0] * 3)

    def host_seconds(run: Callable[[], object], calls: int) -> float:
        assert calls == 7
        run()
        return next(times)

    monkeypatch.setattr(clock, "host_seconds", host_seconds)
    found = list(speed.host(2, 7))
    assert [one.what for one in found] == ["cross_entropy", "linear_cross_entropy", "AdamW of 2 tensors"]
    for one in found:
        assert one.ok is None and one.figures == {"seconds": 3.0, "torch_seconds": 2.0, "ours_to_torch": 1.5}


def test_full_cases_are_called_by_the_sizes_that_they_time() -> None:
    found: dict[str, Any] = {case.name: case.run for case in speed.cases(torch.device("cpu"), "full")}
    wanted: dict[str, tuple[Any, ...]] = {
        "row kernel, Llama-3 N=4096": (speed.row_kernels, 4096, 128256, True),
        "host": (speed.host, 300, 50),
        "AdamW, formats": (speed.formats, PARAMETERS["124M"]),
        "AdamW, 8B, bfloat16": (speed.one_optimizer, PARAMETERS["8B"]),
    }
    for model, (D, V) in MODELS.items():
        wanted[f"linear_cross_entropy, {model} N=8192"] = speed.linear, model, 8192, D, V
    for name in ("124M", "1B"):
        for dtype in (torch.bfloat16, torch.float32):
            wanted[f"AdamW, {name}, {str(dtype).removeprefix('torch.')}"] = speed.adamw, PARAMETERS[name], dtype
    for V in (32768, 128256, 256000):
        for N in (256, 4096, 16384):
            wanted[f"row kernel, N={N} V={V}"] = speed.row_kernels, N, V, True
    assert {name: (run.func, *run.args) for name, run in found.items()} == wanted


@pytest.mark.parametrize(
    ("N", "asked", "judged"), [(4095, True, False), (4096, True, True), (4097, True, True), (4096, False, False)]
)
def test_only_many_rows_of_a_full_size_are_judged(
    N: int, asked: bool, judged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int, int]] = []
    monkeypatch.setattr(speed, "row_kernel", lambda *given: made.append(given))
    monkeypatch.setattr(speed, "kernel_finding", lambda what, kernel, *, judged: (what, judged))
    assert list(speed.row_kernels(N, 70, asked)) == [(what, judged) for what in speed.ROW_KERNELS]
    assert made == [(what, N, 70) for what in speed.ROW_KERNELS]


def test_ways_take_turns_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let load affect all of them equally."""
    order: list[str] = []
    monkeypatch.setattr(clock, "timed", lambda run: (run(), float(len(order)))[1])
    found = speed.race({name: partial(order.append, name) for name in "ab"})
    assert order == ["a", "b"] * 5
    assert [found[name].seconds for name in "ab"] == [5.0, 6.0]
    assert found["b"].ratio == 5 / 6
