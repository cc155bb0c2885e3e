"""Make Triton's CPU interpreter numerically honest, and quicker.

The stock interpreter keeps a bfloat16 value as its 16 bits in an unsigned integer. Rounding to bfloat16 truncates, and
`a + b` adds the integers: wrong numbers, no error. `install()` repairs what our kernels rely on and refuses the rest.

* Conversions to and from bfloat16, the implicit ones of `tl.store` too, round to nearest even.
* Every other operation on bfloat16 values is an error. Our kernels upcast right after the load and round only at the
  store, so emulating bfloat16 arithmetic would hide a mistake rather than help.
* `tl.fma` rounds once in float32 and float16. (float64 is left to Triton: before 3.9 it rounds twice.)
* `tl.minimum`, `tl.maximum` and `tl.clamp` skip a NaN operand unless told to propagate it, as the compiled code does.
* A `float` argument of a launch is a float32 inside the kernel, not a Python float.
* `debug=True` at a launch turns `tl.device_assert` on, as it does for compiled kernels; stock Triton drops the option.
* NumPy's floating-point warnings are silent inside a kernel: overflow to infinity is the kernel's own business.
* The stock interpreter patches `triton.language` again for each call of a `@triton.jit` helper, `tl.sum` and `tl.max`
  included. Here a launch patches it once.

Known to work with Triton 3.7.1 and 3.9.0; `install()` fails where the parts it replaces are missing.
"""

import dataclasses
import functools
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

Array = npt.NDArray[Any]

# What may touch a bfloat16 value: operations that move or reinterpret bits, and the conversions we implement.
_ALLOWED_ON_BFLOAT16 = frozenset(
    "create_" + name
    for name in (
        *("load", "store", "masked_load", "masked_store", "descriptor_load", "descriptor_store"),
        *("bitcast", "fp_ext", "fp_trunc", "fp_to_fp", "fp_to_si", "fp_to_ui", "si_to_fp", "ui_to_fp"),
        *("reshape", "trans", "expand_dims", "broadcast", "splat", "unsplat", "cat", "join", "split"),
        *("select", "gather", "print"),
    )
)

_REPLACED = {
    "": ("TensorHandle", "_patch_lang", "_implicit_cvt", "interpreter_builder"),
    "InterpreterBuilder": (
        *("cast_impl", "binary_op", "create_fp_to_fp", "create_fma", "create_clampf", "create_maxnumf"),
        *("create_minnumf", "create_fadd", "create_dot", "create_masked_store"),
    ),
    "GridExecutor": ("__call__",),
    "InterpretedFunction": ("__call__", "rewrite"),
    "ReduceScanOpInterface": ("check_tensor",),
}


def bfloat16_to_float32(stored: Array) -> Array:
    """The float32 values of bfloat16 bit patterns held as uint16; exact."""
    return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """The uint16 patterns of the bfloat16 values nearest to float32 ones, ties to even; NaN stays NaN."""
    word = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    last_kept = (word >> np.uint32(16)) & np.uint32(1)
    rounded = (word + np.uint32(0x7FFF) + last_kept) >> np.uint32(16)
    # The carry of the addition above would turn a NaN with a large payload into an infinity or a zero.
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def _round_to_odd(rounded: Array, error: Array) -> Array:
    """Step `rounded` towards the exact value `rounded + error` where it is inexact and its last bit is even.

    A value rounded to odd can be rounded again to a format at least two bits narrower as if it had been exact.
    """
    word = rounded.view(f"uint{8 * rounded.itemsize}")
    inexact_even = (error != 0) & ~np.isnan(error) & (word % 2 == 0)
    towards = np.copysign(rounded.dtype.type(np.inf), error.astype(rounded.dtype))
    return np.where(inexact_even, np.nextafter(rounded, towards), rounded)


def float64_to_bfloat16(values: Array) -> Array:
    """As `float32_to_bfloat16`, with a single rounding although float32 is passed on the way."""
    nearest = values.astype(np.float32)
    return float32_to_bfloat16(_round_to_odd(nearest, values - nearest))


def fma_float32(x: Array, y: Array, z: Array) -> Array:
    """`x * y + z` rounded once, for float32 or narrower operands; the result is in the type of `z`."""
    product = x.astype(np.float64) * y.astype(np.float64)  # exact: 24 + 24 bits fit in 53
    addend = z.astype(np.float64)
    total = product + addend
    # Knuth's two-sum: `total + error` is the sum without rounding.
    shadow = total - product
    error = (product - (total - shadow)) + (addend - shadow)
    return _round_to_odd(total, error).astype(z.dtype)


def _is_bfloat16(value: object) -> bool:
    return hasattr(value, "dtype") and value.dtype.scalar == tl.bfloat16


def _refuse_bfloat16(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if any(map(_is_bfloat16, args)):
            operation = name.removeprefix("create_")
            raise NotImplementedError(f"{operation} on bfloat16 values: upcast to float32 right after the load")
        return method(*args, **kwargs)

    return checked


def _check_version(interpreter: types.ModuleType) -> None:
    missing = [
        f"{owner}.{name}".lstrip(".")
        for owner, names in _REPLACED.items()
        for name in names
        if not hasattr(getattr(interpreter, owner, None) if owner else interpreter, name)
    ]
    if missing:
        raise RuntimeError(
            f"support.interpreter cannot patch the interpreter of triton {triton.__version__}: no {', '.join(missing)}"
        )


def install() -> None:
    """Patch the interpreter of this process, once; TRITON_INTERPRET=1 must be set before Triton is imported."""
    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before importing triton")
    import triton.runtime.interpreter as interpreter  # itself fails to load in a process that compiles

    if getattr(interpreter, "_patched_by_llmfast", False):
        return
    _check_version(interpreter)
    _patch_arithmetic(interpreter)
    _patch_arguments(interpreter)
    _patch_launch(interpreter)
    interpreter._patched_by_llmfast = True


def _patch_arithmetic(interpreter: types.ModuleType) -> None:
    builder = interpreter.InterpreterBuilder
    tensor_handle = interpreter.TensorHandle
    rounding = interpreter._ir.ROUNDING_MODE
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    stock_fma, stock_clamp = builder.create_fma, builder.create_clampf

    def cast(self: Any, source: Any, target_type: tl.dtype) -> Any:
        source_type, target_type = source.dtype.scalar, target_type.scalar
        if source_type == target_type:
            return source
        if source_type == tl.bfloat16:
            source = tensor_handle(bfloat16_to_float32(source.data), tl.float32)
            return source if target_type == tl.float32 else stock_cast(self, source, target_type)
        if target_type == tl.bfloat16:
            # Integers take the way through float64: exact up to 2**53, and then one rounding.
            narrow = source_type in (tl.float16, tl.float32)
            convert = float32_to_bfloat16 if narrow else float64_to_bfloat16
            return tensor_handle(convert(source.data.astype(np.float32 if narrow else np.float64)), tl.bfloat16)
        return stock_cast(self, source, target_type)

    def fp_to_fp(self: Any, source: Any, target_type: tl.dtype, rounding_mode: Any) -> Any:
        if tl.bfloat16 not in (source.dtype.scalar, target_type.scalar):
            return stock_fp_to_fp(self, source, target_type, rounding_mode)
        if rounding_mode not in (None, rounding.RTNE):
            raise NotImplementedError(f"bfloat16 conversion with rounding mode {rounding_mode}")
        return cast(self, source, target_type)

    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.dtype.scalar not in (tl.float16, tl.float32):
            return stock_fma(self, x, y, z)
        return tensor_handle(fma_float32(x.data, y.data, z.data), z.dtype.scalar)

    def clamp(self: Any, value: Any, low: Any, high: Any, propagate_nan: Any) -> Any:
        if propagate_nan != tl.PropagateNan.NONE:
            return stock_clamp(self, value, low, high, propagate_nan)
        return self.binary_op(self.binary_op(value, low, np.fmax), high, np.fmin)

    def bfloat16_constant(self: Any, value: float) -> Any:
        return tensor_handle(float64_to_bfloat16(np.array([value], dtype=np.float64)), tl.bfloat16)

    builder.get_bf16 = bfloat16_constant  # absent before Triton 3.9
    builder.cast_impl = cast
    builder.create_fp_to_fp = fp_to_fp
    builder.create_fma = fma
    builder.create_clampf = clamp
    builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)

    # Refusing all but a list keeps operations that a later Triton adds on the safe side.
    for name, method in list(vars(builder).items()):
        if name.startswith("create_") and name not in _ALLOWED_ON_BFLOAT16:
            setattr(builder, name, _refuse_bfloat16(name, method))

    # Reductions and scans work on the arrays without asking the builder. (tl.max and tl.min upcast bfloat16 first.)
    reductions = interpreter.ReduceScanOpInterface
    stock_check = reductions.check_tensor

    def check_tensor(self: Any, inputs: tuple[Any, ...]) -> None:
        if any(map(_is_bfloat16, inputs)):
            raise NotImplementedError("reduction or scan of bfloat16 values: upcast to float32 right after the load")
        stock_check(self, inputs)

    reductions.check_tensor = check_tensor


def _patch_arguments(interpreter: types.ModuleType) -> None:
    stock_convert = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return stock_convert(argument)

    interpreter._implicit_cvt = convert


def _patch_launch(interpreter: types.ModuleType) -> None:
    executor = interpreter.GridExecutor
    stock_launch, stock_patch_language = executor.__call__, interpreter._patch_lang
    # A stand-in for the launched function that sees both modules a helper may see, so that helpers need no patching.
    sees_all = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def patch_language(fn: Callable[..., Any]) -> Any:
        return stock_patch_language(sees_all)

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        builder = interpreter.interpreter_builder
        stock_options = builder.options
        debug = bool(kwargs.get("debug")) or triton.knobs.runtime.debug
        builder.options = dataclasses.replace(stock_options, debug=debug)
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="All-NaN slice", category=RuntimeWarning)
                stock_launch(self, *args, **kwargs)
        finally:
            builder.options = stock_options

    def call_helper(self: Any, *args: Any, **kwargs: Any) -> Any:
        helper = self.rewrite()
        try:
            return helper(*args, **kwargs)
        except interpreter.InterpreterError:
            raise  # once named is enough; stock Triton would wrap it again at each level
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = patch_language
    executor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = call_helper
