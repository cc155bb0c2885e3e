"""Stand-ins for torch's functions that make tensors."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._device import _device_constructors


@contextmanager
def replaced(functions: Iterable[str], methods: Iterable[str], make: Callable[[Any], Any]) -> Iterator[None]:
    """Replace functions of torch and methods of Tensor by what `make` makes of each."""
    # The first default device of a process lets torch remember which functions it concerns. These must be torch's own:
    # a stand-in would be remembered for good, and no default device would concern the function behind it.
    _device_constructors()
    with ExitStack() as stack:
        for owner, names in ((torch, functions), (Tensor, methods)):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))
        yield
