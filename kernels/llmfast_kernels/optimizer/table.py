"""The records that host and kernels share: each is declared once, as a numpy dtype, and every column has a name.

The host fills records by name. A kernel finds a column by its number, which `column` looks up in the same record.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

# Elements per program: small models still fill a GPU, and the table stays comparatively small.
CHUNK = tl.constexpr(4096)

# One tensor. Addresses are 0 for a tensor that does not exist.
ROW = np.dtype(
    [
        ("param", np.int64),
        ("state0", np.int64),
        ("state1", np.int64),
        ("state2", np.int64),
        ("scale0", np.int64),  # of state0, if it has 8 bits
        ("scale1", np.int64),
        ("low", np.int64),  # what the parameter's format keeps besides the parameter
        ("ema", np.int64),
        ("numel", np.int64),
        ("first_chunk", np.int64),  # the program that updates its first elements
        ("group", np.int64),
        ("identity", np.int64),  # keeps the noise of two tensors apart
        # Element e of this piece is element e // run * stride + e % run + offset of the whole tensor.
        ("run", np.int64),
        ("stride", np.int64),
        ("offset", np.int64),
    ]
)

# One parameter group. The rule's own numbers follow: see `group_record`.
GROUP = np.dtype(
    [
        ("lr", np.float64),
        ("sign", np.float64),  # -1 to maximize
        ("decay_by_lr", np.float64),  # share of itself that a parameter loses per unit of lr
        ("decay", np.float64),  # share of itself that a parameter loses whatever lr is, unless it is 0
        ("l2", np.float64),
        ("ema_rate", np.float64),
        ("max_norm", np.float64),
        ("seed", np.float64),
    ]
)

# What the update needs to know of one tensor. The rule's own coefficients follow: see `coefficients_record`.
COEFFICIENTS = np.dtype(
    [
        ("active", np.float32),  # 0 if this step leaves the tensor as it is
        ("grad_factor", np.float32),
        ("decay", np.float32),
        ("l2", np.float32),
        ("ema_rate", np.float32),
        ("key0", np.uint32),
        ("key1", np.uint32),
    ]
)


def group_record(numbers: Iterable[str]) -> np.dtype[Any]:
    """Return the record of a parameter group, for a rule with these numbers of its own."""
    return np.dtype([*GROUP.descr, *((name, np.float64) for name in numbers)])


def coefficients_record(names: Iterable[str]) -> np.dtype[Any]:
    """Return the record of a tensor's coefficients, for a rule with these of its own."""
    return np.dtype([*COEFFICIENTS.descr, *((name, np.float32) for name in names)])


def column(record: np.dtype[Any], name: str) -> tl.constexpr:
    """Return the number of a column, for a kernel."""
    return tl.constexpr((record.names or ()).index(name))


def width(record: np.dtype[Any]) -> tl.constexpr:
    """Return the number of columns, for a kernel."""
    return tl.constexpr(len(record.names or ()))


ROW_WIDTH, GROUP_WIDTH, COEFFICIENTS_WIDTH = width(ROW), width(GROUP), width(COEFFICIENTS)
FIRST_CHUNK, NUMEL = column(ROW, "first_chunk"), column(ROW, "numel")

TRITON_TYPES = {
    None: None,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int16: tl.int16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}


@triton.jit
def load_columns(ptr, mask, other, COUNT: tl.constexpr):
    """Load COUNT columns from `ptr` on, as a tuple."""
    columns = ()
    for i in tl.static_range(COUNT):
        columns += (tl.load(ptr + i, mask=mask, other=other),)  # type: ignore[assignment]
    return columns


@triton.jit
def pointer(address, TYPE: tl.constexpr):
    """Return a pointer to what is at this address (int64), or None if TYPE is None: there is nothing."""
    ptr = None
    if TYPE is not None:
        ptr = address.to(tl.pointer_type(TYPE))
    return ptr


@triton.jit
def elements(ptr, start, i, ALIGNED: tl.constexpr):
    """Return pointers to elements start + i, or None if there is no pointer; ALIGNED says that it is on 16 bytes."""
    found = None  # Triton 3.4 cannot return an argument that is None
    if ptr is not None:
        if ALIGNED:
            # Rounding makes it a value of its own: the hint must not reach pointers made from the same address
            # elsewhere.
            ptr = tl.multiple_of((ptr.to(tl.int64) // 16 * 16).to(ptr.dtype), 16)
        found = ptr + start + i
    return found


@triton.jit
def load_grad(ptr, start, i, mask, aligned, WIDE: tl.constexpr):
    """Load a tile of the gradient: 16 bytes at a time if WIDE and `aligned`, which is None where it must be."""
    if WIDE:
        if aligned is None:
            g = tl.load(elements(ptr, start, i, True))
        else:
            if aligned:
                g = tl.load(elements(ptr, start, i, True))
            else:
                g = tl.load(elements(ptr, start, i, False))
    else:
        g = tl.load(elements(ptr, start, i, False), mask=mask)
    return g


@triton.jit
def store_grad(ptr, start, i, g, mask, aligned, WIDE: tl.constexpr):
    """Store a tile of the gradient as `load_grad` loads it."""
    if WIDE:
        if aligned is None:
            tl.store(elements(ptr, start, i, True), g)
        else:
            if aligned:
                tl.store(elements(ptr, start, i, True), g)
            else:
                tl.store(elements(ptr, start, i, False), g)
    else:
        tl.store(elements(ptr, start, i, False), g, mask=mask)
