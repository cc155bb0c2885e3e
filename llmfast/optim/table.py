"""The pointer table: tensors of one dtype signature, as the optimizer kernels take them.

Parameters, states and sizes are written into it once. What changes from step to step, gradient addresses and
hyperparameters, shares one small buffer: refreshing it is one asynchronous copy, or none where nothing changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Signature(NamedTuple):
    """What tensors must share to go into one launch."""

    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    state_dtype: torch.dtype
    state_names: tuple[str, ...]


@dataclass
class Row:
    """One parameter, the index of its group, and its entry in the optimizer's state."""

    param: Tensor
    group: int
    state: dict[str, Any]


class PointerTable:
    """Addresses, sizes and step counters of tensors of one signature, on their device."""

    def __init__(self, signature: Signature, rows: list[Row]) -> None:
        from llmfast_kernels import optimizer as kernels

        self.signature = signature
        T, device = len(rows), signature.device
        self.params = [row.param for row in rows]
        chunks = [-(-p.numel() // kernels.CHUNK) for p in self.params]
        self._rows = rows
        table = np.zeros((kernels.TABLE_ROWS, T), np.int64)
        table[kernels.PARAM] = [p.data_ptr() for p in self.params]
        for i, name in enumerate(signature.state_names):
            table[kernels.FIRST_STATE + i] = [row.state[name].data_ptr() for row in rows]
        self._numels = [p.numel() for p in self.params]
        table[kernels.NUMEL] = self._numels
        table[kernels.FIRST_CHUNK] = np.cumsum([0, *chunks[:-1]])
        table[kernels.GROUP] = [row.group for row in rows]
        self.table = torch.from_numpy(table).to(device)  # (TABLE_ROWS, T)
        self.chunk_tensor = torch.from_numpy(np.repeat(np.arange(T, dtype=np.int32), chunks)).to(device)  # (programs,)
        self.coefficients = torch.empty(T, kernels.COEFFICIENTS, dtype=torch.float32, device=device)

        # Each state's `step` becomes a view of one buffer, so that one kernel counts them all.
        self.steps = torch.stack([row.state["step"].to(device, torch.float32).reshape(()) for row in rows])  # (T,)
        for row, step in zip(rows, self.steps.unbind()):
            row.state["step"] = step
        names = ("step", *signature.state_names)
        self._states = [(row.state, name, row.state[name]) for row in rows for name in names]
        self._tensors = [*self.params, *(tensor for _, _, tensor in self._states)]
        self._addresses = [t.data_ptr() for t in self._tensors]

        self._dynamic = torch.empty(0)
        self.grads = self.hyper = self._dynamic
        self._grad_addresses: list[int] = []
        self._hyper_values: list[list[float]] = []

    def holds(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """False once something the table points to is no longer what it was; `states` are the optimizer's.

        Parameters or states may have moved or been replaced, or a gradient come in another dtype or memory order.
        """
        _, _, grad_dtype, _, _ = self.signature
        for p in self.params:
            g = p.grad
            if g is not None and (g.dtype != grad_dtype or g.layout != torch.strided or g.stride() != p.stride()):
                return False
        return (
            [t.data_ptr() for t in self._tensors] == self._addresses
            and [p.numel() for p in self.params] == self._numels
            and all(states.get(row.param) is row.state for row in self._rows)
            and all(state.get(name) is tensor for state, name, tensor in self._states)
        )

    def refresh(self, hyper: list[list[float]], lrs: list[float | Tensor]) -> None:
        """Bring gradient addresses (0 for none) and hyperparameters, one list a group, up to date on the device.

        A learning rate that lives on the device is copied there, unseen by the host.
        """
        # An empty gradient has no address, but is one.
        addresses = [0 if (g := p.grad) is None else g.data_ptr() or 1 for p in self.params]
        if addresses != self._grad_addresses or hyper != self._hyper_values:
            T, shape = len(addresses), (len(hyper), len(hyper[0]))
            # Pinned memory is torch's to reuse only once the copy from it is done: its allocator sees to that.
            host = torch.empty(
                T + shape[0] * shape[1], dtype=torch.int64, pin_memory=self.signature.device.type == "cuda"
            )
            host.numpy()[:T] = addresses
            host.numpy()[T:].view(np.float64)[:] = np.asarray(hyper, np.float64).ravel()
            if self._dynamic.shape != host.shape:
                self._dynamic = torch.empty_like(host, device=self.signature.device, pin_memory=False)
                self.grads = self._dynamic[:T]  # (T,)
                self.hyper = self._dynamic[T:].view(torch.float64).view(shape)  # (groups, hyperparameters)
            self._dynamic.copy_(host, non_blocking=True)
            self._grad_addresses, self._hyper_values = addresses, hyper
        for row, lr in enumerate(lrs):
            if isinstance(lr, Tensor) and lr.device.type != "cpu":
                self.hyper[row, 0].copy_(lr.reshape(()), non_blocking=True)
