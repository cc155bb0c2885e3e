"""Tests of the data known about GPUs, by the names that drivers report."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from llmfast import _gpus
from llmfast.models import Decoder, DecoderConfig
from llmfast.train import run
from llmfast.train.config import Config


@pytest.mark.parametrize(
    ("driver", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 80 GB SXM"),
        ("NVIDIA A100-SXM4-40GB", "A100 40 GB SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA B300 SXM6 AC", "B300"),
        ("NVIDIA GB200", "GB200"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"),
        ("NVIDIA GeForce RTX 5080", "RTX 5080"),
        ("NVIDIA GeForce RTX 5070 Ti", "RTX 5070 Ti"),
        ("NVIDIA GeForce RTX 5070", "RTX 5070"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI325X", "MI325X"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla T4", None),
        ("", None),
    ],
)
def test_names_of_drivers(driver: str, name: str | None) -> None:
    found = _gpus.named(driver)
    assert (found and found.name) == name


def test_each_has_its_own_name_and_rates_in_order() -> None:
    assert len({gpu.name for gpu in _gpus.KNOWN.values()}) == len(_gpus.KNOWN)
    for gpu in _gpus.KNOWN.values():
        assert gpu.special < gpu.float32 < gpu.tensor_cores
        assert 50 < gpu.product_rate(torch.bfloat16) / gpu.bandwidth < 300, "FLOPs per byte, which makers balance"
        assert 0.01 < gpu.memory / gpu.bandwidth < 0.06, "seconds to read all of it"
    assert _gpus.H200.bandwidth > 1.4 * _gpus.H100.bandwidth
    assert _gpus.H200.tensor_cores == _gpus.H100.tensor_cores


# From the data sheets: GB, TB/s, TFLOP/s of 16-bit products and of float32, multiprocessors, GHz; and what compilers
# call it. A second list, so that a slip of the pen in the first is noticed.
SHEETS = {
    "A100": (80, 2.039, 312, 19.5, 108, 1.41, "sm_80"),
    "A100-40": (40, 1.555, 312, 19.5, 108, 1.41, "sm_80"),
    "H100": (80, 3.35, 989, 66.9, 132, 1.98, "sm_90"),
    "H100-PCIe": (80, 2.0, 756, 51, 114, 1.755, "sm_90"),
    "H100-NVL": (94, 3.9, 835, 60, 132, 1.785, "sm_90"),
    "H200": (141, 4.8, 989, 66.9, 132, 1.98, "sm_90"),
    "H200-NVL": (141, 4.8, 835, 60, 132, 1.785, "sm_90"),
    "B200": (180, 8.0, 2250, 74.5, 148, 1.965, "sm_100"),
    "B300": (288, 8.0, 2250, 75, 148, 1.92, "sm_103"),
    "GB200": (186, 8.0, 2500, 80, 148, 1.965, "sm_100"),
    "MI300X": (192, 5.3, 1307, 163.4, 304, 2.1, "gfx942"),
    "MI325X": (256, 6.0, 1307, 163.4, 304, 2.1, "gfx942"),
    "L40S": (48, 0.864, 362, 91.6, 142, 2.52, "sm_89"),
    "RTX3090": (24, 0.936, 71, 35.6, 82, 1.695, "sm_86"),
    "RTX4090": (24, 1.008, 165.2, 82.6, 128, 2.52, "sm_89"),
    "RTX5070": (12, 0.672, 61.7, 30.9, 48, 2.51, "sm_120"),
    "RTX5070Ti": (16, 0.896, 87.9, 43.9, 70, 2.45, "sm_120"),
    "RTX5080": (16, 0.96, 112.6, 56.3, 84, 2.62, "sm_120"),
    "RTX5090": (32, 1.792, 209.5, 104.8, 170, 2.41, "sm_120"),
}


@pytest.mark.parametrize("short", _gpus.KNOWN)
def test_figures_are_those_of_the_data_sheets(short: str) -> None:
    """Take 16 lanes for special functions on each multiprocessor."""
    gpu = _gpus.KNOWN[short]
    memory, bandwidth, products, float32, processors, gigahertz, architecture = SHEETS[short]
    assert (gpu.memory, _gpus.ARCHITECTURES[short]) == (memory * 10**9, architecture)
    found = [gpu.bandwidth, gpu.tensor_cores, gpu.float32, gpu.special]
    wanted = [bandwidth * 1e12, products * 1e12, float32 * 1e12, processors * gigahertz * 16e9]
    assert found == pytest.approx(wanted)
    low, wide = (gpu.product_rate(dtype) for dtype in (torch.float16, torch.float32))
    assert low == gpu.product_rate(torch.bfloat16) == pytest.approx(0.7 * products * 1e12)
    assert wide == gpu.product_rate(torch.float64) == pytest.approx(float32 * 1e12)
    assert gpu.name.replace(" ", "").startswith(short.partition("-")[0])


def test_the_list_is_of_every_gpu_and_times_are_of_these() -> None:
    assert SHEETS.keys() == _gpus.KNOWN.keys()
    assert [gpu.name for gpu in _gpus.GPUS] == ["A100 80 GB SXM", "H100 SXM", "H200", "B200", "MI300X"]


@pytest.mark.parametrize(("driver", "known"), [("NVIDIA H200", True), ("Quadro 1", False)])
def test_the_trainer_logs_mfu_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], driver: str, known: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: driver)
    world: Any = SimpleNamespace(device=torch.device("cuda", 0), size=2)
    hooks = run.Utilisation(Config(), Decoder(DecoderConfig(100, width=16, layers=1, heads=2)), world, Console())
    values = {"tokens_per_s": 1000.0}
    hooks.on_log(SimpleNamespace(), values)  # type: ignore[arg-type]
    assert ("mfu" in values) == known
    assert ("no MFU is logged: the peak rate of Quadro 1 is not known" in capsys.readouterr().out) == (not known)
    if known:
        assert 0 < values["mfu"] == pytest.approx(1000 * hooks._flops / (2 * 989e12))


def test_users_name_gpus_in_short_or_as_drivers_do() -> None:
    for short, gpu in _gpus.KNOWN.items():
        assert _gpus.chosen(short) is _gpus.chosen(short.lower()) is gpu
    assert _gpus.chosen("h100") is _gpus.H100 and _gpus.chosen("RTX 5070 Ti").memory == 16 * _gpus.GB
    assert _gpus.chosen("NVIDIA H100 80GB HBM3") is _gpus.H100 and _gpus.chosen("a100 80GB") is _gpus.A100
    for name in ("a100 40gb", "A100 40 GB", "A100-40GB", "a100 40", "NVIDIA A100-SXM4-40GB"):
        assert _gpus.chosen(name).memory == 40 * _gpus.GB
    for name in ("h100 pcie", "H100PCIe", "NVIDIA H100 PCIe"):
        assert _gpus.chosen(name).tensor_cores < 0.8 * _gpus.H100.tensor_cores
    with pytest.raises(ValueError, match=r"A100-40, .*: RTX 4090 has 24 GB; got 'rtx 4090 48 gb'"):
        _gpus.chosen("rtx 4090 48 gb")
    for unknown in ("H1000", "cpu", ""):
        with pytest.raises(ValueError, match=f"--gpu must be one of A100, A100-40, H100, .*; got '{unknown}'"):
            _gpus.chosen(unknown)
