"""NumPy implementations of libdevice functions, which Triton's interpreter lacks; one without raises when called."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.extra import libdevice

from evidence import observers
from evidence.observers import Array

_SAME = (
    *("abs", "cbrt", "ceil", "copysign", "cos", "cosh", "exp", "exp2", "expm1", "floor", "fmod", "hypot"),
    *("isinf", "isnan", "log", "log10", "log1p", "log2", "nextafter", "rint", "sin", "sinh", "sqrt", "tan"),
    *("tanh", "trunc"),
)
# Not looked up by name: NumPy's `round` and `remainder` round halves and quotients differently.
FUNCTIONS: dict[str, Callable[..., Array]] = {
    **{name: getattr(np, name) for name in _SAME},
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
    """Replace all functions of `triton.language.extra.libdevice`.

    Kernels import them by name, so this must precede the import of kernels.
    """
    for name, stub in inspect.getmembers(libdevice, inspect.isfunction):
        if stub.__module__ == libdevice.__name__:
            setattr(libdevice, name, _emulated(interpreter, name, FUNCTIONS.get(name)))


def _emulated(interpreter: Any, name: str, function: Callable[..., Array] | None) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if function is None:
            raise NotImplementedError(f"libdevice.{name} is not emulated: evidence/libdevice.py lists what is")
        values = [interpreter.interpreter_semantic.to_tensor(arg) for arg in args]
        for scalar in (value.dtype.scalar for value in values):
            if scalar not in (tl.float32, tl.float64):  # the compiler finds no function for anything else
                raise NotImplementedError(f"libdevice.{name} takes float32 and float64; got {scalar}")
        result = function(*(value.handle.data for value in values))
        dtype = tl.int1 if result.dtype == np.bool_ else values[0].dtype.scalar
        result = result.astype(bool if dtype == tl.int1 else values[0].handle.data.dtype)
        for observer in observers.computing:
            observer.compute("libdevice", result.size, observers.dtype_name(values[0]))
        is_block = any(value.type.is_block() for value in values)
        kind = tl.block_type(dtype, list(result.shape)) if is_block else dtype
        return tl.tensor(interpreter.TensorHandle(result, dtype), kind)

    return call
