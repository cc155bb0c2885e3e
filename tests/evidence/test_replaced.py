"""Tests that nothing stays behind when torch's functions were replaced."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch.utils._device import _device_constructors

from evidence.pretend_cuda import pretending_cuda
from evidence.sanitizer import sanitizing


@pytest.mark.parametrize("replacing", [pretending_cuda, sanitizing])
def test_a_default_device_works_afterwards_and_concerns_the_same_functions(
    replacing: Callable[[], AbstractContextManager[object]],
) -> None:
    _device_constructors.cache_clear()  # as if no default device had ever been set
    with replacing(), torch.device("cpu"):
        torch.empty(1)
    with torch.device("meta"):
        assert torch.empty(2).is_meta and torch.zeros(2).is_meta and torch.nn.Embedding(3, 2).weight.is_meta
