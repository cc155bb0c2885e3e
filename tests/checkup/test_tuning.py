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


def test_a_gain_of_a_fiftieth_is_worth_another_default() -> None:
    default, other, third = Tile(8, 128), Tile(8, 256), Tile(4, 512)
    for gain, named in ((0.0199, default), (0.0201, other)):
        found = tuning.fastest(tuning.UPDATE, default, {default: 1.0 + gain, other: 1.0, third: 1.01})
        assert (found.what, found.ok) == ("fastest", None)
        figures = {"choice": tuning.UPDATE.place, "default": list(default), "fastest": list(named)}
        assert found.figures == figures | {"gain": pytest.approx(gain)}
    assert tuning.WORTH == 0.02 and tuning.UPDATE.place == "kernels/llmfast_kernels/optimizer/step.py: TILE"


def test_where_the_default_spills_the_fastest_of_the_others_is_named_without_a_gain() -> None:
    default, other, third = Tile(8, 128), Tile(8, 256), Tile(4, 512)
    found = tuning.fastest(tuning.UPDATE, default, {third: 2.0, other: 1.0})
    assert found.figures["fastest"] == list(other) and found.figures["gain"] is None
    found = tuning.fastest(tuning.UPDATE, default, {})
    assert found.figures["fastest"] == list(default) and found.figures["gain"] is None


def test_a_tiles_time_is_the_middle_of_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tuning.SCALE.found(tuning.SCALE.name)
    samples = iter([3.0, 9.0, 1.0] * len(tuned.tiles))
    monkeypatch.setattr(clock, "kernel_seconds", lambda run: next(samples))
    monkeypatch.setattr(speed, "copy_bandwidth", lambda: 10.0)
    first, *_ = tuning.tiles(tuning.SCALE, lambda: Kernel(lambda: None, 60))
    assert {name: first.figures[name] for name in ("least", "seconds", "most")} == {
        "least": 1.0,
        "seconds": 3.0,
        "most": 9.0,
    }
    assert first.figures["share_of_copy"] == 60 / 3.0 / 10.0


@pytest.mark.parametrize(
    ("registers", "warps", "programs"),
    [(64, 4, 8), (32, 4, 16), (16, 4, 16), (255, 4, 2), (64, 32, 1), (0, 8, 8)],  # 65536 registers, 2048 threads
)
def test_registers_or_threads_limit_the_programs_in_flight(
    registers: int, warps: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, multi_processor_count=3, L2_cache_size=50
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    binary = SimpleNamespace(n_regs=registers, n_spills=7, metadata=SimpleNamespace(num_warps=warps))
    other = SimpleNamespace(n_regs=1, n_spills=1, metadata=SimpleNamespace(num_warps=1))
    found = tuning.machine([other, binary])
    assert found == {"registers": registers, "spills": 7, "programs_in_flight": 3 * programs, "l2_bytes": 50}
    monkeypatch.setattr(torch.version, "hip", "6.4")  # whose registers are counted in another way
    assert tuning.machine([other, binary]) == {"registers": registers, "spills": 7}
    assert tuning.machine([]) == tuning.machine([SimpleNamespace()]) == {}


@pytest.mark.parametrize(
    ("options", "dtype", "least_bytes"),
    [
        ({}, torch.float32, 7 * 4),
        ({}, torch.bfloat16, 7 * 2),
        # A parameter is read and written, a gradient read; states are read and written: codes, scales and low bits.
        ({"state_dtype": "8bit"}, torch.bfloat16, 3 * 2 + 2 * (2 + 2 * 4 / 128)),
        ({"state_dtype": "8bit", "master_weights": "split8"}, torch.bfloat16, 3 * 2 + 2 * (3 + 2 * 4 / 128)),
    ],
)
def test_a_step_must_move_what_it_keeps(options: dict[str, Any], dtype: torch.dtype, least_bytes: float) -> None:
    assert tuning.adamw(1024, dtype, **options).least_bytes == 1024 * least_bytes


def test_a_norm_reads_a_gradient_and_a_cast_six_bytes() -> None:
    assert [tuning.norm(10, dtype).least_bytes for dtype in (torch.float32, torch.bfloat16)] == [40, 20]
    assert speed.scale_and_cast(10).least_bytes == 60


@pytest.mark.parametrize(("what", "least"), [("loss", 2), ("loss and gradient", 4), ("gradient later", 4)])
def test_a_row_kernel_reads_logits_and_writes_their_gradient(what: str, least: int) -> None:
    for name in (what, f"softcap, {what}"):
        if name in speed.ROW_KERNELS:  # of rows that are padded to 64 columns
            assert speed.row_kernel(name, 2, 70).least_bytes == least * 2 * 128
