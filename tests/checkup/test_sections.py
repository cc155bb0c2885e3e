"""Every section on a pretended GPU, at sizes that an interpreter can compute; and faults that each must find."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from evidence.launches import Recorder
from evidence.observers import observing
from llmfast import optim
from llmfast.checkup import (
    behaviour,
    clock,
    comparing,
    further_losses,
    here,
    memory,
    numerics,
    several,
    speed,
    training,
)
from llmfast.checkup.record import Finding
from llmfast.checkup.sections import SECTIONS, named
from support.code_blocks import ROOT
from support.launched import unrecorded
from support.pretended_gpu import pretending_a_gpu

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    with pretending_a_gpu(), unrecorded():
        yield


def findings(section: str, containing: str = "") -> dict[tuple[str, str], Finding]:
    """Run the cases of a section whose names contain a text."""
    return {
        (case.name, found.what): found
        for case in named(section).cases(DEVICE, "small")
        if containing in case.name
        for found in case.run()
    }


def wrong(section: str, containing: str = "") -> list[tuple[str, str]]:
    return [key for key, found in findings(section, containing).items() if found.ok is False]


def kernels_of_the_package() -> set[str]:
    sources = (ROOT / "kernels" / "llmfast_kernels").rglob("*.py")
    return {name for file in sources for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)}


@pytest.mark.parametrize("section", [section.name for section in SECTIONS])
def test_a_section_finds_nothing_wrong(section: str) -> None:
    recorder = Recorder()
    with observing(recorder):
        found = findings(section)
    if section == "numerics":
        assert {kind.name for kind in recorder.kinds.values()} == kernels_of_the_package()
    assert {key: one.figures for key, one in found.items() if one.ok is False} == {}
    judged = sum(one.ok is True for one in found.values())
    assert judged >= {"here": 0, "numerics": 110, "behaviour": 30, "memory": 8, "speed": 0, "training": 2}[section]


@pytest.mark.parametrize("section", [section.name for section in SECTIONS])
def test_full_cases_fit_a_gpu_and_its_time(section: str) -> None:
    cases = named(section).cases(DEVICE, "full")
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.gpu_bytes <= 60 << 30 for case in cases)
    # What the cases are expected to take is an estimate, doubled: half of it fits a section's part of 8 minutes.
    part = 480 * named(section).share / sum(one.share for one in SECTIONS)
    assert sum(case.seconds for case in cases) / 2 / named(section).processes <= part


@pytest.mark.parametrize("section", ["numerics", "behaviour"])
def test_every_optimizer_is_looked_at(section: str) -> None:
    cases = " ".join(case.name for case in named(section).cases(DEVICE, "full"))
    offered = [name for name in optim.__all__ if name.startswith("Fused") and name != "FusedOptimizer"]
    assert len(offered) >= 6 and [name for name in offered if f"{name}(" not in cases] == []


def test_wrong_numbers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = numerics.cross_entropy
    monkeypatch.setattr(numerics, "cross_entropy", lambda x, *args, **options: right(x * 1.001, *args, **options))
    assert wrong("numerics", "cross_entropy, plain, float32") == [
        ("cross_entropy, plain, float32", "loss"),
        ("cross_entropy, plain, float32", "gradient of logits"),
    ]


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("cross_entropy", "cross_entropy, probabilities"),
        ("logprobs", "logprobs"),
        ("linear_distillation", "linear_distillation, forward_kl"),
        ("linear_distillation", "linear_distillation, jsd"),
    ],
)
def test_wrong_numbers_of_further_losses_are_found(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(further_losses, name)
    monkeypatch.setattr(further_losses, name, lambda x, *args, **options: right(x * 1.05, *args, **options))
    found = wrong("numerics", case)
    assert {what.partition(" of ")[0] for _, what in found} == {"gradient", "loss"}


def test_a_wrong_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = further_losses.logprobs

    def shifted(*args: Any, **options: Any) -> Any:
        found, stats = right(*args, **options)
        return found, stats if "return_rank" not in options else stats._replace(rank=stats.rank + 1)

    monkeypatch.setattr(further_losses, "logprobs", shifted)
    assert wrong("numerics", "logprobs") == [("logprobs", "ranks")]


def test_numbers_that_change_from_run_to_run_are_found() -> None:
    counter = iter(range(100))
    found = comparing.same_bits("repeated", lambda: (torch.tensor([1.0, float("nan"), float(next(counter) // 2)]),), 3)
    assert not found.ok and found.figures == {"times": 3, "elements_that_differ": 1}
    assert comparing.same_bits("repeated", lambda: (torch.tensor([float("nan")]),), 3).ok


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("place", [-comparing.GUARD, -1, 15, 14 + comparing.GUARD])
def test_a_write_outside_is_found(offset: int, place: int) -> None:
    guarded = comparing.Guarded(torch.zeros(3, 5), offset=offset)
    guarded.tensor.fill_(1.0)
    assert guarded.finding().ok
    flat = guarded.tensor.as_strided((1,), (1,), guarded.tensor.storage_offset() + place - offset * (place > 15))
    flat.zero_()
    assert not guarded.finding().ok and guarded.finding().figures == {"elements_written": 1}


@pytest.mark.parametrize(("ours", "excess"), [(1.0, 0), (1.5, 0.25), (float("nan"), float("inf"))])
def test_what_is_further_from_the_truth_than_torch_exceeds(ours: float, excess: float) -> None:
    truth, torchs = torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.25])
    by = comparing.excess(torch.tensor([ours]), torchs, truth)
    assert (by <= 0) if excess == 0 else by == pytest.approx(excess, rel=1e-5)


def test_a_capture_that_fails_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing:
        def __init__(self, *args: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(behaviour, "Graph", Failing)
    case = next(case for case in behaviour.cases(DEVICE, "small") if case.name == "graph of FusedLion()")
    with pytest.raises(RuntimeError, match="not permitted"):
        list(case.run())


def test_a_wait_for_the_device_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def waiting() -> None:
        raise RuntimeError("called a synchronizing CUDA operation")

    assert behaviour._does_not_raise("step", waiting) == Finding(
        "step", False, {"error": "called a synchronizing CUDA operation"}
    )


def test_memory_beyond_the_plan_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = memory.linear_cross_entropy

    def leaking(hidden: Any, weight: Any, targets: Any, **options: Any) -> Any:
        return right(hidden, weight + 0 * weight.float().repeat(2, 1).sum(), targets, **options)

    monkeypatch.setattr(memory, "linear_cross_entropy", leaking)
    found = wrong("memory", "linear_cross_entropy, tiny, the default budget")
    assert found and {what for _, what in found} == {"peak"}
    assert wrong("memory", "AdamW, fp32") == []


@pytest.mark.parametrize(("seconds", "ok"), [(1.0, True), (4.0, False)])
def test_a_slow_kernel_is_found(monkeypatch: pytest.MonkeyPatch, seconds: float, ok: bool) -> None:
    monkeypatch.setattr(clock, "kernel_seconds", lambda run: seconds)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1000.0)
    found = speed.kernel_finding("loss", speed.Kernel(lambda: None, 1000), judged=True)
    assert found.ok is ok and found.figures["share_of_copy"] == 1 / seconds
    assert speed.kernel_finding("loss", speed.Kernel(lambda: None, 1000), judged=False).ok is None


def test_a_curve_that_parts_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(ours: bool, *args: Any) -> tuple[list[float], float]:
        return [5.0, 4.0, 3.2 if ours else 3.0], 1.0

    monkeypatch.setattr(training, "trained", trained)
    found = findings("training")
    assert [what for (_, what), one in found.items() if one.ok is False] == ["last losses"]


def test_rates_are_medians_of_several_samples() -> None:
    samples = iter([1.0, 100.0, 3.0, 2.0, 4.0])
    (found,) = here.rate(lambda: next(samples), "bytes_per_s", 6.0)
    assert found.figures == {
        "bytes_per_s": 3.0,
        "least": 1.0,
        "most": 100.0,
        "samples": 5,
        "share_of_data_sheet": 0.5,
    }


def test_several_devices_say_so_where_there_is_one() -> None:
    (found,) = several.findings(DEVICE)
    assert found.ok is None and found.figures == {"devices": 1}
