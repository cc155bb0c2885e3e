"""Comparisons of results with float64, with plain torch in the same dtype, and with themselves.

Ours may be no further from the truth than plain torch, plus a few roundings; see `numerics`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmfast.checkup.record import Finding

GUARD = 4096  # elements on each side of a guarded tensor
SENTINEL = 77.0


class Sizes(NamedTuple):
    """The shapes of this section."""

    N: int
    V: int
    D: int
    repeats: int
    budget: int  # bytes for slabs, small enough for several
    wide: tuple[int, int]  # N, V with N * V above 2^31
    numels: tuple[int, ...]  # of an optimizer's parameters


def excess(ours: Tensor, torchs: Tensor, truth: Tensor, scale: float = 0.0) -> float:
    """Return by how much |truth - ours| exceeds |truth - torch| + slack at worst; not above 0 if all is right.

    The slack is one rounding of the result's own dtype, since torch can be lucky, and a few roundings of float32 at the
    size of the intermediate values, `scale` (for a loss, that of the logits). NaN or infinity where the truth has
    something else, or the other way round, exceeds by infinity.
    """
    truth = truth.double()
    if not (torch.equal(ours.isnan(), truth.isnan()) and torch.equal(ours.isinf(), truth.isinf())):
        return float("inf")
    error, allowed = (truth - ours.double()).abs(), (truth - torchs.double()).abs()
    slack = torch.finfo(ours.dtype).eps * truth.abs() + 4 * torch.finfo(torch.float32).eps * scale + 1e-9
    over = (error - allowed - slack)[truth.isfinite()]
    return float(over.max()) if over.numel() else 0.0


def excess_in_norm(ours: Tensor, torchs: Tensor, truth: Tensor, *, factor: float = 1.5) -> float:
    """Return the same for norms, because single elements of long sums differ by luck."""
    truth = truth.double()
    if not bool(ours.isfinite().all()):
        return float("inf")
    error, allowed = (truth - ours.double()).norm(), (truth - torchs.double()).norm()
    return float(error - factor * allowed - 2e-6 * truth.norm() - 1e-6)


def told(what: str, by: float, ours: Tensor, truth: Tensor) -> Finding:
    """Make the finding of a comparison."""
    error = (ours.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300)
    return Finding(what, by <= 0, {"excess": by, "relative_error": float(error)})


def same_bits(what: str, run: Callable[[], tuple[Tensor, ...]], times: int) -> Finding:
    """Run something again and again, and say whether the results are equal to the bit."""
    first = [t.clone() for t in run()]
    different: Any = 0
    for _ in range(times - 1):
        # No `equal`: NaN equals NaN here, and nothing waits for the device in between.
        again = run()
        different = different + sum((_bits(a) != _bits(b)).sum() for a, b in zip(first, again))
    return Finding(what, int(different) == 0, {"times": times, "elements_that_differ": int(different)})


def _bits(t: Tensor) -> Tensor:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return t.contiguous().view(integers[t.element_size()])


class Guarded:
    """A tensor with sentinels before and behind it."""

    def __init__(self, values: Tensor, *, offset: int = 0) -> None:
        flat = torch.full((values.numel() + 2 * GUARD,), SENTINEL, dtype=values.dtype, device=values.device)
        self._memory, self._start, self._end = flat, GUARD + offset, GUARD + offset + values.numel()
        self.tensor = flat[self._start : self._end].view(values.shape)
        self.tensor.copy_(values)

    def finding(self) -> Finding:
        """Say whether anything was written outside of the tensor."""
        outside = torch.cat([self._memory[: self._start], self._memory[self._end :]])
        written = int((outside != SENTINEL).sum())
        return Finding("memory around it", written == 0, {"elements_written": written})


class Inputs:
    """Random numbers that are the same on every device."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self._device = device
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=self._generator, dtype=torch.float32, device="cpu")
        return (drawn * scale).to(self._device, dtype)

    def positive(self, *shape: int) -> Tensor:
        return self.normal(*shape).abs() + 0.1

    def classes(self, V: int, *shape: int) -> Tensor:
        """Draw classes, of which about one in four is ignored."""
        drawn = torch.randint(0, V, shape, generator=self._generator, dtype=torch.int64, device="cpu")
        ignored = torch.rand(shape, generator=self._generator, dtype=torch.float32, device="cpu") < 0.25
        return torch.where(ignored, -100, drawn).to(self._device)


def scalar_of(result: Any) -> Tensor:
    """Return one number whose gradient is that of everything differentiable in a loss's result."""
    if not isinstance(result, Tensor):
        loss, stats = result
        further: Tensor = stats.lse.mean() + stats.entropy.mean()
        return scalar_of(loss) + 0.1 * further
    weights = torch.arange(1, result.numel() + 1, dtype=result.dtype, device=result.device)
    total: Tensor = (result.reshape(-1) * weights).sum() / weights.sum()
    return total


def compare(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    tensors: dict[str, Tensor],
    repeats: int,
    *,
    in_norm: bool,
) -> Iterator[Finding]:
    """Compare ours, plain torch in the same dtype, and plain torch in float64; then ours with itself."""

    def results(run: Callable[..., Any], given: list[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in given]
        value = scalar_of(run(*leaves))
        return value.detach(), *torch.autograd.grad(value, leaves)

    given = list(tensors.values())
    mine, theirs = results(ours, given), results(plain, given)
    truth = results(plain, [t.double() for t in given])
    scale = 10.0 * float(truth[0].abs().clamp(min=1.0))
    for what, a, b, c in zip(("loss", *(f"gradient of {name}" for name in tensors)), mine, theirs, truth):
        if not in_norm:
            by = excess(a, b, c, scale if what == "loss" else 0.0)
        elif what != "loss":
            by = excess_in_norm(a, b, c)
        else:  # plain torch rounds the logits, and ours may too: by about as much
            by = float((a.double() - c).abs() - 2 * (b.double() - c).abs() - 1e-3 * c.abs())
        yield told(what, by, a, c)
    yield same_bits("repeated", lambda: results(ours, given), repeats)
