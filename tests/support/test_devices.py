"""`pytest --device cuda`: where tests make their tensors, what they skip, and a part of them on a pretended GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evidence import observers, sanitizer
from llmfast._dispatch import use_kernels
from support import devices, gpus
from support.devices import DEVICE, ON_GPU, UNAVAILABLE

ROOT = Path(__file__).parents[2]

# Tests of every family of kernels that the interpreter computes in a few seconds.
SAMPLE = [
    "tests/support/test_devices.py",
    "tests/losses/test_cross_entropy.py",
    "tests/losses/test_filtered_matmul.py",
    "tests/losses/test_linear_cross_entropy.py",
    "tests/losses/test_surroundings.py",
    "tests/optim/test_clipping.py",
    "tests/optim/test_host_time.py",
    "tests/optim/test_lion.py",
]
PART = "chosen_device or skip or refuses or ignored or all_dead or waits or host_time or climbs or norm"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run pytest in a process that sees no GPU and has not chosen a device."""
    left_out = {devices._CHOSEN, "TRITON_INTERPRET"}
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | gpus.HIDDEN
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_tensors_are_made_on_the_chosen_device(path: str) -> None:
    x = torch.randn(3, 2, requires_grad=True)
    for t in (
        x,
        torch.zeros(2),
        torch.tensor([1.0]),
        torch.rand_like(x),
        torch.randint(0, 5, (2,)),
        torch.ones_like(x),
    ):
        assert t.device.type == DEVICE
    assert x.requires_grad and x.is_leaf
    assert torch.zeros(1, device="meta").is_meta and torch.rand(1, device="meta").is_meta
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.randn(2).is_meta
    generator = torch.Generator().manual_seed(7)
    assert torch.randn(2, generator=generator).tolist() == pytest.approx([-0.1468, 0.7861], abs=1e-4)
    assert use_kernels(x) == (path == "kernels")


@pytest.mark.cpu("is what a GPU skips")
def test_the_marker_skips() -> None:
    assert not ON_GPU


def test_tools_of_the_interpreter_skip(kernels: None) -> None:
    with observers.observing(observers.Observer()), sanitizer.sanitizing():
        assert not ON_GPU


def test_without_a_gpu_one_sentence_says_so() -> None:
    done = run("--device", "cuda", "tests/losses")
    assert done.returncode == 1
    assert done.stderr.strip() == "--device cuda needs a GPU that torch can use, and finds none"
    assert "Traceback" not in done.stdout


def test_an_unknown_device_is_refused() -> None:
    done = run("--device", "tpu", "tests/losses")
    assert done.returncode == 4 and "argument --device: invalid choice: 'tpu'" in done.stderr


def test_machine_code_needs_the_interpreter() -> None:
    done = run("-p", "support.pretended_device", "--device", "cuda", "--machine-code", "tests/losses/test_calls.py")
    assert done.returncode == 4 and "leave it out with --device cuda" in done.stderr


@pytest.mark.cpu("pretends that there is a GPU")
def test_a_sample_of_the_suite_passes_on_a_pretended_gpu() -> None:
    done = run("-p", "support.pretended_device", "--device", "cuda", "-rs", "-k", PART, *SAMPLE)
    assert done.returncode == 0, done.stdout
    assert int(re.findall(r"(\d+) passed", done.stdout)[-1]) >= 60, done.stdout
    reasons = set(re.findall(r"not with --device cuda: (.+)", done.stdout))
    assert "compares steps on CPU tensors, without their launches" in reasons
    assert UNAVAILABLE["evidence.pretend_cuda:pretending_cuda"] in reasons
