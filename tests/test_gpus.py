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
        ("NVIDIA H200", "H200"),
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
    for unknown in ("H1000", "cpu", ""):
        with pytest.raises(ValueError, match=f"--gpu must be one of A100, A100-40, H100, .*; got '{unknown}'"):
            _gpus.chosen(unknown)
