"""One AdamW step by wall clock, next to torch's: `make bench`. Runs on a GPU where there is one."""

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from llmfast.optim import FusedAdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The demo's decoder, and a model of 300 tensors whose host work shows.
SHAPES = {"4M in 44": [(8192, 192)] + [(576, 192), (192, 192), (1024, 192), (192, 512), (192,), (192,)] * 7}
SHAPES["10M in 300"] = [(181, 181)] * 300

WAYS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "llmfast": FusedAdamW,
    "torch": torch.optim.AdamW,
    "torch-fused": lambda params: torch.optim.AdamW(params, fused=True),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_step(benchmark: BenchmarkFixture, shape: str, way: str) -> None:
    params = [torch.randn(s, device=DEVICE, requires_grad=True) for s in SHAPES[shape]]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = WAYS[way](params)

    def run() -> None:
        optimizer.step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"AdamW step, {shape} tensors, float32 on {DEVICE}"
    benchmark.pedantic(run, rounds=20, warmup_rounds=3)
