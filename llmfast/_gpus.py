"""Peak rates of GPUs from their data sheets, for modelled times."""

import re
from dataclasses import dataclass, replace

import torch

# The share of the peak rates that good code is known to reach.
BANDWIDTH_SHARE = 0.9
TENSOR_CORE_SHARE = 0.7
LAUNCH = 2e-6  # seconds between one kernel's end and the next one's start; assumed equal for all GPUs


@dataclass(frozen=True)
class Gpu:
    """Peak rates per second, dense."""

    name: str
    bandwidth: float  # bytes
    tensor_cores: float  # FLOPs of bfloat16 and float16 matrix products
    float32: float  # FLOPs of the ordinary units, and of float32 matrix products without TF32
    special: float  # exponentials, reciprocals, ...

    def product_rate(self, dtype: torch.dtype) -> float:
        """Return the FLOPs per second that matrix products of `dtype` reach."""
        low = dtype in (torch.bfloat16, torch.float16)
        return TENSOR_CORE_SHARE * self.tensor_cores if low else self.float32


# Special functions: 16 per clock on each of NVIDIA's multiprocessors and AMD's compute units.
A100 = Gpu("A100 80 GB SXM", bandwidth=2.039e12, tensor_cores=312e12, float32=19.5e12, special=108 * 16 * 1.41e9)
H100 = Gpu("H100 SXM", bandwidth=3.35e12, tensor_cores=989e12, float32=66.9e12, special=132 * 16 * 1.98e9)
B200 = Gpu("B200", bandwidth=8.0e12, tensor_cores=2250e12, float32=74.5e12, special=148 * 16 * 1.965e9)
MI300X = Gpu("MI300X", bandwidth=5.3e12, tensor_cores=1307e12, float32=163.4e12, special=304 * 16 * 2.1e9)
H200 = replace(H100, name="H200", bandwidth=4.8e12)
GPUS = (A100, H100, H200, B200, MI300X)  # GPUs used for modelled times

B300 = Gpu("B300", bandwidth=8.0e12, tensor_cores=2250e12, float32=75e12, special=148 * 16 * 1.92e9)
GB200 = Gpu("GB200", bandwidth=8.0e12, tensor_cores=2500e12, float32=80e12, special=148 * 16 * 1.965e9)
MI325X = replace(MI300X, name="MI325X", bandwidth=6.0e12)
# For GeForce cards, matrix products with float32 accumulation.
RTX5090 = Gpu("RTX 5090", bandwidth=1.792e12, tensor_cores=209.5e12, float32=104.8e12, special=170 * 16 * 2.41e9)
RTX5080 = Gpu("RTX 5080", bandwidth=0.96e12, tensor_cores=112.6e12, float32=56.3e12, special=84 * 16 * 2.62e9)
RTX5070_TI = Gpu("RTX 5070 Ti", bandwidth=0.896e12, tensor_cores=87.9e12, float32=43.9e12, special=70 * 16 * 2.45e9)
RTX5070 = Gpu("RTX 5070", bandwidth=0.672e12, tensor_cores=61.7e12, float32=30.9e12, special=48 * 16 * 2.51e9)
KNOWN = (*GPUS, B300, GB200, MI325X, RTX5090, RTX5080, RTX5070_TI, RTX5070)


def named(name: str) -> Gpu | None:
    """Look up a GPU by the name its driver reports, such as "NVIDIA A100-SXM4-80GB"; None if it is unknown."""
    if "Laptop" in name:  # laptop chips have the same names but other rates
        return None
    found = [gpu for gpu in KNOWN if re.search(rf"\b{_model(gpu)}\b", name)]
    return max(found, key=lambda gpu: len(_model(gpu)), default=None)


def _model(gpu: Gpu) -> str:
    """Return its name without memory size and form factor."""
    return re.sub(r" (\d+ GB|SXM)", "", gpu.name)
