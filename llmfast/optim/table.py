"""The pointer table: tensors of one dtype signature, as the optimizer kernels take them.

Parameters, states and sizes are written into it once. Gradient addresses and hyperparameters can change with every
step. They share one small buffer, and one asynchronous copy refreshes it; if nothing changed, there is no copy.
"""

from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmfast.optim.row import Bucket, Row, grad_of

if TYPE_CHECKING:
    from llmfast_kernels.optimizer import Kind

_grad, _dtype = attrgetter("grad"), attrgetter("dtype")
Hyper = dict[str, Any]  # hyperparameters of a group by their names: floats, or tensors that live on a device


class Signature(NamedTuple):
    """Properties that tensors must share to be updated in one launch."""

    device: torch.device
    kind: "Kind"
    bucket: Bucket | None  # the ranks that hold the other pieces of these tensors
    clip: int | None  # see `Row.clip`


def signature(row: Row) -> Signature:
    """Return what this row must share with others that go into its launch."""
    from llmfast_kernels.optimizer import Kind

    g = row.grad
    kind = Kind(
        param_dtype=row.local.dtype,
        grad_dtype=row.local.dtype if g is None else g.dtype,
        state_dtypes=tuple(None if state is None else state.dtype for state in row.states),
        master=row.master,
        low_dtype=None if row.low is None else row.low.dtype,
        averaged=row.ema is not None,
        strided=row.shard.strided,
    )
    return Signature(device=row.local.device, kind=kind, bucket=row.shard.bucket, clip=row.clip)


class PointerTable:
    """Addresses, sizes and step counters of tensors of one signature, on their device."""

    def __init__(self, signature: Signature, rows: list[Row], rule: str) -> None:
        from llmfast_kernels import optimizer as kernels

        self.signature, self._rule = signature, kernels.RULES[rule]
        self._hyper_names = kernels.group_record(self._rule.numbers).names or ()
        device = signature.device
        T = len(rows)
        self._params = [row.param for row in rows]
        self._locals = [row.local for row in rows]
        self._are_dtensors = any(row.param is not row.local for row in rows)
        self._strides = [p.stride() for p in self._locals]
        self._contiguous = all(p.is_contiguous() for p in self._locals)
        chunks = [-(-p.numel() // kernels.CHUNK.value) for p in self._locals]
        table = np.zeros(T, kernels.ROW)
        table["numel"] = [p.numel() for p in self._locals]
        table["first_chunk"] = np.cumsum([0, *chunks[:-1]])
        table["identity"] = [row.identity for row in rows]
        table["group"] = [row.group for row in rows]
        for name in ("run", "stride", "offset"):
            table[name] = [getattr(row.shard, name) for row in rows]
        for name, tensors in _tensors(rows).items():
            table[name] = [0 if t is None else t.data_ptr() for t in tensors]
        self.table = torch.from_numpy(table.view(np.int64).reshape(T, -1)).to(device)  # (T, columns of ROW)
        self.chunk_tensor = torch.from_numpy(np.repeat(np.arange(T, dtype=np.int32), chunks)).to(device)  # (programs,)
        width = len(kernels.coefficients_record(self._rule.coefficients).names or ())
        self.coefficients = torch.empty(T, width, dtype=torch.float32, device=device)
        self.squares = torch.zeros(sum(chunks), dtype=torch.float32, device=device)  # of gradients, for their norm

        # Each state's `step` becomes a view of one buffer, so that one kernel counts them all.
        self.steps = torch.stack([row.state["step"].to(device, torch.float32).reshape(()) for row in rows])  # (T,)
        for row, step in zip(rows, self.steps.unbind()):
            row.state["step"] = step
        self._host = self._dynamic = _no_memory()
        self._captured: list[Tensor] = []
        self.grads = self.hyper = self._dynamic
        self._known: tuple[list[int], list[Hyper]] = [], []  # gradient addresses and hyperparameters on the device

    def gradients(self) -> list[int] | None:
        """Return the gradients' addresses (0 for none); None if one has another dtype or memory order than the table's.

        Kernels take addresses, so this runs before every step: `map` over functions in C is the fastest loop there is.
        """
        grads: list[Any] = list(map(grad_of if self._are_dtensors else _grad, self._params))
        try:
            return self._addresses(grads, self._strides)
        except TypeError:  # some have no gradient
            there = [g for g in grads if g is not None]
            addresses = self._addresses(there, [s for s, g in zip(self._strides, grads) if g is not None])
            if addresses is None:
                return None
            left = iter(addresses)
            return [0 if g is None else next(left) for g in grads]

    def _addresses(self, grads: list[Tensor], strides: list[tuple[int, ...]]) -> list[int] | None:
        try:
            if self._contiguous:
                fits = all(map(Tensor.is_contiguous, grads))
            else:
                fits = list(map(Tensor.stride, grads)) == strides
            addresses = list(map(Tensor.data_ptr, grads))
        except (RuntimeError, NotImplementedError):  # a sparse one has neither
            return None
        if not fits or list(map(_dtype, grads)).count(self.signature.kind.grad_dtype) != len(grads):
            return None
        # An empty gradient has no address, but it exists.
        return [address or 1 for address in addresses] if 0 in addresses else addresses

    def refresh(self, addresses: list[int], hyper: list[Hyper], on_device: list[tuple[int, str, Tensor]]) -> bool:
        """Bring gradient addresses and hyperparameters, one dict per group, up to date on the device.

        Hyperparameters that live on a device, such as a learning rate, are copied there, by the index of their group
        and their name; the host does not look at them. Return True while a CUDA graph is captured.
        """
        in_graph = capturing(self.signature.device)
        if in_graph or (addresses, hyper) != self._known:
            self._upload(addresses, hyper, in_graph)
        for group, name, number in on_device:
            target = self.hyper[group, self._hyper_names.index(name)]
            target.copy_(number.reshape(()), non_blocking=target.device.type != "cpu")
        return in_graph

    def _upload(self, addresses: list[int], hyper: list[Hyper], in_graph: bool) -> None:
        T, shape = len(addresses), (len(hyper), len(self._hyper_names))
        size = T + shape[0] * shape[1]
        pinned = self.signature.device.type == "cuda"
        if in_graph:
            # A graph copies from this memory at every replay. So the memory becomes the graph's, as does the buffer it
            # is copied to, and steps outside the graph take others. The step before has allocated the memory.
            host, self._host, self._dynamic = self._host, _no_memory(), _no_memory()
            if host.numel() != size:
                raise RuntimeError("take one step between two captures in CUDA graphs")
        else:
            # Torch's allocator reuses pinned memory only after the copy from it is done.
            host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned)
            if pinned and self._host.numel() != size:
                self._host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
        host.numpy()[:T] = addresses
        host.numpy()[T:].view(np.float64)[:] = [numbers[name] for numbers in hyper for name in self._hyper_names]
        if self._dynamic.shape != host.shape:
            self._dynamic = torch.empty_like(host, device=self.signature.device, pin_memory=False)
            self.grads = self._dynamic[:T]  # (T,)
            self.hyper = self._dynamic[T:].view(torch.float64).view(shape)  # (groups, columns of group_record)
        self._dynamic.copy_(host, non_blocking=self._dynamic.device.type != "cpu")
        if in_graph:
            self._captured += [host, self._dynamic]
            self._known, self._dynamic = ([], []), _no_memory()
        else:
            self._known = addresses, hyper

    def sum_squares(self) -> Tensor:
        """Return the sum of the squares of all gradients, as a float64 scalar on the device."""
        from llmfast_kernels import optimizer as kernels

        total = torch.empty((), dtype=torch.float64, device=self.signature.device)
        kernels.sum_of_squares(
            self.table,
            self.grads,
            self.chunk_tensor,
            self.squares,
            total,
            grad_dtype=self.signature.kind.grad_dtype,
        )
        return total

    def step(
        self, sums: Tensor | None, zero: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor | None:
        """Update every tensor of the table in two launches.

        If `sums`, (n,) float64, are given, they add up to the square of the gradients' norm: clip by it, and return the
        norm before clipping.
        """
        from llmfast_kernels import optimizer as kernels

        norm = None if sums is None else torch.empty((), dtype=torch.float32, device=self.signature.device)
        kernels.prepare(
            self.table,
            self.grads,
            self.hyper,
            self.steps,
            self.coefficients,
            rule=self._rule,
            grad_scale=grad_scale,
            found_inf=found_inf,
            sums=sums,
            norm=norm,
        )
        kernels.update(
            self.table,
            self.grads,
            self.coefficients,
            self.chunk_tensor,
            rule=self._rule,
            kind=self.signature.kind,
            zero=zero,
            unscale=grad_scale is not None,
        )
        return norm


def _tensors(rows: list[Row]) -> dict[str, list[Tensor | None]]:
    """Return the tensors of every row by the names of their columns."""
    found: dict[str, list[Tensor | None]] = {
        "param": [row.local for row in rows],
        "low": [row.low for row in rows],
        "ema": [row.ema for row in rows],
    }
    found |= {f"state{i}": [row.states[i] for row in rows] for i in range(3)}
    return found | {f"scale{i}": [row.scales[i] for row in rows] for i in range(2)}


def _no_memory() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


def capturing(device: torch.device) -> bool:
    """Return True while a CUDA graph is captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
