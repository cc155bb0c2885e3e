"""The device on which tests make their tensors: `pytest --device cuda`.

    cpu   the default: kernels run in Triton's interpreter, on CPU tensors, and their accesses are checked; no test sees
          a GPU
    cuda  kernels are compiled and run on the GPU; what can only be done without one is skipped, with the reason

Few tests know of it. A tensor that is made without a device is made on the chosen one. Random numbers are drawn by
the CPU's generators and moved, so that a test computes with the same numbers everywhere. A test that cannot run on a
GPU is skipped where it calls a tool that works only without one (`UNAVAILABLE`), or carries the marker `cpu`. The
choice reaches xdist's workers in an environment variable, because they need it before they import torch.
"""

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any
from unittest import mock

import pytest

from support import gpus

CHOICES = ("cpu", "cuda")
_CHOSEN = "LLMFAST_TESTS_DEVICE"
# Tools of the tests that work only without a GPU, and what each needs.
UNAVAILABLE = {
    "evidence.dry_run:reserve": "pretends to allocate memory, for the interpreter alone",
    "evidence.observers:observing": "observes launches in the interpreter",
    "evidence.pretend_cuda:pretending_cuda": "pretends that CPU tensors are on a GPU",
    "evidence.sanitizer:sanitizing": "checks memory accesses in the interpreter",
    "evidence.traffic:counting": "counts memory accesses in the interpreter",
    "support.ranks:Ranks": "starts several processes on the CPU; `llmfast doctor --full` checks several GPUs",
}
_RANDOM = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli")

# For tests of errors that need a look at the targets, for which a GPU would have to be waited for.
TARGETS_CHECKED = pytest.mark.cpu("a GPU's targets are not checked: if one is out of range, the loss is NaN")


def _chosen() -> str:
    """Return the device of this process, which is needed before pytest has parsed its options."""
    if _CHOSEN not in os.environ:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        parser.add_argument("--device", default="cpu")
        os.environ[_CHOSEN] = parser.parse_known_args(sys.argv[1:])[0].device
    return os.environ[_CHOSEN]


DEVICE = _chosen()
ON_GPU = DEVICE == "cuda"
# Hugging Face's libraries ask nothing of the network and draw no bars.
QUIET = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def environment() -> dict[str, str]:
    """Return environment variables to be set before NumPy, torch, Triton and transformers are imported."""
    always = {"LLMFAST_CACHE": "", **QUIET}
    if ON_GPU:
        return always
    # There is one worker per core: more threads, of NumPy or of processes that tests start, would wait for each other.
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return {**always, "TRITON_INTERPRET": "1", **threads, **gpus.hiding()}


def install() -> None:
    """Install the interpreter, or make the GPU the default device. Must be called before test modules are imported."""
    if not ON_GPU:
        from evidence import interpreter

        interpreter.install()
        return
    import torch

    from llmfast import _dispatch

    if not torch.cuda.is_available():
        raise SystemExit("--device cuda needs a GPU that torch can use, and finds none")
    torch.set_default_device("cuda")
    for name in _RANDOM:
        setattr(torch, name, _drawn_on_the_cpu(getattr(torch, name)))
    for place, why in UNAVAILABLE.items():
        module, name = place.split(":")
        setattr(import_module(module), name, functools.partial(skip, why))
    _dispatch.kernels_on_cpu = nullcontext  # type: ignore[assignment]  # they run on the GPU in any case


def skip(why: str, *args: object, **options: object) -> None:
    pytest.skip(f"not with --device {DEVICE}: {why}")


def _drawn_on_the_cpu(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that it moves the numbers that the CPU draws to where they are wanted."""
    import torch

    @functools.wraps(draw)
    def run(*args: Any, device: Any = None, requires_grad: bool = False, **options: Any) -> Any:
        like = next((a.device for a in args if isinstance(a, torch.Tensor)), None)
        wanted = device or like or torch.get_default_device()
        return draw(*args, device="cpu", **options).to(wanted).requires_grad_(requires_grad)

    return run


def kernels() -> AbstractContextManager[object]:
    """Send the tests' tensors to the kernels; check their accesses in the interpreter."""
    return nullcontext() if ON_GPU else _interpreted()


@contextmanager
def _interpreted() -> Iterator[None]:
    from evidence.sanitizer import sanitizing
    from llmfast._dispatch import kernels_on_cpu

    with kernels_on_cpu(), sanitizing():
        yield


def plain() -> AbstractContextManager[object]:
    """Send the tests' tensors to plain torch, as where Triton is not installed."""
    from evidence.sanitizer import sanitizing
    from llmfast import _dispatch

    return mock.patch.object(_dispatch, "_has_triton", return_value=False) if ON_GPU else sanitizing()


# Hooks of pytest, which finds them through tests/conftest.py.


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu(why): the test concerns the CPU, and is skipped with --device cuda")
    if ON_GPU and config.option.machine_code:
        raise pytest.UsageError("--machine-code compiles what was interpreted: leave it out with --device cuda")


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("cpu")
    if marker is not None and ON_GPU:
        skip(*marker.args)
