"""Cheaper bookkeeping of types in Triton's interpreter, which takes longer than NumPy does for small tiles.

Values and errors stay the same. What is replaced:

* A block type and a tensor find their shape, number of elements and name in a table instead of computing them.
* An operation of two tensors of one type, or of a tensor and a Python number, skips the search for a common type.
* Integer arithmetic is checked for overflow only where the check can fail: at launches with `debug=True`.
* A handle's type is compared with its array's by a table, which also says whether it is bfloat16.
* A function of `tl` is called without the wrapper that asks for `_semantic`.
* Arithmetic, comparisons and offsets of pointers go to NumPy at once where an operation needs nothing else: where no
  observer counts arithmetic, and operands have one type, or one is a number that this type can hold.
* Which types may hold a constexpr is remembered.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import triton.language as tl
from triton.language import core, semantic

from evidence import observers
from evidence.observers import Array

# Types that stay what they are in an operation of two tensors, whichever it is.
_INTEGERS = frozenset(("int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))
_FLOATING = frozenset(("fp32", "fp64"))
_KEPT = _INTEGERS | _FLOATING
_WIDE = _FLOATING | {"int32", "int64"}  # take any number of 32 bits
_MANY = 4096  # constants to remember


class _Operator(NamedTuple):
    """Operator of `tl.tensor`, for operands of certain types."""

    function: Callable[[Array, Array], Array]
    kinds: frozenset[str]
    compares: bool = False


def _swapped(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    return lambda a, b: function(b, a)


_OPERATORS = {
    "__add__": _Operator(np.add, _WIDE),
    "__radd__": _Operator(_swapped(np.add), _WIDE),
    "__sub__": _Operator(np.subtract, _WIDE),
    "__rsub__": _Operator(_swapped(np.subtract), _WIDE),
    "__mul__": _Operator(np.multiply, _WIDE),
    "__rmul__": _Operator(_swapped(np.multiply), _WIDE),
    "__and__": _Operator(np.bitwise_and, _INTEGERS),
    "__or__": _Operator(np.bitwise_or, _INTEGERS),
    "__lt__": _Operator(np.less, _WIDE, compares=True),
    "__le__": _Operator(np.less_equal, _WIDE, compares=True),
    "__gt__": _Operator(np.greater, _WIDE, compares=True),
    "__ge__": _Operator(np.greater_equal, _WIDE, compares=True),
    "__eq__": _Operator(np.equal, _WIDE, compares=True),
    "__ne__": _Operator(np.not_equal, _WIDE, compares=True),
}


def install(interpreter: Any) -> None:
    """Patch Triton's classes; `evidence.interpreter` calls it once."""
    _remember_block_types(core.block_type)
    _remember_shapes(core.tensor)
    _compare_sizes_by_table(interpreter.TensorHandle)
    _call_functions_directly(interpreter)
    core._unwrap_if_constexpr = _unwrapped(core._unwrap_if_constexpr)
    kind: Any = semantic.TritonSemantic
    kind.binary_op_type_checking_impl = _common_type(kind.binary_op_type_checking_impl, interpreter)
    kind.broadcast_impl_value = _broadcast(kind.broadcast_impl_value)
    kind.cast = _cast(kind.cast)
    kind.binary_op_sanitize_overflow_impl = _checked_for_overflow(kind.binary_op_sanitize_overflow_impl)


def _remember_block_types(block_type: Any) -> None:
    stock = block_type.__init__
    known: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes: Any = tuple([s.value if type(s) is tl.constexpr else s for s in shape])
        fields = known.get((element_ty.name, sizes))
        if fields is None:
            stock(self, element_ty, shape)
            known[element_ty.name, sizes] = dict(vars(self))
        else:
            self.__dict__.update(fields)
            self.element_ty = element_ty  # pointers to one type may lie in different spaces of memory

    block_type.__init__ = init


def _remember_shapes(tensor: Any) -> None:
    stock = tensor.__init__
    known: dict[str, dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        fields = known.get(type.name)  # which says the shape too
        if fields is None:
            stock(self, handle, type)
            known[type.name] = dict(vars(self))
        else:
            self.__dict__ = {**fields, "handle": handle, "type": type, "dtype": type.scalar}

    tensor.__init__ = init


def _compare_sizes_by_table(handle: Any) -> None:
    stock = handle.__post_init__
    fits: dict[tuple[str, int], bool] = {}

    def init(self: Any, data: Array, dtype: Any, attr: dict[Any, Any] | None = None) -> None:
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr
        key = (dtype.name, data.itemsize)
        bfloat16 = fits.get(key)
        if bfloat16 is None:
            stock(self)
            bfloat16 = fits[key] = dtype.scalar.name == "bf16"
        self.holds_bfloat16 = bfloat16

    handle.__init__ = init


def _call_functions_directly(interpreter: Any) -> None:
    def patch(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function, its_semantic = getattr(member, "__wrapped__", member), interpreter.interpreter_semantic

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = its_semantic
            return function(*args, **kwargs)

        if owner is core.tensor and name in _OPERATORS:
            call = _direct(name, call, interpreter)
        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch


def _direct(name: str, stock: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    """Return an operator of `tl.tensor` without the search for what to do, where that is known."""
    builder, handle = interpreter.interpreter_builder, interpreter.TensorHandle
    function, kinds, compares = _OPERATORS[name]
    if name == "__add__":
        stock = _offset(stock, interpreter)
    boolean: dict[str, Any] = {}  # types of comparisons, by the name of the operands' type

    def run(self: Any, other: Any) -> Any:
        dtype, kind = self.dtype, self.type
        if dtype.name not in kinds or observers.computing or builder.options.debug:
            return stock(self, other)
        if _is_tensor(other):
            if other.type.name != kind.name:
                if other.dtype.name != dtype.name or other.type.is_block() == kind.is_block():
                    return stock(self, other)
                kind = kind if kind.is_block() else other.type
            theirs = other.handle.data
        elif _takes(self, other) and not (compares and type(other) is float):  # which Triton compares by its own type
            theirs = _constant(interpreter, other, self).handle.data
        else:
            return stock(self, other)
        result = function(self.handle.data, theirs)
        if compares:
            if kind.name not in boolean:
                boolean[kind.name] = kind.with_element_ty(tl.int1)
            kind = boolean[kind.name]
        return tl.tensor(handle(result, dtype), kind)

    return run


def _offset(stock: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    """Return `pointer + offsets` likewise, and `stock` for all else."""
    handle = interpreter.TensorHandle

    def run(self: Any, other: Any) -> Any:
        pointer = self.handle.dtype
        if not isinstance(pointer, tl.pointer_type) or not _is_tensor(other) or observers.computing:
            return stock(self, other)
        kind, theirs = self.type, other.type
        if other.dtype.name not in ("int32", "int64") or (
            kind.is_block() and theirs.is_block() and kind.shape.values != theirs.shape.values
        ):
            return stock(self, other)
        if theirs.is_block() and not kind.is_block():
            kind = theirs.with_element_ty(kind)
        size = max(1, pointer.element_ty.primitive_bitwidth // 8)
        result = handle(self.handle.data + size * other.handle.data.astype(np.uint64), pointer)
        argument = self.handle.attr.get("argument")
        if argument is not None:
            result.attr["argument"] = argument
        return tl.tensor(result, kind)

    return run


def _is_tensor(value: Any) -> bool:
    return type(value) is tl.tensor


def _takes(tensor: Any, value: Any) -> bool:
    """Return True for a Python number that has the tensor's type in an operation with it."""
    if type(value) is int:
        return tensor.dtype.name in _WIDE and -(2**31) <= value < 2**31
    return type(value) is float and tensor.dtype.name in _FLOATING


_constants: dict[tuple[str, Any], Array] = {}


def _constant(interpreter: Any, value: Any, like: Any) -> Any:
    """Return a tensor full of a number, with the type of another."""
    key = (like.type.name, value or str(value))  # 0.0 and -0.0 are equal but differ
    array = _constants.get(key)
    if array is None:
        if len(_constants) >= _MANY:
            _constants.clear()
        array = interpreter.interpreter_semantic.scalar_constant(value, like.dtype).handle.data
        array = np.full(like.type.shape.values if like.type.is_block() else (1,), array)
        array.flags.writeable = False
        _constants[key] = array
    return tl.tensor(interpreter.TensorHandle(array, like.dtype), like.type)


def _unwrapped(stock: Callable[..., Any]) -> Callable[..., Any]:
    containers = (list, tuple, core.tuple, core.constexpr)
    contains: dict[type, bool] = {}

    @functools.wraps(stock)
    def unwrapped(value: Any) -> Any:
        kind = type(value)
        if kind not in contains:
            contains[kind] = issubclass(kind, containers)
        return stock(value) if contains[kind] else value

    return unwrapped


def _common_type(stock: Callable[..., Any], interpreter: Any) -> Callable[..., Any]:
    @functools.wraps(stock)
    def check(
        self: Any,
        lhs: Any,
        rhs: Any,
        allow_lhs_ptr: bool = False,
        allow_rhs_ptr: bool = False,
        arithmetic_check: bool = True,
        div_or_mod: bool = False,
    ) -> Any:
        if _is_tensor(lhs) and _is_tensor(rhs):
            if lhs.type.name == rhs.type.name and lhs.dtype.name in _KEPT:
                return lhs, rhs
            if lhs.dtype.name == rhs.dtype.name and lhs.dtype.name in _KEPT:
                return self.broadcast_impl_value(lhs, rhs)
            if allow_lhs_ptr and lhs.dtype.is_ptr() and rhs.dtype.name in _INTEGERS:
                return self.broadcast_impl_value(lhs, rhs)
        elif arithmetic_check:
            if _is_tensor(lhs) and _takes(lhs, rhs):
                return lhs, _constant(interpreter, rhs, lhs)
            if _is_tensor(rhs) and _takes(rhs, lhs):
                return _constant(interpreter, lhs, rhs), rhs
        return stock(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)

    return check


def _broadcast(stock: Callable[..., Any]) -> Callable[..., Any]:
    def splat(self: Any, scalar: Any, like: Any) -> Any:
        wanted = like.with_element_ty(scalar.type)
        return tl.tensor(self.builder.create_splat(wanted, scalar.handle), wanted)

    @functools.wraps(stock)
    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if a.is_block():
            if b.is_block():
                if a.shape.values == b.shape.values:
                    return lhs, rhs
            elif b.name in _KEPT:
                return lhs, splat(self, rhs, a)
        elif b.is_block() and a.name in _KEPT:
            return splat(self, lhs, b), rhs
        return stock(self, lhs, rhs)

    return broadcast


def _cast(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def cast(self: Any, input: Any, dst_ty: tl.dtype, *rounding: Any, **named: Any) -> Any:
        return input if input.dtype is dst_ty.scalar else stock(self, input, dst_ty, *rounding, **named)

    return cast


def _checked_for_overflow(stock: Callable[..., Any]) -> Callable[..., Any]:
    def check(self: Any, *operation: Any) -> None:
        if self.builder.options.debug:  # without it, the assertion at the end of the check does nothing
            stock(self, *operation)

    return check
