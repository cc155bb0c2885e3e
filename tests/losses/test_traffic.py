"""Bytes and FLOPs of the losses, counted as a GPU would move them."""

import pytest
import torch

from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import Counts, counting
from llmfast._dispatch import kernels_on_cpu
from llmfast.losses import cross_entropy, linear_cross_entropy
from support.launched import unrecorded
from support.plans import forced


@pytest.mark.parametrize("V", [16384, 50257])
def test_rows_are_read_once_and_written_once(V: int) -> None:
    N = 64
    logits_bytes = 2 * N * V
    with pretending_cuda():
        logits = torch.randn(N, V, dtype=torch.bfloat16).requires_grad_() * 1.0
        targets = torch.randint(0, V, (N,))
        with counting(dry=True) as forward, torch.no_grad():
            cross_entropy(logits, targets, label_smoothing=0.1, z_loss=1e-4, softcap=30.0, return_stats=True)
        with counting(dry=True) as in_place:
            cross_entropy(logits, targets, label_smoothing=0.1, z_loss=1e-4, inplace=True)
    assert kernel_bytes(forward) <= 1.02 * logits_bytes
    assert kernel_bytes(in_place) <= 1.02 * 2 * logits_bytes


def kernel_bytes(counts: Counts) -> float:
    return sum(t.dram for t in counts.traffic if "cross_entropy" in t.name)


def test_linear_loss_with_a_slab_of_a_quarter() -> None:
    N, D, V = 1024, 256, 16384
    with pretending_cuda():
        hidden = torch.randn(N, D, dtype=torch.bfloat16).requires_grad_()
        weight = torch.randn(V, D, dtype=torch.bfloat16).requires_grad_()
        targets = torch.randint(0, V, (N,))
        with forced("chunk", rows=N // 4), counting(dry=True) as counts:
            linear_cross_entropy(hidden, weight, targets).backward()
    total = counts.total()
    assert total.dram <= 26 * N * V
    assert total.dot_flops.total() == 6 * N * D * V
    assert total.syncs == 0


def test_float32_logits_take_the_same_products() -> None:
    N, D, V = 64, 32, 512
    found = []
    for slab_dtype in (None, torch.float32):
        with pretending_cuda():
            hidden, weight = (torch.randn(n, D, dtype=torch.bfloat16).requires_grad_() for n in (N, V))
            with forced("chunk"), counting(dry=True) as counts:
                linear_cross_entropy(hidden, weight, torch.randint(0, V, (N,)), slab_dtype=slab_dtype).backward()
        found.append(counts.total().dot_flops)
    assert found == [{"bfloat16": 6 * N * D * V}] * 2


@pytest.mark.parametrize(("dtype", "bytes_per_element"), [(torch.bfloat16, 0), (torch.float32, 0), (torch.float16, 4)])
def test_a_mean_is_divided_without_a_pass(dtype: torch.dtype, bytes_per_element: int) -> None:
    """Test sums in the weight's dtype, which no pass casts. float16 would underflow, and is divided in the end."""
    N, D, V = 256, 64, 4096
    with pretending_cuda():
        hidden, weight = (torch.randn(n, D, dtype=dtype).requires_grad_() for n in (N, V))
        with forced("chunk", rows=N // 4), counting(dry=True) as counts:
            loss = linear_cross_entropy(hidden, weight, torch.randint(0, V, (N,)), accumulate_dtype=dtype)
            loss.backward()
    moved = sum(t.dram for t in counts.traffic if "scale" in t.name)
    assert moved == pytest.approx(bytes_per_element * (N * D + V * D), rel=0.01, abs=64)


def test_frozen_inputs_cost_nothing() -> None:
    N, D, V = 256, 64, 4096
    with pretending_cuda():
        for wants_hidden, wants_weight in ((True, False), (False, True)):
            hidden = torch.randn(N, D, dtype=torch.bfloat16).requires_grad_(wants_hidden)
            weight = torch.randn(V, D, dtype=torch.bfloat16).requires_grad_(wants_weight)
            with forced("chunk"), counting(dry=True) as counts:
                linear_cross_entropy(hidden, weight, torch.randint(0, V, (N,))).backward()
            assert counts.total().dot_flops.total() == 4 * N * D * V


@pytest.mark.parametrize(("threshold", "share"), [(1e9, 0.0), (1e-30, 1.0)])
def test_gradient_filter_pays_for_surviving_blocks(threshold: float, share: float) -> None:
    N, D, V = 256, 128, 512
    with kernels_on_cpu():
        hidden, weight = torch.randn(N, D).requires_grad_(), torch.randn(V, D).requires_grad_()
        with counting() as counts:
            linear_cross_entropy(hidden, weight, torch.randint(0, V, (N,)), grad_filter=threshold).backward()
    assert counts.total().dot_flops.total() == (2 + 4 * share) * N * D * V


WAYS: list[tuple[str, str, dict[str, int]]] = [
    ("chunk", "mean", {"rows": 128}),
    ("chunk", "mean", {"rows": 512}),
    ("materialise", "none", {}),
    ("two-stage", "mean", {"rows": 128, "summed": 1024, "kept": 0, "columns": 256}),
    ("two-stage", "mean", {"rows": 128, "summed": 0, "kept": 256, "columns": 256}),
    ("recompute", "none", {"rows": 128, "finished": 0, "summed": 0, "kept": 256, "columns": 256}),
    ("two-stage", "mean", {"rows": 128, "summed": 0, "kept": 1024, "columns": 128}),
    ("recompute", "none", {"rows": 128, "finished": 0, "summed": 0, "kept": 2048, "columns": 96}),
    ("recompute", "none", {"rows": 128, "finished": 512, "summed": 1024, "kept": 0, "columns": 256}),
    ("recompute", "none", {"rows": 128, "finished": 256, "summed": 0, "kept": 0, "columns": 256}),
]


@pytest.mark.parametrize(("mode", "reduction", "changes"), WAYS, ids=str)
@unrecorded()
def test_a_plan_adds_up_what_is_moved_and_multiplied(mode: str, reduction: str, changes: dict[str, int]) -> None:
    N, D, V = 512, 128, 4096
    with pretending_cuda():
        hidden, weight = (torch.randn(n, D, dtype=torch.bfloat16).requires_grad_() for n in (N, V))
        targets = torch.randint(0, V, (N,))
        with forced(mode, **changes) as plans, counting(dry=True) as counts:
            loss = linear_cross_entropy(hidden, weight, targets, reduction=reduction)  # type: ignore[call-overload]
            loss.backward(torch.full_like(loss, 2.0))
    (plan,) = plans
    assert plan.mode == mode
    assert counts.total().dot_flops.total() == plan.flops
    assert counts.total().dram == pytest.approx(plan.hbm_bytes, rel=0.012)
