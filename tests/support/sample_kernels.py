"""Small kernels with known properties, in their own module because the workers that compile them import it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from evidence.launches import Recorder, Specialization
from evidence.observers import observing

GEMM_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}


@triton.jit
def add_kernel(x, y, total, count, BLOCK: tl.constexpr):
    """Add one block of two vectors."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(total + offsets, tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)


@triton.jit
def rows_kernel(x, y, rows, columns, BLOCK: tl.constexpr):
    """Loop over rows and, inside, twice over columns: two innermost loops, the first without a store."""
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            total += tl.exp2(tl.load(x + row * columns + start + tl.arange(0, BLOCK)))
        normaliser = tl.sum(total, axis=0)
        for start in range(0, columns, BLOCK):
            offsets = row * columns + start + tl.arange(0, BLOCK)
            tl.store(y + offsets, tl.exp2(tl.load(x + offsets)) / normaliser)


@triton.jit
def spill_kernel(x, y, BLOCK: tl.constexpr):
    """Keep a block in registers across a reduction, so that a large block spills."""
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x + offsets)
    tl.store(y + offsets, values - tl.max(values, axis=0))


@triton.jit
def matmul_kernel(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Compute c (M, N) = a (M, K) @ b (K, N), all contiguous, for sizes that are multiples of the blocks."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        total = tl.dot(tl.load(a + m * K + k[None, :]), tl.load(b + k[:, None] * N + n), total)
    tl.store(c + m * N + n, total.to(c.dtype.element_ty))


@triton.jit
def apply_kernel(x, y, RULE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Take a function and a type as constants."""
    offsets = tl.arange(0, BLOCK)
    tl.store(y + offsets, RULE(tl.load(x + offsets).to(KIND)))


class Vector(NamedTuple):
    ptr: Any
    scale: float | None
    bias_ptr: Any = None


@triton.jit
def scaled(x, vector):
    return x * vector.scale if vector.scale is not None else x


@triton.jit
def record_kernel(x, out, BLOCK: tl.constexpr):
    """Take a named tuple with absent members, and make another one that a loop carries."""
    offsets = tl.arange(0, BLOCK)
    sums = Vector(tl.zeros([BLOCK], tl.float32), 0.0)
    for start in range(0, tl.num_programs(0) * BLOCK, BLOCK):
        sums = Vector(sums.ptr + scaled(tl.load(x.ptr + start + offsets), x), 0.0)
    tl.store(out + offsets, sums.ptr)


@triton.jit
def square(x):
    return x * x


@triton.jit
def never_compiles_kernel(x):
    """Change the type of a value inside a loop, which the interpreter accepts and the compiler does not."""
    value = tl.load(x)
    for _ in range(tl.program_id(0) + 2):
        value = value.to(tl.float64)
    tl.store(x, value.to(tl.float32))


def recorded(launch: Callable[[], None]) -> list[Specialization]:
    """Return the kinds of kernel launch that `launch()` makes."""
    recorder = Recorder()
    with observing(recorder):
        launch()
    return list(recorder.kinds.values())


def add(count: int, offset: int = 0) -> None:
    """Launch `add_kernel` on `count` elements that begin `offset` elements after an aligned address."""
    x = torch.zeros(count + 4)[offset : offset + count]
    add_kernel[lambda meta: (triton.cdiv(meta["count"], meta["BLOCK"]),)](x, x, x, count, BLOCK=1024)
