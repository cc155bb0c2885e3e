"""Small kernels with known properties, and launches of them, for the tests of `support.machine_code`.

Imported by its worker processes only: in an interpreting process there is nothing to compile.
"""

import torch
import triton
import triton.language as tl

from support.machine_code import label


@triton.jit
def add_kernel(x, y, total, count, BLOCK: tl.constexpr):
    """One block of a vector addition."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(total + offsets, tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)


@triton.jit
def rows_kernel(x, y, rows, columns, BLOCK: tl.constexpr):
    """Loops over rows and, inside, twice over columns: two innermost loops, the first without a store."""
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
    """Keeps a block in registers across a reduction: too many for a thread if the block is large."""
    offsets = tl.arange(0, BLOCK)
    values = tl.load(x + offsets)
    tl.store(y + offsets, values - tl.max(values, axis=0))


def add_launches() -> None:
    """The same addition on aligned sizes, on a bound that is no multiple of 16, and once more under another name."""
    for name, count in [("aligned", 4096), ("unaligned", 4095), ("again", 8192)]:
        x = torch.empty(count, device="meta")
        with label("add"), label(name):
            add_kernel[lambda meta: (triton.cdiv(meta["count"], meta["BLOCK"]),)](x, x, x, count, BLOCK=1024)


def loop_launches() -> None:
    """The kernel of nested loops."""
    x = torch.empty(64, 4096, device="meta")
    rows_kernel[(8,)](x, x, 64, 4096, BLOCK=1024, num_warps=4, enable_fp_fusion=False)


def spill_launches() -> None:
    """One kernel that fits its registers and one that does not."""
    x = torch.empty(32768)
    for block in (1024, 65536):
        with label(str(block)):
            spill_kernel[(1,)](x, x, BLOCK=block, num_warps=2)


def failing_launches() -> None:
    """Something goes wrong."""
    raise ValueError("planted failure")
