"""Time one AdamW step, compared with all other installed implementations, and its host time."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from benchmarks.conftest import Add, Race
from llmfast._dispatch import kernels_on_cpu
from llmfast.checkup.clock import Run, copy_bandwidth, device
from llmfast.checkup.implementations import implementations
from llmfast.checkup.shapes import PARAMETERS

GPU = torch.cuda.is_available()
TIER = "gpu" if GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
# The demo's decoder; a model of 300 tensors, whose host time is noticeable; GPT-2.
Shapes = Sequence[tuple[int, ...]]
MODELS: dict[str, Shapes] = {
    "demo, 4M in 38": [
        *((8192, 192), (192,)),
        *[(576, 192), (192, 192), (1024, 192), (192, 512), (192,), (192,)] * 6,
    ],
    "10M in 300": [(181, 181)] * 300,
    "124M": PARAMETERS["124M"],
}
if GPU:
    MODELS |= {name: PARAMETERS[name] for name in ("1B", "8B")}


def parameters(shapes: Shapes, dtype: torch.dtype) -> list[torch.Tensor]:
    """Create parameters with gradients, with random values if cheap, because denormal numbers would slow down a CPU."""
    made = [torch.randn(shape, dtype=dtype, device=device()).requires_grad_() for shape in shapes]
    for p in made:
        p.grad = torch.randn_like(p)
    return made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_adamw(race: Race, add: Add, model: str, dtype: torch.dtype) -> None:
    shapes = MODELS[model]
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    if GPU and 4 * numel * dtype.itemsize > 0.9 * torch.cuda.get_device_properties(0).total_memory:
        pytest.skip("not enough memory")
    steps: dict[str, Run] = {}
    tensors = parameters(shapes, dtype)
    for name, way in implementations("adamw", TIER, dtype).items():
        try:
            optimizer = way.run(tensors)  # all of them update the same parameters
            optimizer.step()
            steps[name] = optimizer.step
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            add("clock", operation="adamw", shape=model, dtype=str(dtype), way=name, failure="out of memory")
    for name, timing in race(steps, rounds=5 if numel > 50_000_000 else 20).items():
        add(
            "clock",
            operation="adamw",
            shape=model,
            size={"parameters": numel},
            dtype=str(dtype),
            way=name,
            seconds=timing.seconds,
            ratio=timing.ratio,
            spread=timing.spread,
        )
    if GPU:
        floor = 7 * numel * dtype.itemsize / copy_bandwidth()
        what = "copying 7 values per parameter"
        add("roof", operation="adamw", shape=model, dtype=str(dtype), seconds=floor, what=what)


def test_host_time_of_a_step(race: Race, add: Add, monkeypatch: pytest.MonkeyPatch) -> None:
    """Time `step` without its launches, for llmfast and torch."""
    kernels: Any = pytest.importorskip("llmfast_kernels.optimizer")
    for name in ("prepare", "update"):
        monkeypatch.setattr(kernels, name, lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch, "_foreach_add_", lambda *args, **kwargs: None)  # step counters, a launch on a GPU
    shapes = [(8, 8)] * 300  # so small that only host time counts
    ours, theirs = implementations("adamw", "cpu")["llmfast"], implementations("adamw", "cpu")["torch fused"]
    with kernels_on_cpu():
        runs: dict[str, Callable[[], object]] = {
            "llmfast, launches left out": ours.run(parameters(shapes, torch.float32)).step,
            "torch fused, launches left out": theirs.run(parameters(shapes, torch.float32)).step,
        }
        for name, timing in race(runs, rounds=50).items():
            add(
                "clock",
                operation="host time of AdamW",
                shape="300 tensors",
                dtype="torch.float32",
                way=name,
                seconds=timing.seconds,
                ratio=timing.ratio,
                spread=timing.spread,
            )
