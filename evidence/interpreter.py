"""Patches that make Triton's CPU interpreter numerically honest, observable and faster.

The stock interpreter keeps a bfloat16 value as its 16 bits in an unsigned integer. Rounding to bfloat16 truncates, and
`a + b` adds the integers: wrong numbers, no error. `install()` repairs what our kernels rely on and refuses the rest.

* Conversions to and from bfloat16, including the implicit ones of `tl.store`, round to nearest even.
* `tl.dot` multiplies low-precision operands exactly and adds in float32, as tensor cores do.
* Every other operation on bfloat16 values is an error. Our kernels upcast right after the load and round only at the
  store, so emulating bfloat16 arithmetic would hide a mistake rather than help. Other people's kernels may do
  otherwise: inside `bfloat16_arithmetic()` each operation is done in float32 and rounded.
* Lanes that the mask of `tl.load` leaves out are NaN or very large by turns, unless `other` says what they are: stock
  Triton has 0 there, a GPU anything.
* `tl.multiple_of` checks its hint. A GPU would take a false hint for a fact.
* The functions of libdevice exist as far as NumPy has them; see `evidence.libdevice`.
* `tl.fma` rounds once in float32 and float16. (float64 is left to Triton: before 3.9 it rounds twice.)
* `tl.minimum`, `tl.maximum` and `tl.clamp` skip a NaN operand unless told to propagate it, as the compiled code does.
* A `float` argument of a launch is a float32 inside the kernel, not a Python float.
* `debug=True` at a launch turns `tl.device_assert` on, as it does for compiled kernels; stock Triton drops the option.
* NumPy's floating-point warnings are silent inside a kernel, where overflow to infinity may be intended.
* `tl.reduce` with a custom function combines whole arrays, not single elements.
* The stock interpreter patches `triton.language` again for each call of a `@triton.jit` helper, including `tl.sum` and
  `tl.max`, and looks up NumPy's types in a table that it builds for each value. Here a launch patches it once, with
  what the first launch has found to patch, types are remembered, and programs run where Python's stack has room.
* `evidence.observers` are notified of launches, memory accesses and arithmetic. A pointer knows which argument it came
  from.

Known to work with Triton 3.6.0, 3.7.1 and 3.9.0, and NumPy 2.4; `install()` fails if a part that it replaces is
missing.
"""

import dataclasses
import functools
import importlib
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton import knobs

from evidence import interpreter_types, libdevice, observers
from evidence.observers import Access, Array, Launch, dtype_name, lanes
from evidence.rounding import bfloat16_to_float32, float32_to_bfloat16, float64_to_bfloat16, fma_float32

# Operations that may touch a bfloat16 value: those that move or reinterpret bits, and the conversions we implement.
_ALLOWED_ON_BFLOAT16 = frozenset(
    "create_" + name
    for name in (
        *("load", "store", "masked_load", "masked_store", "descriptor_load", "descriptor_store"),
        *("bitcast", "fp_ext", "fp_trunc", "fp_to_fp", "fp_to_si", "fp_to_ui", "si_to_fp", "ui_to_fp"),
        *("reshape", "trans", "expand_dims", "broadcast", "splat", "unsplat", "cat", "join", "split"),
        *("select", "gather", "print", "dot"),
    )
)
# These work on memory, where a bfloat16 cannot be widened to a float32, so they cannot be emulated.
_NEVER_ON_BFLOAT16 = ("create_atomic_rmw", "create_atomic_cas")
# Operations that make a pointer from a pointer, and the position of the latter among their arguments.
_POINTERS_FROM_POINTERS = {"addptr": 0, "bitcast": 0, "broadcast": 0, "expand_dims": 0, "reshape": 0, "trans": 0}
_POINTERS_FROM_POINTERS |= {"splat": 1, "unsplat": 0}

# Turn by turn in lanes that nothing defines: NaN, which no sum hides, and 3.39e38, which no maximum hides.
UNDEFINED = np.repeat(np.array([0x7FF5, 0x7F7F], np.uint16), 4)

_REPLACED = {
    "": (
        *("TensorHandle", "_get_np_dtype", "_patch_lang", "_patch_attr", "_implicit_cvt", "interpreter_builder"),
        *("interpreter_semantic", "_LangPatchScope"),
    ),
    "InterpreterBuilder": (
        *("cast_impl", "binary_op", "create_fp_to_fp", "create_fma", "create_clampf", "create_maxnumf"),
        *("create_minnumf", "create_fadd", "create_dot", "create_masked_store", "create_masked_load"),
        *("create_atomic_rmw", "create_atomic_cas"),
        *("create_" + name for name in _POINTERS_FROM_POINTERS),
    ),
    "GridExecutor": ("__call__",),
    "InterpretedFunction": ("__call__", "rewrite"),
    "ReduceScanOpInterface": ("check_tensor",),
    "ReduceOps": ("generic_reduce",),
}


_emulate_bfloat16 = False


@contextmanager
def bfloat16_arithmetic() -> Iterator[None]:
    """Let third-party kernels compute with bfloat16 values: each operation in float32, then rounded."""
    global _emulate_bfloat16
    before, _emulate_bfloat16 = _emulate_bfloat16, True
    try:
        yield
    finally:
        _emulate_bfloat16 = before


def _is_bfloat16(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and dtype.scalar.name == "bf16"


def _widened(handle: Any) -> Any:
    return dataclasses.replace(handle, data=bfloat16_to_float32(handle.data), dtype=tl.float32)


def _in_float32(name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a method of the builder with bfloat16 values, if it may have them."""
    if not _emulate_bfloat16 or name in _NEVER_ON_BFLOAT16:
        operation = name.removeprefix("create_")
        raise NotImplementedError(f"{operation} on bfloat16 values: upcast to float32 right after the load")
    result = method(*(_widened(arg) if _is_bfloat16(arg) else arg for arg in args), **kwargs)
    if result.data.dtype == np.bool_:
        return dataclasses.replace(result, dtype=tl.int1)
    return dataclasses.replace(result, data=float32_to_bfloat16(result.data), dtype=tl.bfloat16)


def _watched(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method of the builder: notify observers of it, and let none compute with bfloat16 unless it is allowed."""
    operation, takes_all = name.removeprefix("create_"), name in _ALLOWED_ON_BFLOAT16

    @functools.wraps(method)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = method
        if not takes_all:
            for arg in args:  # a plain loop, because this runs at every operation
                if getattr(arg, "holds_bfloat16", False):  # of a handle, see `interpreter_types`
                    function = functools.partial(_in_float32, name, method)
        result = function(self, *args, **kwargs)
        if observers.computing and hasattr(result, "data"):
            elements = result.data.size * (args[0].data.shape[-1] if operation == "dot" else 1)
            for observer in observers.computing:
                observer.compute(operation, elements, dtype_name(args[0]))
        return result

    return run


def _check_version(interpreter: Any) -> None:
    missing = [
        f"{owner}.{name}".lstrip(".")
        for owner, names in _REPLACED.items()
        for name in names
        if not hasattr(getattr(interpreter, owner, None) if owner else interpreter, name)
    ]
    if missing:
        raise RuntimeError(
            f"evidence.interpreter cannot patch the interpreter of triton {triton.__version__}: no {', '.join(missing)}"
        )


def install() -> None:
    """Patch the interpreter of this process, once; TRITON_INTERPRET=1 must be set before Triton is imported."""
    if not knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 before importing triton")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")  # fails in a process that compiles
    if getattr(interpreter, "_patched_by_llmfast", False):
        return
    _check_version(interpreter)
    with suppress(ImportError):
        # Otherwise the first launch does, where `tl.static_print` is `print`, which has no signature in Python 3.10.
        importlib.import_module("triton.experimental.gluon")
    interpreter._get_np_dtype = _remembering_by_name(interpreter._get_np_dtype)
    _patch_arithmetic(interpreter)
    _patch_memory(interpreter)
    _patch_arguments(interpreter)
    _patch_launch(interpreter)
    interpreter_types.install(interpreter)
    libdevice.install(interpreter)
    interpreter._patched_by_llmfast = True


def _remembering_by_name(numpy_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Cache the function from Triton's types to NumPy's, which builds a table of all of them at each call."""
    known: dict[str, Any] = {}

    def remembering(dtype: Any) -> Any:
        scalar = dtype.scalar
        found = known.get(scalar.name)
        if found is None:
            found = known[scalar.name] = numpy_dtype(scalar)
        return found

    return remembering


def _patch_arithmetic(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder
    tensor_handle = interpreter.TensorHandle
    rounding = interpreter._ir.ROUNDING_MODE
    stock_cast, stock_fp_to_fp = builder.cast_impl, builder.create_fp_to_fp
    stock_fma, stock_clamp, stock_dot = builder.create_fma, builder.create_clampf, builder.create_dot

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

    def dot(self: Any, a: Any, b: Any, c: Any, *options: Any) -> Any:
        if not all(x.dtype.scalar in (tl.float16, tl.bfloat16, tl.float32) for x in (a, b, c)):
            return stock_dot(self, a, b, c, *options)
        wide = [cast(self, x, tl.float32).data for x in (a, b, c)]
        return cast(self, tensor_handle(np.matmul(wide[0], wide[1]) + wide[2], tl.float32), c.dtype)

    def bfloat16_constant(self: Any, value: float) -> Any:
        return tensor_handle(float64_to_bfloat16(np.array([value], dtype=np.float64)), tl.bfloat16)

    builder.get_bf16 = bfloat16_constant  # absent before Triton 3.9
    builder.cast_impl = cast
    builder.create_fp_to_fp = fp_to_fp
    builder.create_fma = fma
    builder.create_clampf = clamp
    builder.create_dot = dot
    builder.create_maxnumf = lambda self, x, y: self.binary_op(x, y, np.fmax)
    builder.create_minnumf = lambda self, x, y: self.binary_op(x, y, np.fmin)

    # Refusing all but a list keeps operations that a later Triton adds on the safe side.
    for name, method in list(vars(builder).items()):
        if name.startswith("create_"):
            setattr(builder, name, _watched(name, method))

    # Reductions and scans work on the arrays without asking the builder. (tl.max and tl.min upcast bfloat16 first.)
    reductions = interpreter.ReduceScanOpInterface
    stock_check = reductions.check_tensor

    def check_tensor(self: Any, inputs: tuple[Any, ...]) -> None:
        if any(map(_is_bfloat16, inputs)):
            raise NotImplementedError("reduction or scan of bfloat16 values: upcast to float32 right after the load")
        for observer in observers.computing:
            observer.compute("reduce", sum(value.handle.data.size for value in inputs), dtype_name(inputs[0]))
        stock_check(self, inputs)

    reductions.check_tensor = check_tensor
    interpreter.ReduceOps.generic_reduce = _reduce_by_halves(interpreter)


def _reduce_by_halves(interpreter: Any) -> Callable[..., Any]:
    """Return a `tl.reduce` that applies a custom function to whole arrays, not element by element."""

    def tensor(data: Array, dtype: tl.dtype) -> Any:
        kind = tl.block_type(dtype, list(data.shape)) if data.shape else dtype
        return tl.tensor(interpreter.TensorHandle(data if data.shape else data.reshape(1), dtype.scalar), kind)

    def reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
        arrays = [value.handle.data for value in inputs]
        dimensions = arrays[0].ndim
        arrays = [a.reshape(-1) if self.axis is None else np.moveaxis(a, self.axis, -1) for a in arrays]
        while (length := arrays[0].shape[-1]) > 1:
            even = length // 2 * 2
            pairs = [
                tensor(np.ascontiguousarray(a[..., first:even:2]), value.dtype)
                for first in (0, 1)
                for a, value in zip(arrays, inputs)
            ]
            combined = self.combine_fn.fn(*pairs)
            combined = combined if isinstance(combined, tuple | tl.tuple) else (combined,)
            halves = [np.broadcast_to(c.handle.data, p.handle.data.shape) for c, p in zip(combined, pairs)]
            arrays = [np.concatenate([half, a[..., even:]], axis=-1) for half, a in zip(halves, arrays)]
        results = []
        for a, value in zip(arrays, inputs):
            result = a[..., 0]
            if self.keep_dims:
                result = result.reshape((1,) * dimensions) if self.axis is None else np.expand_dims(result, self.axis)
            results.append(tensor(result, value.dtype))
        return results

    return reduce


def _patch_memory(interpreter: Any) -> None:
    builder = interpreter.InterpreterBuilder
    stock_load, stock_store = builder.create_masked_load, builder.create_masked_store
    stock_rmw, stock_cas = builder.create_atomic_rmw, builder.create_atomic_cas
    relaxed = interpreter._ir.MEM_SEMANTIC.RELAXED

    @functools.cache
    def undefined(kind: Any, shape: tuple[int, ...]) -> Any:
        return interpreter.TensorHandle(np.resize(UNDEFINED.view(interpreter._get_np_dtype(kind)), shape), kind)

    def some(mask: Any) -> Array | None:
        """Return the mask, or None if it leaves nothing out."""
        values: Array = mask.data if isinstance(mask, interpreter.TensorHandle) else mask
        return None if values.all() else values

    def load(self: Any, pointers: Any, mask: Any, other: Any, *args: Any, **kwargs: Any) -> Any:
        kept = some(mask)
        if other is None and kept is not None:
            other = undefined(pointers.get_element_ty(), pointers.data.shape)
        if not observers.active:
            return stock_load(self, pointers, mask, other, *args, **kwargs)
        access = lanes(pointers, kept)
        for observer in observers.active:
            observer.load(access)
        result = stock_load(self, pointers, mask, other, *args, **kwargs)
        values = np.ravel(result.data if kept is None else result.data[kept])
        for observer in observers.active:
            observer.loaded(access, values)
        return result

    def store(self: Any, pointers: Any, values: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        if observers.active:
            kept = some(mask)
            access, stored = lanes(pointers, kept), np.broadcast_to(values.data, pointers.data.shape)
            stored = np.ravel(stored if kept is None else stored[kept])
            for observer in observers.active:
                observer.store(access, stored)
        return stock_store(self, pointers, values, mask, *args, **kwargs)

    def tell_atomic(access: Access, semantics: Any) -> None:
        for observer in observers.active:
            observer.atomic(access, semantics != relaxed)

    def rmw(self: Any, operation: Any, pointers: Any, values: Any, mask: Any, semantics: Any, *args: Any) -> Any:
        if observers.active:
            tell_atomic(lanes(pointers, some(mask)), semantics)
        return stock_rmw(self, operation, pointers, values, mask, semantics, *args)

    def cas(self: Any, pointers: Any, compare: Any, values: Any, semantics: Any, *args: Any) -> Any:
        if observers.active:
            tell_atomic(lanes(pointers, None), semantics)
        return stock_cas(self, pointers, compare, values, semantics, *args)

    def remembering(method: Callable[..., Any], position: int) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = method(self, *args, **kwargs)
            argument = args[position].attr.get("argument")
            if argument is not None:
                result.attr["argument"] = argument
            return result

        return run

    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_rmw, builder.create_atomic_cas = rmw, cas
    for name, position in _POINTERS_FROM_POINTERS.items():
        setattr(builder, "create_" + name, remembering(getattr(builder, "create_" + name), position))


def _patch_arguments(interpreter: Any) -> None:
    stock_convert = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return stock_convert(argument)

    interpreter._implicit_cvt = convert


def _patch_launch(interpreter: Any) -> None:
    executor = interpreter.GridExecutor
    stock_patch_language = interpreter._patch_lang
    # A stand-in for the launched function that sees both modules a helper may see, so that helpers need no patching.
    sees_all = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    changes: list[tuple[Any, str, Any]] = []  # which the first launch looks for, and all make

    def patch_language(fn: Callable[..., Any]) -> Any:
        if changes:
            scope = interpreter._LangPatchScope()
            for change in changes:
                scope.set_attr(*change)
            return scope
        scope = stock_patch_language(sees_all)
        for module in (tl, tl.core):
            scope.set_attr(module, "multiple_of", _checked_multiple_of(module.multiple_of))
        # NumPy 2.4 refuses int() of an array of one element, which Triton 3.6 asks for.
        scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
        changed = dict.fromkeys((owner, name) for owner, name, _ in scope._changes)
        changes.extend((owner, name, vars(owner)[name]) for owner, name in changed)
        return scope

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        grid: Any
        given = {name: value for name, value in kwargs.items() if name in self.arg_names}
        options = {name: value for name, value in kwargs.items() if name not in self.arg_names}
        arguments = inspect.getcallargs(self.fn, *args, **given)
        for hook in self.pre_run_hooks:
            hook(**arguments)
        grid = self.grid(arguments) if callable(self.grid) else self.grid
        x, y, z = (*map(int, grid), 1, 1)[:3]
        kernel = f"{self.fn.__module__}:{self.fn.__name__}"
        unspecialized, unaligned = (
            _names(self.fn, option, self.arg_names)
            for option in ("do_not_specialize", "do_not_specialize_on_alignment")
        )
        described = Launch(kernel, arguments, frozenset(self.constexprs), unspecialized, unaligned, options, (x, y, z))
        for name, tensor in described.tensors():
            if not tensor.is_cpu:
                raise TypeError(f"{described.name}: the interpreter runs on CPU tensors; {name} is on {tensor.device}")

        builder = interpreter.interpreter_builder
        stock_options = builder.options
        debug = bool(options.get("debug")) or knobs.runtime.debug
        builder.options = dataclasses.replace(stock_options, debug=debug)
        scope = interpreter._patch_lang(self.fn)
        builder.set_grid_dim(x, y, z)
        try:
            values = {
                name: value if name in self.constexprs else _named(interpreter._implicit_cvt(value), name)
                for name, value in arguments.items()
            }

            def run_programs(programs: Sequence[int]) -> None:
                for index in programs:
                    builder.set_grid_idx(index // (y * z), index // z % y, index % z)
                    for observer in observers.active:
                        observer.program(index)
                    call(self.fn, **values)

            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="All-NaN slice", category=RuntimeWarning)
                _with_room(observers.run_launch, described, run_programs)
        finally:
            scope.restore()
            builder.options = stock_options

    def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (interpreter.InterpreterError, observers.Objection):
            raise  # wrapped already; stock Triton would wrap it again at each level
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter._patch_lang = patch_language
    executor.__call__ = launch
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **kwargs: call(self.rewrite(), *args, **kwargs)


def _with_room(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


# Python keeps frames in chunks of 16 KiB and maps a new one for a call that does not fit into the last. Near the end
# of a chunk every call does so, which took half of the time of some kernels. After a frame of half a megabyte there is
# room.
_with_room.__code__ = _with_room.__code__.replace(co_stacksize=70_000)


def _names(function: Callable[..., Any], option: str, parameters: Sequence[str]) -> frozenset[str]:
    """Return the parameters in an option of @triton.jit, which takes names and positions."""
    decorated: Any = function.__globals__.get(function.__name__)
    while hasattr(decorated, "fn") and not hasattr(decorated, "rewriter"):
        decorated = decorated.fn  # from under heuristics and autotuners
    given = getattr(decorated, "kwargs", {}).get(option) or ()
    return frozenset(parameters[name] if isinstance(name, int) else name for name in given)


def _named(value: Any, name: str) -> Any:
    """Let pointers remember the argument that they are or come from."""
    for leaf, member in observers.leaves(name, value):
        if isinstance(member, tl.tensor) and isinstance(member.type, tl.pointer_type):
            member.handle.attr["argument"] = leaf
    return value


def _checked_multiple_of(stock: Callable[..., Any]) -> Callable[..., Any]:
    def multiple_of(value: Any, divisors: Any) -> Any:
        if isinstance(value, tl.tensor):
            first = int(value.handle.data.flat[0])
            for divisor in divisors if isinstance(divisors, list | tuple) else [divisors]:
                if first % (divisor.value if isinstance(divisor, tl.constexpr) else divisor):
                    raise ValueError(f"tl.multiple_of({divisors}): {first} is not a multiple")
        return stock(value, divisors)

    return multiple_of
