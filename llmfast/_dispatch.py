"""Choice of implementation for a tensor: Triton kernels on an accelerator, plain torch everywhere else."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

P = ParamSpec("P")
R = TypeVar("R")

_kernels_on_cpu = False


def use_kernels(t: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Return True if the Triton kernels process tensors like `t`, or, given `dtype`, tensors of that dtype next to `t`.

    All code that chooses a path calls this function.
    """
    if (dtype or t.dtype) not in KERNEL_DTYPES:
        return False
    return ((t.is_cuda or t.is_xpu) and _has_triton()) or _kernels_on_cpu


def has_no_data(t: Tensor) -> bool:
    """Return True for meta tensors, fake tensors and tensors traced by torch.compile, which have only shapes."""
    if t.is_meta or torch.compiler.is_compiling():
        return True
    # A fake tensor cannot exist before its module, which is slow to import.
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and isinstance(t, fake.FakeTensor)


def in_transform() -> bool:
    """Return True inside a transform of torch.func, such as `grad` or `vmap`, that torch.compile does not trace."""
    return not torch.compiler.is_compiling() and peek_interpreter_stack() is not None


def autocasting(device: torch.device) -> bool:
    """Return True inside autocast for `device`; a meta device has none.

    `torch.amp.is_autocast_available` would know of all devices, but `torch.compile` cannot trace it before torch 2.13.
    """
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def takes_plain_torch(t: Tensor) -> bool:
    """Return True if `t` has data and does not go to the kernels."""
    return not has_no_data(t) and not use_kernels(t)


def expect_data(t: Tensor, argument: str) -> None:
    """Raise ValueError for a meta or fake tensor, which `argument` does not support."""
    if has_no_data(t) and not torch.compiler.is_compiling():
        raise ValueError(f"{argument} does not work with meta or fake tensors")


def multiplies_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if torch can multiply matrices of a low-precision `dtype` into a float32 one (`mm(out_dtype=)`).

    NVIDIA GPUs support it in every torch that llmfast runs with, CPUs in none. Other devices are tested once.
    """
    if device.type == "cpu" or device.type == "meta":
        return False
    return (device.type == "cuda" and torch.version.hip is None) or _works("mm", device.type, dtype)


def adds_into_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if `addmm(out_dtype=)` accepts a float32 matrix to add to: on NVIDIA GPUs since torch 2.10.

    See pytorch#154086, fixed by #167931.
    """
    if device.type == "cuda" and torch.version.hip is None:
        return torch.__version__ >= "2.10"  # a TorchVersion, so this compares versions
    return _works("addmm", device.type, dtype)


@cache
def _works(product: str, device: str, dtype: torch.dtype) -> bool:
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        if product == "mm":
            torch.mm(a, a, out_dtype=torch.float32)
        else:
            torch.addmm(torch.zeros(16, 16, dtype=torch.float32, device=device), a, a, out_dtype=torch.float32)
    except (RuntimeError, TypeError):  # unsupported on this device, or no such argument
        return False
    return True


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """Return `function` so that torch.compile does not trace it: the graph breaks there."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            from llmfast._untraced import call

            return cast("R", call(function, *args, **kwargs))
        return function(*args, **kwargs)

    return run


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """Send CPU tensors to the kernels: for tests in Triton's interpreter, and to compile without a GPU."""
    global _kernels_on_cpu
    before, _kernels_on_cpu = _kernels_on_cpu, True
    try:
        yield
    finally:
        _kernels_on_cpu = before
