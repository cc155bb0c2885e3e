"""One pytest process for everything: kernels run in Triton's interpreter, on CPU tensors.

The variable must be set before anything imports Triton, and GPUs be hidden before anything imports torch. Machine code,
which the interpreter cannot give, is looked at after the tests, by worker processes: see support/launched.py.
"""

import os

from support import gpus

os.environ |= {"TRITON_INTERPRET": "1", **gpus.hiding()}

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import pytest
import torch
from hypothesis import settings

from evidence import interpreter
from evidence.sanitizer import sanitizing
from llmfast._dispatch import kernels_on_cpu
from llmfast.losses import targets
from support.launched import (  # noqa: F401  pytest finds its hooks here
    pytest_addoption,
    pytest_runtestloop,
    pytest_sessionfinish,
    pytest_testnodedown,
    unrecorded,
)

interpreter.install()
torch.set_num_threads(1)  # there is a worker for each core, and most tensors here are small
# Shapes are drawn, not times measured: two busy cores must not fail a test.
settings.register_profile("llmfast", deadline=None, max_examples=20, derandomize=True)
settings.load_profile("llmfast")


@pytest.fixture(params=["plain", "kernels"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test twice: on the plain torch path and on the kernels."""
    with kernels_on_cpu() if request.param == "kernels" else nullcontext(), sanitizing(), ours_however_small():
        yield request.param


def ours_however_small() -> AbstractContextManager[object]:
    """Otherwise small logits on the plain path would be torch's own loss."""
    return mock.patch.dict(targets.SMALL, dict.fromkeys(targets.SMALL, -1))


@pytest.fixture
def kernels() -> Iterator[None]:
    """Sends CPU tensors to the kernels, and watches what these do."""
    with kernels_on_cpu(), sanitizing():
        yield


# The tests whose launches are compiled afterwards, in folders where others mix the same variants anew: that would be
# minutes of compiling and no news.
RECORDED = {
    "losses": {
        *("test_cross_entropy.py", "test_linear_cross_entropy.py", "test_options.py", "test_row_kernels.py"),
        *("test_filtered_matmul.py", "test_traffic.py"),
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
    torch.manual_seed(0)
