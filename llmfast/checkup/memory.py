"""Measured memory of the losses and optimizers, compared with what their plans say."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from llmfast.checkup import clock
from llmfast.checkup.record import Case, Finding, Size
from llmfast.checkup.shapes import MODELS
from llmfast.losses import LinearCrossEntropyPlan, cross_entropy, linear_cross_entropy
from llmfast.models.memory import PRECISIONS, Precision
from llmfast.optim import FusedAdamW

# Kernels' and libraries' own buffers, and what an allocator rounds up.
SLACK = 16 << 20
SHARE = 1.02
MODES: dict[str, dict[str, Any]] = {
    "the default budget": {},
    "a small budget": {"memory_budget": True},
    "a small budget, losses per token": {"memory_budget": True, "reduction": "none"},
    "a small budget, float32 logits": {"memory_budget": True, "slab_dtype": torch.float32},
}


def cases(device: torch.device, size: Size) -> list[Case]:
    """Return the cases of this section."""
    shapes = {name: (8192, D, V) for name, (D, V) in MODELS.items()} if size == "full" else {"tiny": (64, 16, 520)}
    parameters = ((4096, 4096), (50257, 768), (768,)) if size == "full" else ((33, 7), (300,))
    return [
        *(
            Case(f"linear_cross_entropy, {model}, {mode}", partial(linear, shape, mode, device), 5.0, 30 << 30)
            for model, shape in shapes.items()
            for mode in MODES
        ),
        *(
            Case(f"cross_entropy, {model}", partial(rows, shape, device), 4.0, 10 << 30)
            for model, shape in shapes.items()
        ),
        *(
            Case(f"AdamW, {precision.name}", partial(optimizer, precision, parameters, device), 4.0)
            for precision in (PRECISIONS if size == "full" else PRECISIONS[::4])
        ),
    ]


def compared(what: str, measured: int, planned: int, slack: int = SLACK) -> Finding:
    """Say whether no more memory was taken than planned."""
    within = measured <= SHARE * planned + slack
    return Finding(what, within, {"measured_bytes": measured, "planned_bytes": planned, "ratio": measured / planned})


def linear(shape: tuple[int, int, int], mode: str, device: torch.device) -> Iterator[Finding]:
    """Measure a linear loss, forward and backward."""
    N, D, V = shape
    options = dict(MODES[mode])
    if "memory_budget" in options:
        options["memory_budget"] = N * V // 4
    hidden = torch.full((N, D), 0.1, dtype=torch.bfloat16, device=device, requires_grad=True)
    weight = torch.full((V, D), 0.1, dtype=torch.bfloat16, device=device, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.int64, device=device)
    plan = LinearCrossEntropyPlan.make(N, D, V, device=device, **options)

    def run() -> None:
        hidden.grad = weight.grad = None
        linear_cross_entropy(hidden, weight, targets, **options).sum().backward()

    run()
    hidden.grad = weight.grad = None
    slack = SLACK if N > 1000 else 64 * N  # the loss keeps a few numbers per row
    found = compared("peak", clock.gpu_peak_bytes(run), plan.peak_bytes, slack)
    yield Finding(found.what, found.ok, found.figures | {"mode": plan.mode})


def rows(shape: tuple[int, int, int], device: torch.device) -> Iterator[Finding]:
    """Measure the loss of logits: a gradient of their size, and next to nothing if it is made in place."""
    N, _, V = shape
    leaf = torch.zeros(N, V, dtype=torch.bfloat16, device=device, requires_grad=True)
    targets = torch.zeros(N, dtype=torch.int64, device=device)

    def run() -> None:
        leaf.grad = None
        cross_entropy(leaf, targets).backward()

    run()
    leaf.grad = None
    slack = SLACK if N > 1000 else 64 * N
    yield compared("forward and backward", clock.gpu_peak_bytes(run), 2 * N * V, slack)


def optimizer(precision: Precision, shapes: tuple[tuple[int, ...], ...], device: torch.device) -> Iterator[Finding]:
    """Measure what AdamW keeps, and what a step takes beyond that."""
    params = [torch.zeros(s, dtype=precision.parameters, device=device, requires_grad=True) for s in shapes]
    for p in params:
        p.grad = torch.zeros_like(p)
    stepping = FusedAdamW(params, master_weights=precision.master_weights, state_dtype=precision.state_dtype)
    stepping.step()
    kept = sum(t.nbytes for state in stepping.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    yield compared("states", kept, stepping.state_bytes(), 1024)
    yield Finding("a step", (took := clock.gpu_peak_bytes(stepping.step)) <= 1 << 16, {"bytes": took})
