"""Convert counts to modelled times: each launch is bound by a single resource, and nothing overlaps.

    seconds(launch) = LAUNCH + max(dram bytes / bandwidth, dot FLOPs / tensor cores, other FLOPs / float32 units,
                                   special functions / special function units)
    seconds(operation) = the sum over its launches

Nothing here was measured on a GPU. Rates are the manufacturers' figures; for bytes and matrix products they are
multiplied by the share that good code is known to reach. Caches are assumed to be perfect within a launch and empty
before it. The model compares designs by the work they request. It does not predict measured times, and it flatters
kernels that are limited by cache bandwidth or latency.
"""

from collections.abc import Iterable

from evidence.traffic import Traffic
from llmfast._gpus import A100, B200, BANDWIDTH_SHARE, GPUS, H100, LAUNCH, MI300X, TENSOR_CORE_SHARE, Gpu

__all__ = ["A100", "B200", "FORMULA", "GPUS", "H100", "MI300X", "Gpu", "bounds", "seconds"]

FORMULA = (
    "modelled seconds = sum over launches of (2 µs + max(DRAM bytes / (0.9 · bandwidth), dot FLOPs / (0.7 · tensor "
    "cores), other FLOPs / float32 rate, special functions / special function rate))"
)


def bounds(gpu: Gpu, traffic: Traffic) -> dict[str, float]:
    """Return, for one launch, the seconds that each resource would take."""
    low = sum(flops for dtype, flops in traffic.dot_flops.items() if dtype in ("bfloat16", "float16"))
    return {
        "bytes": traffic.dram / (BANDWIDTH_SHARE * gpu.bandwidth),
        "tensor cores": low / (TENSOR_CORE_SHARE * gpu.tensor_cores),
        "float32": (traffic.flops + traffic.dot_flops.total() - low) / gpu.float32,
        "special functions": traffic.transcendentals / gpu.special,
    }


def seconds(gpu: Gpu, launches: Iterable[Traffic]) -> float:
    """Return the modelled time of a sequence of launches."""
    return sum(launch.calls * LAUNCH + max(bounds(gpu, launch).values()) for launch in launches)
