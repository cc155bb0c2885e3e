"""Record every kind of launch that a process makes in the interpreter, so that it can be compiled later.

Launches are of the same kind if Triton would use one binary for them: the same kernel, types of arguments, facts about
them (pointers aligned to 16 bytes, integers that are 1 or multiples of 16), compile-time constants and options.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from triton.language import dtype as TritonType

from evidence.observers import Launch, Observer, Run

Fields = dict[str, Any]


@dataclass(frozen=True)
class Specialization:
    """Kind of launch. Arguments and options are stored as JSON values: see `_encode`."""

    kernel: str  # "package.module:name"
    arguments: Fields
    options: Fields
    first_test: str = ""  # the first pytest test that launched it
    count: int = 1

    @property
    def key(self) -> str:
        return json.dumps([self.kernel, self.arguments, self.options], sort_keys=True)

    @property
    def name(self) -> str:
        return self.kernel.split(":")[1]

    def argument(self, path: str) -> Any:
        """Return the argument `name`, or the member `name.field` of a named tuple; None if the tuple is absent."""
        name, *fields = path.split(".")
        value = self.arguments[name]
        for field in fields:
            value = None if value is None else value["record"][field]
        return value

    def __str__(self) -> str:
        """Format as `scale_kernel(x_ptr=*float32:16, numel=16, BLOCK=4096, num_warps=8)`."""
        shown = {name: _show(value) for name, value in self.arguments.items()} | self.options
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in shown.items())})"


def specialization(launch: Launch) -> Specialization:
    return Specialization(
        launch.kernel,
        {
            name: {"constant": _encode_constant(value)}
            if name in launch.constexprs
            else _encode(value, name in launch.unspecialized, name in launch.unaligned)
            for name, value in launch.arguments.items()
        },
        {name: value for name, value in sorted(launch.options.items()) if value is not None},
        os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0],
    )


def _encode(value: Any, unspecialized: bool = False, unaligned: bool = False) -> Any:
    """Encode the properties of a run-time argument that decide which binary Triton uses."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        # 1 becomes a constant, multiples of 16 are marked, and the type is the narrowest that fits.
        small = 3 if unspecialized else 1 if value == 1 else 16 if value % 16 == 0 else 3
        return small if -(2**31) <= value < 2**31 else small + 2**40 if value < 2**63 else small + 2**63
    if isinstance(value, float):
        return 0.5
    if isinstance(value, tuple):  # Triton looks at all members, whatever the kernel says of the argument
        members, fields = [_encode(member) for member in value], getattr(value, "_fields", None)
        if fields is None:
            return members
        return {"record": dict(zip(fields, members)), "name": type(value).__name__}  # by which Triton names its file
    if hasattr(value, "data_ptr"):
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "aligned": not unaligned and value.data_ptr() % 16 == 0,
            "below_2_gib": _bytes(value) < 2**31,  # AMD GPUs have shorter instructions for these
        }
    raise TypeError(f"a launch with an argument of type {type(value).__name__} cannot be recorded")


def _bytes(tensor: Any) -> int:
    return int(tensor.untyped_storage().nbytes()) if isinstance(tensor, torch.Tensor) else 0


def _encode_constant(value: Any) -> Any:
    value = getattr(value, "value", value)  # unwrap a tl.constexpr
    if isinstance(value, TritonType):
        return {"triton_type": value.name}
    if isinstance(value, tuple | list):
        return {"tuple": [_encode_constant(member) for member in value]}
    if hasattr(value, "fn") and hasattr(value.fn, "__module__"):  # a @triton.jit function
        return {"function": f"{value.fn.__module__}:{value.fn.__name__}"}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a launch with a constant of type {type(value).__name__} cannot be recorded")


def _show(value: Any) -> str:
    if isinstance(value, dict) and "dtype" in value:
        return f"*{value['dtype']}{':16' if value['aligned'] else ''}"
    if isinstance(value, dict) and "record" in value:
        return f"({', '.join(f'{name}={_show(member)}' for name, member in value['record'].items())})"
    if isinstance(value, dict):
        return str(next(iter(value.values())))
    return str(value)


class Recorder(Observer):
    """Observer that keeps one `Specialization` per kind of launch, by `key`."""

    def __init__(self) -> None:
        self.kinds: dict[str, Specialization] = {}

    def launch(self, launch: Launch, programs: Sequence[int], run: Run) -> None:
        self.add(specialization(launch))
        run(programs)

    def add(self, kind: Specialization) -> None:
        before = self.kinds.get(kind.key)
        self.kinds[kind.key] = kind if before is None else replace(before, count=before.count + kind.count)
