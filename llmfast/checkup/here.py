"""Facts about the machine: GPU, driver, libraries, clocks; and the rates that everything after is compared with."""

import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

from llmfast._gpus import Gpu, named
from llmfast.checkup import clock
from llmfast.checkup.record import Case, Figures, Finding, Size

LIBRARIES = ("torch", "triton", "numpy", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "apex")
SAMPLES = 5
# nvidia-smi's names of what may hold a GPU back.
STATE = (
    *("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "temperature.gpu"),
    "mig.mode.current",
)


def cases(device: torch.device, size: Size) -> list[Case]:
    """Return the cases of this section."""
    n, copied = (8192, 1 << 30) if size == "full" else (64, 1 << 16)
    known = named(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return [
        Case("versions", lambda: [Finding("installed", None, versions())], 1.0, 0),
        Case("device", lambda: [Finding(str(device), None, properties(device))], 2.0, 0),
        Case(
            "copy bandwidth",
            lambda: rate(
                lambda: clock.copy_bandwidth(copied), "bytes_per_s", None if known is None else known.bandwidth
            ),
            5.0,
            2 * copied,
        ),
        *(
            Case(
                f"matrix products, {str(dtype).removeprefix('torch.')}",
                partial(rate, partial(clock.product_rate, n, dtype), "flops_per_s", _printed(known, dtype)),
                10.0,
                4 * n * n * 4,
            )
            for dtype in (torch.bfloat16, torch.float16, torch.float32)
        ),
    ]


def versions() -> Figures:
    """Return the versions of what is installed."""
    found: Figures = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"cuda": torch.version.cuda, "hip": torch.version.hip}


def properties(device: torch.device) -> Figures:
    """Return what the driver says of the device."""
    if device.type != "cuda":
        return {"name": platform.processor() or "CPU", "threads": torch.get_num_threads()}
    p = torch.cuda.get_device_properties(device)
    found: Figures = {
        "name": p.name,
        "bytes": p.total_memory,
        "multiprocessors": p.multi_processor_count,
        "capability": f"{p.major}.{p.minor}",
        "l2_bytes": getattr(p, "L2_cache_size", None),
        "devices": torch.cuda.device_count(),
    }
    # By its name: CUDA_VISIBLE_DEVICES gives GPUs other numbers than nvidia-smi.
    command = ["nvidia-smi", f"--id=GPU-{p.uuid}", f"--query-gpu={','.join(STATE)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return found
    return found | dict(zip(STATE, line.split(", ")))


def rate(sample: Callable[[], float], unit: str, printed: float | None) -> Iterator[Finding]:
    """Measure a rate several times, compared with the data sheet's where the GPU is known."""
    samples = [sample() for _ in range(SAMPLES)]
    median = statistics.median(samples)
    figures: Figures = {unit: median, "least": min(samples), "most": max(samples), "samples": len(samples)}
    if printed:
        figures["share_of_data_sheet"] = median / printed
    yield Finding("median", None, figures)


def _printed(gpu: Gpu | None, dtype: torch.dtype) -> float | None:
    if gpu is None:
        return None
    return gpu.float32 if dtype == torch.float32 else gpu.tensor_cores
