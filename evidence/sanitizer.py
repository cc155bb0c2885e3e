"""Detection of faulty accesses by interpreted kernels, most of which a GPU would execute silently.

    with sanitizer.sanitizing():
        library_function(tensors)  # raises Fault at the first fault

* An access outside the elements of the tensor from whose pointer it was computed; for pointers passed as numbers (such
  as an optimizer's table of addresses), outside of all existing tensors.
* Two programs that access the same element without an order between them, unless both only read it or both are atomic.
  Atomic operations order programs as on a GPU, so locks and "the last program adds up" are understood.
* One store that writes two values to one address.
* A result that depends on unwritten memory. New tensors are filled with a pattern; if a kernel reads it, its programs
  run again over another pattern. (Reading padding and masking it is fine, so reads alone are not faults.)
* An output that a launch fills only in part.
* A result that depends on the order of the programs: a process's first launch of each kind and grid runs again in
  reverse order.

Limits: interactions between the threads of one program are not modelled, and only code that a test runs is checked.
"""

import ctypes
import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from evidence.launches import specialization
from evidence.observers import Access, Array, Launch, Objection, Observer, Run, observing, unobserved
from evidence.replaced import replaced

# Repeated through new memory. A NaN in every floating-point type; as an integer, an out-of-bounds index.
PATTERN = 0x7FF5
OTHER_PATTERN = 0x3C3C  # an ordinary number in all of them


class Fault(Objection):
    """Faulty behaviour of a kernel."""


@contextmanager
def sanitizing() -> Iterator[None]:
    """Check every launch in the context, and fill the memory that torch allocates."""
    with observing(Sanitizer()), _filled_allocations(), _few_objects():
        yield


Index = slice | Array


@dataclass
class _Memory:
    """Stretch of memory covered by one or more tensors, with the programs that accessed each element in this launch."""

    low: int
    high: int
    granule: int  # bytes of the smallest element in it
    name: str
    bytes: Array = field(init=False)  # the memory itself
    before: Array = field(init=False)  # content before the launch
    # Per element, 1 + the last program that accessed it; for loads and updates, -1 after unordered programs.
    stored: Array = field(init=False)
    loaded: Array = field(init=False)
    updated: Array = field(init=False)  # updated atomically
    changed: bool = False  # whether any element was stored or updated

    def __post_init__(self) -> None:
        self.bytes = _memory_at(self.low, self.high - self.low)
        self.before = self.bytes.copy()
        elements = -(-(self.high - self.low) // self.granule)
        self.stored, self.loaded, self.updated = (np.zeros(elements, np.int32) for _ in range(3))

    def words(self) -> Array:
        """Return the memory as unsigned integers, one per element."""
        whole = self.bytes.size // self.granule * self.granule
        return self.bytes[:whole].view(f"u{self.granule}")

    def written(self) -> Array:
        either: Array = (self.stored != 0) | (self.updated != 0)
        return either


@dataclass
class _Bounds:
    """Positions of the elements of one tensor."""

    low: int
    high: int
    size: int
    axes: tuple[tuple[int, int], ...]  # (stride, length), widest first; empty if the tensor has no gaps

    @classmethod
    def of(cls, t: Tensor) -> "_Bounds":
        axes = sorted(((stride, n) for n, stride in zip(t.shape, t.stride()) if stride > 0 and n > 1), reverse=True)
        span = 1 + sum((n - 1) * stride for stride, n in axes)
        dense = span == t.numel()
        low = t.data_ptr()
        return cls(low, low + span * t.element_size(), t.element_size(), () if dense else tuple(axes))

    def contain(self, elements: Array) -> Array:
        """Return a mask of the offsets from the first element, within the span, at which there are elements."""
        inside = np.ones(elements.shape, bool)
        for stride, length in self.axes:
            inside &= elements // stride < length
            elements = elements % stride
        return inside & (elements == 0) if self.axes else inside

    def outside(self, access: Access) -> Array:
        """Return the addresses outside the tensor."""
        addresses = access.addresses
        if not self.axes and access.consecutive:
            first, last = access.ends
            if self.low <= first and last + access.size <= self.high:
                return addresses[:0]
        wrong = (addresses < self.low) | (addresses + access.size > self.high)
        if not wrong.any():
            wrong = ~self.contain((addresses - self.low) // self.size)
        return addresses[wrong]

    def meets(self, memory: _Memory) -> bool:
        return self.low < memory.high and memory.low < self.high


class Sanitizer(Observer):
    """Observer that raises `Fault`. Install it last, as the innermost observer, because it runs programs repeatedly."""

    _in_order: ClassVar[set[tuple[str, tuple[int, int, int]]]] = set()  # launches whose order was seen not to matter

    def __init__(self) -> None:
        self._hidden = _HiddenTensors()

    # A launch.

    def launch(self, launch: Launch, programs: Sequence[int], run: Run) -> None:
        self._launch = launch
        tensors = [(name, t) for name, t in launch.tensors() if t.numel() > 0]
        self._bounds = {name: _Bounds.of(t) for name, t in tensors}
        self._memories: list[_Memory] = []
        self._add_memories(tensors)
        # Where a tensor without gaps lies, in which most accesses need no search.
        self._own = {
            name: next(m for m in self._memories if m.low <= bounds.low < m.high)
            for name, bounds in self._bounds.items()
            if not bounds.axes
        }
        self._released: dict[int, set[int]] = {}
        # Argument, addresses and element size of each load of undefined memory.
        self._undefined: list[tuple[str, Array, int]] = []

        run(programs)
        self._check_outputs()
        if self._undefined:
            self._check_influence(programs, run)
        kind = (specialization(launch).key, launch.grid)
        if len(programs) > 1 and kind not in self._in_order:
            self._check_order(programs, run)
            self._in_order.add(kind)

    def _add_memories(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        """Create memories for the tensors, one per group of overlapping tensors."""
        spans = sorted((b.low, b.high, b.size, name) for name, t in tensors for b in [_Bounds.of(t)])
        merged: list[tuple[int, int, int, str]] = []
        for low, high, size, name in spans:
            if merged and low < merged[-1][1]:
                before = merged.pop()
                low, high = before[0], max(before[1], high)
                size, name = min(before[2], size), f"{before[3]}|{name}"
            merged.append((low, high, size, name))
        self._memories = sorted([*self._memories, *(_Memory(*span) for span in merged)], key=lambda m: m.low)
        self._lows = np.array([memory.low for memory in self._memories], dtype=np.int64)
        self._highs = np.array([memory.high for memory in self._memories], dtype=np.int64)

    def _check_outputs(self) -> None:
        for memory in self._memories:
            if not memory.stored.any() or memory.granule == 1:
                continue
            unwritten = (memory.words() == _repeated(PATTERN, memory.granule)) & ~memory.written()
            for name, bounds in self._bounds.items():
                if not memory.low <= bounds.low < memory.high or bounds.size != memory.granule:
                    continue
                part = unwritten[(bounds.low - memory.low) // bounds.size :][
                    : (bounds.high - bounds.low) // bounds.size
                ]
                part = part & bounds.contain(np.arange(part.size))
                if part.any():
                    self._fail(f"leaves {part.sum()} of {part.size} elements of {name} unwritten", int(part.argmax()))

    def _check_influence(self, programs: Sequence[int], run: Run) -> None:
        """Run again over different undefined memory; no written value may change."""
        results = self._swap([memory.before for memory in self._memories])
        for _, addresses, size in self._undefined:
            for address in np.unique(addresses):
                _memory_at(int(address), size).view(f"u{size}")[:] = _repeated(OTHER_PATTERN, size)
        with unobserved():
            run(programs)
        again = self._swap(results)
        for memory, first, second in zip(self._memories, results, again):
            changed = _differs(first, second, memory.granule) & memory.written()
            if changed.any():
                name, addresses, size = self._undefined[0]
                low = self._bounds[name].low if name in self._bounds else memory.low
                self._fail(
                    f"writes {memory.name} from what it read in {name}, which nobody wrote",
                    (int(addresses[0]) - low) // size,
                )

    def _check_order(self, programs: Sequence[int], run: Run) -> None:
        results = self._swap([memory.before for memory in self._memories])
        with unobserved():
            run(list(reversed(programs)))
        backwards = self._swap(results)
        for memory, first, second in zip(self._memories, results, backwards):
            changed = _differs(first, second, memory.granule)
            if changed.any():
                self._fail(f"writes other bits to {memory.name} when its programs run backwards", int(changed.argmax()))

    def _swap(self, contents: list[Array]) -> list[Array]:
        """Swap `contents` with the memories and return what they held."""
        held = [memory.bytes.copy() for memory in self._memories]
        for memory, content in zip(self._memories, contents):
            memory.bytes[:] = content
        return held

    # A program's accesses.

    def program(self, index: int) -> None:
        self._program = index
        self._ordered: set[int] = set()  # programs known to have come before, as 1 + number

    def load(self, access: Access) -> None:
        for memory, at in self._find(access, "load"):
            if memory.changed:
                self._refuse_unordered(memory.stored, at, memory, "loads", "stored")
                self._refuse_unordered(memory.updated, at, memory, "loads", "updated")
            self._mark(memory.loaded, at)

    def loaded(self, access: Access, values: Array) -> None:
        # Any 16 bits are an ordinary integer; the pattern stands out only in floating-point numbers or wider types.
        if access.size > 1 and values.itemsize == access.size and values.dtype != np.int16:
            undefined = values.view(f"u{access.size}") == _repeated(PATTERN, access.size)
            if undefined.any():
                self._undefined.append((access.argument or "memory", access.addresses[undefined], access.size))

    def store(self, access: Access, values: Array) -> None:
        for memory, at in self._find(access, "store"):
            self._refuse_unordered(memory.stored, at, memory, "stores", "stored")
            self._refuse_unordered(memory.loaded, at, memory, "stores", "loaded")
            self._refuse_unordered(memory.updated, at, memory, "stores", "updated")
            memory.stored[at] = self._program + 1
            memory.changed = True
        if not access.consecutive:
            order = np.argsort(access.addresses, kind="stable")
            addresses, words = access.addresses[order], values[order].view(f"u{values.itemsize}")
            twice = (addresses[1:] == addresses[:-1]) & (words[1:] != words[:-1])
            if twice.any():
                self._fail_at("stores two values at once", addresses[1:][twice][0], access)

    def atomic(self, access: Access, ordered: bool) -> None:
        touched = self._find(access, "update")
        for memory, at in touched:
            self._refuse_unordered(memory.stored, at, memory, "updates", "stored")
            self._refuse_unordered(memory.loaded, at, memory, "updates", "loaded")
        if ordered and access.addresses.size == 1:
            released = self._released.setdefault(int(access.addresses[0]), set())
            self._ordered |= released
            released |= self._ordered | {self._program + 1}
        for memory, at in touched:
            self._mark(memory.updated, at)
            memory.changed = True

    def _mark(self, programs: Array, at: Index) -> None:
        """Note that this program accessed elements, and where others did before without an order between them."""
        before = programs[at]
        programs[at] = np.where(self._unordered(before), -1, self._program + 1) if before.any() else self._program + 1

    def _find(self, access: Access, verb: str) -> list[tuple[_Memory, Index]]:
        """Return the memories that an access touches, with the elements it touches there."""
        if access.addresses.size == 0:
            return []
        if access.consecutive and access.argument in self._own and access.size == self._own[access.argument].granule:
            memory, whole, (first, last) = self._own[access.argument], self._bounds[access.argument], access.ends
            if whole.low <= first and last + access.size <= whole.high:
                begin = (first - memory.low) // access.size
                return [(memory, slice(begin, begin + access.addresses.size))]
        if access.argument is not None:
            bounds = self._bounds.get(access.argument)
            wrong = access.addresses if bounds is None else bounds.outside(access)
            if wrong.size:
                self._fail_at(f"would {verb} outside", wrong[0], access)
        elif self._in_no_memory(access).size:
            self._search_hidden_tensors(access)
            if (wrong := self._in_no_memory(access)).size:
                self._fail_at(f"would {verb} outside of all tensors", wrong[0], access)
        if access.consecutive:
            memory = self._memories[self._owners(access.ends[0])]
            if memory.granule == access.size and access.ends[1] < memory.high:
                begin = (access.ends[0] - memory.low) // access.size
                return [(memory, slice(begin, begin + access.addresses.size))]
        found: list[tuple[_Memory, Index]] = []
        owners = self._owners(access.addresses)
        for owner in np.unique(owners):
            memory = self._memories[owner]
            first = (access.addresses[owners == owner] - memory.low) // memory.granule
            parts = np.arange(-(-access.size // memory.granule))
            found.append((memory, np.unique(first[:, None] + parts)))
        return found

    def _owners(self, addresses: Any) -> Any:
        """Return the indices of the memories; -1 for an address below all of them."""
        return np.searchsorted(self._lows, addresses, side="right") - 1

    def _in_no_memory(self, access: Access) -> Array:
        addresses = access.addresses
        if access.consecutive:
            owner = self._owners(access.ends[0])
            if owner >= 0 and access.ends[1] + access.size <= self._highs[owner]:
                return addresses[:0]
        owners = self._owners(addresses)
        lost: Array = addresses[(owners < 0) | (addresses + access.size > self._highs[np.maximum(owners, 0)])]
        return lost

    def _search_hidden_tensors(self, access: Access) -> None:
        """Add the tensors that contain the addresses; of a tensor and its views, the smallest that fits."""
        for address in (wanted := self._in_no_memory(access)):
            if not self._in_no_memory(access).size:
                return
            tensor = self._hidden.covering(int(address))
            if tensor is not None and not any(_Bounds.of(tensor).meets(memory) for memory in self._memories):
                self._add_memories([("memory", tensor)])
            elif address == wanted[0]:
                return  # a stray address before all others; do not search for its neighbours

    # Order and faults.

    def _unordered(self, programs: Array) -> Array:
        """Return True where another program that is not known to have come before accessed an element."""
        others: Array = (programs != 0) & (programs != self._program + 1)
        if self._ordered and others.any():
            others &= ~np.isin(programs, list(self._ordered))
        return others

    def _refuse_unordered(self, programs: Array, at: Index, memory: _Memory, verb: str, other_verb: str) -> None:
        touched = programs[at]
        others = self._unordered(touched)
        if others.any():
            element = at.start + int(others.argmax()) if isinstance(at, slice) else int(at[others.argmax()])
            other = int(touched[others.argmax()])
            who = f"program {other - 1}" if other > 0 else "several others"
            self._fail(f"{verb} what {who} {other_verb}, in {memory.name}", element)

    def _fail_at(self, what: str, address: int, access: Access) -> None:
        bounds = self._bounds.get(access.argument or "")
        if bounds is None:
            self._fail(f"{what}, at address {int(address)}")
        else:
            elements = (bounds.high - bounds.low) // bounds.size
            self._fail(f"{what} {access.argument}, of {elements} elements", (int(address) - bounds.low) // bounds.size)

    def _fail(self, what: str, element: int | None = None) -> NoReturn:
        where = "" if element is None else f": element {element}"
        raise Fault(f"{self._launch.name}, program {self._program} of {self._launch.programs}, {what}{where}")


def _memory_at(address: int, size: int) -> Array:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _repeated(pattern: int, size: int) -> int:
    return int.from_bytes(pattern.to_bytes(2, "little") * (size // 2), "little")


def _differs(first: Array, second: Array, granule: int) -> Array:
    """Return, per element, whether two contents of a memory differ."""
    different = np.zeros((-(-first.size // granule), granule), dtype=bool)
    different.reshape(-1)[: first.size] = first != second
    return np.asarray(different.any(axis=1))


FROZEN = 3  # beyond the collector's generations: what `_few_objects` took out of them


class _HiddenTensors:
    """Tensors that a kernel reaches through addresses in memory, found by asking the garbage collector."""

    def __init__(self) -> None:
        self._known: dict[int, weakref.ref[Tensor]] = {}
        self._lows = self._highs = np.zeros(0, np.int64)
        self._tensors: list[weakref.ref[Tensor]] = []

    def covering(self, address: int) -> Tensor | None:
        """Return the smallest tensor with an element at the address."""
        # Search the collector's young generations first: they have few objects, and a step's gradients are new.
        for generation in (None, 0, 1, 2, FROZEN):
            if generation == FROZEN:
                gc.unfreeze()
                self._collect(gc.get_objects(2))
                gc.freeze()
            elif generation is not None:
                self._collect(gc.get_objects(generation))
            covers = np.flatnonzero((self._lows <= address) & (address < self._highs))
            alive = [t for i in covers if (t := self._tensors[i]()) is not None and self._lows[i] == t.data_ptr()]
            if alive:
                return min(alive, key=Tensor.numel)
        return None

    def _collect(self, objects: list[Any]) -> None:
        kinds = (Tensor, torch.nn.Parameter)
        fresh = [o for o in objects if type(o) in kinds and o.is_cpu and o.layout == torch.strided and o.numel() > 0]
        self._known |= {id(t): weakref.ref(t) for t in fresh}
        self._known = {key: reference for key, reference in self._known.items() if reference() is not None}
        self._tensors = list(self._known.values())
        spans = [
            (b.low, b.high) for reference in self._tensors if (t := reference()) is not None for b in [_Bounds.of(t)]
        ]
        self._lows, self._highs = np.array(spans, dtype=np.int64).reshape(-1, 2).T


@contextmanager
def _few_objects() -> Iterator[None]:
    """Leave older objects out of the collector's generations, because modules alone are a million of them."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _filled_allocations() -> Iterator[None]:
    """Fill what torch leaves undefined with `PATTERN`."""

    def filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(allocate)
        def run(*args: Any, **kwargs: Any) -> Tensor:
            t = allocate(*args, **kwargs)
            if not torch.compiler.is_compiling() and type(t) is Tensor and t.is_cpu and t.element_size() > 1:
                storage = t.untyped_storage()
                _memory_at(storage.data_ptr(), storage.nbytes() // 2 * 2).view(np.uint16)[:] = PATTERN
            return t

        return run

    with replaced(("empty", "empty_like", "empty_strided"), ("new_empty", "new_empty_strided"), filling):
        yield
