"""Compare wall time and memory of several implementations fairly: in turn, round by round, on one device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], object]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
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
    """Timing of one implementation, relative to the first of the race."""

    seconds: float  # median over the rounds
    ratio: float  # median over the rounds of (first implementation's time / this one's): below 1, the first is faster
    spread: float  # interquartile range of that ratio


def compare(times: dict[str, list[float]]) -> dict[str, Timing]:
    """Summarise rounds that timed each implementation once in turn. Some may have missed the last rounds."""
    first = next(iter(times.values()))
    timings = {}
    for name, mine in times.items():
        ratios = [a / b for a, b in zip(first, mine)]
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        timings[name] = Timing(statistics.median(mine), statistics.median(ratios), quartiles[2] - quartiles[0])
    return timings


def peak_bytes(run: Run) -> int:
    """Return the peak of the bytes of tensors, beyond those that existed before."""
    if torch.cuda.is_available():
        synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    from evidence.traffic import counting

    with counting() as counts:
        run()
    return counts.peak_bytes


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Return the bytes per second that the device reads and writes while copying memory much larger than its caches."""
    x = torch.empty(size // 2, dtype=torch.int8, device=device())
    y = torch.empty_like(x)
    return size / kernel_seconds(lambda: y.copy_(x))


def kernel_seconds(run: Run) -> float:
    """Return the median time of a short operation with cold caches: by Triton's benchmark, on a GPU."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        milliseconds: Any = do_bench(run, return_mode="median")
        return float(milliseconds) / 1e3
    run()
    return statistics.median(timed(run) for _ in range(5))
