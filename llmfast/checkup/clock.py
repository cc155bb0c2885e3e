"""Wall time and memory of ways to do the same thing, compared fairly: in turn, round by round, on one device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]


def device() -> torch.device:
    """Return the device that is timed: the current GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: Run) -> float:
    """Return the seconds until the device is done."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Timing:
    """The time of one way, compared with the first way of the race."""

    seconds: float  # median over the rounds
    ratio: float  # median over the rounds of (the first way's time / this way's): below 1, the first is faster
    spread: float  # of that ratio: the difference between its quartiles


def compare(times: dict[str, list[float]]) -> dict[str, Timing]:
    """Compare rounds that timed each way once, one after the other. Some ways may have missed the last rounds."""
    first = next(iter(times.values()))
    timings = {}
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(first, mine)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        timings[name] = Timing(statistics.median(mine), statistics.median(ratios), quartiles[2] - quartiles[0])
    return timings


def gpu_peak_bytes(run: Run) -> int:
    """Return the most bytes of GPU tensors alive at a time during `run`, beyond those alive before it."""
    synchronize()
    torch.cuda.reset_peak_memory_stats()
    before: int = torch.cuda.memory_allocated()
    run()
    synchronize()
    peak: int = torch.cuda.max_memory_allocated()
    return peak - before


def kernel_seconds(run: Run) -> float:
    """Return the median time of something short, with cold caches: by Triton's benchmark on a GPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        milliseconds: Any = do_bench(run, warmup=10, rep=50, return_mode="median")
        return float(milliseconds) / 1e3
    run()
    return statistics.median(timed(run) for _ in range(5))


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Return the bytes per second that the device reads and writes while it copies memory larger than its caches."""
    x = torch.empty(size // 2, dtype=torch.int8, device=device())
    y = torch.empty_like(x)
    return size / kernel_seconds(lambda: y.copy_(x))


def product_rate(n: int = 8192, dtype: torch.dtype = torch.bfloat16) -> float:
    """Return the FLOPs per second that a product of square matrices reaches, by the device's own library."""
    a, b = (torch.randn(n, n, dtype=torch.float32, device=device()).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * n**3 / kernel_seconds(lambda: torch.mm(a, b, out=out))


def linear_layer_seconds(hidden: Tensor, weight: Tensor) -> float:
    """Return the time of the three products of a linear layer's forward and backward, in slices of rows.

    Args:
        hidden: (N, D).
        weight: (V, D).
    """
    rows = max(1, min(len(hidden), (4 << 30) // (weight.shape[0] * hidden.element_size())))
    seconds = 0.0
    for start in range(0, len(hidden), rows):
        h = hidden[start : start + rows]
        logits = h @ weight.T
        for a, b in ((h, weight.T), (logits, weight), (logits.T, h)):
            seconds += kernel_seconds(partial(torch.mm, a, b))
    return seconds


def host_seconds(run: Run, calls: int = 50) -> float:
    """Return the median time that the host spends in a call, without waiting for the device."""
    times = []
    for _ in range(calls):
        synchronize()
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    synchronize()
    return statistics.median(times)
