"""Events of an interpreted kernel that can be observed: its launch, programs, memory accesses and arithmetic.

The sanitizer, the traffic counter and the launch recorder are observers. They see any Triton code that runs in the
interpreter patched by `evidence.interpreter`, without changes to that code.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Run = Callable[[Sequence[int]], None]


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel. Programs are numbered in the default order of execution."""

    kernel: str  # "package.module:name"
    arguments: dict[str, Any]  # as passed, by name, in the order of the kernel's parameters
    constexprs: frozenset[str]  # arguments that are compile-time constants
    unspecialized: frozenset[str]  # integers that Triton must not specialise on
    unaligned: frozenset[str]  # pointers whose alignment Triton must not use
    options: dict[str, Any]  # num_warps, enable_fp_fusion, ...
    grid: tuple[int, int, int]

    @property
    def name(self) -> str:
        return self.kernel.split(":")[1]

    @property
    def programs(self) -> int:
        x, y, z = self.grid
        return x * y * z

    def tensors(self) -> Iterator[tuple[str, Any]]:
        """Yield the arguments that are tensors, members of tuples included, each with its name."""
        for argument, value in self.arguments.items():
            for name, member in leaves(argument, value):
                tensor = getattr(member, "base", member)  # of a tensor descriptor
                if hasattr(tensor, "data_ptr"):
                    yield name, tensor


def leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an argument, or the members of a tuple: `name.field` of a named tuple, `name[0]` of any other."""
    if not isinstance(value, tuple):
        yield name, value
        return
    fields = getattr(value, "_fields", None)
    for i, member in enumerate(value):
        yield from leaves(f"{name}[{i}]" if fields is None else f"{name}.{fields[i]}", member)


class Access:
    """Memory operation of one program: a class of few parts, because there are millions."""

    def __init__(self, addresses: Array, lanes: int, size: int, argument: str | None) -> None:
        self.addresses = addresses  # int64, flat, only of active lanes
        self.lanes = lanes  # active or masked off
        self.size = size  # bytes per element
        self.argument = argument  # the argument from whose pointer the addresses were computed, if known
        self._consecutive: bool | None = None

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last address; there must be at least one."""
        return int(self.addresses[0]), int(self.addresses[-1])

    @property
    def consecutive(self) -> bool:
        """True if the elements are contiguous from the first address to the last."""
        if self._consecutive is None:
            count = self.addresses.size
            self._consecutive = count <= 1 or bool(
                self.addresses[-1] - self.addresses[0] == (count - 1) * self.size
                and (self.addresses[1:] - self.addresses[:-1] == self.size).all()
            )
        return self._consecutive


class Observer:
    """Base class whose methods do nothing; override those needed."""

    def launch(self, launch: Launch, programs: Sequence[int], run: Run) -> None:
        """Wrap a launch of `programs`: `run` runs those it is given, in that order, and may be called again."""
        run(programs)

    def program(self, index: int) -> None:
        """Receive the index of the program that starts."""

    def load(self, access: Access) -> None:
        """Receive a load before it happens."""

    def loaded(self, access: Access, values: Array) -> None:
        """Receive a load's result: the values of the active lanes as NumPy holds them (bfloat16 is uint16)."""

    def store(self, access: Access, values: Array) -> None:
        """Receive a store of `values` by the active lanes before it happens."""

    def atomic(self, access: Access, ordered: bool) -> None:
        """Receive an atomic read-modify-write before it happens; `ordered` unless its memory semantics are relaxed."""

    def compute(self, operation: str, elements: int, dtype: str) -> None:
        """Receive an operation on values, such as "fadd" or "exp2", with its number of results and torch's dtype name.

        For "reduce" the number is that of operands, for "dot" that of multiply-adds; the dtype is the first operand's.
        """


class Objection(Exception):
    """Exception that an observer raises to stop a kernel; the interpreter passes it on unchanged."""


def dtype_name(value: Any) -> str:
    """Return torch's name of the type of a tl.tensor or TensorHandle."""
    kind = getattr(getattr(value, "dtype", None), "scalar", None)
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}.get(str(kind), str(kind))


active: list[Observer] = []
computing: list[Observer] = []  # the observers of arithmetic, which is too frequent to notify the others


def _set_active(listening: list[Observer]) -> None:
    active[:] = listening
    computing[:] = [observer for observer in listening if type(observer).compute is not Observer.compute]


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Notify `observer` of all interpreted code in the context. The latest observer is innermost around a launch."""
    _set_active([*active, observer])
    try:
        yield
    finally:
        _set_active([other for other in active if other is not observer])


@contextmanager
def unobserved() -> Iterator[None]:
    """Suspend all observers, for running programs again."""
    before = active[:]
    _set_active([])
    try:
        yield
    finally:
        _set_active(before)


def run_launch(launch: Launch, run_programs: Run) -> None:
    """Run all programs of a launch, as far as the observers permit."""

    def around(observer: Observer, inner: Run) -> Run:
        return lambda programs: observer.launch(launch, programs, inner) if observer in active else inner(programs)

    run = run_programs
    for observer in reversed(active):
        run = around(observer, run)
    run(range(launch.programs))


def lanes(pointers: Any, mask: Any) -> Access:
    """Return the access described by TensorHandles of pointers and a mask; no mask means all lanes are active."""
    addresses = pointers.data
    kept = addresses if mask is None else addresses[np.broadcast_to(mask, addresses.shape)]
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    return Access(np.ravel(kept).view(np.int64), addresses.size, size, pointers.attr.get("argument"))
