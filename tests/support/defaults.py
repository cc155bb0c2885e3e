"""Programs that say where their own tensors are made, and a way of running them under other defaults of torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# As `with torch.device("cuda")` around a program, which a machine without one can have too: what is made without a
# device has no values then. And as `from_pretrained`, and those who compute in float64, set them.
DEFAULTS: dict[str, dict[str, Any]] = {
    "meta": {"device": "meta"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


@contextmanager
def defaults(device: str | None = None, dtype: torch.dtype | None = None) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_device(device)
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def assert_same(ours: Any, theirs: Any) -> None:
    """Assert that tensors, or containers of tensors, are equal bit for bit, in dtypes and devices too."""
    assert type(ours) is type(theirs)
    if isinstance(ours, Tensor):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        for key in ours:
            assert_same(ours[key], theirs[key])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs):
            assert_same(a, b)
    else:
        assert ours == theirs
