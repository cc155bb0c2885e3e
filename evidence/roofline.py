"""Counts to modelled times: how long a GPU would take if each launch were bound by one thing and nothing overlapped.

    seconds(launch) = LAUNCH + max(dram bytes / bandwidth, dot FLOPs / tensor cores, other FLOPs / float32 units,
                                   special functions / special function units)
    seconds(operation) = the sum over its launches

Nothing here was measured on a GPU. The rates are what the makers print, bytes and matrix products times the share of
it that good code is known to reach; caches count as perfect within a launch and empty before it. So this compares
designs, by the work they ask for. It does not predict a clock, and it flatters kernels that live on the caches'
bandwidth or on latency.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from evidence.traffic import Traffic

FORMULA = (
    "modelled seconds = sum over launches of (2 µs + max(DRAM bytes / (0.9 · bandwidth), dot FLOPs / (0.7 · tensor "
    "cores), other FLOPs / float32 rate, special functions / special function rate))"
)

LAUNCH = 2e-6  # seconds from one kernel's end to the next one's work; assumed, the same for all
BANDWIDTH_SHARE = 0.9
TENSOR_CORE_SHARE = 0.7


@dataclass(frozen=True)
class Gpu:
    """Peak rates a second, dense, from the maker's data sheet."""

    name: str
    bandwidth: float  # bytes
    tensor_cores: float  # FLOPs of bfloat16 and float16 matrix products
    float32: float  # FLOPs of the ordinary units, and of float32 matrix products without TF32
    special: float  # exponentials, reciprocals, ...

    def bounds(self, traffic: Traffic) -> dict[str, float]:
        """Seconds by what could bind, for one launch."""
        low = sum(flops for dtype, flops in traffic.dot_flops.items() if dtype in ("bfloat16", "float16"))
        return {
            "bytes": traffic.dram / (BANDWIDTH_SHARE * self.bandwidth),
            "tensor cores": low / (TENSOR_CORE_SHARE * self.tensor_cores),
            "float32": (traffic.flops + traffic.dot_flops.total() - low) / self.float32,
            "special functions": traffic.transcendentals / self.special,
        }

    def seconds(self, launches: Iterable[Traffic]) -> float:
        """Modelled time of launches one after the other."""
        return sum(launch.calls * LAUNCH + max(self.bounds(launch).values()) for launch in launches)


# Special functions: 16 a clock on each of NVIDIA's multiprocessors and AMD's compute units.
A100 = Gpu("A100 80 GB SXM", bandwidth=2.039e12, tensor_cores=312e12, float32=19.5e12, special=108 * 16 * 1.41e9)
H100 = Gpu("H100 SXM", bandwidth=3.35e12, tensor_cores=989e12, float32=66.9e12, special=132 * 16 * 1.98e9)
B200 = Gpu("B200", bandwidth=8.0e12, tensor_cores=2250e12, float32=74.5e12, special=148 * 16 * 1.965e9)
MI300X = Gpu("MI300X", bandwidth=5.3e12, tensor_cores=1307e12, float32=163.4e12, special=304 * 16 * 2.1e9)
GPUS = (A100, H100, B200, MI300X)
