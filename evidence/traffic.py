"""Count bytes moved and operations done by interpreted Triton kernels and by the torch operators between them.

    with traffic.counting() as counts:
        loss = linear_cross_entropy(hidden, weight, targets)
        loss.backward()
    print(counts.table(per=N * V))

Every access of a kernel is observed, so its counts are exact. There are three measures of its bytes: those its lanes
request (`loaded`, `stored`, `updated`: the bytes moved without any cache), the 32-byte sectors touched by each access
(`sectors`: the cost of misaligned or scattered accesses), and distinct bytes per launch (`unique_...`: the bytes moved
if caches keep everything during a launch and nothing between launches). `dram`, the sum of the unique ones, is the
figure to compare. Kernels of other libraries are counted unchanged.

For torch operators, the tensors are counted: each is read and written once, completely, unless the operator is known to
touch less. FLOPs are counted for matrix products only.

`counting(dry=True)` supports sizes that no CPU can compute: operators on large tensors are counted but not run, a
sample of a launch's programs represents the rest, and large memory is reserved but not used. Counts that depend on the
values of large tensors are then meaningless.
"""

import functools
import math
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from evidence.dry_run import run_dry
from evidence.observers import Access, Array, Launch, Observer, Run, observing
from evidence.pretend_cuda import PRODUCTS_INTO_OTHER_DTYPES

SECTOR = 32  # bytes, the minimum that GPUs move between memory and the L2 cache


@dataclass
class Traffic:
    """Work of one kernel launch or torch operator, or the sum of several. In bytes unless stated otherwise."""

    name: str
    by: str  # "triton" or "torch"
    calls: int = 1
    loaded: float = 0
    stored: float = 0
    updated: float = 0  # by atomic operations, counted once
    unique_loaded: float = 0  # includes reads by atomic operations
    unique_stored: float = 0
    sectors: float = 0
    dot_flops: Counter[str] = field(default_factory=Counter)  # of matrix products, by the operands' dtype
    flops: float = 0  # of other float arithmetic; a fused multiply-add counts as two
    transcendentals: float = 0  # exp2, log2, square root, division, tanh, ...: work of the special function units
    syncs: int = 0  # operators for which the host waits on a GPU

    @property
    def moved(self) -> float:
        return self.loaded + self.stored + 2 * self.updated

    @property
    def dram(self) -> float:
        return self.unique_loaded + self.unique_stored

    def add(self, other: "Traffic", weight: float = 1) -> None:
        """Add another's work `weight` times, and its calls and waits once."""
        for name in ("loaded", "stored", "updated", "unique_loaded", "unique_stored", "sectors", "flops"):
            setattr(self, name, getattr(self, name) + weight * getattr(other, name))
        self.transcendentals += weight * other.transcendentals
        self.dot_flops.update({dtype: round(weight * flops) for dtype, flops in other.dot_flops.items()})
        self.calls += other.calls
        self.syncs += other.syncs


@dataclass
class Counts:
    """All counts, in order."""

    traffic: list[Traffic] = field(default_factory=list)
    peak_bytes: int = 0  # peak of the bytes of tensors created meanwhile

    def total(self, by: str | None = None) -> Traffic:
        """Return the sum, restricted to one kind if `by` is "triton" or "torch"."""
        total = Traffic("total", by or "both", calls=0)
        for t in self.traffic:
            if by in (None, t.by):
                total.add(t)
        return total

    def by_name(self) -> dict[str, Traffic]:
        """Return sums by name, those that move the most bytes first."""
        sums: dict[str, Traffic] = {}
        for t in self.traffic:
            sums.setdefault(t.name, Traffic(t.name, t.by, calls=0)).add(t)
        return dict(sorted(sums.items(), key=lambda item: -item[1].dram))

    def table(self, per: float = 1.0) -> str:
        """Format a table by name, with all numbers except the calls divided by `per`."""
        head = ("calls", "loaded", "stored", "updated", "dram", "sectors", "dot flops", "flops", "special")
        lines = [f"{'':44}" + "".join(f"{name:>14}" for name in head)]
        for t in [*self.by_name().values(), self.total()]:
            numbers = (t.loaded, t.stored, t.updated, t.dram, t.sectors, sum(t.dot_flops.values()), t.flops)
            row = "".join(f"{n / per:14,.3f}" for n in (*numbers, t.transcendentals))
            lines.append(f"{t.name[:43]:44}{t.calls:14,}{row}")
        return "\n".join([*lines, f"peak of tensors made meanwhile: {self.peak_bytes:,} bytes"])


@contextmanager
def counting(*, dry: bool = False) -> Iterator[Counts]:
    """Count the work of kernels and torch in the context, forward and backward."""
    counts = Counts()
    with observing(_KernelCounter(counts, dry)), _TorchCounter(counts, dry):
        yield counts


# Triton.

_SPECIAL = (
    *("exp", "exp2", "log", "log2", "sin", "cos", "erf", "sqrt", "precise_sqrt", "rsqrt", "libdevice"),
    *("fdiv", "frem", "precise_divf", "approx_divf"),
)
_FLOPS = {"fadd": 1, "fsub": 1, "fmul": 1, "fneg": 1, "fma": 2, "minimumf": 1, "maximumf": 1, "minnumf": 1}
_FLOPS |= {"maxnumf": 1, "clampf": 2, "reduce": 1}


class _Ranges:
    """Set of byte addresses, as runs from `begin` to `end`."""

    def __init__(self) -> None:
        self._begins: list[Array] = []
        self._ends: list[Array] = []

    def add(self, begins: Array, ends: Array) -> None:
        self._begins.append(begins)
        self._ends.append(ends)
        if len(self._begins) > 4096:
            self._merge()

    def _merge(self) -> None:
        begins, ends = np.concatenate(self._begins), np.concatenate(self._ends)
        order = np.argsort(begins, kind="stable")
        begins, ends = begins[order], np.maximum.accumulate(ends[order])
        first = np.append(True, begins[1:] > ends[:-1])  # True for a run that does not touch the previous one
        last = np.append(first[1:], True)
        self._begins, self._ends = [begins[first]], [ends[last]]

    def bytes(self) -> int:
        if not self._begins:
            return 0
        self._merge()
        return int((self._ends[0] - self._begins[0]).sum())


def _runs(access: Access) -> tuple[Array, Array]:
    """Return the runs of adjacent bytes that an access covers, each byte once."""
    addresses = access.addresses
    steps = addresses[1:] - addresses[:-1]
    if (steps != access.size).any():
        addresses = np.sort(addresses)
        addresses = addresses[np.append(True, addresses[1:] != addresses[:-1])]
        steps = addresses[1:] - addresses[:-1]
    breaks = np.flatnonzero(steps != access.size)
    return addresses[np.append(0, breaks + 1)], addresses[np.append(breaks, -1)] + access.size


class _KernelCounter(Observer):
    def __init__(self, counts: Counts, dry: bool) -> None:
        self._counts = counts
        self._dry = dry
        self._known: dict[object, Traffic] = {}  # of launches in a dry run, by everything that determines them

    def launch(self, launch: Launch, programs: Sequence[int], run: Run) -> None:
        if self._dry:
            traffic = self._sampled(launch, run)
        else:
            traffic = self._begin(launch.name)
            run(programs)
            traffic.unique_loaded = sum(ranges.bytes() for ranges in self._loads.values())
            traffic.unique_stored = sum(ranges.bytes() for ranges in self._stores.values())
        self._counts.traffic.append(traffic)

    def _begin(self, name: str) -> Traffic:
        self._now = Traffic(name, "triton")
        # Accesses of all tensors together; in a dry run, by the argument they belong to.
        self._loads: dict[str | None, _Ranges] = {}
        self._stores: dict[str | None, _Ranges] = {}
        return self._now

    def _sampled(self, launch: Launch, run: Run) -> Traffic:
        """Count some programs and multiply each by the number it represents."""
        known = (launch.kernel, launch.grid, *((name, _outline(v)) for name, v in launch.arguments.items()))
        if known not in self._known:
            total = Traffic(launch.name, "triton", calls=0)
            loads: Counter[str | None] = Counter()
            stores: Counter[str | None] = Counter()
            for program, weight in sample(launch.grid):
                traffic = self._begin(launch.name)
                run([program])
                total.add(traffic, weight)
                for unique, sets in ((loads, self._loads), (stores, self._stores)):
                    for argument, ranges in sets.items():
                        unique[argument] += round(weight * ranges.bytes())
            # Programs may touch the same bytes, but a launch touches no more bytes than the tensor has.
            most = {name: t.numel() * t.element_size() for name, t in launch.tensors()}
            total.calls = 1
            total.unique_loaded = sum(min(n, most.get(argument or "", n)) for argument, n in loads.items())
            total.unique_stored = sum(min(n, most.get(argument or "", n)) for argument, n in stores.items())
            self._known[known] = total
        return self._known[known]

    def load(self, access: Access) -> None:
        self._now.loaded += access.addresses.size * access.size
        self._touch(access, self._loads)

    def store(self, access: Access, values: Array) -> None:
        self._now.stored += access.addresses.size * access.size
        self._touch(access, self._stores)

    def atomic(self, access: Access, ordered: bool) -> None:
        self._now.updated += access.addresses.size * access.size
        self._touch(access, self._loads, self._stores)

    def _touch(self, access: Access, *sets: dict[str | None, _Ranges]) -> None:
        if access.addresses.size:
            begins, ends = _runs(access)
            first, last = begins // SECTOR, (ends - 1) // SECTOR
            sectors = (last - first + 1).sum() - (first[1:] == last[:-1]).sum()
            self._now.sectors += int(sectors) * SECTOR * len(sets)
            for ranges in sets:
                ranges.setdefault(access.argument if self._dry else None, _Ranges()).add(begins, ends)

    def compute(self, operation: str, elements: int, dtype: str) -> None:
        if operation == "dot":
            self._now.dot_flops[dtype] += 2 * elements
        elif operation in _SPECIAL:
            self._now.transcendentals += elements
        else:
            self._now.flops += elements * _FLOPS.get(operation, 0)


def sample(grid: tuple[int, int, int]) -> list[tuple[int, float]]:
    """Return programs that represent a whole grid, each with the number of programs it represents.

    Takes all programs of a short axis; of a long one the last, which may have less work, and two of the others.
    """
    short = 16 if sum(n > 1 for n in grid) == 1 else 3

    def along(n: int) -> list[tuple[int, float]]:
        if n <= short:
            return [(i, 1.0) for i in range(n)]
        return [(0, (n - 1) / 2), ((n - 1) // 2, (n - 1) / 2), (n - 1, 1.0)]

    return [((x * grid[1] + y) * grid[2] + z, wx * wy * wz) for (x, wx), (y, wy), (z, wz) in product(*map(along, grid))]


def _outline(value: Any) -> object:
    """Return what determines the traffic of a launch with this argument, except for the values of tensors."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.data_ptr() % SECTOR
    if isinstance(value, tuple):
        return tuple(map(_outline, value))
    return getattr(value, "value", value)


# torch.

_aten = torch.ops.aten
_SYNCS = {_aten._local_scalar_dense, _aten.nonzero, _aten.equal, _aten.is_nonzero, _aten.masked_select, _aten._unique2}
_BY_INDEX = {_aten.index, _aten.index_put_}  # which wait to count the elements of a mask
_WRITE_ONLY = {_aten.fill_, _aten.zero_, _aten.copy_, _aten.normal_, _aten.uniform_, _aten.random_, _aten.bernoulli_}
_NO_TRAFFIC = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_NO_TRAFFIC |= {_aten._unsafe_view, _aten.detach, _aten.alias, _aten.lift_fresh, _aten.set_, _aten.resize_}
_ONLY_SHAPE_OF_INPUT = {
    _aten.zeros_like,
    _aten.ones_like,
    _aten.full_like,
    _aten.new_zeros,
    _aten.new_full,
    _aten.new_ones,
}
_ONLY_SHAPE_OF_INPUT |= {_aten.rand_like, _aten.randn_like}

# Operators that touch only part of a tensor. `_PICKS` names the argument of which a part is read, `_SCATTERS` the one
# whose size is that of the part of `self` that is touched.
_PICKS = {_aten.gather: "self", _aten.index_select: "self", _aten.index: "self", _aten.embedding: "weight"}
_PICKS |= {_aten.nll_loss_forward: "self", _aten.take: "self"}
_SCATTERS = {_aten.index_add_: "source", _aten.scatter_add_: "src", _aten.scatter_: "src", _aten.index_put_: "values"}
_SCATTERS |= {_aten.index_copy_: "source", _aten.scatter_reduce_: "src"}


# Updates of many tensors whose schema says that they also write the gradients.
_FUSED_UPDATES = {_aten._fused_adamw_, _aten._fused_adam_, _aten._fused_sgd_, _aten._fused_adagrad_}
# Matrix products missing from torch's own FLOP table.
_PRODUCTS_IN_PLACE = {_aten.addmm_: ("mat1", "mat2")}


def _bytes(t: Tensor) -> int:
    """Count the bytes of the distinct elements of a tensor: an expanded dimension counts once."""
    return math.prod(n for n, stride in zip(t.shape, t.stride()) if stride != 0) * t.element_size()


def _tensors(value: Any) -> list[Tensor]:
    """Return the tensors in an argument or a result of an operator, which may be a list."""
    if isinstance(value, Tensor):
        return [value]
    return [t for member in value for t in _tensors(member)] if isinstance(value, list | tuple) else []


class _Argument(NamedTuple):
    """Argument of an operator, as its schema describes it."""

    name: str
    writes: bool
    reads: bool
    positional: bool


@functools.cache  # torch takes longer to answer than to run a small operator
def _arguments(func: Any) -> list[_Argument]:
    packet, found = func._overloadpacket, []
    for argument in func._schema.arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        only_written = writes and (argument.is_out or packet in _WRITE_ONLY)
        reads = not only_written and packet not in _ONLY_SHAPE_OF_INPUT
        found.append(_Argument(argument.name, writes, reads, not argument.kwarg_only))
    return found


@functools.cache
def _moves_nothing(func: Any) -> bool:
    return bool(func.is_view) or func._overloadpacket in _NO_TRAFFIC


class _TorchCounter(TorchDispatchMode):
    def __init__(self, counts: Counts, dry: bool) -> None:
        super().__init__()
        self._counts = counts
        self._dry = dry
        self._alive = 0
        self._storages: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (custom := OPDEFS.get(func._schema.name)) is not None:
            with self:  # consists of operators itself
                return custom._init_fn(*args, **kwargs)
        outputs = run_dry(func, args, kwargs) if self._dry else func(*args, **kwargs)
        inputs, results = _tensors([*args, *kwargs.values()]), _tensors(outputs)
        given = {t.untyped_storage()._cdata for t in inputs}
        for t in results:
            if t.untyped_storage()._cdata not in given:
                self._track(t)
        if not _moves_nothing(func) and (inputs or results):
            self._counts.traffic.append(_operator_traffic(func, args, kwargs, results))
        return outputs

    def _track(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed() -> None:
            self._alive -= self._storages.pop(key)

        self._storages[key] = size
        self._alive += size
        self._counts.peak_bytes = max(self._counts.peak_bytes, self._alive)
        weakref.finalize(storage, freed)


def _operator_traffic(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> Traffic:
    packet, arguments = func._overloadpacket, _arguments(func)
    bound = dict(zip((a.name for a in arguments), args)) | kwargs
    read: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    written: list[Tensor] = []
    for argument in arguments:
        tensors, writes = _tensors(bound.get(argument.name)), argument.writes
        if packet in _FUSED_UPDATES and argument.name == "grads":
            writes = bound.get("grad_scale") is not None  # if so, gradients are unscaled in place
        if writes:
            written += tensors
        if argument.reads:
            read |= {(t.data_ptr(), tuple(t.shape)): t for t in tensors}
    loaded, stored = sum(map(_bytes, read.values())), sum(map(_bytes, written or results))
    if packet in _PICKS:
        whole = bound[_PICKS[packet]]
        loaded += min(0, _picked(packet, bound, results) - _bytes(whole))
    elif packet in _SCATTERS:
        touched = _bytes(source) if isinstance(source := bound.get(_SCATTERS[packet]), Tensor) else 0
        loaded += min(0, touched - _bytes(bound["self"]))
        stored = min(touched, stored)
    elif packet is _aten.nll_loss_backward:
        loaded -= _bytes(bound["self"])  # only its shape is used
    traffic = Traffic(func._schema.name.split("::")[1], "torch", loaded=loaded, stored=stored)
    traffic.unique_loaded, traffic.unique_stored = loaded, stored
    traffic.sectors = loaded + stored
    traffic.syncs = int(packet in _SYNCS or (packet in _BY_INDEX and _has_mask(bound["indices"])))
    if factors := PRODUCTS_INTO_OTHER_DTYPES.get(func) or _PRODUCTS_IN_PLACE.get(packet):
        a, b = (bound[name] for name in factors)
        traffic.dot_flops[_name(a.dtype)] += 2 * a.shape[0] * a.shape[1] * b.shape[1]
    elif packet in flop_registry:
        dtype = next(t.dtype for t in read.values())
        operands = [bound[a.name] for a in arguments if a.name in bound and a.positional]
        flops = flop_registry[packet](*operands, out_val=results[0] if len(results) == 1 else tuple(results))
        traffic.dot_flops[_name(dtype)] += int(flops)
    return traffic


def _has_mask(indices: list[Tensor | None]) -> bool:
    return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)


def _picked(packet: Any, bound: dict[str, Any], results: list[Tensor]) -> int:
    """Count the bytes read from a tensor from which elements are selected."""
    if packet is _aten.nll_loss_forward:
        return int(bound["target"].numel() * bound["self"].element_size())
    return sum(map(_bytes, results))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
