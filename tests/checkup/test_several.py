"""Results of several processes, compared with those of one: here on CPUs."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfast.checkup import several


def test_two_processes() -> None:
    found = list(several.findings(torch.device("cpu"), 2))
    assert [one.what for one in found] == ["vocab-parallel", "DDP", "FSDP2"]
    assert all(one.ok for one in found), found


@pytest.mark.parametrize(("error", "right"), [(0.9e-4, True), (1e-4, False), (math.nan, False)])
@pytest.mark.parametrize("devices", [2, 3, 8])
def test_the_worst_device_counts(error: float, right: bool, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a process for each device, of which at most four take part."""
    started: list[int] = []

    def spawn(run: Any, arguments: tuple[int, str, str], nprocs: int) -> None:
        count, kind, folder = arguments
        assert run is several._rank and kind == "cuda" and count == nprocs
        started.append(count)
        for rank in range(count):
            torch.save({"DDP": error if rank == 1 else 1e-7, "FSDP2": 1e-6}, Path(folder) / f"{rank}.pt")

    monkeypatch.setattr(several, "spawn", spawn)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    parallel, sharded = several.findings(torch.device("cuda"))
    assert started == [min(devices, 4)]
    assert (parallel.what, parallel.ok, sharded.what, sharded.ok) == ("DDP", right, "FSDP2", True)
    wanted = {"relative_error": pytest.approx(error, nan_ok=True), "devices": min(devices, 4)}
    assert parallel.figures == wanted and sharded.figures["relative_error"] == 1e-6


def test_an_error_is_a_share_of_what_is_wanted() -> None:
    wanted = torch.tensor([3.0, 4.0])
    assert several._error(wanted + torch.tensor([0.0, 0.5]), wanted) == pytest.approx(0.1)
