"""Time single kernels on a GPU, as a percentage of the bandwidth of a copy on the same device."""

import pytest
import torch

from benchmarks.conftest import Add
from llmfast.checkup.clock import copy_bandwidth, kernel_seconds
from llmfast.checkup.shapes import MODELS
from llmfast.checkup.speed import Kernel, adamw_step, row_kernel, scale_and_cast

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU"),
    pytest.mark.usefixtures("benchmark"),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", ["loss", "loss and gradient", "gradient later"])
def test_rows(add: Add, model: str, what: str) -> None:
    time_rows(add, what, 4096, MODELS[model][1], f"{model} N=4096")


def time_rows(add: Add, what: str, N: int, V: int, shape: str) -> None:
    record(add, f"row kernel, {what}", shape, row_kernel(what, N, V))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw(add: Add, dtype: torch.dtype) -> None:
    time_adamw(add, 1 << 27, dtype)


def time_adamw(add: Add, numel: int, dtype: torch.dtype) -> None:
    record(add, "AdamW step", f"{numel} {dtype}", adamw_step(numel, dtype))


def test_scale(add: Add) -> None:
    time_scale(add, 1 << 28)


def time_scale(add: Add, numel: int) -> None:
    record(add, "scale and cast", f"{numel}", scale_and_cast(numel))


def record(add: Add, name: str, shape: str, kernel: Kernel) -> None:
    seconds = kernel_seconds(kernel.run)
    reached = kernel.least_bytes / seconds
    add("kernels", kernel=name, shape=shape, seconds=seconds, bandwidth=reached, share=reached / copy_bandwidth())
