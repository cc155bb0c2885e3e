"""The arithmetic of comparisons, and the benchmarks for GPUs, whose code has nowhere else to run."""

import math
import time
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import test_kernels, test_losses
from benchmarks.clock import peak_bytes
from evidence.pretend_cuda import pretending_cuda
from llmfast.checkup import clock


def test_ratios_are_taken_round_by_round() -> None:
    # The machine is twice as slow in the second round, and the third way missed it.
    timings = clock.compare({"ours": [1.0, 2.0, 1.0], "other": [2.0, 4.0, 2.0], "slow": [10.0]})
    assert timings["ours"].ratio == 1 and timings["other"].ratio == 0.5 and timings["slow"].ratio == 0.1
    assert timings["other"].spread == 0 and timings["slow"].seconds == 10


def test_medians_and_quartiles() -> None:
    timings = clock.compare({"ours": [1.0, 2.0, 3.0, 4.0, 5.0], "other": [1.0, 1.0, 1.0, 1.0, 40.0]})
    other = timings["other"]  # whose ratios are 1, 2, 3, 4 and 1/8
    assert (other.seconds, other.ratio) == (1.0, 2.0)
    assert other.spread == pytest.approx(3.5 - 0.5625)
    assert clock.compare({"ours": [3.0], "other": [6.0]})["other"] == clock.Timing(6.0, 0.5, 0.0)


def test_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel_seconds(run: clock.Run) -> float:
        copied = run()
        assert isinstance(copied, torch.Tensor)
        moved.append(2 * copied.nbytes)
        return 0.5

    moved: list[int] = []
    monkeypatch.setattr(clock, "kernel_seconds", kernel_seconds)
    assert clock.copy_bandwidth(1 << 20) == moved[0] / 0.5 == 1 << 21


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_product_counts_a_multiplication_and_an_addition_per_term(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel_seconds(run: clock.Run) -> float:
        with FlopCounterMode(display=False) as counter:
            product = run()
        assert isinstance(product, torch.Tensor) and product.shape == (24, 24) and product.dtype == dtype
        flops.append(counter.get_total_flops())
        return 0.5

    flops: list[int] = []
    monkeypatch.setattr(clock, "kernel_seconds", kernel_seconds)
    assert clock.product_rate(24, dtype) == flops[0] / 0.5 == 4 * 24**3


def test_time_and_memory() -> None:
    assert 0.01 <= clock.timed(lambda: time.sleep(0.01)) < 1
    assert peak_bytes(lambda: torch.empty(1000) + 1) == 8000
    assert clock.copy_bandwidth(1 << 20) > 1e6


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    monkeypatch.setattr(test_kernels, "kernel_seconds", lambda run: run() is None or 2.0)
    monkeypatch.setattr(test_kernels, "copy_bandwidth", lambda: 1e3)
    return []


@pytest.mark.parametrize(
    ("run", "least_bytes"),
    [
        (lambda add: test_kernels.time_rows(add, "loss", 2, 100, "shape"), 2 * 2 * 128),
        (lambda add: test_kernels.time_rows(add, "loss and gradient", 2, 100, "shape"), 4 * 2 * 128),
        (lambda add: test_kernels.time_rows(add, "gradient later", 2, 100, "shape"), 4 * 2 * 128),
        (lambda add: test_kernels.time_adamw(add, 1000, torch.float32), 28 * 1000),
        (lambda add: test_kernels.time_adamw(add, 1000, torch.bfloat16), 14 * 1000),
        (lambda add: test_kernels.time_scale(add, 1000), 6 * 1000),
    ],
)
def test_kernels_for_a_gpu_run(added: list[dict[str, Any]], run: Any, least_bytes: int) -> None:
    with pretending_cuda():
        run(lambda section, **fields: added.append({"section": section, **fields}))
    (row,) = added
    seconds = row["seconds"]
    assert row["section"] == "kernels" and row["bandwidth"] == least_bytes / seconds
    assert row["share"] == row["bandwidth"] / 1e3


@pytest.mark.parametrize("on_gpu", [False, True])
def test_peak_memory_counts_gradients(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    """Check that gradients left by earlier runs do not count as memory of the next implementation."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(60, 8, requires_grad=True)
    before = []

    def peak_bytes(run: clock.Run) -> int:
        before.append([hidden.grad, weight.grad])
        run()
        return 1

    monkeypatch.setattr(test_losses, "GPU", on_gpu)
    monkeypatch.setattr(test_losses, "peak_bytes", peak_bytes)
    test_losses.race_losses(
        lambda *args, **fields: None,
        lambda runs, **options: {},
        "linear_cross_entropy",
        "shape",
        {},
        torch.float32,
        [hidden, weight],
        torch.tensor([1, 2, 3, -100]),
    )
    assert len(before) > 1 and before == [[None, None]] * len(before)


def test_the_roof_is_no_single_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one product take a hundred times as long once; the median ignores it."""
    samples = iter([1.0, 1.0, 100.0, 1.0, 1.0, *[2.0] * 5, *[3.0] * 5])
    monkeypatch.setattr(clock, "timed", lambda run: run() is None or next(samples))
    assert clock.linear_layer_seconds(torch.randn(4, 8), torch.randn(60, 8)) == 6.0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Pretend a GPU, on which 1000 bytes are alive, and note what it is asked for."""
    log: list[str] = []
    peak = [5000]  # of what came before
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.__setitem__(0, 1000))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 1000)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0] + 640 * ("run" in log))
    return log


def test_a_gpus_peak_is_what_a_run_has_alive_beyond_what_was_there(gpu: list[str]) -> None:
    assert clock.gpu_peak_bytes(lambda: gpu.append("run")) == 640
    assert gpu == ["wait", "run", "wait"]


def test_a_kernels_time_is_the_median_in_seconds(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def do_bench(run: clock.Run, **options: Any) -> float:
        asked.append(options)
        run()
        return 2.5  # milliseconds

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    assert clock.kernel_seconds(lambda: gpu.append("run")) == 2.5e-3
    assert gpu == ["run"] and asked == [{"warmup": 10, "rep": 50, "return_mode": "median"}]


def test_a_kernels_time_without_a_gpu_is_that_of_five_runs_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    lasts, ran = iter([9.0, 1.0, 4.0, 3.0, 2.0]), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(clock, "timed", lambda run: (run(), next(lasts))[1])
    assert clock.kernel_seconds(lambda: ran.append("run")) == 3.0
    assert len(ran) == 6 and list(lasts) == []


def test_the_hosts_time_is_without_that_of_the_device(gpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the device before each call, and not within what is timed."""
    now, lasts = [0.0], iter([1.0, 9.0, 2.0])

    def wait() -> None:
        gpu.append("wait")
        now[0] += 100.0

    def run() -> None:
        gpu.append("run")
        now[0] += next(lasts)

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert clock.host_seconds(run, 3) == 2.0
    assert gpu == ["wait", "run"] * 3 + ["wait"]
    lasts = iter([3.0])
    assert clock.timed(run) == 103.0, "what the device does counts"


def test_a_large_layer_is_timed_in_slices_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of a slice take at most 4 GiB; the products of all slices have the FLOPs of the whole."""
    shapes: list[tuple[int, ...]] = []

    def kernel_seconds(run: Any) -> float:
        (a, b) = run.args
        shapes.append((*a.shape, b.shape[1]))
        return float(math.prod(shapes[-1]))

    monkeypatch.setattr(clock, "kernel_seconds", kernel_seconds)
    N, D, V = 5, 2, 1 << 30
    hidden, weight = (torch.empty(n, D, device="meta", dtype=torch.bfloat16) for n in (N, V))
    assert clock.linear_layer_seconds(hidden, weight) == 3 * N * D * V
    assert shapes == [shape for n in (2, 2, 1) for shape in ((n, D, V), (n, V, D), (V, n, D))]
