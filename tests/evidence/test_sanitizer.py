"""Planted faults, each of which must be found, and correct kernels that look suspicious, none of which may be."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for a run of this file without a conftest

from collections.abc import Callable

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from evidence import interpreter
from evidence.sanitizer import OTHER_PATTERN, PATTERN, Fault, Sanitizer, _differs, _repeated, sanitizing

interpreter.install()


@triton.jit
def copy_kernel(x_ptr, out_ptr, load_bound, store_bound, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < load_bound), mask=i < store_bound)


def copy(numel: int, load_bound: int, store_bound: int) -> None:
    x = torch.randn(numel)
    copy_kernel[(triton.cdiv(numel, 16),)](x, torch.empty_like(x), load_bound, store_bound, BLOCK=16)


def test_an_exact_mask_is_fine() -> None:
    with sanitizing():
        for numel in (1, 16, 30, 33):
            copy(numel, numel, numel)


@pytest.mark.parametrize(
    ("load_bound", "store_bound", "message"),
    [
        (31, 30, r"copy_kernel, program 1 of 2, would load outside x_ptr, of 30 elements: element 30"),
        (30, 31, r"copy_kernel, program 1 of 2, would store outside out_ptr, of 30 elements: element 30"),
        (30, 29, r"leaves 1 of 30 elements of out_ptr unwritten: element 29"),
        (30, 16, r"leaves 14 of 30 elements of out_ptr unwritten: element 16"),
    ],
)
def test_wrong_masks(load_bound: int, store_bound: int, message: str) -> None:
    with sanitizing(), pytest.raises(Fault, match=message):
        copy(30, load_bound, store_bound)


def test_what_one_pointer_reaches_of_another_tensor_is_outside() -> None:
    storage = torch.zeros(64)
    with sanitizing(), pytest.raises(Fault, match=r"would load outside x_ptr, of 16 elements: element 16"):
        copy_kernel[(2,)](storage[:16], storage[16:48], 32, 32, BLOCK=16)


@triton.jit
def rows_kernel(x_ptr, columns, stride, value, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + tl.program_id(0) * stride + i, value + i * 0.0, mask=i < columns)


def test_the_gap_between_the_rows_of_a_view_is_outside() -> None:
    view = torch.zeros(4, 24)[:, :20]
    with sanitizing():
        rows_kernel[(4,)](view, 20, 24, 1.0, BLOCK=32)
        with pytest.raises(Fault, match=r"would store outside x_ptr, of 92 elements: element 20"):
            rows_kernel[(4,)](view, 21, 24, 1.0, BLOCK=32)


@pytest.mark.parametrize("columns", [slice(None, None, 2), slice(1, None, 3)])
def test_the_gap_between_the_elements_of_a_view_is_outside(columns):
    whole = torch.zeros(4, 24)
    with sanitizing(), pytest.raises(Fault, match=r"would store outside x_ptr, of \d+ elements: element 1\b"):
        rows_kernel[(4,)](whole[:, columns], 5, 24, 1.0, BLOCK=32)
    column = whole[:, columns][:, :1]
    with sanitizing():
        rows_kernel[(4,)](column, 1, 24, 1.0, BLOCK=32)
    assert column.eq(1).all() and whole.sum() == 4


@triton.jit
def table_kernel(table_ptr, numel, BLOCK: tl.constexpr):
    x_ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i, mask=i < numel) + 1.0, mask=i < numel)


def test_addresses_from_memory_reach_tensors_and_nothing_else() -> None:
    tensors = [torch.zeros(20), torch.zeros(20)]
    flat = torch.zeros(60)
    tensors += [flat[:20], flat[20:40]]
    with sanitizing():
        table_kernel[(4,)](torch.tensor([t.data_ptr() for t in tensors]), 20, BLOCK=32)
        assert all(t.eq(1).all() for t in tensors)
        with pytest.raises(Fault, match=r"would load outside of all tensors, at address"):
            table_kernel[(2,)](torch.tensor([t.data_ptr() for t in tensors[:2]]), 21, BLOCK=32)
        with pytest.raises(Fault, match=r"would load outside of all tensors, at address 16"):
            table_kernel[(1,)](torch.tensor([16]), 20, BLOCK=32)


@triton.jit
def sum_kernel(x_ptr, total_ptr, HOW: tl.constexpr, BLOCK: tl.constexpr):
    part = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), axis=0)
    if HOW == "load and store":
        tl.store(total_ptr, tl.load(total_ptr) + part)
    elif HOW == "store":
        tl.store(total_ptr, part)
    elif HOW == "atomic":
        tl.atomic_add(total_ptr, part)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("load and store", r"sum_kernel, program 1 of 4, loads what program 0 stored, in total_ptr: element 0"),
        ("store", r"program 1 of 4, stores what program 0 stored, in total_ptr: element 0"),
        ("atomic", r"writes other bits to total_ptr when its programs run backwards: element 0"),
    ],
)
def test_racing_accumulations(how: str, message: str) -> None:
    x = torch.tensor([1e8, 1.0, -1e8, 1.0]).repeat_interleave(64)  # sums to 64 forwards and to 0 backwards
    with sanitizing(), pytest.raises(Fault, match=message):
        sum_kernel[(4,)](x, torch.zeros(1), HOW=how, BLOCK=64)


def test_integer_atomics_are_fine() -> None:
    total = torch.zeros(1, dtype=torch.int32)
    with sanitizing():
        sum_kernel[(4,)](torch.ones(256, dtype=torch.int32), total, HOW="atomic", BLOCK=64)
    assert total.item() == 256


@triton.jit
def two_accesses_kernel(x_ptr, out_ptr, FIRST: tl.constexpr, SECOND: tl.constexpr, SEM: tl.constexpr):
    """Access an element in one way by the last program and in another way by those before it."""
    n = tl.program_id(0)
    last = n == tl.num_programs(0) - 1
    if ((not last) and FIRST == "load") or (last and SECOND == "load"):
        tl.store(out_ptr + n, tl.load(x_ptr))
    if ((not last) and FIRST == "store") or (last and SECOND == "store"):
        tl.store(x_ptr, 0)
    if ((not last) and FIRST == "atomic") or (last and (SECOND == "atomic" or SECOND == "atomic and load")):
        tl.atomic_add(x_ptr, 1, sem=SEM)
    if last and SECOND == "atomic and load":
        tl.store(out_ptr + n, tl.load(x_ptr))


DONE = {"load": "loaded", "store": "stored", "atomic": "updated"}
DOES = {"load": "loads", "store": "stores", "atomic": "updates"}


@pytest.mark.parametrize("first", DONE)
@pytest.mark.parametrize("second", DOES)
def test_any_two_accesses_of_two_programs_need_an_order(first: str, second: str) -> None:
    def launch(programs: int) -> None:
        x, out = torch.zeros(1, dtype=torch.int32), torch.zeros(programs, dtype=torch.int32)
        two_accesses_kernel[(programs,)](x, out, FIRST=first, SECOND=second, SEM="relaxed")

    with sanitizing():
        launch(1)
        if first == second and first != "store":
            launch(2)
            return
        program = 1 if first == "store" else 2  # of three: two loads, or two updates, are fine themselves
        by = "program 0" if program == 1 else "several others"
        with pytest.raises(Fault, match=f"program 1 of 2, {DOES[second]} what program 0 {DONE[first]}, in x_ptr"):
            launch(2)
        verb = DOES[first if program == 1 else second]
        with pytest.raises(Fault, match=f"program {program} of 3, {verb} what {by} {DONE[first]}, in x_ptr"):
            launch(3)


def test_what_others_updated_is_not_read_after_an_update_of_ones_own() -> None:
    def launch(sem: str) -> None:
        x, out = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
        two_accesses_kernel[(2,)](x, out, FIRST="atomic", SECOND="atomic and load", SEM=sem)

    with sanitizing(), pytest.raises(Fault, match="program 1 of 2, loads what several others updated, in x_ptr"):
        launch("relaxed")
    with sanitizing(), pytest.raises(Fault, match="writes other bits to out_ptr when its programs run backwards"):
        launch("acq_rel")  # there is an order, and the result tells which


@triton.jit
def shift_kernel(x_ptr, BLOCK: tl.constexpr):
    """Shift in place: each program reads one element of its right neighbour."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + i, tl.load(x_ptr + i + 1))


def test_a_neighbour_that_is_read_in_place() -> None:
    with sanitizing(), pytest.raises(Fault, match=r"program 1 of 2, stores what program 0 loaded, in x_ptr: element 8"):
        shift_kernel[(2,)](torch.randn(17), BLOCK=8)


@triton.jit
def overlapping_kernel(x_ptr, first, second, BLOCK: tl.constexpr):
    start = tl.where(tl.program_id(0) == 0, first, second)
    tl.store(x_ptr + start + tl.arange(0, BLOCK), 1.0)


@pytest.mark.parametrize(("first", "second", "element"), [(8, 5, 8), (5, 8, 8), (16, 9, 16), (0, 7, 7)])
def test_the_first_element_that_two_programs_store_is_named(first: int, second: int, element: int) -> None:
    with sanitizing(), pytest.raises(Fault, match=rf"stores what program 0 stored, in x_ptr: element {element}$"):
        overlapping_kernel[(2,)](torch.zeros(32), first, second, BLOCK=8)
    with sanitizing():
        overlapping_kernel[(2,)](torch.zeros(32), first, first + 8, BLOCK=8)


@triton.jit
def duplicate_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x_ptr + i // 2, i.to(tl.float32))


def test_two_values_for_one_address() -> None:
    with sanitizing(), pytest.raises(Fault, match=r"stores two values at once x_ptr, of 8 elements: element 0"):
        duplicate_kernel[(1,)](torch.empty(8), BLOCK=16)


@triton.jit
def padded_sum_kernel(x_ptr, out_ptr, V, USE_PADDING: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i).to(tl.float32)
    tl.store(out_ptr, tl.sum(x if USE_PADDING else tl.where(i < V, x, 0.0), axis=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_undefined_memory_may_be_read_but_not_used(dtype: torch.dtype) -> None:
    with sanitizing():
        x = torch.empty(16, dtype=dtype)
        x[:10] = torch.arange(10)
        padded_sum_kernel[(1,)](x, out := torch.empty(1), 10, USE_PADDING=False, BLOCK=16)
        assert out.item() == 45
        with pytest.raises(Fault, match=r"writes out_ptr from what it read in x_ptr, which nobody wrote: element 10"):
            padded_sum_kernel[(1,)](x, out, 10, USE_PADDING=True, BLOCK=16)


def test_bytes_may_have_any_value() -> None:
    """New memory of bytes is not marked, so no value of it says that it was not written."""
    with sanitizing():
        for value in {*PATTERN.to_bytes(8, "little"), 0}:
            x, out = torch.full((16,), value, dtype=torch.uint8), torch.full((16,), value, dtype=torch.uint8)
            copy_kernel[(1,)](x, out, 16, 8, BLOCK=16)
            assert out.eq(value).all()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda x: torch.empty(x.shape),
        lambda x: torch.empty_like(x),
        lambda x: x.new_empty(x.shape),
        lambda x: torch.empty_strided(x.shape, x.stride()),
        lambda x: x.new_empty_strided(x.shape, x.stride()),
        lambda x: torch.empty_strided((3, 2), (7, 2)),  # with gaps, so that the last elements are far away
        lambda x: torch.empty(5, dtype=torch.bfloat16),
    ],
)
def test_every_way_to_allocate_is_filled(allocate: Callable[[Tensor], Tensor]) -> None:
    x = torch.zeros(5)
    with sanitizing():
        assert allocate(x).isnan().all()
    assert torch.zeros(3).eq(0).all()


@triton.jit
def locked_sum_kernel(x_ptr, total_ptr, lock_ptr, BLOCK: tl.constexpr):
    part = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), axis=0)
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.store(total_ptr, tl.load(total_ptr) + part)
    tl.atomic_xchg(lock_ptr, 0)


def test_a_lock_orders_programs() -> None:
    total, lock = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with sanitizing():
        locked_sum_kernel[(4,)](torch.ones(256, dtype=torch.int32), total, lock, BLOCK=64)
    assert total.item() == 256


@triton.jit
def last_adds_up_kernel(x_ptr, parts_ptr, done_ptr, total_ptr, SEM: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    tl.store(parts_ptr + n, tl.sum(tl.load(x_ptr + n * BLOCK + tl.arange(0, BLOCK)), axis=0))
    if tl.atomic_add(done_ptr, 1, sem=SEM) == tl.num_programs(0) - 1:
        tl.store(total_ptr, tl.sum(tl.load(parts_ptr + tl.arange(0, 4)), axis=0))


def test_the_last_program_may_read_what_the_others_stored() -> None:
    x = torch.randn(256)
    with sanitizing():
        total = torch.empty(1)
        last_adds_up_kernel[(4,)](x, torch.empty(4), torch.zeros(1, dtype=torch.int32), total, SEM="acq_rel", BLOCK=64)
        torch.testing.assert_close(total[0], x.sum())
        with pytest.raises(Fault, match=r"program 3 of 4, loads what program 0 stored, in parts_ptr: element 0"):
            last_adds_up_kernel[(4,)](
                x, torch.empty(4), torch.zeros(1, dtype=torch.int32), total, SEM="relaxed", BLOCK=64
            )


def test_running_again_leaves_the_first_results() -> None:
    """Run a kernel that works in place, which a second run would corrupt."""
    rows = list(torch.zeros(4, 20))
    with sanitizing():
        table_kernel[(4,)](torch.tensor([row.data_ptr() for row in rows]), 20, BLOCK=32)
    assert all(row.eq(1).all() for row in rows)


def test_nothing_is_watched_afterwards() -> None:
    with sanitizing():
        pass
    copy(30, 31, 30)
    assert torch.empty.__name__ == "empty" and not hasattr(torch.empty, "__wrapped__")


@triton.jit
def parts_kernel(x_ptr, out_ptr, x_offset, out_offset, BLOCK: tl.constexpr):
    """Copy a block per program from one place to another, as numbers of the second's type."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + out_offset + i, tl.load(x_ptr + x_offset + i).to(out_ptr.dtype.element_ty))


def test_a_view_does_not_end_the_tensor_that_it_is_of() -> None:
    whole = torch.arange(64.0)
    with sanitizing():
        parts_kernel[(2,)](whole, whole[8:16], 48, 0, BLOCK=4)
        parts_kernel[(2,)](whole[8:16], whole, 0, 48, BLOCK=4)
        assert whole[8:16].tolist() == whole[48:56].tolist() == list(range(48, 56))
        with pytest.raises(Fault, match="program 1 of 2, stores what program 0 loaded"):
            parts_kernel[(2,)](whole[16:24], whole, 0, 12, BLOCK=4)


def test_parts_of_an_element_that_have_another_type() -> None:
    """One memory as integers of four bytes and, from the second on, as bytes."""
    words = torch.zeros(8, dtype=torch.int32)
    few = words.view(torch.int8)[4:28]
    with sanitizing():
        parts_kernel[(2,)](words, few, 0, 6, BLOCK=1)  # each program writes a byte of one word that neither reads
        with pytest.raises(Fault, match="program 1 of 2, loads what program 0 stored"):
            parts_kernel[(2,)](words, few, 0, 3, BLOCK=1)  # byte 3 of `few` is the last of words[1]
        with pytest.raises(Fault, match="program 1 of 2, stores what program 0 loaded"):
            parts_kernel[(2,)](few, words, 7, 1, BLOCK=1)  # byte 7 of `few` is the last of words[2]


def test_integers_of_16_bits_may_have_any_value() -> None:
    with sanitizing():
        x, out = torch.full((16,), PATTERN, dtype=torch.int16), torch.zeros(16, dtype=torch.int16)
        copy_kernel[(1,)](x, out, 16, 16, BLOCK=16)
        assert out.eq(PATTERN).all()


def test_addresses_reach_parameters_and_no_further_than_the_smallest_tensor() -> None:
    p, flat = torch.nn.Parameter(torch.zeros(20)), torch.zeros(60)
    row = flat[20:40]
    with sanitizing():
        table_kernel[(2,)](torch.tensor([p.data_ptr(), row.data_ptr()]), 20, BLOCK=32)
        assert p.eq(1).all() and row.eq(1).all() and flat.sum() == 20
        with pytest.raises(Fault, match="outside of all tensors"):
            table_kernel[(1,)](torch.tensor([row.data_ptr()]), 21, BLOCK=32)


@triton.jit
def padded_update_kernel(x_ptr, out_ptr, V, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.atomic_add(out_ptr, tl.sum(tl.where(i < V, x, 0.0) if MASKED else x, axis=0))


def test_undefined_memory_is_not_used_in_updates() -> None:
    with sanitizing():
        x = torch.empty(16)
        x[:10] = 1
        padded_update_kernel[(1,)](x, out := torch.zeros(1), 10, MASKED=True, BLOCK=16)
        assert out.item() == 10
        with pytest.raises(Fault, match="writes out_ptr from what it read in x_ptr, which nobody wrote: element 10"):
            padded_update_kernel[(1,)](x, out, 10, MASKED=False, BLOCK=16)


@triton.jit
def relay_kernel(x_ptr, flags_ptr, out_ptr, LEFT_OUT: tl.constexpr):
    """Let program 0 hand on to 1, 1 to 2 and so on, and the last read what the first has stored."""
    n = tl.program_id(0)
    if n == 0:
        tl.store(x_ptr, 5)
    if n > 0 and n != LEFT_OUT:
        tl.atomic_add(flags_ptr + n - 1, 1)
    tl.atomic_add(flags_ptr + n, 1)
    if n == tl.num_programs(0) - 1:
        tl.store(out_ptr, tl.load(x_ptr) * 0)


@pytest.mark.parametrize("programs", [2, 3, 5])
def test_an_order_is_handed_on(programs: int) -> None:
    def launch(left_out: int) -> None:
        flags, x, out = (torch.zeros(8, dtype=torch.int32) for _ in range(3))
        relay_kernel[(programs,)](x, flags, out, LEFT_OUT=left_out)

    with sanitizing():
        launch(-1)
        with pytest.raises(Fault, match=f"program {programs - 1} of {programs}, loads what program 0 stored, in x_ptr"):
            launch(1)


@pytest.mark.parametrize("granule", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 8, 15, 16])
def test_a_difference_is_found_at_every_byte(granule: int, size: int) -> None:
    first = np.arange(size, dtype=np.uint8)
    assert not _differs(first, first.copy(), granule).any()
    for at in range(size):
        second = first.copy()
        second[at] ^= 1
        found = _differs(first, second, granule)
        assert found.size == -(-size // granule) and np.flatnonzero(found).tolist() == [at // granule]


def test_patterns_are_repeated_in_the_order_of_memory() -> None:
    for size in (2, 4, 8):
        memory = np.frombuffer(np.uint16(PATTERN).tobytes() * (size // 2), f"u{size}")
        assert _repeated(PATTERN, size) == memory[0]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for pattern, nan in ((PATTERN, True), (OTHER_PATTERN, False)):
            bits = torch.tensor([pattern] * 4, dtype=torch.int16).view(dtype)
            assert bool(bits.isnan().all()) == nan and bool(bits.isfinite().all()) != nan


def test_a_launch_is_tried_backwards_once_per_kind_and_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(Sanitizer, "_in_order", set())
    original = Sanitizer._check_order
    monkeypatch.setattr(
        Sanitizer,
        "_check_order",
        lambda self, programs, run: tried.append(len(programs)) or original(self, programs, run),
    )
    for numels in ((48, 48, 16), (33, 48, 64)):  # one has one program, one another divisibility, one more programs
        with sanitizing():
            for numel in numels:
                copy(numel, numel, numel)
    assert tried == [3, 3, 4]
