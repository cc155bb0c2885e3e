"""A pytest plugin for `--device cuda` without a GPU: `pytest -p support.pretended_device --device cuda`.

Every tensor claims to be on a GPU, and kernels run in the interpreter. This shows that the tests make their tensors
where they should, take the kernels, and skip what a GPU cannot do; not that the tests pass on a GPU.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

from contextlib import ExitStack
from unittest import mock

import pytest
import torch

from evidence import interpreter
from support.pretended_gpu import pretending_a_gpu

_pretence = ExitStack()
interpreter.install()
_pretence.enter_context(pretending_a_gpu())
# A tensor made without a device claims to be on the GPU in any case; torch itself would look for one.
_pretence.enter_context(mock.patch.object(torch, "set_default_device"))


def pytest_unconfigure(config: pytest.Config) -> None:
    _pretence.close()
