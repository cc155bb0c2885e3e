"""Stand-ins for the functions of torch that make tensors."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors


@contextmanager
def replaced(functions: Iterable[str], methods: Iterable[str], make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace functions of torch and methods of Tensor with what `make` returns for each."""
    # torch looks up only once which functions a default device applies to. Let it do so before they are replaced: it
    # would keep a stand-in forever, and default devices would not apply to the function behind it.
    _device_constructors()
    with ExitStack() as stack:
        for owner, names in ((torch, functions), (Tensor, methods)):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))
        yield
