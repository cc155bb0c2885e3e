"""Counts where the answer is known by hand."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for a run of this file without a conftest

import re
import resource
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from evidence import interpreter
from evidence.dry_run import reserve
from evidence.observers import Access
from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import Counts, Traffic, _KernelCounter, _Ranges, _runs, counting, sample
from llmfast._dispatch import kernels_on_cpu
from llmfast.losses import cross_entropy, linear_cross_entropy
from llmfast.optim import FusedAdamW
from support.plans import forced
from support.sample_kernels import matmul_kernel

interpreter.install()


def counted(run: Callable[[], object], *, dry: bool = False) -> Counts:
    with counting(dry=dry) as counts:
        run()
    return counts


# Kernels.


@triton.jit
def softmax_kernel(x_ptr, y_ptr, columns, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * stride + i, mask=i < columns, other=-float("inf"))
    e = tl.exp(x - tl.max(x, axis=0))
    tl.store(y_ptr + tl.program_id(0) * stride + i, e / tl.sum(e, axis=0), mask=i < columns)


@pytest.mark.parametrize("dry", [False, True])
def test_softmax_reads_and_writes_each_element_once(dry: bool) -> None:
    rows, columns = 24, 96
    x = torch.randn(rows, columns)
    counts = counted(lambda: softmax_kernel[(rows,)](x, torch.empty_like(x), columns, columns, BLOCK=128), dry=dry)
    (kernel,) = [t for t in counts.traffic if t.by == "triton"]
    n = rows * columns
    assert (kernel.loaded, kernel.stored, kernel.updated) == (4 * n, 4 * n, 0)
    assert kernel.dram == kernel.moved == kernel.sectors == 8 * n
    # Masked lanes compute too: exponential and quotient; difference, maximum and sum.
    assert kernel.transcendentals == 2 * rows * 128
    assert kernel.flops == 3 * rows * 128


@triton.jit
def arithmetic_kernel(x_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    if HOW == "fma":
        x = tl.fma(x, x, x)
    elif HOW == "add":
        x = x + x
    elif HOW == "subtract":
        x = x - 1.0
    elif HOW == "multiply":
        x = x * x
    elif HOW == "maximum":
        x = tl.maximum(x, 0.5)
    elif HOW == "clamp":
        x = tl.clamp(x, 0.0, 0.5)
    elif HOW == "divide":
        x = x / 3.0
    elif HOW == "root":
        x = tl.sqrt(x)
    elif HOW == "logarithm":
        x = tl.log(x)
    tl.store(x_ptr + tl.arange(0, BLOCK), x)


@pytest.mark.parametrize(
    ("how", "flops", "special"),
    [
        ("nothing", 0, 0),
        ("add", 1, 0),
        ("subtract", 1, 0),
        ("multiply", 1, 0),
        ("fma", 2, 0),
        ("maximum", 1, 0),
        ("clamp", 2, 0),
        ("divide", 0, 1),
        ("root", 0, 1),
        ("logarithm", 0, 1),
    ],
)
def test_what_each_operation_counts(how: str, flops: int, special: int) -> None:
    counts = counted(lambda: arithmetic_kernel[(1,)](torch.rand(64), HOW=how, BLOCK=64))
    kernel = counts.by_name()["arithmetic_kernel"]
    assert (kernel.flops, kernel.transcendentals) == (64 * flops, 64 * special)


@triton.jit
def strided_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride))


@pytest.mark.parametrize(("stride", "offset", "sectors"), [(1, 0, 8), (1, 1, 9), (2, 0, 16), (8, 0, 64), (9, 0, 64)])
def test_sectors_show_what_scattered_and_unaligned_accesses_cost(stride: int, offset: int, sectors: int) -> None:
    x = torch.zeros(1024)[offset:]
    counts = counted(lambda: strided_kernel[(1,)](x, torch.empty(64), stride, BLOCK=64))
    kernel = counts.by_name()["strided_kernel"]
    assert kernel.loaded == kernel.unique_loaded == 4 * 64
    assert kernel.sectors == 32 * (sectors + 8)


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tiled_matmul(dtype: torch.dtype, dry: bool) -> None:
    M, N, K = 192, 64, 96
    a, b, c = torch.zeros(M, K, dtype=dtype), torch.zeros(K, N, dtype=dtype), torch.empty(M, N, dtype=dtype)
    blocks = {"BLOCK_M": 32, "BLOCK_N": 16, "BLOCK_K": 32}
    counts = counted(lambda: matmul_kernel[(M // 32, N // 16)](a, b, c, M, N, K, **blocks), dry=dry)
    kernel = counts.by_name()["matmul_kernel"]
    size = dtype.itemsize
    assert kernel.dot_flops == {str(dtype).removeprefix("torch."): 2 * M * N * K}
    assert kernel.loaded == (N // 16 * M * K + M // 32 * K * N) * size  # a once a column of tiles, b once a row
    assert kernel.unique_loaded == (M * K + K * N) * size
    assert kernel.stored == kernel.unique_stored == M * N * size


@triton.jit
def histogram_kernel(x_ptr, bins_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))
    tl.atomic_add(bins_ptr + x, 1)


def test_atomics_read_and_write() -> None:
    x, bins = torch.arange(64) % 4, torch.zeros(4, dtype=torch.int32)
    counts = counted(lambda: histogram_kernel[(2,)](x, bins, BLOCK=32))
    kernel = counts.by_name()["histogram_kernel"]
    assert (kernel.loaded, kernel.stored, kernel.updated) == (8 * 64, 0, 4 * 64)
    assert kernel.moved == 8 * 64 + 2 * 4 * 64
    assert (kernel.unique_loaded, kernel.unique_stored) == (8 * 64 + 16, 16)
    assert kernel.sectors == 8 * 64 + 2 * 2 * 32  # each of two programs reads and writes the sector of the bins


@pytest.mark.parametrize(("dtype", "bytes_per_parameter"), [(torch.float32, 28), (torch.bfloat16, 14)])
@pytest.mark.parametrize("dry", [False, True])
def test_adamw(dtype: torch.dtype, bytes_per_parameter: int, dry: bool) -> None:
    """Count reads of parameter, gradient and two moments, and writes of all but the gradient."""
    p = torch.zeros(1 << 17, dtype=dtype, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = FusedAdamW([p])
    with kernels_on_cpu():
        optimizer.step()
        counts = counted(optimizer.step, dry=dry)
    kernel = counts.by_name()["update_kernel"]
    assert bytes_per_parameter <= kernel.dram / p.numel() < bytes_per_parameter + 0.01  # and a table
    assert bytes_per_parameter <= counts.total().dram / p.numel() < bytes_per_parameter + 0.01


@pytest.mark.parametrize(("scaled", "bytes_per_parameter"), [(False, 28), (True, 32)])
def test_torchs_fused_adamw(scaled: bool, bytes_per_parameter: int) -> None:
    p = torch.zeros(1 << 12, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW([p], fused=True)
    if scaled:
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.zeros(())
    optimizer.step()
    total = counted(optimizer.step).total()
    assert bytes_per_parameter <= total.dram / p.numel() < bytes_per_parameter + 0.01


@pytest.mark.parametrize(
    ("kind", "bytes_per_parameter"),
    [
        (lambda p: torch.optim.SGD([p], lr=0.1, momentum=0.9, fused=True), 20),  # reads p, g and m, writes p and m
        (lambda p: torch.optim.Adagrad([p], fused=True), 20),
        (lambda p: torch.optim.Adam([p], fused=True), 28),
    ],
)
def test_torchs_other_fused_optimizers(
    kind: Callable[[Tensor], torch.optim.Optimizer], bytes_per_parameter: int
) -> None:
    p = torch.zeros(1 << 12, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = kind(p)
    optimizer.step()
    total = counted(optimizer.step).total()
    assert bytes_per_parameter <= total.dram / p.numel() < bytes_per_parameter + 0.01


# torch.


def torch_traffic(run: Callable[[], object]) -> Traffic:
    counts = counted(run)
    assert all(t.by == "torch" for t in counts.traffic)
    return counts.total()


X, Y = torch.randn(30, 40), torch.randn(40, 50)
INDEX = torch.randint(0, 30, (7,))
n, m = 4 * 30 * 40, 4 * 7 * 40  # bytes of X, and of its rows at INDEX


@pytest.mark.parametrize(
    ("run", "loaded", "stored"),
    [
        (lambda: X + X, n, n),  # the same tensor twice is read once
        (lambda: X + X.T.contiguous().T, 3 * n, 2 * n),
        (lambda: X.t().reshape(8, 150).view(-1), n, n),  # the reshape copies
        (lambda: X[3:].T.unsqueeze(0), 0, 0),
        (lambda: torch.empty_like(X), 0, 0),
        (lambda: torch.zeros_like(X), 0, n),
        (lambda: X.clone().zero_(), n, 2 * n),
        (lambda: torch.empty_like(X).copy_(X), n, n),
        (lambda: X.clone().mul_(2), 2 * n, 2 * n),
        (lambda: torch.mul(X, 2, out=torch.empty_like(X)), n, n),
        (lambda: X + torch.ones(1).expand(30, 40), n + 4, n + 4),
        (lambda: X[INDEX], m + 56, m),
        (lambda: X.index_select(0, INDEX), m + 56, m),
        (lambda: F.embedding(INDEX, X), m + 56, m),
        (lambda: X.gather(0, INDEX[:, None]), 28 + 56, 28),
        (lambda: F.nll_loss(X, torch.arange(30)), 30 * 4 + 30 * 8, 30 * 8 + 4 + 4),  # the loss and its divisor
        (lambda: F.nll_loss(X, torch.arange(30), reduction="none"), 30 * 4 + 30 * 8, 30 * 8 + 30 * 4 + 4),
        (lambda: F.nll_loss(X.bfloat16(), torch.arange(30)), n + 30 * 2 + 30 * 8, n // 2 + 30 * 8 + 2 + 2),
        (lambda: torch.zeros_like(X).index_add_(0, INDEX, X[INDEX]), (m + 56) + 2 * m + 56, n + m + m),
        (lambda: X.to(torch.bfloat16), n, n // 2),
        (lambda: torch._foreach_mul_([X.clone(), X.clone()], 1.0), 4 * n, 4 * n),
    ],
)
def test_bytes_of_torchs_operators(run: Callable[[], object], loaded: int, stored: int) -> None:
    total = torch_traffic(run)
    assert (total.loaded, total.stored) == (loaded, stored)


@pytest.mark.parametrize(
    "run",
    [
        lambda: X @ Y,
        lambda: torch.mm(X, Y, out=torch.empty(30, 50)),
        lambda: torch.addmm(torch.zeros(50), X, Y),
        lambda: torch.zeros(30, 50).addmm_(X, Y),
        lambda: F.linear(X, Y.T),
    ],
)
def test_flops_of_torchs_matrix_products(run: Callable[[], object]) -> None:
    assert torch_traffic(run).dot_flops == {"float32": 2 * 30 * 40 * 50}


def test_products_into_float32() -> None:
    a, b, c = torch.zeros(30, 40, dtype=torch.bfloat16), torch.zeros(40, 50, dtype=torch.bfloat16), torch.zeros(30, 50)
    with pretending_cuda():
        total = torch_traffic(lambda: torch.addmm(c, a, b, out_dtype=torch.float32, out=c))
    assert total.dot_flops == {"bfloat16": 2 * 30 * 40 * 50}
    assert (total.loaded, total.stored) == (2 * (30 * 40 + 40 * 50) + 4 * 1500, 4 * 1500)


def test_cross_entropy_picks_its_targets() -> None:
    """Picking one logit per row must not count as a read of the whole matrix."""
    x = torch.randn(30, 1000, requires_grad=True)
    y = torch.randint(0, 1000, (30,))
    total = torch_traffic(lambda: F.cross_entropy(x, y).backward())
    # log_softmax 1 + 1; its target; backward of the target 1 written; of log_softmax 2 + 1
    assert total.dram / x.numel() / 4 == pytest.approx(6, abs=0.02)


def test_waits_for_the_gpu_are_counted() -> None:
    x = torch.tensor([1.0, 0.0])
    assert torch_traffic(lambda: x.sum() * 2).syncs == 0
    assert torch_traffic(lambda: x.sum().item()).syncs == 1
    assert torch_traffic(lambda: x.nonzero()).syncs == 1
    assert torch_traffic(lambda: torch.equal(x, x)).syncs == 1


def test_peak_of_tensors_made_meanwhile() -> None:
    def run() -> None:
        a = torch.empty(1000)
        b = a.view(10, 100)  # shares
        del a
        c = b + 1
        del b
        torch.zeros(1500, dtype=torch.int8), c

    assert counted(run).peak_bytes == 8000
    assert counted(lambda: X.t()).peak_bytes == 0


def test_an_operator_of_python_is_counted_by_what_it_is_made_of() -> None:
    @torch.library.custom_op("llmfast_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x.exp() + x

    counts = counted(lambda: twice(X))
    assert [t.name for t in counts.traffic] == ["exp", "add"]


# Dry runs.


@pytest.mark.parametrize("mode", ["materialise", "chunk", "two-stage", "recompute"])
def test_a_dry_run_counts_the_same(mode: str) -> None:
    N, D, V = 48, 32, 700

    def run() -> None:
        hidden = torch.zeros(N, D, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True)
        linear_cross_entropy(hidden, weight, torch.zeros(N, dtype=torch.int64)).backward()

    with pretending_cuda(), forced(mode):
        real, dry = counted(run), counted(run, dry=True)
    assert [t.name for t in real.traffic] == [t.name for t in dry.traffic]
    for a, b in zip(real.traffic, dry.traffic):
        for name in ("loaded", "stored", "dram", "sectors", "dot_flops", "flops", "transcendentals", "calls"):
            assert getattr(a, name) == pytest.approx(getattr(b, name)), (a.name, name)
    assert real.peak_bytes == dry.peak_bytes


def test_a_dry_run_of_a_large_model_takes_no_memory_and_no_time() -> None:
    N, D, V = 65536, 4096, 128256
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pretending_cuda(), counting(dry=True) as counts:
        hidden = reserve(N, D, dtype=torch.bfloat16).requires_grad_()
        weight = reserve(V, D, dtype=torch.bfloat16).requires_grad_()
        targets = torch.zeros(N, dtype=torch.int64)
        linear_cross_entropy(hidden, weight, targets, memory_budget=3 << 30).backward()
    assert counts.total().dot_flops == {"bfloat16": 6 * N * D * V}
    assert 3 << 30 < counts.peak_bytes < 5 << 30  # the slab, and dW in float32
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


def test_a_dry_run_computes_what_is_small() -> None:
    x = reserve(1 << 11, 1 << 11)

    def run() -> None:
        assert (torch.arange(5) * 2).sum().item() == 20
        assert X.nonzero().shape[1] == 2
        assert (x + x).shape == x.shape and (x @ x).dtype == x.dtype
        assert x.mul_(2) is x
        assert torch.zeros(1 << 11, 1 << 11).stride() == x.stride()
        x[0, :4] = 7
        assert x[0, :5].tolist() == [7, 7, 7, 7, 0]

    counted(run, dry=True)


def test_a_dry_run_changes_small_lists_of_tensors_in_place() -> None:
    """Torch's optimizers change lists of tensors and return nothing."""

    def run() -> None:
        small, large = [torch.ones(3), torch.ones(2)], [torch.ones(1 << 11, 1 << 11)]
        torch._foreach_add_(small, 2.0)
        torch._foreach_mul_(large, 2.0)
        assert [t.tolist() for t in small] == [[3.0] * 3, [3.0] * 2]

    counted(run, dry=True)


def test_a_table_has_each_count_under_its_name() -> None:
    fields = {"loaded": 1, "stored": 2, "updated": 3, "unique_loaded": 4, "unique_stored": 5, "sectors": 6}
    given = Traffic(
        "a kernel", "triton", calls=7, **fields, flops=8, transcendentals=9, dot_flops=Counter({"bfloat16": 10})
    )
    lines = Counts([given, given], peak_bytes=1234).table(per=0.5).splitlines()
    names = re.split(r" {2,}", lines[0].strip())
    for line, name in zip(lines[1:3], ("a kernel", "total")):
        assert line.startswith(f"{name} ")
        row = dict(zip(names, (float(x.replace(",", "")) for x in line[44:].split())))
        assert row.pop("calls") == 14  # which is not divided
        assert row == {
            **{"loaded": 4, "stored": 8, "updated": 12, "dram": 4 * given.dram, "sectors": 24},
            **{"dot flops": 40, "flops": 32, "special": 36},
        }
    assert lines[3] == "peak of tensors made meanwhile: 1,234 bytes"


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_program_of_a_short_axis_is_taken(axis: int) -> None:
    for count, all_taken in ((1, True), (4, True), (16, True), (17, False)):
        grid = [1, 1, 1]
        grid[axis] = count
        programs = sample(tuple(grid))  # type: ignore[arg-type]
        assert (programs == [(i, 1.0) for i in range(count)]) == all_taken
        assert all_taken or len(programs) == 3
    assert len(sample((3, 3, 1))) == 9 and len(sample((4, 4, 1))) == 9


@pytest.mark.parametrize("grid", [(1, 1, 1), (7, 1, 1), (8, 1, 1), (1000, 1, 1), (5, 9, 1), (1000, 3, 2)])
def test_a_sample_stands_for_the_whole_grid(grid: tuple[int, int, int]) -> None:
    programs = sample(grid)
    total = grid[0] * grid[1] * grid[2]
    assert sum(weight for _, weight in programs) == pytest.approx(total)
    numbers = [program for program, _ in programs]
    assert len(set(numbers)) == len(numbers) <= 60 and max(numbers) == total - 1 and min(numbers) == 0


# The library's own, against the least there is to move.


def rows(inplace: bool, grad: bool, V: int) -> Callable[[], None]:
    def run() -> None:
        logits = torch.zeros(64, V, dtype=torch.bfloat16, requires_grad=grad)
        loss = cross_entropy(logits * 1 if inplace else logits, torch.zeros(64, dtype=torch.int64), inplace=inplace)
        if grad:
            loss.backward()

    return run


@pytest.mark.parametrize("V", [4096, 50257])
@pytest.mark.parametrize(
    ("inplace", "grad", "bytes_per_logit"),
    [(False, False, 2), (True, True, 4), (False, True, 6)],
)
def test_row_kernels_move_little_more_than_they_must(inplace: bool, grad: bool, bytes_per_logit: int, V: int) -> None:
    with kernels_on_cpu():
        counts = counted(rows(inplace, grad, V), dry=True)
    assert bytes_per_logit <= counts.total("triton").dram / (64 * V) < 1.02 * bytes_per_logit


def test_the_linear_loss_in_four_chunks() -> None:
    N, D, V = 1024, 256, 16384
    with pretending_cuda(), forced("chunk", rows=N // 4), counting(dry=True) as counts:
        hidden = reserve(N, D, dtype=torch.bfloat16).requires_grad_()
        weight = reserve(V, D, dtype=torch.bfloat16).requires_grad_()
        linear_cross_entropy(hidden, weight, torch.zeros(N, dtype=torch.int64)).backward()
    total = counts.total()
    assert total.dram / (N * V) < 26
    assert total.dot_flops == {"bfloat16": 6 * N * D * V}
    assert total.syncs == 0


# Parts of the counters.


@pytest.mark.parametrize("seed", range(5))
def test_a_byte_that_is_touched_twice_counts_once(seed: int) -> None:
    random, ranges, bytes_touched = np.random.default_rng(seed), _Ranges(), set[int]()
    assert ranges.bytes() == 0
    for _ in range(8):
        begins = random.integers(0, 100, 6)
        ends = begins + random.integers(1, 30, 6)
        ranges.add(begins, ends)
        bytes_touched |= {byte for a, b in zip(begins, ends) for byte in range(a, b)}
        assert ranges.bytes() == len(bytes_touched)


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_runs_are_of_adjacent_elements(size: int, seed: int) -> None:
    elements = np.random.default_rng(seed).integers(0, 12, 9)  # in any order, some of them twice
    begins, ends = _runs(Access(64 + size * elements, 9, size, None))
    covered = [byte for a, b in zip(begins, ends) for byte in range(a, b)]
    assert covered == sorted({64 + size * e + k for e in elements.tolist() for k in range(size)})
    assert (begins[1:] > ends[:-1]).all()


def test_many_small_accesses_are_merged_meanwhile() -> None:
    ranges = _Ranges()
    for i in range(10_000):
        ranges.add(np.array([2 * i]), np.array([2 * i + 1]))
        assert len(ranges._begins) <= 4097
    assert ranges.bytes() == 10_000


@pytest.mark.parametrize("dry", [False, True])
def test_launches_that_differ_in_one_thing_are_counted_each_for_itself(dry: bool) -> None:
    """Check a dry run too, in which what is known of one launch must not be taken for another's."""
    x, y, offset = torch.zeros(2000), torch.zeros(64), torch.zeros(2001)[1:]
    copies: list[Callable[[], object]] = [
        lambda: copies_kernel[(4,)](x, y, 1, BLOCK=16),
        lambda: copies_kernel[(3,)](x, y, 1, BLOCK=16),
        lambda: copies_kernel[(4,)](x, y, 9, BLOCK=16),
        lambda: copies_kernel[(4,)](offset, y, 1, BLOCK=16),
        lambda: copies_kernel[(4,)](x, y, 1, BLOCK=8),
        lambda: copies_kernel[(4,)](x, y.double(), 1, BLOCK=16),
        lambda: copies_kernel[(4,)](x, y[::16], 1, BLOCK=16),
        lambda: copies_kernel[(4,)](x, y, 1, BLOCK=16),
    ]
    found = [t for t in counted(lambda: [run() for run in copies], dry=dry).traffic if t.by == "triton"]
    alone = [t for run in copies for t in counted(run, dry=dry).traffic if t.by == "triton"]
    assert [(t.loaded, t.stored, t.sectors, t.dram) for t in found] == [
        (t.loaded, t.stored, t.sectors, t.dram) for t in alone
    ]
    elements = [64, 48, 64, 64, 32, 64, 64, 64]
    assert [t.loaded for t in found] == [4 * n for n in elements]
    assert [t.stored for t in found] == [(8 if i == 5 else 4) * n for i, n in enumerate(elements)]
    assert len({t.sectors for t in found[:5]}) == 5 and found[0].sectors == found[-1].sectors


@triton.jit
def copies_kernel(x_ptr, y_ptr, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i * stride))


def test_a_dry_launch_touches_no_more_bytes_than_there_are() -> None:
    """Every program reads and writes the same 16 elements."""
    x, y = torch.zeros(16), torch.zeros(16)
    (kernel,) = counted(lambda: same_kernel[(40,)](x, y, BLOCK=16), dry=True).traffic
    assert (kernel.loaded, kernel.stored) == (40 * 64, 40 * 64)
    assert (kernel.unique_loaded, kernel.unique_stored, kernel.calls) == (64, 64, 1)


@triton.jit
def same_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


B = 4 * 7  # bytes of seven elements


@pytest.mark.parametrize(
    ("run", "loaded", "stored"),
    [
        (lambda: X.new_zeros(7), 0, B),
        (lambda: X.new_ones(7), 0, B),
        (lambda: X.new_full((7,), 2.0), 0, B),
        (lambda: torch.ones_like(X), 0, n),
        (lambda: torch.full_like(X, 2.0), 0, n),
        (lambda: torch.rand_like(X), 0, n),
        (lambda: torch.randn_like(X), 0, n),
        (lambda: torch.empty(7).fill_(1), 0, B),
        (lambda: torch.empty(7).normal_(), 0, B),
        (lambda: torch.empty(7).uniform_(), 0, B),
        (lambda: X.take(INDEX), B + 56, B),
        (lambda: torch.empty(30, 40).scatter_(0, INDEX[None], torch.ones(1, 7)), 2 * B + 56, 2 * B),
        (lambda: torch.empty(30, 40).scatter_add_(0, INDEX[None], torch.ones(1, 7)), 2 * B + 56, 2 * B),
        (lambda: torch.empty(30, 40).index_copy_(0, INDEX, torch.ones(7, 40)), 2 * m + 56 + 0, 2 * m),
        (lambda: torch.empty(30, 40).index_put_((INDEX,), torch.ones(7, 40)), 2 * m + 56 + 0, 2 * m),
    ],
)
def test_bytes_of_operators_that_touch_part_of_a_tensor(run: Callable[[], object], loaded: int, stored: int) -> None:
    total = torch_traffic(run)
    assert (total.loaded, total.stored) == (loaded, stored)


@pytest.mark.parametrize(
    ("run", "waits"),
    [
        (lambda: X.sum().item(), 1),
        (lambda: X[X > 0], 1),
        (lambda: X.clone().index_put_((X > 0,), torch.tensor(1.0)), 1),
        (lambda: X[INDEX], 0),
        (lambda: X.masked_select(X > 0), 1),
        (lambda: X.nonzero(), 1),
        (lambda: X.unique(), 1),
        (lambda: bool((X > 0).all()), 1),
        (lambda: X.argmax() + X.sum(), 0),
        (lambda: torch.where(X > 0, X, 0.0), 0),
    ],
)
def test_operators_that_wait(run: Callable[[], object], waits: int) -> None:
    assert torch_traffic(run).syncs == waits


def test_sums_add_up_every_count() -> None:
    numbers = {"loaded": 1, "stored": 2, "updated": 3, "unique_loaded": 4, "unique_stored": 5, "sectors": 6, "flops": 8}
    first = Traffic("a", "triton", **numbers, transcendentals=9, dot_flops=Counter(bfloat16=10), calls=2, syncs=1)
    second = Traffic("b", "torch", **dict.fromkeys(numbers, 100), calls=1, syncs=2, dot_flops=Counter(float32=7))
    counts = Counts([first, second, first])
    total = counts.total()
    assert all(getattr(total, name) == 2 * value + 100 for name, value in numbers.items())
    assert (total.transcendentals, total.calls, total.syncs) == (18, 5, 4)
    assert total.dot_flops == {"bfloat16": 20, "float32": 7}
    assert counts.total("torch").loaded == 100 and counts.total("triton").calls == 4
    assert list(counts.by_name()) == ["b", "a"] and counts.by_name()["a"].loaded == 2
    assert (first.moved, first.dram) == (1 + 2 + 2 * 3, 4 + 5)
    total.add(first, 3.0)  # as many times, but one call
    assert (total.loaded, total.transcendentals, total.calls) == (102 + 3, 18 + 27, 7)
    assert total.dot_flops["bfloat16"] == 50


def test_every_operation_of_floats_is_counted_as_what_it_is() -> None:
    counter = _KernelCounter(Counts(), dry=False)
    counter._begin("kernel")
    for operation in ("fadd", "fsub", "fmul", "fneg", "minimumf", "maximumf", "minnumf", "maxnumf", "reduce"):
        counter.compute(operation, 1, "float32")
    counter.compute("fma", 10, "float32")
    counter.compute("clampf", 10, "float32")
    assert counter._now.flops == 9 + 20 + 20
    special = ("exp", "exp2", "log", "log2", "sin", "cos", "erf", "sqrt", "precise_sqrt", "rsqrt", "libdevice")
    for operation in (*special, "fdiv", "frem", "precise_divf", "approx_divf"):
        counter.compute(operation, 1, "float32")
    assert counter._now.transcendentals == 15
    for operation in ("add", "xor", "fcmp", "load", "select", "fp_to_fp"):
        counter.compute(operation, 1, "float32")
    counter.compute("dot", 5, "float16")
    assert (counter._now.flops, counter._now.transcendentals) == (49, 15)
    assert counter._now.dot_flops == {"float16": 10}


def test_a_tensor_is_counted_once_while_it_lives() -> None:
    def run() -> None:
        a = torch.empty(100)
        kept = [torch.add(a, 1, out=torch.empty(100)), a.resize_(50), a.set_(torch.empty(100))]
        del a, kept
        for _ in range(3):
            torch.empty(100).zero_()

    assert counted(run).peak_bytes == 3 * 400
