"""Time losses forward and backward, compared with all other installed implementations; on a GPU at realistic sizes."""

from typing import Any

import pytest
import torch

from benchmarks.clock import peak_bytes
from benchmarks.conftest import Add, Race
from llmfast.checkup.clock import copy_bandwidth, device, linear_layer_seconds
from llmfast.checkup.implementations import implementations
from llmfast.checkup.shapes import MODELS, TOKENS

GPU = torch.cuda.is_available()
TIER = "gpu" if GPU else "cpu"
DTYPES = [torch.bfloat16] if GPU else [torch.float32, torch.bfloat16]
# N, D, V. On a CPU: the vocabularies of the demo, GPT-2 and Llama-3.
LINEAR = (
    {f"{model} N={N}": (N, *MODELS[model]) for model in MODELS for N in TOKENS}
    if GPU
    else {"demo": (2048, 192, 8192), "GPT-2's V": (1024, 512, 50257), "Llama-3's V": (128, 256, 128256)}
)
ROWS = (
    {f"{model} N={N}": (N, V) for model, (_, V) in MODELS.items() for N in TOKENS}
    if GPU
    else {"demo": (2048, 8192), "GPT-2's V": (512, 50257), "Llama-3's V": (256, 128256)}
)


def race_losses(
    add: Add,
    race: Race,
    operation: str,
    shape: str,
    size: dict[str, int],
    dtype: torch.dtype,
    leaves: Any,
    targets: Any,
) -> None:
    """Time all implementations that fit in the device's memory on the same tensors, and record the results."""
    runs, peaks = {}, {}
    for name, way in implementations(operation, TIER, dtype).items():

        def run(way: Any = way.run) -> None:
            clear(leaves)
            way(*leaves, targets).backward()

        try:
            if GPU:
                run()  # compiles, if necessary
            clear(leaves)  # otherwise gradients would count as memory used before
            peaks[name] = peak_bytes(run)
            runs[name] = run
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            add("clock", operation=operation, shape=shape, dtype=str(dtype), way=name, failure="out of memory")
    if "llmfast" not in runs:
        pytest.skip("not enough memory")
    for name, timing in race(runs, warm=True).items():
        add(
            "clock",
            operation=operation,
            shape=shape,
            size=size,
            dtype=str(dtype),
            way=name,
            seconds=timing.seconds,
            ratio=timing.ratio,
            spread=timing.spread,
            peak_bytes=peaks[name],
        )


def clear(leaves: Any) -> None:
    for leaf in leaves:
        leaf.grad = None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LINEAR)
def test_linear_cross_entropy(race: Race, add: Add, shape: str, dtype: torch.dtype) -> None:
    N, D, V = LINEAR[shape]
    if GPU and 0.8 * torch.cuda.get_device_properties(0).total_memory < 6 * V * D + 4 * N * D:
        pytest.skip("not enough memory")
    hidden = torch.randn(N, D, device=device()).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device()) * D**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device())
    size = {"N": N, "D": D, "V": V}
    race_losses(add, race, "linear_cross_entropy", shape, size, dtype, [hidden, weight], targets)
    if GPU:  # what the three matrix products take by themselves
        gemms = linear_layer_seconds(hidden.detach(), weight.detach())
        add("roof", operation="linear_cross_entropy", shape=shape, dtype=str(dtype), seconds=gemms, what="cuBLAS")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ROWS)
def test_cross_entropy(race: Race, add: Add, shape: str, dtype: torch.dtype) -> None:
    N, V = ROWS[shape]
    if GPU and 0.8 * torch.cuda.get_device_properties(0).total_memory < 8 * N * V:
        pytest.skip("not enough memory")
    logits = torch.randn(N, V, device=device()).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), device=device())
    # One overwrites the logits with their gradient; the numbers do not matter for the time.
    race_losses(add, race, "cross_entropy", shape, {"N": N, "V": V}, dtype, [logits], targets)
    if GPU:
        floor = 6 * N * V / copy_bandwidth()
        add(
            "roof",
            operation="cross_entropy",
            shape=shape,
            dtype=str(dtype),
            seconds=floor,
            what="copying 6 bytes per logit",
        )
