"""Every function of libdevice that the interpreter has, against torch's or Python's of that name."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for a run of this file without a conftest

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.language.extra import libdevice

from evidence import interpreter, observers
from evidence.libdevice import FUNCTIONS
from evidence.observers import Observer, observing

interpreter.install()
X = np.array([0.25, 0.5, 0.75, 1.0])
Y = np.array([2.0, 0.5, -0.5, 3.0])

WANTED: dict[str, Callable[..., Any]] = {
    "rsqrt": lambda x: x**-0.5,
    "exp10": lambda x: 10**x,
    "pow": lambda x, y: x**y,
    "atan2": math.atan2,
    **{name: getattr(math, name) for name in ("asin", "acos", "atan", "asinh", "atanh")},
    "acosh": lambda x: math.acosh(1 / x),
    **{f"fast_{name}f": getattr(math, name) for name in ("exp", "log", "log2", "log10", "sin", "cos", "tan", "tanh")},
    **{name: lambda x, y: x / y for name in ("div_rn", "fast_dividef")},
    "sqrt_rn": math.sqrt,
    **{name: getattr(math, name) for name in ("exp", "log1p", "expm1", "tanh", "floor", "hypot", "ceil", "trunc")},
    **{name: getattr(math, name) for name in ("copysign", "cos", "cosh", "fmod", "isinf", "isnan", "log", "log10")},
    **{name: getattr(math, name) for name in ("log2", "sin", "sinh", "sqrt", "tan")},
    **{"abs": abs, "cbrt": lambda x: x ** (1 / 3), "exp2": lambda x: 2**x, "rint": round},
    "nextafter": lambda x, y: np.nextafter(np.float32(x), np.float32(y)),
}


def block(values: Any, dtype: Any = np.float32, kind: Any = tl.float32) -> Any:
    import triton.runtime.interpreter as stock

    data = np.array(values, dtype=dtype)
    return tl.tensor(stock.TensorHandle(data, kind), tl.block_type(kind, list(data.shape)))


def test_every_function_is_tried_and_the_others_say_so() -> None:
    assert FUNCTIONS.keys() == WANTED.keys()
    for name in ("round", "remainder", "erf"):  # NumPy has two of them, with another meaning
        with pytest.raises(NotImplementedError, match=rf"libdevice\.{name} is not emulated: evidence/libdevice\.py"):
            getattr(libdevice, name)(block(X))


@pytest.mark.parametrize("name", WANTED)
def test_a_function_computes_what_its_name_says(name: str) -> None:
    wanted = WANTED[name]
    two = name in ("pow", "atan2", "div_rn", "fast_dividef", "hypot", "copysign", "fmod", "nextafter")
    x = 1 / X if name == "acosh" else np.minimum(X, 0.75) if name == "atanh" else X
    given = x if name == "atanh" else X
    found = getattr(libdevice, name)(*(block(v) for v in ((x, Y) if two else (x,))))
    expected = [wanted(*values) for values in (zip(given, Y) if two else zip(given))]
    np.testing.assert_allclose(found.handle.data, expected, rtol=1e-6)
    kinds = (np.bool_, tl.int1) if name.startswith("is") else (np.float32, tl.float32)
    assert (found.handle.data.dtype, found.dtype) == kinds and found.shape == [4]


def test_a_number_and_a_block_make_a_block_in_either_order() -> None:
    for given in ((2.0, block(X)), (block(X), 2.0)):
        found = libdevice.pow(*given)
        assert found.type.is_block() and [int(n) for n in found.shape] == [4]
    found = libdevice.isnan(block([1.0, math.nan]))
    assert found.handle.data.tolist() == [False, True]
    found = libdevice.pow(block([[2.0], [3.0]]), block([[1.0, 2.0]]))
    assert found.handle.data.tolist() == [[2, 4], [3, 9]] and [int(n) for n in found.shape] == [2, 2]


def test_float64_stays_and_other_dtypes_are_refused() -> None:
    found = libdevice.exp(block(X, np.float64, tl.float64))
    assert found.handle.data.dtype == np.float64 and np.array_equal(found.handle.data, np.exp(X))
    for given in ((block([1], np.uint16, tl.bfloat16),), (block(X), block([1] * 4, np.uint16, tl.bfloat16))):
        name = "exp" if len(given) == 1 else "pow"
        with pytest.raises(NotImplementedError, match=rf"libdevice\.{name} takes float32 and float64; got bf16"):
            getattr(libdevice, name)(*given)
    with pytest.raises(NotImplementedError, match="got int32"):
        libdevice.exp(block([1, 2], np.int32, tl.int32))


def test_observers_hear_of_every_element() -> None:
    heard = []

    class Listen(Observer):
        def compute(self, operation: str, elements: int, dtype: str) -> None:
            heard.append((operation, elements, dtype))

    with observing(Listen()):
        libdevice.pow(2.0, block(X))
        libdevice.exp(block(X[:2], np.float64, tl.float64))
    assert heard == [("libdevice", 4, "float32"), ("libdevice", 2, "float64")]
    assert observers.computing == []
