"""`llmfast doctor --full --tune`: every tile of every kernel is timed, and one that spills never wins."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmfast.checkup import clock, speed, tuning
from llmfast.checkup.record import Finding
from llmfast.checkup.speed import Kernel
from llmfast_kernels.launch import Tile
from support.launched import unrecorded
from support.pretended_gpu import pretending_a_gpu

DEVICE = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    with pretending_a_gpu(), unrecorded():
        yield


def test_every_choice_is_timed_with_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SAMPLES", 1)
    timed: dict[str, set[tuple[int, int]]] = {}
    for case in tuning.cases(DEVICE, "small"):
        *each, last = case.run()
        assert [found.figures["default"] for found in each] == [True] + [False] * (len(each) - 1)
        assert last.what == "fastest" and last.figures["default"] == [
            each[0].figures[k] for k in ("elements", "threads")
        ]
        for found in each:
            assert found.ok is None and found.figures["seconds"] > 0 and found.figures["share_of_copy"] > 0
            tile = found.figures["elements"], found.figures["threads"]
            timed.setdefault(found.figures["choice"], set()).add(tile)
    assert timed == {choice.place: set(choice.found(choice.name).tiles) for choice in tuning.CHOICES}


def test_each_tile_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = tuning.FEW_TERMS
    tuned, cross_entropy = choice.found(choice.name), choice.found("tile")
    seen: list[dict[str, int]] = []
    found = list(tuning.tiles(choice, lambda: Kernel(lambda: seen.append(cross_entropy(50000)), 1)))
    blocks = list(dict.fromkeys((meta["BLOCK_V"], meta["THREADS"]) for meta in seen))
    assert blocks == [(tile.elements * tile.threads, tile.threads) for tile in tuned.tiles]
    assert len(found) == len(tuned.tiles) + 1 and tuned.chosen == tuned.tiles[0]


def told(seconds: list[float], spills: int = 0, monkeypatch: Any = None) -> list[Finding]:
    """Return findings for a kernel that takes `seconds` with its tiles, the last of which spills."""
    tiles = [Tile(8, 128 * 2**i) for i in range(len(seconds))]
    tuned = tuning.UPDATE.found("Choice")(*tiles)
    binary = SimpleNamespace(n_regs=64, n_spills=0, metadata=SimpleNamespace(num_warps=4))

    def launch(*args: Any, **options: Any) -> Any:
        spilled = spills if tuned.chosen == tiles[-1] else 0
        return SimpleNamespace(**vars(binary) | {"n_spills": spilled})

    kernel = SimpleNamespace(run=launch)
    choice = SimpleNamespace(name="TILE", kernel="kernel", place="file.py: TILE")
    choice.found = lambda name: {"TILE": tuned, "kernel": kernel}[name]
    monkeypatch.setattr(clock, "kernel_seconds", lambda run: (run(), seconds[tiles.index(tuned.chosen)])[1])
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 1000.0)
    properties = SimpleNamespace(
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, multi_processor_count=132, L2_cache_size=50
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return list(tuning.tiles(choice, lambda: Kernel(lambda: kernel.run(), 1000)))  # type: ignore[arg-type]


def test_the_fastest_is_named_with_its_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, last = told([2.0, 1.0], monkeypatch=monkeypatch)
    assert first.what == "8 elements x 128 threads" and first.figures["share_of_copy"] == 0.5
    assert second.figures["registers"] == 64 and second.figures["spills"] == 0
    assert second.figures["programs_in_flight"] == 8 * 132 and second.figures["l2_bytes"] == 50
    assert last.figures == {"choice": "file.py: TILE", "default": [8, 128], "fastest": [8, 256], "gain": 1.0}


@pytest.mark.parametrize(("seconds", "spills"), [([1.01, 1.0], 0), ([2.0, 1.0], 12), ([1.0, 2.0], 0)])
def test_the_default_stays(monkeypatch: pytest.MonkeyPatch, seconds: list[float], spills: int) -> None:
    last = told(seconds, spills, monkeypatch)[-1]
    assert last.figures["fastest"] == last.figures["default"] == [8, 128]
