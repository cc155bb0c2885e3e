"""The model, on numbers small enough to work out by hand."""

from collections import Counter
from dataclasses import replace

import pytest

from evidence.roofline import FORMULA, GPUS, H100, Gpu, seconds
from evidence.traffic import Traffic
from llmfast._gpus import BANDWIDTH_SHARE, LAUNCH, TENSOR_CORE_SHARE

# Rates that differ, so that none can be taken for another, nor multiplied by for divided by.
UNIT = Gpu("unit", memory=1, bandwidth=2.0, tensor_cores=4.0, float32=8.0, special=16.0)


def launch(dram: float = 0, dot: float = 0, flops: float = 0, special: float = 0, dtype: str = "bfloat16") -> Traffic:
    return Traffic(
        "x", "triton", unique_loaded=dram, dot_flops=Counter({dtype: int(dot)}), flops=flops, transcendentals=special
    )


NEAR = LAUNCH / 100  # so that each launch counts


@pytest.mark.parametrize(
    ("traffic", "expected"),
    [
        (launch(dram=18, dot=24.0), 10),
        (launch(dram=18, dot=56), 20),
        (launch(dram=18, dot=56, flops=200), 25),
        (launch(dram=18, special=176), 11),
        (launch(dram=16, special=16), 16 / 1.8),
        (launch(dot=56, flops=16, dtype="float32"), 9),  # float32 products take the ordinary units
        (launch(dot=56, flops=8, dtype="float16"), 20),
    ],
)
def test_a_launch_takes_what_binds_it(traffic: Traffic, expected: float) -> None:
    assert seconds(UNIT, [traffic]) == pytest.approx(expected + LAUNCH, rel=0, abs=NEAR)


def test_launches_follow_one_another() -> None:
    assert seconds(UNIT, [launch(dram=18), launch(dot=28)]) == pytest.approx(20 + 2 * LAUNCH, rel=0, abs=NEAR)
    assert seconds(UNIT, []) == 0
    assert seconds(UNIT, [replace(launch(dram=18), calls=5)]) == pytest.approx(10 + 5 * LAUNCH, rel=0, abs=NEAR)


def test_the_formula_is_the_one_in_force() -> None:
    assert f"({LAUNCH * 1e6:g} µs + max(DRAM bytes / ({BANDWIDTH_SHARE:g} ·" in FORMULA
    assert f"dot FLOPs / ({TENSOR_CORE_SHARE:g} ·" in FORMULA


def test_known_orders_of_magnitude() -> None:
    """Expect about 12 ms for an 8192 x 4096 x 128256 GEMM on an H100, and about 9 ms for 28 GB of AdamW."""
    gemm = launch(dot=2 * 8192 * 4096 * 128256, dram=2 * (8192 * 4096 + 4096 * 128256 + 8192 * 128256))
    assert 0.010 < seconds(H100, [gemm]) < 0.014
    assert 0.008 < seconds(H100, [launch(dram=28e9)]) < 0.010
    assert [gpu.name.split()[0] for gpu in GPUS] == ["A100", "H100", "H200", "B200", "MI300X"]
