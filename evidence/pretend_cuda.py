"""CPU tensors that claim to be on a GPU, so that libraries take their GPU path.

    with pretending_cuda():
        loss = linear_cross_entropy(hidden, weight, targets)  # takes the kernels; its GEMMs accumulate in float32

Inside the context, Python code sees `tensor.device` as cuda:0 and `tensor.is_cuda` as true. The tensors stay on the
CPU, kernels run in the interpreter, and operations that torch supports only on GPUs (low-precision matrix products into
float32) are emulated. This serves to run the code of the GPU path and to count its work, not to time it.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.replaced import replaced

DEVICE = torch.device("cuda", 0)
# The properties an H100 reports.
PROPERTIES = SimpleNamespace(
    name="pretended H100", total_memory=80 << 30, multi_processor_count=132, major=9, minor=0, warp_size=32, uuid="0-1"
)

_FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "empty_strided", "full", "full_like", "ones", "ones_like"),
    *("rand", "rand_like", "randint", "randn", "randn_like", "scalar_tensor", "tensor", "zeros", "zeros_like"),
)
_METHODS = ("to", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


@contextmanager
def pretending_cuda() -> Iterator[None]:
    """Pretend to be on an H100. Not for concurrent use by two threads."""
    from triton.runtime import driver

    with ExitStack() as stack:
        stack.enter_context(replaced(_FACTORIES, _METHODS, _on_the_cpu))
        stack.enter_context(_property("device", DEVICE))
        stack.enter_context(_property("is_cuda", True))
        for name, answer in {
            "is_available": True,
            "is_bf16_supported": True,
            "current_device": 0,
            "device_count": 1,
            "get_device_capability": (PROPERTIES.major, PROPERTIES.minor),
            "get_device_properties": PROPERTIES,
            "get_device_name": PROPERTIES.name,
            "synchronize": None,
            "is_current_stream_capturing": False,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, _answering(answer)))
        stack.enter_context(mock.patch.object(driver, "_active", cast(Any, _Driver())))
        stack.enter_context(Float32Products())
        yield


@contextmanager
def _property(name: str, value: object) -> Iterator[None]:
    """Override a property of CPU tensors. Tensor inherits it from a class in C, which this override precedes."""
    inherited = getattr(Tensor, name)
    setattr(Tensor, name, property(lambda self: value if self.is_cpu else inherited.__get__(self)))
    try:
        yield
    finally:
        delattr(Tensor, name)


def _answering(answer: object) -> Callable[..., object]:
    return lambda *args, **kwargs: answer


def _on_the_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a function so that it uses the CPU where "cuda" is requested."""

    def translated(value: object) -> object:
        cuda = isinstance(value, torch.device | str) and str(value).split(":")[0] == "cuda"
        return torch.device("cpu") if cuda else value

    @functools.wraps(make)
    def run(*args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("pin_memory", None)
        return make(*map(translated, args), **{name: translated(value) for name, value in kwargs.items()})

    return run


class Float32Products(TorchDispatchMode):
    """Emulation of `torch.mm(out_dtype=torch.float32)` and `torch.addmm(out_dtype=...)`, which CPUs lack."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS_INTO_OTHER_DTYPES:
            return func(*args, **kwargs)
        bound = (
            inspect.Signature(
                [inspect.Parameter(a.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for a in func._schema.arguments]
            )
            .bind_partial(*args, **kwargs)
            .arguments
        )
        a, b = (bound[name].to(bound["out_dtype"]) for name in PRODUCTS_INTO_OTHER_DTYPES[func])
        if "self" in bound and func._overloadpacket is torch.ops.aten.addmm:
            product = torch.addmm(bound["self"], a, b, beta=bound.get("beta", 1), alpha=bound.get("alpha", 1))
        else:
            product = a @ b
        return bound["out"].copy_(product) if "out" in bound else product


_aten = torch.ops.aten
# The names of each operator's two matrices.
PRODUCTS_INTO_OTHER_DTYPES = {
    _aten.mm.dtype: ("self", "mat2"),
    _aten.mm.dtype_out: ("self", "mat2"),
    _aten.addmm.dtype: ("mat1", "mat2"),
    _aten.addmm.dtype_out: ("mat1", "mat2"),
}


class _Driver:
    """Replacement for Triton's driver with what launchers and autotuners need; the first configuration always wins."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", 90, 32)
        properties = dict(multiprocessor_count=PROPERTIES.multi_processor_count, max_shared_mem=227 << 10)
        self.utils = SimpleNamespace(get_device_properties=lambda device: properties)
        self._timed = 0

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def time(call: object, quantiles: tuple[float, ...] = (0.5,), **kwargs: object) -> list[float]:
            self._timed += 1
            return [float(self._timed)] * len(quantiles)

        return time
