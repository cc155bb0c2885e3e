"""What the compiler makes of every launch, for five GPUs: no spills, and 16 bytes at a time in the hot loops."""

import pkgutil
from importlib import import_module
from typing import Any

import pytest

import llmfast_kernels
from support.machine_code import TARGETS, compile_in_subprocess


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return compile_in_subprocess("support.launches:all_launches", TARGETS)


@pytest.fixture(params=TARGETS)
def compiled(request: pytest.FixtureRequest, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["target"] == request.param]


def name_of(record: dict[str, Any]) -> str:
    return f"{record['kernel']} [{record['label']}] for {record['target']}"


def test_every_kernel_is_compiled(records: list[dict[str, Any]]) -> None:
    modules = [import_module(f"llmfast_kernels.{m.name}") for m in pkgutil.iter_modules(llmfast_kernels.__path__)]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert kernels, "no kernels found"
    for target in TARGETS:
        assert {r["kernel"] for r in records if r["target"] == target} == kernels


def test_nothing_spills(compiled: list[dict[str, Any]]) -> None:
    spilling = {
        name_of(r): (r["facts"].spill_bytes, r["facts"].stack_bytes)
        for r in compiled
        if r["facts"].spill_bytes or r["facts"].stack_bytes
    }
    assert spilling == {}


def test_blocks_fit_the_target(compiled: list[dict[str, Any]]) -> None:
    width = 64 if compiled[0]["target"].startswith("gfx") else 32
    for record in compiled:
        assert record["options"]["num_warps"] * width <= 1024, name_of(record)
        assert record["facts"].shared_bytes <= 48 << 10, name_of(record)
        assert record["options"]["enable_fp_fusion"] is True, name_of(record)


def aligned_rows(record: dict[str, Any]) -> bool:
    """All but logits of 50257 columns without padding, whose rows start at any address."""
    return ("rows" in record["label"] and "V=50257" not in record["label"]) or "slab" in record["label"]


def test_row_kernels_move_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    loops = 0
    for record in compiled:
        if record["kernel"] == "cross_entropy_kernel" and aligned_rows(record):
            for loop in record["facts"].hot_loops:
                assert loop.access_bits == {128}, (name_of(record), loop)
                loops += 1
        if record["kernel"] == "cross_entropy_backward_kernel" and aligned_rows(record):
            code = record["facts"].code
            assert code.load_bits.get(128, 0) > 0 and set(code.store_bits) == {128}, name_of(record)
            loops += 1
    assert loops >= 20


def test_row_kernels_wait_for_nobody_inside_their_loops(compiled: list[dict[str, Any]]) -> None:
    """A thread folds its own logits: also where rows are unaligned, no shuffle and no barrier in a loop."""
    for record in compiled:
        if record["kernel"] == "cross_entropy_kernel":
            for loop in record["facts"].hot_loops:
                assert loop.shuffles == loop.barriers == 0, (name_of(record), loop)


def test_adamw_moves_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    checked = 0
    for record in compiled:
        if record["kernel"] == "adamw_kernel":
            wide = [loop for loop in record["facts"].hot_loops if loop.access_bits == {128}]
            # One loop for whole tiles, 16 bytes at a time; one for ends and misaligned views.
            assert len(wide) == 1 and len(record["facts"].hot_loops) == 2, name_of(record)
            assert sum(wide[0].load_bits.values()) * 16 == wide_bytes(record), name_of(record)
            checked += 1
    assert checked >= 6


def wide_bytes(record: dict[str, Any]) -> int:
    """Bytes a thread must load in one turn of the loop: eight elements of p, g and each state."""
    states = 3 if "amsgrad=True" in record["label"] else 2
    element = 4 if "float32" in record["label"] else 2
    threads = record["options"]["num_warps"] * (64 if record["target"].startswith("gfx") else 32)
    return record["constants"]["BLOCK"] // threads * (2 + states) * element


def test_scale_moves_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    for record in compiled:
        if record["kernel"] == "scale_kernel" and str(1 << 20) in record["label"]:
            assert 128 in record["facts"].code.load_bits, name_of(record)
