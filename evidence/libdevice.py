"""The functions of libdevice in NumPy, for Triton's interpreter, which has none of them."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice

from evidence import observers
from evidence.observers import Array

# Functions whose NumPy name differs. The others are looked up in NumPy by their own name.
_RENAMED: dict[str, Callable[..., Array]] = {
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "exp10": lambda x: np.power(10.0, x),
    "pow": np.power,
    "atan2": np.arctan2,
    **{name: getattr(np, "arc" + name[1:]) for name in ("asin", "acos", "atan", "asinh", "acosh", "atanh")},
    **{f"fast_{name}f": getattr(np, name) for name in ("exp", "log", "log2", "log10", "sin", "cos", "tan", "tanh")},
    **{name: np.divide for name in ("div_rn", "fast_dividef")},
    "sqrt_rn": np.sqrt,
}


def install(interpreter: Any) -> None:
    """Replace every function of libdevice. Kernels import them by name, so this must precede the kernels' import."""
    for name, stub in inspect.getmembers(libdevice, inspect.isfunction):
        if stub.__module__ == libdevice.__name__:
            function = _RENAMED.get(name, getattr(np, name, None))
            setattr(libdevice, name, _emulated(interpreter, name, function))


def _emulated(interpreter: Any, name: str, function: Callable[..., Array] | None) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if function is None:
            raise NotImplementedError(f"libdevice.{name} has no counterpart in NumPy")
        values = [interpreter.interpreter_semantic.to_tensor(arg) for arg in args]
        if any(value.dtype.scalar == tl.bfloat16 for value in values):
            raise NotImplementedError(f"libdevice.{name} on bfloat16 values: it takes float32 and float64")
        result = function(*(value.handle.data for value in values))
        dtype = tl.int32 if result.dtype == np.bool_ else values[0].dtype.scalar
        result = result.astype(np.int32 if result.dtype == np.bool_ else values[0].handle.data.dtype)
        for observer in observers.computing:
            observer.compute("libdevice", result.size, observers.dtype_name(values[0]))
        shape = max((value.type for value in values), key=lambda kind: kind.is_block())
        kind = tl.block_type(dtype, [int(n) for n in shape.shape]) if shape.is_block() else dtype
        return tl.tensor(interpreter.TensorHandle(result, dtype), kind)

    return call
