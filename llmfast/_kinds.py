"""Kinds of arguments. An argument's annotation declares its kind, and nothing else does.

Checks of values ("must be positive") come after these, and may count on the kind.
"""

from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, ForwardRef, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

_WORDS: dict[Any, str] = {
    Tensor: "a tensor",
    bool: "a bool",
    int: "an int",
    float: "a number",
    str: "a string",
    NoneType: "None",
    torch.dtype: "a torch.dtype",
    torch.Generator: "a torch.Generator",
}
# What stands for a number of the kind, too: while torch traces, numbers may be symbols.
_CLASSES: dict[Any, tuple[type, ...]] = {
    int: (int, torch.SymInt),
    float: (int, float, torch.SymInt, torch.SymFloat),
    bool: (bool, torch.SymBool),
}
_PLURALS = {
    "a number or a tensor": "numbers or tensors",
    "a number": "numbers",
    "a bool": "bools",
    "a tensor": "tensors",
    "an int": "ints",
}
Given = TypeVar("Given")


class ArgumentKind(NamedTuple):
    """Values that an annotation allows."""

    classes: tuple[type, ...]
    wanted: str  # for messages
    numbers: bool = False  # without bools, which Python counts as ints
    words: tuple[object, ...] = ()  # strings that are allowed, next to other classes
    items: "ArgumentKind | None" = None  # of a sequence


def kind_of(annotation: Any) -> ArgumentKind:
    """Return the kind of an annotation. What it says beyond the classes in `_WORDS` is not checked."""
    if get_origin(annotation) is Annotated:
        annotation = annotation.__origin__
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    classes: list[type] = []
    words: list[object] = []
    wanted: list[str] = []
    items = None
    for part in parts:
        if part in _WORDS:
            classes += _CLASSES.get(part, (part,))
            wanted.append(_WORDS[part])
        elif get_origin(part) is Literal:
            words += get_args(part)
            wanted += map(repr, get_args(part))
        elif get_origin(part) is Sequence:
            items = kind_of(get_args(part)[0])
            wanted.append(f"a sequence of {_PLURALS[items.wanted]}")
        else:
            return ArgumentKind((object,), "anything")
    numbers = (int in parts or float in parts) and bool not in parts
    if words and not numbers:  # which strings they may be is a check of the value
        classes, words = [*classes, str], []
    either = " or ".join([", ".join(wanted[:-1]), wanted[-1]] if len(wanted) > 1 else wanted)
    return ArgumentKind(tuple(classes), either, numbers, tuple(words), items)


def kinds_of(record: Any) -> dict[str, ArgumentKind]:
    """Return the kinds of the fields that a `TypedDict`, a dataclass or a function annotates."""
    hints = record.__annotations__
    if any(isinstance(hint, str) for hint in hints.values()):
        hints = get_type_hints(record)
    return {name: kind_of(hint) for name, hint in hints.items() if not isinstance(hint, ForwardRef)}


def fits(value: Any, kind: ArgumentKind) -> bool:
    """Return True if the class of `value` is of the kind."""
    return isinstance(value, kind.classes) and not (kind.numbers and isinstance(value, bool))


def expect_kind(name: str, value: Any, kind: ArgumentKind) -> Any:
    """Return `value`, as a plain number if it is one of NumPy.

    Raises:
        TypeError: it is of another kind.
    """
    if fits(value, kind) or (kind.words and isinstance(value, str) and value in kind.words):
        return value
    if kind.items is not None and isinstance(value, Sequence) and not isinstance(value, str):
        return [expect_kind(f"{name}[{i}]", item, kind.items) for i, item in enumerate(value)]
    if isinstance(value, np.generic) and fits(value.item(), kind):
        return value.item()
    raise TypeError(f"{name} must be {kind.wanted}; got {what(value)}")


def expect_kinds(kinds: Mapping[str, ArgumentKind], given: dict[str, Given]) -> dict[str, Given]:
    """Return arguments that are of the kinds of their names, with plain numbers for those of NumPy.

    Raises:
        TypeError: one is of another kind.
    """
    plain = given
    for name, value in given.items():
        if name in kinds and not fits(value, kinds[name]):
            plain = {**plain, name: expect_kind(name, value, kinds[name])}
    return plain


def expect_tensors(**given: Any) -> None:
    """Raise TypeError for an argument that is not a tensor, by its name."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor; got {what(value)}")


def what(value: Any) -> str:
    """Say what a value of the wrong kind is: its class, or a small value itself."""
    if value is None or isinstance(value, str | int | float | torch.dtype):
        return repr(value)
    if isinstance(value, np.ndarray):
        return "a NumPy array"
    name = "tensor" if isinstance(value, Tensor) else type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
