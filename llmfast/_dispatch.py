"""Which implementation a tensor takes: Triton kernels on an accelerator, plain torch everywhere else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

P = ParamSpec("P")
R = TypeVar("R")

_kernels_on_cpu = False


def use_kernels(t: Tensor) -> bool:
    """True where `t` goes to the Triton kernels. Everything that chooses a path asks here."""
    if t.dtype not in KERNEL_DTYPES:
        return False
    return ((t.is_cuda or t.is_xpu) and _has_triton()) or _kernels_on_cpu


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, run as it is where torch.compile meets it: the graph breaks there."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            from llmfast._untraced import call

            return cast("R", call(function, *args, **kwargs))
        return function(*args, **kwargs)

    return run


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """For tests: send CPU tensors to the kernels, which Triton's interpreter then runs."""
    global _kernels_on_cpu
    before, _kernels_on_cpu = _kernels_on_cpu, True
    try:
        yield
    finally:
        _kernels_on_cpu = before
