"""The patched interpreter against torch's conversions, and against exact rational arithmetic."""

import math
import os
import types
from fractions import Fraction

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported, for a run of this file without a conftest

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.runtime.errors import InterpreterError

from evidence import interpreter, observers

interpreter.install()

SUBNORMAL_TIES = [2.0**-134, 3 * 2.0**-134, 2.0**-133, 2.0**-149, -(2.0**-134), 5 * 2.0**-134]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.3895313892515355e38, 3.4e38, -3.4028234663852886e38]


def words_to_float32(words: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(words.astype(np.uint32).view(np.float32))


def rounding_cases() -> torch.Tensor:
    """Generate every sign, exponent and kept mantissa with ties and neighbours, random words and special values."""
    kept = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    around = [kept + np.uint32(low) for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    random = np.random.default_rng(0).integers(0, 1 << 32, size=1 << 16, dtype=np.uint32)
    special = torch.tensor(SUBNORMAL_TIES + SPECIAL, dtype=torch.float32)
    return torch.cat([words_to_float32(np.concatenate([*around, random])), special])


def same_bfloat16(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equality bit by bit, signed zeros included; any NaN equals any NaN."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@triton.jit
def copy_kernel(source, target, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(target + offsets, tl.load(source + offsets, mask=mask), mask=mask)


@triton.jit
def cast_kernel(source, target, count, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(target + offsets, tl.load(source + offsets, mask=mask).to(target.dtype.element_ty), mask=mask)


def run_copy(source: torch.Tensor, dtype: torch.dtype, kernel=copy_kernel) -> torch.Tensor:
    target = torch.empty(source.shape, dtype=dtype)
    block = 1 << 16
    kernel[(triton.cdiv(source.numel(), block),)](source, target, source.numel(), BLOCK=block)
    return target


@pytest.mark.parametrize("kernel", [copy_kernel, cast_kernel])
def test_float32_rounds_to_bfloat16_as_torch_does(kernel):
    cases = rounding_cases()
    same_bfloat16(run_copy(cases, torch.bfloat16, kernel), cases.to(torch.bfloat16))


@triton.jit
def left_out_kernel(source, target, count, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    if OTHER is None:
        x = tl.load(source + offsets, mask=offsets < count)
    else:
        x = tl.load(source + offsets, mask=offsets < count, other=OTHER)
    tl.store(target + offsets, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8])
def test_nobody_can_rely_on_what_a_mask_leaves_out(dtype):
    source, target = torch.ones(16).to(dtype), torch.ones(16).to(dtype)
    left_out_kernel[(1,)](source, target, 4, OTHER=None, BLOCK=16)
    assert target[:4].eq(1).all() and target[4:].double().nan_to_num(1e4).abs().gt(9).all()
    if dtype.is_floating_point:
        assert target[4:].isnan().any() and (dtype == torch.float16 or target[4:].gt(1e38).any())
    left_out_kernel[(1,)](source, target, 4, OTHER=0, BLOCK=16)
    assert target.tolist() == [1] * 4 + [0] * 12


def test_bfloat16_widens_exactly():
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(run_copy(every, dtype), every.to(dtype), rtol=0, atol=0, equal_nan=True)
    same_bfloat16(run_copy(every, torch.bfloat16), every)


def test_float64_rounds_to_bfloat16_once():
    # Just above a tie, by less than float32 can tell: through float32 it would round down to even.
    above = 1 + 2.0**-8 + 2.0**-40
    cases = torch.tensor([above, -above, 1 + 2.0**-8, 3.4e38, 1e300, math.inf, math.nan, 0.0], dtype=torch.float64)
    expected = torch.tensor([1 + 2.0**-7, -1 - 2.0**-7, 1.0, math.inf, math.inf, math.inf, math.nan, 0.0])
    same_bfloat16(run_copy(cases, torch.bfloat16), expected.to(torch.bfloat16))


def test_float16_and_integers_convert():
    halves = torch.tensor([1.0009765625, 65504.0, 5.9604644775390625e-08, math.inf], dtype=torch.float16)
    same_bfloat16(run_copy(halves, torch.bfloat16), halves.to(torch.bfloat16))
    integers = torch.tensor([0, 257, -129, 123456789], dtype=torch.int32)
    same_bfloat16(run_copy(integers, torch.bfloat16), integers.to(torch.bfloat16))
    floats = torch.tensor([1.5, -2.75, 300.0], dtype=torch.bfloat16)
    assert run_copy(floats, torch.int32).tolist() == [1, -2, 300]
    assert run_copy(floats, torch.float16).tolist() == [1.5, -2.75, 300.0]


@triton.jit
def bfloat16_kernel(source, target, OPERATION: tl.constexpr):
    offsets = tl.arange(0, 8)
    x = tl.load(source + offsets)
    if OPERATION == "add":
        y = x + x
    elif OPERATION == "scale":
        y = x * 2.0
    elif OPERATION == "compare":
        y = (x < x).to(tl.float32)
    elif OPERATION == "negate":
        y = -x
    elif OPERATION == "abs":
        y = tl.abs(x)
    elif OPERATION == "fma":
        y = tl.fma(x, x, x)
    elif OPERATION == "sum":
        y = tl.sum(x, axis=0) + tl.zeros([8], tl.float32)
    elif OPERATION == "atomic":
        tl.atomic_add(target + offsets, x)
        y = x
    tl.store(target + offsets, y)


@pytest.mark.parametrize(
    ("operation", "named"),
    [
        ("add", "fadd"),
        ("scale", "fmul"),
        ("compare", "fcmp"),
        ("negate", "(fneg|fsub)"),
        ("abs", "fabs"),
        ("fma", "fma"),
        ("sum", "reduction or scan"),
        ("atomic", "atomic_rmw"),
    ],
)
def test_bfloat16_arithmetic_is_refused(operation, named):
    x = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(InterpreterError, match=rf"{named}.* bfloat16 values"):
        bfloat16_kernel[(1,)](x, x.clone(), OPERATION=operation)


def test_bfloat16_arithmetic_can_be_emulated():
    x = torch.randn(8).to(torch.bfloat16)
    for operation, expected in [
        ("add", x + x),
        ("scale", x * 2.0),
        ("compare", torch.zeros_like(x)),
        ("negate", -x),
        ("abs", x.abs()),
        ("fma", (x.double() * x.double() + x.double()).to(torch.bfloat16)),
    ]:
        target = torch.empty_like(x)
        with interpreter.bfloat16_arithmetic():
            bfloat16_kernel[(1,)](x, target, OPERATION=operation)
        same_bfloat16(target, expected)
    for operation in ("sum", "atomic"):
        with interpreter.bfloat16_arithmetic(), pytest.raises(InterpreterError, match="bfloat16 values"):
            bfloat16_kernel[(1,)](x, x.clone(), OPERATION=operation)


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr):
    row, column = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    at = row * 16 + column
    c = tl.load(c_ptr + at)
    tl.store(c_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dot_multiplies_low_precision_exactly_and_adds_in_float32(dtype):
    a, b, c = torch.randn(3, 16, 16)
    a, b = a.to(dtype), b.to(dtype)
    expected = a.double() @ b.double() + c.double()
    dot_kernel[(1,)](a, b, c)
    torch.testing.assert_close(c.double(), expected, rtol=0, atol=1e-5)


@triton.jit
def hint_kernel(x_ptr, target, DIVISOR: tl.constexpr):
    tl.store(target, tl.load(tl.multiple_of(x_ptr, DIVISOR)))


def test_a_false_hint_is_refused():
    x = torch.tensor([1.0, 2.0, 3.0])
    target = torch.empty(1)
    hint_kernel[(1,)](x, target, DIVISOR=16)
    assert target.item() == 1.0
    with pytest.raises(InterpreterError, match=r"tl.multiple_of\(16\): \d+ is not a multiple"):
        hint_kernel[(1,)](x[1:], target, DIVISOR=16)


@triton.jit
def libdevice_kernel(x_ptr, target):
    offsets = tl.arange(0, 8)
    x = tl.load(x_ptr + offsets)
    tl.store(target + offsets, libdevice.tanh(x))
    tl.store(target + 8 + offsets, libdevice.pow(x, 2.0))
    tl.store(target + 16 + offsets, libdevice.isnan(x))


def test_libdevice():
    x = torch.tensor([0.0, 1.0, -2.0, math.nan, math.inf, 0.5, 3.0, -0.1])
    target = torch.empty(3, 8)
    libdevice_kernel[(1,)](x, target)
    torch.testing.assert_close(target, torch.stack([x.tanh(), x**2, x.isnan().float()]), equal_nan=True)


def test_a_function_of_libdevice_that_is_not_emulated_is_named():
    with pytest.raises(InterpreterError, match=r"NotImplementedError.*libdevice.byte_perm"):
        unknown_libdevice_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


@triton.jit
def unknown_libdevice_kernel(x_ptr):
    tl.store(x_ptr, libdevice.byte_perm(tl.load(x_ptr), 0, 0))


@triton.jit
def first_largest(x, i, y, j):
    better = (y > x) | ((y == x) & (j < i))
    return tl.where(better, y, x), tl.where(better, j, i)


@triton.jit
def reduce_kernel(x_ptr, values, places, whole):
    row, column = tl.arange(0, 4)[:, None], tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + row * 16 + column)
    value, place = tl.reduce((x, column + row * 0), 1, first_largest)
    tl.store(values + tl.arange(0, 4), value)
    tl.store(places + tl.arange(0, 4), place)
    value, place = tl.reduce((x, row * 16 + column), None, first_largest)
    tl.store(whole, place)


def test_reductions_of_ones_own():
    x = torch.randint(0, 5, (4, 16)).float()  # with ties
    values, places, whole = torch.empty(4), torch.empty(4, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    reduce_kernel[(1,)](x, values, places, whole)
    assert values.tolist() == x.amax(1).tolist()
    assert places.tolist() == x.argmax(1).tolist()
    assert whole.item() == x.argmax()


@triton.jit
def moves_kernel(source, target):
    offsets = tl.arange(0, 8)
    x = tl.load(source + offsets, mask=offsets < 6, other=-float("inf"))
    x = tl.where(offsets < 4, x, tl.load(source))
    tl.store(target + offsets, tl.reshape(tl.reshape(x, (2, 4)), (8,)))
    tl.store(target + 8 + offsets, tl.full((8,), 1.0 + 3 * 2.0**-8, tl.bfloat16))


def test_moving_bfloat16_values_is_allowed():
    x = torch.randn(8).to(torch.bfloat16)
    target = x.new_empty(16)
    moves_kernel[(1,)](x, target)
    same_bfloat16(target[:8], torch.cat([x[:4], x[:1].expand(4)]))
    assert target[8:].tolist() == [1 + 2.0**-6] * 8  # a tie, to even


@triton.jit
def fma_kernel(x, y, z, target, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)
    result = tl.fma(tl.load(x + offsets), tl.load(y + offsets), tl.load(z + offsets))
    tl.store(target + offsets, result)


def rounded_once(x: float, y: float, z: float) -> float:
    """Round x * y + z to the nearest float32, ties to even, by comparing candidates in exact rationals."""
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    near = np.float32(float(exact))
    candidates = [np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))]
    return float(min(candidates, key=lambda c: (abs(Fraction(float(c)) - exact), int(c.view(np.uint32)) & 1)))


def test_fma_rounds_once():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 512, generator=generator)
    z = -(x * y) * (1 + torch.randint(-4, 5, (512,), generator=generator) * 2.0**-20)  # much cancellation
    z[:128] = torch.randn(128, generator=generator) * 2.0 ** torch.randint(-40, 40, (128,), generator=generator)
    # The product is 1 + 2**-12 + 2**-24 + ..., a tie in float32 that only the far smaller addend decides;
    # rounding to float64 first would lose the addend and then round the tie to even.
    x[0] = y[0] = 1 + 2.0**-12
    x[1], y[1] = x[0], y[0]
    z[0], z[1] = 2.0**-80, -(2.0**-80)
    expected = torch.tensor([rounded_once(*values) for values in zip(x.tolist(), y.tolist(), z.tolist())])
    target = torch.empty_like(x)
    fma_kernel[(1,)](x, y, z, target, COUNT=512)
    torch.testing.assert_close(target, expected, rtol=0, atol=0)
    assert target[0] != target[1]
    assert not torch.equal(target, x * y + z)


def test_fma_of_special_values():
    x = torch.tensor([math.inf, math.inf, 3e38, 1.0, math.nan, 0.0, 1e-30, 2.0])
    y = torch.tensor([1.0, 0.0, 3e38, 1.0, 1.0, -1.0, 1e-30, 3.0])
    z = torch.tensor([1.0, 1.0, 0.0, math.inf, 1.0, 0.0, 0.0, -6.0])
    target = torch.empty_like(x)
    fma_kernel[(1,)](x, y, z, target, COUNT=8)
    expected = torch.tensor([math.inf, math.nan, math.inf, math.inf, math.nan, 0.0, 0.0, 0.0])
    torch.testing.assert_close(target, expected, rtol=0, atol=0, equal_nan=True)


@triton.jit
def functions_kernel(source, target, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)
    x = tl.load(source + offsets)
    tl.store(target + offsets, tl.rsqrt(x))
    tl.store(target + COUNT + offsets, tl.exp2(x))
    tl.store(target + 2 * COUNT + offsets, tl.log2(x))
    tl.store(target + 3 * COUNT + offsets, tl.maximum(x, 1.0))
    tl.store(target + 4 * COUNT + offsets, tl.where(x > 1.0, x, -x))
    tl.store(target + 5 * COUNT + offsets, tl.sqrt(x))
    rows = tl.reshape(x, (4, COUNT // 4))
    tl.store(target + 6 * COUNT + tl.arange(0, 4), tl.sum(rows, axis=1))
    tl.store(target + 6 * COUNT + 4 + tl.arange(0, 4), tl.max(rows, axis=1))


@triton.jit
def precise_kernel(source, target, COUNT: tl.constexpr):
    offsets = tl.arange(0, COUNT)
    x = tl.load(source + offsets)
    tl.store(target + offsets, tl.sqrt_rn(x))
    tl.store(target + COUNT + offsets, tl.div_rn(x, x + 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions(dtype):
    x = torch.rand(64, dtype=dtype) * 4 + 0.1
    target = torch.empty(7, 64, dtype=dtype)
    functions_kernel[(1,)](x, target, COUNT=64)
    expected = [torch.rsqrt(x), torch.exp2(x), torch.log2(x), x.clamp(min=1), torch.where(x > 1, x, -x), x.sqrt()]
    torch.testing.assert_close(target[:6], torch.stack(expected))
    torch.testing.assert_close(target[6, :4], x.view(4, 16).sum(1))
    torch.testing.assert_close(target[6, 4:8], x.view(4, 16).amax(1), rtol=0, atol=0)


def test_precise_functions():
    x = torch.rand(64) * 4 + 0.1
    target = torch.empty(2, 64)
    precise_kernel[(1,)](x, target, COUNT=64)
    # Double rounding through float64 is harmless for the square root and the quotient of float32 values.
    expected = torch.stack([x.double().sqrt().float(), (x.double() / (x + 1).double()).float()])
    torch.testing.assert_close(target, expected, rtol=0, atol=0)


@triton.jit
def nan_kernel(source, target):
    offsets = tl.arange(0, 4)
    x = tl.load(source + offsets)
    tl.store(target + offsets, tl.maximum(x, 0.0))
    tl.store(target + 4 + offsets, tl.minimum(x, 0.0))
    tl.store(target + 8 + offsets, tl.clamp(x, -1.0, 1.0))
    tl.store(target + 12 + offsets, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL))


@pytest.mark.filterwarnings("error")
def test_minimum_and_maximum_skip_nan_and_warn_of_nothing():
    target = torch.empty(4, 4)
    nan_kernel[(1,)](torch.tensor([math.nan, 2.0, -2.0, math.inf]), target)
    expected = [[0.0, 2, 0, math.inf], [0, 0, -2, 0], [-1, 1, -1, 1], [math.nan, 2, 0, math.inf]]
    torch.testing.assert_close(target, torch.tensor(expected), rtol=0, atol=0, equal_nan=True)


@triton.jit
def shifted_exponential(x, axis: tl.constexpr):
    return tl.exp2((x - tl.max(x, axis=axis, keep_dims=True)) * 1.4426950408889634)


@triton.jit
def softmax_kernel(source, target, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < columns
    x = tl.load(source + row * columns + offsets, mask=mask, other=-float("inf")).to(tl.float32)
    weights = shifted_exponential(x, axis=0)
    tl.store(target + row * columns + offsets, weights / tl.sum(weights, axis=0), mask=mask)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softmax_with_a_helper(dtype):
    x = (torch.randn(5, 100) * 30).to(dtype)
    target = torch.empty_like(x)
    softmax_kernel[(5,)](x, target, 100, BLOCK=128)
    torch.testing.assert_close(target, torch.softmax(x.float(), dim=1).to(dtype))


@triton.jit
def scalar_kernel(beta, target):
    tl.store(target, 1 - beta)


def test_float_arguments_are_float32():
    target = torch.empty(1, dtype=torch.float64)
    scalar_kernel[(1,)](0.999, target)
    assert target.item() == float(np.float32(1) - np.float32(0.999)) != 1 - 0.999


@triton.jit
def assert_kernel(source):
    tl.device_assert(tl.load(source) > 0, "not positive")


def test_device_assert_follows_the_debug_option():
    negative = torch.tensor([-1.0])
    assert_kernel[(1,)](negative)
    with pytest.raises(InterpreterError, match="not positive"):
        assert_kernel[(1,)](negative, debug=True)
    assert_kernel[(1,)](negative)


def test_helpers_do_not_patch_the_language_again(monkeypatch):
    import triton.runtime.interpreter as stock

    calls = []
    patch = stock._patch_lang
    monkeypatch.setattr(stock, "_patch_lang", lambda fn: calls.append(fn) or patch(fn))
    softmax_kernel[(5,)](torch.randn(5, 8), torch.empty(5, 8), 8, BLOCK=8)
    assert len(calls) == 1


def test_the_language_is_restored_after_a_launch():
    before = tl.load, tl.core.load, tl.tensor.__add__, tl.range
    run_copy(torch.ones(4), torch.float32)
    assert before == (tl.load, tl.core.load, tl.tensor.__add__, tl.range)


def test_install_twice_changes_nothing():
    import triton.runtime.interpreter as stock

    before = stock.InterpreterBuilder.create_fadd, stock.GridExecutor.__call__
    interpreter.install()
    assert before == (stock.InterpreterBuilder.create_fadd, stock.GridExecutor.__call__)


def test_an_unknown_interpreter_is_named():
    with pytest.raises(RuntimeError, match=rf"triton {triton.__version__}.*_patch_lang.*InterpreterBuilder.cast_impl"):
        interpreter._check_version(types.SimpleNamespace(TensorHandle=object))


@triton.jit
def grid_kernel(out, X: tl.constexpr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = (x * tl.num_programs(1) + y) * tl.num_programs(2) + z
    tl.store(out + at, x * 100 + y * 10 + z)


@pytest.mark.parametrize("grid", [(3,), (3, 2), (2, 3, 4), lambda meta: (meta["X"], 2)])
def test_every_program_of_a_grid_runs_in_order(grid):
    out = torch.full((2, 3, 4), -1, dtype=torch.int32)
    seen = []

    class Watch(observers.Observer):
        def program(self, index):
            seen.append(index)

    with observers.observing(Watch()):
        grid_kernel[grid](out, X=3)
    nx, ny, nz = (*(grid({"X": 3}) if callable(grid) else grid), 1, 1)[:3]
    wanted = [x * 100 + y * 10 + z for x in range(nx) for y in range(ny) for z in range(nz)]
    assert out.flatten().tolist() == wanted + [-1] * (24 - len(wanted))
    assert seen == list(range(nx * ny * nz))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=[1])
def asked_kernel(x, y, n, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) * n)


asked_around = triton.heuristics({"BLOCK": lambda args: 16})(asked_kernel)


def test_what_a_kernel_asks_of_the_compiler_is_told_to_observers():
    launches = []

    class Watch(observers.Observer):
        def launch(self, launch, programs, run):
            launches.append(launch)
            run(programs)

    with observers.observing(Watch()):
        asked_kernel[(2,)](torch.ones(16), torch.ones(16), 3, BLOCK=16, num_warps=8)
        asked_around[(2,)](torch.ones(16), torch.ones(16), 3)
        copy_kernel[(2,)](torch.ones(32), torch.ones(32), 32, BLOCK=16)
    for launch, warps in zip(launches, ({"num_warps": 8}, {})):
        assert (launch.unspecialized, launch.unaligned, launch.constexprs) == ({"n"}, {"y"}, {"BLOCK"})
        assert list(launch.arguments) == ["x", "y", "n", "BLOCK"] and launch.arguments["BLOCK"] == 16
        assert launch.options.items() >= warps.items() and (launch.grid, launch.programs) == ((2, 1, 1), 2)
    assert (launches[2].unspecialized, launches[2].unaligned) == (set(), set())
    assert launches[2].kernel.endswith("test_interpreter:copy_kernel")


def test_tensors_of_other_devices_are_named():
    with pytest.raises(TypeError, match="copy_kernel: the interpreter runs on CPU tensors; target is on meta"):
        copy_kernel[(1,)](torch.ones(4), torch.ones(4, device="meta"), 4, BLOCK=4)


def test_debugging_may_be_on_for_all_launches(monkeypatch):
    import triton.runtime.interpreter as stock

    before = stock.interpreter_builder.options
    monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    with pytest.raises(InterpreterError, match="not positive"):
        assert_kernel[(1,)](torch.tensor([-1.0]))
    monkeypatch.undo()
    assert_kernel[(1,)](torch.tensor([-1.0]))
    assert stock.interpreter_builder.options is before


@triton.jit
def hints_kernel(x_ptr, target, FIRST: tl.constexpr, SECOND: tl.constexpr):
    rows = tl.load(x_ptr + tl.arange(0, 4)[:, None] + tl.arange(0, 2)[None, :])
    tl.store(target, tl.sum(tl.sum(tl.multiple_of(rows, (FIRST, SECOND)), axis=0), axis=0))


def test_every_hint_of_several_is_checked():
    x = torch.tensor([6, 1, 2, 3, 4])
    hints_kernel[(1,)](x, torch.zeros(1, dtype=torch.int64), FIRST=2, SECOND=3)
    for first, second in ((4, 3), (3, 4)):
        with pytest.raises(InterpreterError, match="6 is not a multiple"):
            hints_kernel[(1,)](x, torch.zeros(1, dtype=torch.int64), FIRST=first, SECOND=second)


@triton.jit
def wide_kernel(source, target):
    offsets = tl.arange(0, 4)
    tl.store(target + offsets, tl.load(source + offsets))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_wide_numbers_are_rounded_to_bfloat16_once(dtype):
    tie = 2**30 + 2**22  # half way between two bfloat16 numbers
    source = torch.tensor([tie + 1, tie, tie - 1, -tie - 1], dtype=dtype)  # and 1 more than float32 can tell
    target = torch.empty(4, dtype=torch.bfloat16)
    wide_kernel[(1,)](source, target)
    assert target.tolist() == [2**30 + 2**23, 2**30, 2**30, -(2**30) - 2**23]


@triton.jit
def toward_zero_kernel(source, target, MODE: tl.constexpr):
    tl.store(target, tl.load(source).to(tl.bfloat16, fp_downcast_rounding=MODE))


def test_other_roundings_to_bfloat16_are_refused():
    source, target = torch.tensor([1 + 2.0**-8 + 2.0**-9]), torch.empty(1, dtype=torch.bfloat16)
    toward_zero_kernel[(1,)](source, target, MODE="rtne")
    assert target.item() == 1 + 2.0**-7
    with pytest.raises(InterpreterError, match="bfloat16 conversion with rounding mode"):
        toward_zero_kernel[(1,)](source, target, MODE="rtz")


@triton.jit
def shapes_kernel(x_ptr, out, kept, COUNT: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, 4)[:, None] * COUNT + tl.arange(0, COUNT)[None, :])
    places = tl.arange(0, 4)[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    value, _ = tl.reduce((x, places), 0, first_largest)
    tl.store(out + tl.arange(0, COUNT), value)
    value, _ = tl.reduce((x, places), 1, first_largest, keep_dims=True)
    tl.store(kept + tl.arange(0, 4)[:, None] + tl.zeros([4, 1], tl.int32), value)


@pytest.mark.parametrize("count", [1, 2, 8])
def test_reductions_along_each_axis_and_with_kept_dimensions(count):
    x, out, kept = torch.randn(4, count), torch.empty(count), torch.empty(4)
    shapes_kernel[(1,)](x, out, kept, COUNT=count)
    assert torch.equal(out, x.amax(0)) and torch.equal(kept, x.amax(1))


def test_a_process_that_does_not_interpret_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=1 before importing triton"):
        interpreter.install()


def test_what_waits_for_a_launch_runs_before_it_with_its_arguments():
    seen, x = [], torch.zeros(4)
    kernel = triton.jit(copy_kernel.fn)
    kernel.add_pre_run_hook(lambda **given: seen.append((given["count"], x.fill_(7))))
    kernel[(1,)](x, target := torch.empty(4), 4, BLOCK=4)
    assert seen[0][0] == 4 and target.eq(7).all()


def test_arithmetic_is_told_with_its_size_and_type():
    told = []

    class Watch(observers.Observer):
        def compute(self, operation, elements, dtype):
            told.append((operation, elements, dtype))

    a, b, c = torch.randn(3, 16, 16)
    with observers.observing(Watch()):
        narrow_dot_kernel[(1,)](a.bfloat16(), b.bfloat16(), c)
    assert ("dot", 16 * 8 * 32, "bfloat16") in told  # rows, columns, and the length of a product
    assert ("reduce", 16 * 8, "float32") in told


@triton.jit
def narrow_dot_kernel(a_ptr, b_ptr, c_ptr):
    row, column, inner = tl.arange(0, 16), tl.arange(0, 8), tl.arange(0, 32)
    a = tl.load(a_ptr + (row[:, None] + inner[None, :]))
    b = tl.load(b_ptr + (inner[:, None] + column[None, :]))
    tl.store(c_ptr + row, tl.sum(tl.dot(a, b), axis=1))
