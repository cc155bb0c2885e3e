"""Updates in plain torch, one tensor at a time, such as those of CPU tensors in formats that torch does not support."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmfast.optim import formats
from llmfast.optim.options import Options
from llmfast.optim.row import Row

Number = float | Tensor


def with_l2(grad: Tensor, param: Tensor, l2: float) -> Tensor:
    """Add an L2 penalty's gradient."""
    return grad + l2 * _bounded(param) if l2 else grad


def fall(param: Tensor, decay: Number, change: Tensor) -> None:
    """Shrink a parameter by the fraction `decay`, and subtract a change."""
    param.sub_(decay * _bounded(param) + change)


def _bounded(param: Tensor) -> Tensor:
    """Clamp to finite values: an infinite weight then stays infinite when a fraction of it is subtracted, not NaN."""
    largest = torch.finfo(param.dtype).max
    return param.clamp(-largest, largest)


@dataclass
class Amount:
    """The factor that unscales and clips gradients, and whether to skip the step. Tensors are scalars on the device."""

    factor: Tensor | None = None  # float64
    skip: Tensor | None = None  # bool
    norm: Tensor | None = None  # float32, before clipping

    @classmethod
    def of(
        cls, grad_scale: Tensor | None, found_inf: Tensor | None, sums: Tensor | None, max_norm: float | None
    ) -> "Amount":
        """Combine GradScaler's tensors with `sums`, (n,) float64, which add up to the square of the gradients' norm."""
        amount = cls()
        if grad_scale is not None:
            amount.factor = 1 / grad_scale.double().reshape(())
        if found_inf is not None:
            amount.skip = found_inf.reshape(()) != 0
        if sums is not None and max_norm is not None:
            scale = 1.0 if amount.factor is None else amount.factor
            norm = sums.sum().sqrt() * scale
            amount.norm = norm.float()
            amount.factor = (max_norm / (norm + 1e-6)).clamp(max=1.0) * scale
            overflow = ~norm.isfinite()
            amount.skip = overflow if amount.skip is None else amount.skip | overflow
        if amount.factor is not None and amount.factor.device.type == "cpu" and amount.factor == 1:
            amount.factor = None
        return amount

    @property
    def skipped(self) -> bool:
        """True if the host knows, without waiting for a device, that nothing may change."""
        return self.skip is not None and self.skip.device.type == "cpu" and bool(self.skip)

    def divisor(self) -> Tensor | None:
        """Return the number by which torch's fused CPU kernels divide gradients in place."""
        return None if self.factor is None else (1 / self.factor).float()

    def scaled(self, g: Tensor) -> Tensor:
        return g if self.factor is None else g * self.factor.to(g.dtype)


def leave(t: Tensor, x: Tensor) -> None:
    """Overwrite `t` with `x`, such as a gradient with the unscaled and clipped one, as torch's `unscale_` does."""
    if t.layout == torch.strided:  # write each element of an expanded gradient's memory once
        once = tuple(slice(None) if stride else slice(1) for stride in t.stride())
        t, x = t[once], x[once]
    t.copy_(x)


@contextmanager
def undone_if(skip: Tensor | None, tensors: list[Tensor]) -> Iterator[None]:
    """Undo all changes in the context if `skip`, a scalar on the device, is set, without waiting for the device."""
    if skip is None or skip.device.type == "cpu":  # the caller has checked `Amount.skipped`
        yield
        return
    before = [t.clone() for t in tensors]
    yield
    for t, old in zip(tensors, before):
        leave(t, torch.where(skip, old, t))


def update_plainly(
    rule: Callable[..., None], row: Row, amount: Amount, arguments: dict[str, Any], sign: float, o: Options
) -> None:
    """Update one tensor in float32 (float64 for float64)."""
    if amount.skipped:
        return
    p, g = row.local, row.grad
    assert g is not None
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    used = amount.scaled(g.to(dtype))
    with undone_if(amount.skip, row.tensors if amount.factor is None else [*row.tensors, g]):
        step = row.state["step"].add_(1)
        scales = (*row.scales, None)
        found = zip(row.names, row.states, scales)
        states: dict[Any, Tensor] = {name: _read(t, scale, dtype) for name, t, scale in found if t is not None}
        value = row.format.read(p, row.low, dtype)
        rule(value, used * sign, **states, step=step.double(), **arguments)
        noise = None
        if row.format.noisy or any(scale is not None for scale in scales):
            noise = _noise(row, step, o.seed)
        row.format.write(p, row.low, value, None if noise is None else noise[0])
        for i, (name, t, scale) in enumerate(zip(row.names, row.states, scales)):
            if t is not None:
                _write(t, scale, states[name], None if noise is None else noise[1] >> 16 * i)
        if row.ema is not None and o.ema_decay is not None:
            row.ema.lerp_(value.float(), 1 - o.ema_decay)
        if amount.factor is not None:
            leave(g, used)


def _noise(row: Row, step: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return random bits for every element, flat, in memory order."""
    run, stride, offset, _ = row.shard
    e = torch.arange(row.local.numel(), dtype=torch.int64, device=row.local.device)
    e = e // run * stride + e % run + offset
    return formats.noise(e, formats.noise_keys(seed, step.to(row.local.device), row.identity))


def _read(t: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return t.to(dtype, copy=True) if scale is None else formats.decoded_like(t, scale)


def _write(t: Tensor, scale: Tensor | None, x: Tensor, random: Tensor | None) -> None:
    if scale is None:
        t.copy_(x)
    else:
        scale.copy_(formats.encode_into(t, x, random))
