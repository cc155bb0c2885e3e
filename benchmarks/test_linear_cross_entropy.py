"""Forward and backward of the linear loss by wall clock, next to torch's own ways: `make bench`.

Runs on a GPU where there is one. Compare rows of one table only: machines, and moments on one machine, differ.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from llmfast.losses import linear_cross_entropy

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SHAPES = {"small": (2048, 8192, 192), "gpt2": (1024, 50257, 512)} | (
    {"llama3": (8192, 128256, 4096)} if DEVICE == "cuda" else {}
)

WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "llmfast": linear_cross_entropy,
    "torch-unfused": lambda h, w, y: F.cross_entropy(F.linear(h, w), y),
}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # torch 2.13
    WAYS["torch-chunked"] = lambda h, w, y: F.linear_cross_entropy(
        h, w, y, options=torch.nn.LinearCrossEntropyOptions()
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", WAYS)
def test_forward_backward(benchmark: BenchmarkFixture, shape: str, way: str) -> None:
    N, V, D = SHAPES[shape]
    hidden = torch.randn(N, D, device=DEVICE, dtype=DTYPE, requires_grad=True)
    weight = (torch.randn(V, D, device=DEVICE, dtype=DTYPE) * D**-0.5).requires_grad_()
    targets = torch.randint(0, V, (N,), device=DEVICE)

    def run() -> None:
        hidden.grad = weight.grad = None
        WAYS[way](hidden, weight, targets).backward()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"linear cross-entropy {shape}: N={N} V={V} D={D} {DTYPE} on {DEVICE}"
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    if DEVICE == "cuda":
        benchmark.extra_info["peak_bytes"] = torch.cuda.max_memory_allocated()
