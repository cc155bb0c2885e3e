"""Properties of the target that every launch needs, and the choice of tiles."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor
from triton import knobs
from triton.runtime import driver

# Written at every launch: Triton 3.10 turns contraction of a*b + c into one rounding off by default,
# and numerics must not change with the compiler's version.
FP_FUSION = {"enable_fp_fusion": True}
INTERPRETED = bool(knobs.runtime.interpret)  # asked once, as decorators of kernels do: it reads the environment


class Tile(NamedTuple):
    """Division of a program's work among threads."""

    elements: int  # per thread
    threads: int  # per program, at most


class Choice:
    """A tile that only measurements can choose: the default, and others that work too.

    `llmfast doctor --full --tune` times them all. There is no tuning at run time: to choose another tile, change the
    default in the source.
    """

    def __init__(self, default: Tile, *others: Tile) -> None:
        self.tiles = default, *others
        self.chosen = default

    @contextmanager
    def trying(self, tile: Tile) -> Iterator[None]:
        """Use another tile inside the context. For measurements and tests."""
        before, self.chosen = self.chosen, tile
        try:
            yield
        finally:
            self.chosen = before


def warps(threads: int) -> int:
    """Return the number of warps (wavefronts on AMD) that hold `threads` threads on the current target."""
    # The interpreter has no driver to ask, and no warps.
    target = None if INTERPRETED else driver.active.get_current_target()
    return max(1, threads // (32 if target is None else target.warp_size))


def expect_contiguous(**tensors: Tensor | None) -> None:
    """Raise ValueError for a tensor that is not contiguous: a kernel that ignores its strides would misread it."""
    for name, t in tensors.items():
        if t is not None and not t.is_contiguous():
            raise ValueError(f"{name} must be contiguous; got strides {t.stride()} for shape {tuple(t.shape)}")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 0
