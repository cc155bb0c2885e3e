"""Bytes per parameter that a step moves, including its tables, counted as on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import Counts, counting
from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedOptimizer, FusedRMSprop, FusedSGD
from support.training import scaled

TENSORS = 200
SHAPE = (72, 72)
NUMEL = TENSORS * 72 * 72  # more than a million
F32, BF16 = torch.float32, torch.bfloat16
MOMENTUM = {"momentum": 0.9}

# Optimizer, dtype of parameters and gradients, options, bytes per parameter (the minimum, with a small margin).
BUDGETS: list[tuple[Callable[..., torch.optim.Optimizer], torch.dtype, dict[str, Any], float]] = [
    (FusedAdamW, F32, {}, 28.3),
    (FusedAdam, F32, {"weight_decay": 0.1}, 28.3),
    (FusedAdamW, F32, {"amsgrad": True}, 36.3),
    (FusedAdamW, F32, {"max_grad_norm": 1.0}, 32.4),
    (FusedAdamW, F32, {"ema_decay": 0.99}, 36.3),
    (FusedAdamW, F32, {"zero_grads": True}, 32.3),
    (FusedSGD, F32, {}, 12.3),
    (FusedSGD, F32, MOMENTUM, 20.3),
    (FusedRMSprop, F32, {}, 20.3),
    (FusedRMSprop, F32, {"centered": True, **MOMENTUM}, 36.3),
    (FusedAdagrad, F32, {}, 20.3),
    (FusedLion, F32, {}, 20.3),
    (FusedAdamW, BF16, {"master_weights": "fp32", "state_dtype": F32}, 28.3),
    (FusedAdamW, BF16, {"master_weights": "split16", "state_dtype": F32}, 26.3),
    (FusedAdamW, BF16, {"master_weights": "split16", "state_dtype": BF16}, 18.3),
    (FusedAdamW, BF16, {"master_weights": "split8", "state_dtype": BF16}, 16.3),
    (FusedAdamW, BF16, {"master_weights": "kahan"}, 18.3),
    (FusedAdamW, BF16, {"master_weights": "stochastic"}, 14.3),
    (FusedAdamW, BF16, {"master_weights": "stochastic", "state_dtype": "8bit"}, 10.5),
    (FusedAdamW, BF16, {"state_dtype": "8bit"}, 10.5),
    (FusedLion, BF16, {"master_weights": "split16"}, 14.3),
    (FusedLion, BF16, {"master_weights": "split8", "state_dtype": "8bit"}, 10.4),
]


def step_of(
    make: Callable[..., torch.optim.Optimizer],
    dtype: torch.dtype,
    options: dict[str, Any],
    *,
    scale: float | None = None,
) -> Counts:
    """Count the traffic of a step for which states and tables exist."""
    with pretending_cuda():
        params = [torch.zeros(SHAPE, dtype=dtype, requires_grad=True) for _ in range(TENSORS)]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = make(params, **options)
        if isinstance(optimizer, FusedOptimizer):
            with torch.no_grad():
                optimizer._plan, _ = optimizer.make_plan()
        else:
            with counting(dry=True):
                optimizer.step()
        if scale is not None:
            scaled(optimizer, scale)
        with counting(dry=True) as counts:
            optimizer.step()
    return counts


@pytest.mark.parametrize(("make", "dtype", "options", "budget"), BUDGETS)
def test_bytes_per_parameter(
    make: Callable[..., torch.optim.Optimizer], dtype: torch.dtype, options: dict[str, Any], budget: float
) -> None:
    counts = step_of(make, dtype, options)
    total = counts.total()
    print(f"{total.dram / NUMEL:.2f} bytes per parameter")
    assert total.dram <= budget * NUMEL
    assert counts.total("triton").calls == (4 if "max_grad_norm" in options else 2)
    assert not total.syncs


@pytest.mark.parametrize(
    ("dtype", "options", "budget"),
    [
        (F32, {}, 32.3),
        (F32, {"max_grad_norm": 1.0}, 36.4),
        (F32, {"zero_grads": True}, 32.3),  # zeros are written instead of the divided gradients
        (BF16, {"master_weights": "stochastic"}, 16.3),
    ],
)
def test_a_scaler_costs_a_write_of_the_gradients(dtype: torch.dtype, options: dict[str, Any], budget: float) -> None:
    counts = step_of(FusedAdamW, dtype, options, scale=1024.0)
    assert counts.total().dram <= budget * NUMEL
    assert counts.total("triton").calls == (4 if "max_grad_norm" in options else 2)
    assert not counts.total().syncs


def test_torchs_own_optimizers_move_more() -> None:
    ours = step_of(FusedAdamW, F32, {}).total().dram
    assert step_of(torch.optim.AdamW, F32, {"foreach": True}).total().dram > 2.5 * ours
    rmsprop = step_of(torch.optim.RMSprop, F32, {"foreach": True}).total().dram
    assert rmsprop > 2.5 * step_of(FusedRMSprop, F32, {}).total().dram


def test_the_page_on_measurements_has_these_figures() -> None:
    """Count a step on 1 M parameters in 200 tensors, as in the table of `docs/measured.md`."""
    stochastic = {"master_weights": "stochastic", "state_dtype": BF16}
    counts = [
        step_of(FusedAdamW, dtype, options)
        for dtype, options in ((F32, {}), (BF16, stochastic), (BF16, {**stochastic, "state_dtype": "8bit"}))
    ]
    plain, low, coded = (f"{count.total().dram / NUMEL:.1f}" for count in counts)
    (launches,) = {count.total("triton").calls for count in counts}
    text = (Path(__file__).parents[2] / "docs" / "measured.md").read_text(encoding="utf-8")
    begin = f"AdamW, float32, {NUMEL / 1e6:.0f} M parameters in {TENSORS} tensors: bytes per parameter, counted"
    assert f"\n| {begin} | {plain}, in {launches} launches | torch's `foreach` more than 2.5 times as many byt" in text
    begin = "the same in bfloat16 with stochastic rounding: bytes per parameter, counted"
    assert f"\n| {begin} | {low} with bfloat16 moments, {coded} with 8-bit moments |" in text


def test_the_page_on_optimizers_has_lions_figures() -> None:
    coded = {"master_weights": "split8", "state_dtype": "8bit"}
    steps = [(FusedLion, F32, {}), (FusedAdamW, F32, {}), (FusedLion, BF16, coded)]
    lion, adam, low = (step_of(make, dtype, options).total().dram / NUMEL for make, dtype, options in steps)
    page = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text(encoding="utf-8")
    wanted = (
        f"a step moves {lion:.0f} instead of {adam:.0f} bytes per parameter in float32, and {low:.1f} in bfloat16 with "
        '`master_weights="split8"` and `state_dtype="8bit"`'
    )
    assert wanted in " ".join(page.split())
