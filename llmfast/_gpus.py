"""What GPUs can do, by their makers' data sheets: for modelled times, which are never measured ones."""

import re
from dataclasses import dataclass, replace

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
GPUS = (A100, H100, B200, MI300X)  # what work is modelled on

H200 = replace(H100, name="H200", bandwidth=4.8e12)
B300 = Gpu("B300", bandwidth=8.0e12, tensor_cores=2250e12, float32=75e12, special=148 * 16 * 1.92e9)
GB200 = Gpu("GB200", bandwidth=8.0e12, tensor_cores=2500e12, float32=80e12, special=148 * 16 * 1.965e9)
MI325X = replace(MI300X, name="MI325X", bandwidth=6.0e12)
# Of GeForce cards, products that are accumulated in float32.
RTX5090 = Gpu("RTX 5090", bandwidth=1.792e12, tensor_cores=209.5e12, float32=104.8e12, special=170 * 16 * 2.41e9)
RTX5080 = Gpu("RTX 5080", bandwidth=0.96e12, tensor_cores=112.6e12, float32=56.3e12, special=84 * 16 * 2.62e9)
RTX5070_TI = Gpu("RTX 5070 Ti", bandwidth=0.896e12, tensor_cores=87.9e12, float32=43.9e12, special=70 * 16 * 2.45e9)
RTX5070 = Gpu("RTX 5070", bandwidth=0.672e12, tensor_cores=61.7e12, float32=30.9e12, special=48 * 16 * 2.51e9)
KNOWN = (*GPUS, H200, B300, GB200, MI325X, RTX5090, RTX5080, RTX5070_TI, RTX5070)


def named(name: str) -> Gpu | None:
    """The GPU that a driver calls `name`, such as "NVIDIA A100-SXM4-80GB"; None for one that is not known."""
    if "Laptop" in name:  # the same names, and other chips
        return None
    found = [gpu for gpu in KNOWN if re.search(rf"\b{_model(gpu)}\b", name)]
    return max(found, key=lambda gpu: len(_model(gpu)), default=None)


def _model(gpu: Gpu) -> str:
    """Its name without memory and form."""
    return re.sub(r" (\d+ GB|SXM)", "", gpu.name)
