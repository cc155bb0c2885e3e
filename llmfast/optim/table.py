"""The pointer table: tensors of one dtype signature, as the optimizer kernels take them.

Parameters, states and sizes are written into it once. What changes from step to step, gradient addresses and
hyperparameters, shares one small buffer: refreshing it is one asynchronous copy, or none where nothing changed.
"""

from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmfast.optim.row import Bucket, Row, grad_of

_grad, _dtype = attrgetter("grad"), attrgetter("dtype")


class Signature(NamedTuple):
    """What tensors must share to go into one launch."""

    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtypes: tuple[torch.dtype | None, ...]  # three; None for those that there are not
    master: str | None
    low_dtype: torch.dtype | None
    averaged: bool
    strided: bool
    bucket: Bucket | None  # of ranks that hold the other pieces of these tensors
    clip: int | None  # see `Row.clip`


def signature(row: Row) -> Signature:
    g = row.grad
    return Signature(
        device=row.local.device,
        param_dtype=row.local.dtype,
        grad_dtype=row.local.dtype if g is None else g.dtype,
        state_dtypes=tuple(None if state is None else state.dtype for state in row.states),
        master=row.master,
        low_dtype=None if row.low is None else row.low.dtype,
        averaged=row.ema is not None,
        strided=row.shard.strided,
        bucket=row.shard.bucket,
        clip=row.clip,
    )


class PointerTable:
    """Addresses, sizes and step counters of tensors of one signature, on their device."""

    def __init__(self, signature: Signature, rows: list[Row], rule: str) -> None:
        from llmfast_kernels import optimizer as kernels

        self.signature, self.rule = signature, rule
        device = signature.device
        T = len(rows)
        self._params = [row.param for row in rows]
        self._locals = [row.local for row in rows]
        self._are_dtensors = any(row.param is not row.local for row in rows)
        self._strides = [p.stride() for p in self._locals]
        self._contiguous = all(p.is_contiguous() for p in self._locals)
        numels = [p.numel() for p in self._locals]
        chunks = [-(-numel // kernels.CHUNK) for numel in numels]
        table = np.zeros((T, kernels.COLUMNS.value), np.int64)
        for t, row in enumerate(rows):
            addresses = row.local, *row.states, *row.scales, row.low, row.ema  # from column PARAM to EMA
            table[t, : len(addresses)] = [0 if a is None else a.data_ptr() for a in addresses]
        table[:, kernels.NUMEL.value] = numels
        table[:, kernels.FIRST_CHUNK.value] = np.cumsum([0, *chunks[:-1]])
        table[:, kernels.HYPER.value] = [row.group for row in rows]
        table[:, kernels.IDENTITY.value] = [row.identity for row in rows]
        for i, name in enumerate(("run", "stride", "offset")):
            table[:, kernels.RUN.value + i] = [getattr(row.shard, name) for row in rows]
        self.table = torch.from_numpy(table).to(device)  # (T, COLUMNS)
        self.chunk_tensor = torch.from_numpy(np.repeat(np.arange(T, dtype=np.int32), chunks)).to(device)  # (programs,)
        self.coefficients = torch.empty(T, kernels.COEFFICIENTS.value, dtype=torch.float32, device=device)
        self.squares = torch.zeros(sum(chunks), dtype=torch.float32, device=device)  # of gradients, for their norm

        # Each state's `step` becomes a view of one buffer, so that one kernel counts them all.
        self.steps = torch.stack([row.state["step"].to(device, torch.float32).reshape(()) for row in rows])  # (T,)
        for row, step in zip(rows, self.steps.unbind()):
            row.state["step"] = step
        self._host = self._dynamic = _no_memory()
        self._captured: list[Tensor] = []
        self.grads = self.hyper = self._dynamic
        self._addresses_now: list[int] = []  # of the gradients
        self._addresses: list[int] = []  # those that the device knows
        self._hyper_values: list[list[float]] = []

    def looks(self) -> bool:
        """Take notice of the gradients; False if one has come in another dtype or memory order than the table's."""
        grads: list[Any] = list(map(grad_of if self._are_dtensors else _grad, self._params))
        strides = self._strides
        try:
            addresses = self._addresses_of(grads, strides)
        except TypeError:  # some have no gradient
            there = [g for g in grads if g is not None]
            addresses = self._addresses_of(there, [s for s, g in zip(strides, grads) if g is not None])
            if addresses is not None:
                left = iter(addresses)
                addresses = [0 if g is None else next(left) for g in grads]
        self._addresses_now = addresses or []
        return addresses is not None

    def _addresses_of(self, grads: list[Tensor], strides: list[tuple[int, ...]]) -> list[int] | None:
        """Of such gradients; None if the table cannot take them."""
        try:
            if self._contiguous:
                fits = all(map(Tensor.is_contiguous, grads))
            else:
                fits = list(map(Tensor.stride, grads)) == strides
            addresses = list(map(Tensor.data_ptr, grads))
        except (RuntimeError, NotImplementedError):  # a sparse one has neither
            return None
        if not fits or list(map(_dtype, grads)).count(self.signature.grad_dtype) != len(grads):
            return None
        # An empty gradient has no address, but is one.
        return [address or 1 for address in addresses] if 0 in addresses else addresses

    def refresh(self, hyper: list[list[float]], on_device: list[tuple[int, int, Tensor]]) -> bool:
        """Bring gradient addresses (0 for none) and hyperparameters, one list a group, up to date on the device.

        To be called when `looks` has. Hyperparameters that live on a device, such as a learning rate, are copied to row
        and column, unseen by the host.
        Returns True while a CUDA graph is captured.
        """
        addresses = self._addresses_now
        in_graph = capturing(self.signature.device)
        if in_graph or addresses != self._addresses or hyper != self._hyper_values:
            self._upload(addresses, hyper, in_graph)
        for row, column, number in on_device:
            self.hyper[row, column].copy_(number.reshape(()), non_blocking=self.hyper.device.type != "cpu")
        return in_graph

    def _upload(self, addresses: list[int], hyper: list[list[float]], in_graph: bool) -> None:
        T, shape = len(addresses), (len(hyper), len(hyper[0]))
        size = T + shape[0] * shape[1]
        pinned = self.signature.device.type == "cuda"
        if in_graph:
            # A graph copies from this memory at every replay, so that it becomes the graph's, as does the buffer it is
            # copied to. Steps outside the graph take others. The step before has laid the memory by.
            host, self._host, self._dynamic = self._host, _no_memory(), _no_memory()
            if host.numel() != size:
                raise RuntimeError("take one step between two captures in CUDA graphs")
        else:
            # Pinned memory is torch's to reuse only once the copy from it is done: its allocator sees to that.
            host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=pinned)
            if pinned and self._host.numel() != size:
                self._host = torch.empty(size, dtype=torch.int64, device="cpu", pin_memory=True)
        host.numpy()[:T] = addresses
        host.numpy()[T:].view(np.float64)[:] = np.asarray(hyper, np.float64).ravel()
        if self._dynamic.shape != host.shape:
            self._dynamic = torch.empty_like(host, device=self.signature.device, pin_memory=False)
            self.grads = self._dynamic[:T]  # (T,)
            self.hyper = self._dynamic[T:].view(torch.float64).view(shape)  # (groups, hyperparameters)
        self._dynamic.copy_(host, non_blocking=self._dynamic.device.type != "cpu")
        if in_graph:
            self._captured += [host, self._dynamic]
            self._addresses, self._hyper_values, self._dynamic = [], [], _no_memory()
        else:
            self._addresses, self._hyper_values = addresses, hyper

    def sum_squares(self) -> Tensor:
        """The sum of the squares of all gradients, as a float64 scalar on the device."""
        from llmfast_kernels import grad_norm

        total = torch.empty((), dtype=torch.float64, device=self.signature.device)
        grad_norm.sum_of_squares(
            self.table, self.grads, self.chunk_tensor, self.squares, total, grad_dtype=self.signature.grad_dtype
        )
        return total

    def step(
        self, sums: Tensor | None, zero: bool, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor | None:
        """One step of every tensor of the table, by two launches; with sums of squares, clipped to their root.

        Returns that root.
        """
        from llmfast_kernels import optimizer as kernels

        _, param_dtype, grad_dtype, state_dtypes, master, low_dtype, averaged, strided, *_ = self.signature
        norm = None if sums is None else torch.empty((), dtype=torch.float32, device=self.signature.device)
        kernels.prepare(
            self.table, self.grads, self.hyper, self.steps, self.coefficients, rule=self.rule,
            grad_scale=grad_scale, found_inf=found_inf, sums=sums, norm=norm,
        )  # fmt: skip
        kernels.update(
            self.table, self.grads, self.coefficients, self.chunk_tensor,
            rule=self.rule, param_dtype=param_dtype, grad_dtype=grad_dtype, state_dtypes=state_dtypes,
            master=master, low_dtype=low_dtype, strided=strided, averaged=averaged, zero=zero,
            unscale=grad_scale is not None,
        )  # fmt: skip
        return norm


def _no_memory() -> Tensor:
    return torch.empty(0, dtype=torch.int64, device="cpu")


def capturing(device: torch.device) -> bool:
    """True while a CUDA graph is captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
