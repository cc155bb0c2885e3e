"""What GPUs can do, by their makers' data sheets: for modelled times, which are never measured ones."""

from dataclasses import dataclass

import torch

# The share of the printed rates that good code is known to reach.
BANDWIDTH_SHARE = 0.9
TENSOR_CORE_SHARE = 0.7
LAUNCH = 2e-6  # seconds from one kernel's end to the next one's work; assumed, the same for all


@dataclass(frozen=True)
class Gpu:
    """Peak rates a second, dense."""

    name: str
    bandwidth: float  # bytes
    tensor_cores: float  # FLOPs of bfloat16 and float16 matrix products
    float32: float  # FLOPs of the ordinary units, and of float32 matrix products without TF32
    special: float  # exponentials, reciprocals, ...

    def product_rate(self, dtype: torch.dtype) -> float:
        """FLOPs a second that matrix products of `dtype` reach."""
        low = dtype in (torch.bfloat16, torch.float16)
        return TENSOR_CORE_SHARE * self.tensor_cores if low else self.float32


# Special functions: 16 a clock on each of NVIDIA's multiprocessors and AMD's compute units.
A100 = Gpu("A100 80 GB SXM", bandwidth=2.039e12, tensor_cores=312e12, float32=19.5e12, special=108 * 16 * 1.41e9)
H100 = Gpu("H100 SXM", bandwidth=3.35e12, tensor_cores=989e12, float32=66.9e12, special=132 * 16 * 1.98e9)
B200 = Gpu("B200", bandwidth=8.0e12, tensor_cores=2250e12, float32=74.5e12, special=148 * 16 * 1.965e9)
MI300X = Gpu("MI300X", bandwidth=5.3e12, tensor_cores=1307e12, float32=163.4e12, special=304 * 16 * 2.1e9)
GPUS = (A100, H100, B200, MI300X)
