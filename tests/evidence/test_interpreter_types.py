"""Tests of the interpreter's bookkeeping of types: it gives what Triton's own gives, values and errors included."""

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.language.semantic import TritonSemantic

from evidence import interpreter, interpreter_types, observers
from evidence.observers import Observer

interpreter.install()

TYPES = [
    *(tl.int1, tl.int8, tl.int16, tl.int32, tl.int64, tl.uint8, tl.uint16, tl.uint32, tl.uint64),
    *(tl.float16, tl.bfloat16, tl.float32, tl.float64, tl.pointer_type(tl.float32)),
]
SHAPES: list[tuple[int, ...]] = [(), (4,), (8,), (2, 4), (2, 1)]
NUMBERS = [0, 1, -1, 2**31 - 1, 2**31, -(2**31) - 1, 2**63, 2**65, True, 0.0, -0.0, 1.5, -2.5, 1e300, float("inf")]
NUMBERS += [float("nan"), 0.1]
FLAGS = [(), (True, True), (False, False, True, True), (False, False, False)]


def tensor(dtype: Any, shape: tuple[int, ...]) -> Any:
    import triton.runtime.interpreter as stock

    data = np.arange(np.prod(shape, dtype=int)).reshape(shape or (1,)).astype(stock._get_np_dtype(dtype))
    return tl.tensor(stock.TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype)


def outcome(function: Callable[..., Any], *arguments: Any) -> Any:
    import triton.runtime.interpreter as stock

    try:
        with np.errstate(all="ignore"):
            found = function(stock.interpreter_semantic, *arguments)
    except Exception as error:
        return type(error), str(error)
    many = found if isinstance(found, tuple) else (found,)
    return [
        (
            t.type,
            str(t.type),
            t.dtype,
            t.shape,
            t.numel,
            str(t.handle.dtype),
            t.handle.data.dtype,
            t.handle.data.tolist(),
        )
        for t in many
    ]


def same(method: str, *arguments: Any) -> None:
    ours = getattr(TritonSemantic, method)
    assert repr(outcome(ours, *arguments)) == repr(outcome(ours.__wrapped__, *arguments)), arguments


@pytest.mark.parametrize("shape", SHAPES)
def test_two_tensors_have_the_common_type(shape: tuple[int, ...]) -> None:
    for a, b, other, flags in product(TYPES, TYPES, SHAPES, FLAGS):
        same("binary_op_type_checking_impl", tensor(a, shape), tensor(b, other), *flags)


def test_a_number_takes_the_type_of_its_tensor() -> None:
    for kind, shape, number, flags in product(TYPES, SHAPES, NUMBERS, FLAGS):
        same("binary_op_type_checking_impl", tensor(kind, shape), number, *flags)
        same("binary_op_type_checking_impl", number, tensor(kind, shape), *flags)


def test_shapes_meet() -> None:
    for a, b, one, other in product((tl.float32, TYPES[-1]), (tl.int32, tl.bfloat16), SHAPES, SHAPES):
        same("broadcast_impl_value", tensor(a, one), tensor(b, other))
        same("broadcast_impl_value", tensor(b, one), tensor(a, other))


def test_casts() -> None:
    for a, b, shape in product(TYPES[:-1], TYPES[:-1], SHAPES):
        same("cast", tensor(a, shape), b)


@pytest.mark.parametrize("name", interpreter_types._OPERATORS)
def test_operators(name: str) -> None:
    import triton.runtime.interpreter as stock

    member = vars(tl.tensor)[name].__wrapped__

    def theirs(semantic: Any, a: Any, b: Any) -> Any:
        return member(a, b, _semantic=semantic)

    def ours(semantic: Any, a: Any, b: Any) -> Any:
        return interpreter_types._direct(name, lambda a, b: member(a, b, _semantic=semantic), stock)(a, b)

    for kind, shape in product(TYPES, SHAPES):
        others = [tensor(*other) for other in product(TYPES, SHAPES)]
        for other in (*others, *NUMBERS, None, tl.constexpr(3)):
            found, wanted = (outcome(function, tensor(kind, shape), other) for function in (ours, theirs))
            assert repr(found) == repr(wanted), (kind, shape, other)


def test_an_offset_pointer_is_of_the_same_argument() -> None:
    import triton.runtime.interpreter as stock

    add = interpreter_types._direct("__add__", vars(tl.tensor)["__add__"], stock)
    pointer = tensor(TYPES[-1], ())
    for argument in (None, "x_ptr"):
        pointer.handle.attr = {} if argument is None else {"argument": argument}
        assert add(pointer, tensor(tl.int32, (4,))).handle.attr == pointer.handle.attr


@pytest.mark.parametrize("why", ["an observer", "debug"])
def test_operators_that_are_listened_to_or_checked_take_the_long_way(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton.runtime.interpreter as stock

    if why == "debug":
        options = dataclasses.replace(stock.interpreter_builder.options, debug=True)
        monkeypatch.setattr(stock.interpreter_builder, "options", options)
    else:
        monkeypatch.setattr(observers, "computing", [Observer()])
    for name in interpreter_types._OPERATORS:
        for kind in (tl.int32, TYPES[-1]) if name == "__add__" and why != "debug" else (tl.int32,):
            run = interpreter_types._direct(name, lambda *_: "the long way", stock)
            assert run(tensor(kind, (4,)), tensor(tl.int32, (4,))) == "the long way"


def test_constants_are_not_shared_for_writing() -> None:
    import triton.runtime.interpreter as stock

    one, same_one = (
        TritonSemantic.binary_op_type_checking_impl(stock.interpreter_semantic, tensor(tl.float32, (4,)), 1)[1]
        for _ in range(2)
    )
    assert one.handle.data is same_one.handle.data and not one.handle.data.flags.writeable
    assert one.handle is not same_one.handle  # attributes, such as the argument of a pointer, are a handle's own


def test_types_of_a_name_keep_their_elements() -> None:
    one, other = tl.pointer_type(tl.float32), tl.pointer_type(tl.float32, 3)
    for kind in (one, other, one):
        assert tl.block_type(kind, [4]).element_ty is kind
    with pytest.raises(TypeError):
        tl.block_type(tl.float32, [])
