"""Memory and peak rates of GPUs from their data sheets, for plans and modelled times."""

import re
from dataclasses import dataclass, replace

import torch

GB = 10**9  # in data sheets also 2^30 bytes; the smaller is used, and the driver needs the rest
# The share of the peak rates that good code is known to reach.
BANDWIDTH_SHARE = 0.9
TENSOR_CORE_SHARE = 0.7
LAUNCH = 2e-6  # seconds between one kernel's end and the next one's start; assumed equal for all GPUs


@dataclass(frozen=True)
class Gpu:
    """Memory, and peak rates per second, dense."""

    name: str
    memory: int  # bytes
    bandwidth: float  # bytes
    tensor_cores: float  # FLOPs of bfloat16 and float16 matrix products
    float32: float  # FLOPs of the ordinary units, and of float32 matrix products without TF32
    special: float  # exponentials, reciprocals, ...

    def product_rate(self, dtype: torch.dtype) -> float:
        """Return the FLOPs per second that matrix products of `dtype` reach."""
        low = dtype in (torch.bfloat16, torch.float16)
        return TENSOR_CORE_SHARE * self.tensor_cores if low else self.float32


def _gpu(name: str, gb: int, bandwidth: float, tensor_cores: float, float32: float, special: float) -> Gpu:
    """Make a GPU from GB, TB/s, TFLOP/s twice, and multiprocessors times GHz.

    Special functions take 16 lanes on each of NVIDIA's multiprocessors and AMD's compute units.
    """
    return Gpu(name, gb * GB, bandwidth * 1e12, tensor_cores * 1e12, float32 * 1e12, special * 16e9)


A100 = _gpu("A100 80 GB SXM", 80, 2.039, 312, 19.5, 108 * 1.41)
H100 = _gpu("H100 SXM", 80, 3.35, 989, 66.9, 132 * 1.98)
B200 = _gpu("B200", 180, 8.0, 2250, 74.5, 148 * 1.965)
MI300X = _gpu("MI300X", 192, 5.3, 1307, 163.4, 304 * 2.1)
H100_NVL = _gpu("H100 NVL", 94, 3.9, 835, 60, 132 * 1.785)
H200 = replace(H100, name="H200", memory=141 * GB, bandwidth=4.8e12)
GPUS = (A100, H100, H200, B200, MI300X)  # GPUs used for modelled times

# By the names that users give them. GeForce cards and the L40S: matrix products with float32 accumulation.
KNOWN = {
    "A100": A100,
    "A100-40": replace(A100, name="A100 40 GB SXM", memory=40 * GB, bandwidth=1.555e12),
    "H100": H100,
    "H100-PCIe": _gpu("H100 PCIe", 80, 2.0, 756, 51, 114 * 1.755),
    "H100-NVL": H100_NVL,
    "H200": H200,
    "H200-NVL": replace(H100_NVL, name="H200 NVL", memory=141 * GB, bandwidth=4.8e12),
    "B200": B200,
    "B300": _gpu("B300", 288, 8.0, 2250, 75, 148 * 1.92),
    "GB200": _gpu("GB200", 186, 8.0, 2500, 80, 148 * 1.965),
    "MI300X": MI300X,
    "MI325X": replace(MI300X, name="MI325X", memory=256 * GB, bandwidth=6.0e12),
    "L40S": _gpu("L40S", 48, 0.864, 362, 91.6, 142 * 2.52),
    "RTX3090": _gpu("RTX 3090", 24, 0.936, 71, 35.6, 82 * 1.695),
    "RTX4090": _gpu("RTX 4090", 24, 1.008, 165.2, 82.6, 128 * 2.52),
    "RTX5070": _gpu("RTX 5070", 12, 0.672, 61.7, 30.9, 48 * 2.51),
    "RTX5070Ti": _gpu("RTX 5070 Ti", 16, 0.896, 87.9, 43.9, 70 * 2.45),
    "RTX5080": _gpu("RTX 5080", 16, 0.96, 112.6, 56.3, 84 * 2.62),
    "RTX5090": _gpu("RTX 5090", 32, 1.792, 209.5, 104.8, 170 * 2.41),
}

# What compilers call them.
ARCHITECTURES = {
    **dict.fromkeys(("A100", "A100-40"), "sm_80"),
    **dict.fromkeys(("H100", "H100-PCIe", "H100-NVL", "H200", "H200-NVL"), "sm_90"),
    **dict.fromkeys(("B200", "GB200"), "sm_100"),
    "B300": "sm_103",
    "RTX3090": "sm_86",
    **dict.fromkeys(("L40S", "RTX4090"), "sm_89"),
    **dict.fromkeys(("RTX5070", "RTX5070Ti", "RTX5080", "RTX5090"), "sm_120"),
    **dict.fromkeys(("MI300X", "MI325X"), "gfx942"),
}


def named(name: str) -> Gpu | None:
    """Look up a GPU by the name its driver reports, such as "NVIDIA A100-SXM4-80GB"; None if it is unknown."""
    if "laptop" in name.lower():  # laptop chips have the same names but other rates
        return None
    found = [gpu for gpu in KNOWN.values() if re.search(rf"\b{_model(gpu)}\b(?! (Ti|D|Super)\b)", name, re.IGNORECASE)]
    return max(found, key=lambda gpu: (len(_model(gpu)), gpu.memory // GB == _gigabytes(name)), default=None)


def chosen(name: str) -> Gpu:
    """Look up a GPU by the name that a user gives it: one of `KNOWN` with or without spaces and hyphens, or a driver's.

    Raises:
        ValueError: The name is unknown, or says a size of memory that this GPU does not have.
    """
    short = {known.lower().replace("-", ""): gpu for known, gpu in KNOWN.items()}
    gpu = short.get(re.sub("[ -]", "", name).lower()) or named(name)
    if gpu is None:
        raise ValueError(f"--gpu must be one of {', '.join(KNOWN)}; got {name!r}")
    if _gigabytes(name) not in (None, gpu.memory // GB):
        raise ValueError(f"--gpu must be one of {', '.join(KNOWN)}: {gpu.name} has {gpu.memory // GB} GB; got {name!r}")
    return gpu


def _gigabytes(name: str) -> int | None:
    """Return the memory that a name contains, such as "40GB" or "40 gb"."""
    found = re.search(r"(\d+) ?GB\b", name, re.IGNORECASE)
    return int(found[1]) if found else None


def _model(gpu: Gpu) -> str:
    """Return a GPU's name without memory size and form factor."""
    return re.sub(r" (\d+ GB|SXM)", "", gpu.name)
