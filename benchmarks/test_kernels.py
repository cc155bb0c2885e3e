"""Time single kernels on a GPU, as a percentage of the bandwidth of a copy on the same device."""

import pytest
import torch

from benchmarks.clock import copy_bandwidth, device, kernel_seconds
from benchmarks.conftest import Add
from benchmarks.shapes import MODELS

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="times kernels on a GPU"),
    pytest.mark.usefixtures("benchmark"),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("what", ["loss", "loss and gradient", "gradient later"])
def test_rows(add: Add, model: str, what: str) -> None:
    time_rows(add, what, 4096, MODELS[model][1], f"{model} N=4096")


def time_rows(add: Add, what: str, N: int, V: int, shape: str) -> None:
    from llmfast_kernels import cross_entropy as rows
    from llmfast_kernels.terms import Targets, Terms, Upstream

    width = -(-V // 64) * 64
    logits = torch.randn(N, width, device=device()).to(torch.bfloat16)
    d_logits = torch.empty_like(logits)
    targets, terms = Targets(torch.randint(0, V, (N, 1), device=device())), Terms(V)
    found = rows.cross_entropy(logits, targets, terms, V=V)
    softmax, upstream = found.softmax, Upstream(found.loss)
    run, bytes_a_logit = {
        "loss": (lambda: rows.cross_entropy(logits, targets, terms, V=V), 2),
        "loss and gradient": (
            lambda: rows.cross_entropy(logits, targets, terms, V=V, d_logits=d_logits), 4
        ),
        "gradient later": (
            lambda: rows.cross_entropy_backward(logits, targets, terms, softmax, upstream, V=V, d_logits=d_logits), 4
        ),
    }[what]  # fmt: skip
    record(add, f"row kernel, {what}", shape, kernel_seconds(run), bytes_a_logit * N * width)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adamw(add: Add, dtype: torch.dtype) -> None:
    time_adamw(add, 1 << 27, dtype)


def time_adamw(add: Add, numel: int, dtype: torch.dtype) -> None:
    from llmfast.optim import FusedAdamW

    p = torch.randn(numel, dtype=dtype, device=device()).requires_grad_()
    p.grad = torch.randn_like(p)
    optimizer = FusedAdamW([p])
    optimizer.step()
    record(add, "AdamW step", f"{numel} {dtype}", kernel_seconds(optimizer.step), 7 * numel * dtype.itemsize)


def test_scale(add: Add) -> None:
    time_scale(add, 1 << 28)


def time_scale(add: Add, numel: int) -> None:
    from llmfast_kernels.scale import scale

    x, out = torch.randn(numel, device=device()), torch.empty(numel, dtype=torch.bfloat16, device=device())
    factor = torch.full((), 0.5, device=device())
    record(add, "scale and cast", f"{numel}", kernel_seconds(lambda: scale(x, factor, out=out)), 6 * numel)


def record(add: Add, kernel: str, shape: str, seconds: float, least_bytes: int) -> None:
    """Add a row; `least_bytes` is the number of bytes to move if everything is read and written once."""
    reached = least_bytes / seconds
    add("kernels", kernel=kernel, shape=shape, seconds=seconds, bandwidth=reached, share=reached / copy_bandwidth())
