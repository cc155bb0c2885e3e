"""Fixtures for one pytest process in which kernels run in Triton's interpreter, on CPU tensors.

With `--device cuda` they run on a GPU instead: see support/devices.py.

The environment variable must be set before Triton is imported, and GPUs must be hidden before torch is imported. The
interpreter yields no machine code; worker processes check it after the tests: see support/launched.py.
"""

import gc
import os

from support import devices

os.environ |= devices.environment()

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import settings

from llmfast.losses import targets
from support.devices import pytest_configure, pytest_runtest_setup  # noqa: F401
from support.launched import (  # noqa: F401  pytest finds its hooks here
    pytest_addoption,
    pytest_runtestloop,
    pytest_sessionfinish,
    pytest_testnodedown,
    unrecorded,
)

gc.disable()  # until the tests are collected, which makes a million objects and no garbage
devices.install()
torch.set_num_threads(1)  # there is one worker per core, and most tensors here are small
# Shapes are drawn but times are not measured: a busy machine must not fail a test.
settings.register_profile("llmfast", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("llmfast")


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(params=["plain", "kernels"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test twice: on the plain torch path and on the kernels."""
    with devices.kernels() if request.param == "kernels" else devices.plain(), ours_however_small():
        yield request.param


def ours_however_small() -> AbstractContextManager[object]:
    """Disable the fallback to torch's own loss for small logits on the plain path."""
    return mock.patch.dict(targets.SMALL, dict.fromkeys(targets.SMALL, -1))


@pytest.fixture
def kernels() -> Iterator[None]:
    """Send tensors to the kernels, and check their accesses in the interpreter."""
    with devices.kernels():
        yield


# Tests whose launches are compiled afterwards, in folders where other tests combine the same variants, which would take
# minutes to compile and reveal nothing new.
RECORDED = {
    "losses": {
        *("test_cross_entropy.py", "test_linear_cross_entropy.py", "test_options.py", "test_row_kernels.py"),
        *("test_filtered_matmul.py", "test_logprobs.py", "test_traffic.py", "test_distillation.py"),
        "test_probabilities.py",
    },
    "optim": {"test_clipping.py", "test_parity.py", "test_precision.py", "test_traffic.py"},
}


@pytest.fixture(autouse=True)
def _recorded_where_there_is_something_new(request: pytest.FixtureRequest) -> Iterator[None]:
    recorded = RECORDED.get(request.path.parent.name)
    with nullcontext() if recorded is None or request.path.name in recorded else unrecorded():
        yield


@pytest.fixture(autouse=True)
def _seed() -> None:
    # `torch.manual_seed` would also note this line of code, with all that called it, for each kind of accelerator.
    torch.default_generator.manual_seed(0)


@pytest.fixture
def unpictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs that are trained in this process end without loss.png, whose drawing takes longer than their steps."""
    for name in ("finish", "run"):
        monkeypatch.setattr(f"llmfast.train.{name}.plot_loss", lambda *args, **options: None)
