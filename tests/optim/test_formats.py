"""Fewer bits: what each format keeps, that kernels and plain torch keep the same, and that noise is noise."""

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from evidence.sanitizer import sanitizing
from llmfast.optim import formats
from llmfast_kernels.optimizer import formats as kernels

ODD = [0.0, -0.0, 1.0, -1.5, 3.3895e38, -3.4e38, 1e-40, -1e-45, torch.inf, -torch.inf, torch.nan, 6.1e-5]


def samples(n: int = 4096) -> Tensor:
    """Generate all magnitudes and odd values: NaNs with all bits set, as on CUDA, or NaNs that bfloat16 lacks."""
    x = torch.randn(n) * 10.0 ** torch.empty(n).uniform_(-30, 30)
    x[: len(ODD)] = torch.tensor(ODD)
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F80FFFF, 0xFF800001 - (1 << 32)], dtype=torch.int32)
    x.view(torch.int32)[len(ODD) : len(ODD) + len(nans)] = nans
    return x


@triton.jit
def split_join_kernel(x_ptr, high_ptr, low_ptr, back_ptr, LOW_BITS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    high, low = kernels.split(tl.load(x_ptr + i), LOW_BITS)
    tl.store(high_ptr + i, high)
    tl.store(low_ptr + i, low.to(low_ptr.dtype.element_ty))
    tl.store(back_ptr + i, kernels.joined(high, low, LOW_BITS))


@triton.jit
def noise_kernel(out_ptr, start, seed, step, tensor, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    key0, key1 = kernels.noise_keys(seed.to(tl.int64), step.to(tl.uint32), tensor.to(tl.uint32))
    tl.store(out_ptr + i, kernels.noise(start + i.to(tl.int64), key0, key1).to(tl.int64))


@triton.jit
def stochastic_kernel(x_ptr, random_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, kernels.rounded_stochastically(tl.load(x_ptr + i), tl.load(random_ptr + i).to(tl.uint32)))


@triton.jit
def code_kernel(x_ptr, random_ptr, code_ptr, scale_ptr, back_ptr, BLOCK: tl.constexpr, SIGNED: tl.constexpr):
    i = tl.arange(0, BLOCK)
    code, scale = kernels.encoded(tl.load(x_ptr + i), tl.load(random_ptr + i).to(tl.uint32), SIGNED)
    tl.store(code_ptr + i, code)
    tl.store(scale_ptr + tl.arange(0, BLOCK // kernels.PER_SCALE), scale)
    tl.store(back_ptr + i, kernels.decoded(code, scale, SIGNED))


def bits(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 1 << 32, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("low_bits", "dtype"), [(16, torch.int16), (8, torch.int8)])
def test_split_keeps_what_it_says(low_bits: int, dtype: torch.dtype) -> None:
    x = samples()
    high, low = formats.split(x, low_bits)
    back = formats.joined(high, low, low_bits)
    finite = x.isfinite() & high.isfinite()
    if low_bits == 16:
        assert torch.equal(back[finite], x[finite])
    else:
        error = (back[finite].double() - x[finite].double()).abs()
        assert (error <= 2.0**-16 * x[finite].double().abs() + 2.0**-141).all()
    torch.testing.assert_close(high[finite], x[finite].bfloat16(), rtol=2**-7, atol=0)
    assert torch.equal(back.isnan(), x.isnan()) and torch.equal(high.isnan(), x.isnan())
    assert torch.equal(back[x.isinf()], x[x.isinf()])

    out = [torch.empty_like(high), torch.empty(x.numel(), dtype=dtype), torch.empty_like(x)]
    with sanitizing():
        split_join_kernel[(1,)](x, *out, LOW_BITS=low_bits, BLOCK=x.numel())
    for mine, theirs in zip((high, low, back), out):
        assert torch.equal(mine.view(torch.int8), theirs.view(torch.int8))


@pytest.mark.parametrize("low_bits", [16, 8])
def test_inf_and_nan_written_by_others_stay(low_bits: int) -> None:
    high = torch.tensor([torch.inf, -torch.inf, torch.nan, 2.0], dtype=torch.bfloat16)
    low = torch.full((4,), -5, dtype=torch.int16 if low_bits == 16 else torch.int8)
    back = formats.joined(high, low, low_bits)
    assert back[0] == torch.inf and back[1] == -torch.inf and back[2].isnan() and 1.9 < back[3] < 2


def test_stochastic_rounding_is_right_on_average() -> None:
    value = 1.0 + 2**-7 * 0.3  # three tenths of the way to the next bfloat16
    n = 1 << 16
    rounded = formats.rounded_stochastically(torch.full((n,), value), bits(n)).double()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    up = (rounded > 1).double().mean().item()
    assert abs(up - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5


def test_stochastic_rounding_leaves_what_needs_none_and_what_is_odd() -> None:
    x = samples()
    exact = x.bfloat16().float()
    rounded = formats.rounded_stochastically(exact, bits(x.numel()))
    assert torch.equal(rounded.isnan(), exact.isnan())
    assert torch.equal(rounded[~exact.isnan()].float(), exact[~exact.isnan()])
    mine, out = formats.rounded_stochastically(x, bits(x.numel())), torch.empty(x.numel(), dtype=torch.bfloat16)
    with sanitizing():
        stochastic_kernel[(1,)](x, bits(x.numel()), out, BLOCK=x.numel())
    assert torch.equal(mine.view(torch.int16), out.view(torch.int16))


@given(
    seed=st.integers(0, (1 << 53) - 1),
    step=st.integers(0, 1 << 24),
    tensor=st.integers(0, 1 << 20),
    start=st.integers(0, 1 << 40),
)
def test_noise_is_the_same_in_kernels_and_in_torch(seed: int, step: int, tensor: int, start: int) -> None:
    keys = formats.noise_keys(seed, torch.tensor(float(step)), tensor)
    mine, _ = formats.noise(torch.arange(start, start + 256), keys)
    out = torch.empty(256, dtype=torch.int64)
    noise_kernel[(1,)](out, start, seed, step, tensor, BLOCK=256)
    assert torch.equal(mine, out)


def change_element(seed: int, n: int) -> Tensor:
    return formats.noise(torch.arange(n), formats.noise_keys(seed, torch.tensor(7.0), 3))[0]


def change_step(seed: int, n: int) -> Tensor:
    return torch.cat(
        [formats.noise(torch.tensor([5]), formats.noise_keys(seed, torch.tensor(float(s)), 3))[0] for s in range(n)]
    )


def change_tensor(seed: int, n: int) -> Tensor:
    return torch.cat(
        [formats.noise(torch.tensor([5]), formats.noise_keys(seed, torch.tensor(7.0), t))[0] for t in range(n)]
    )


def change_seed(seed: int, n: int) -> Tensor:
    return torch.cat([change_element(seed + s, 1) for s in range(n)])


@pytest.mark.parametrize(
    ("change", "n"), [(change_element, 1 << 16), (change_step, 2048), (change_tensor, 2048), (change_seed, 2048)]
)
def test_noise_has_no_pattern(change: Callable[[int, int], Tensor], n: int) -> None:
    x = change(11, n)
    ones = torch.stack([(x >> b) & 1 for b in range(32)]).double()  # (32, n)
    limit = 5 / n**0.5
    assert (ones.mean(1) - 0.5).abs().max() < limit / 2  # every bit is one half the time,
    centered = 2 * ones - 1
    together = centered @ centered.T / n - torch.eye(32, dtype=torch.float64)
    assert together.abs().max() < limit  # alone of the others,
    for lag in (1, 2, 8, 128):  # and of what comes after
        assert ((centered[:, lag:] * centered[:, :-lag]).mean(1)).abs().max() < limit * 1.1
    assert x.unique().numel() >= n - 3


def test_noise_of_two_steps_is_unrelated() -> None:
    a, b = (formats.noise(torch.arange(4096), formats.noise_keys(0, torch.tensor(s), 0))[0] for s in (1.0, 2.0))
    same = sum(((a >> k) & 1 == (b >> k) & 1).double().mean() - 0.5 for k in range(32)) / 32
    assert abs(same) < 0.006


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_right_on_average(signed: bool) -> None:
    n, trials = 512, 400
    x = torch.randn(n) * 10.0 ** torch.empty(n).uniform_(-3, 0)
    x = x if signed else x**2
    total = torch.zeros(n, dtype=torch.float64)
    squares = torch.zeros(n, dtype=torch.float64)
    for trial in range(trials):
        back = formats.decoded(*formats.encoded(x, bits(n, trial), signed)).double()
        total += back
        squares += (back - x) ** 2
    scale = x.abs().view(-1, 128).amax(1).repeat_interleave(128).double()
    error = (total / trials - x).abs()
    kept = x.abs() > scale * 1e-9 if not signed else torch.ones(n, dtype=torch.bool)
    assert (error[kept] <= 5 * (squares[kept] / trials / trials).sqrt() + 1e-6 * scale[kept]).all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_as_near_as_their_grid(signed: bool) -> None:
    x = torch.randn(1000)
    x = x if signed else x**2
    scale = torch.nn.functional.pad(x.abs(), (0, 24)).view(-1, 128).amax(1).repeat_interleave(128)[:1000]
    nearest, random = (formats.decoded(*formats.encoded(x, r, signed)) for r in (None, bits(1000)))
    y = (x.abs() / scale) ** (0.5 if signed else 0.25)
    levels = 127 if signed else 255
    power = 2 if signed else 4
    gap = scale * (((y * levels).floor() + 1) / levels) ** power - scale * ((y * levels).floor() / levels) ** power
    assert ((nearest - x).abs() <= 0.501 * gap + 1e-6 * scale).all()
    assert ((random - x).abs() <= 1.001 * gap + 1e-6 * scale).all()
    relative = ((nearest - x).abs() / x.abs())[x.abs() > scale / 16]
    assert relative.max() < 0.035


@pytest.mark.parametrize("signed", [True, False])
def test_what_has_no_sign_never_becomes_zero(signed: bool) -> None:
    x = torch.full((256,), 1e-20)
    x[0], x[5] = 1.0, 0.0
    code, scale = formats.encoded(x, bits(256), signed)
    out = torch.empty_like(code), torch.empty_like(scale), torch.empty_like(x)
    code_kernel[(1,)](x, bits(256), *out, BLOCK=256, SIGNED=signed)
    for back in (formats.decoded(code, scale), out[2]):
        assert back[5] == 0 and back[0] == 1
        assert (back[1:5] == 0).all() if signed else (back[1:5] > 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_the_same_in_kernels_and_in_torch(signed: bool) -> None:
    n = 1024
    x = torch.randn(n) * 10.0 ** torch.empty(n).uniform_(-6, 0)
    x = x if signed else x.abs()
    x[:128] = 0.0
    random = bits(n)
    code, scale = formats.encoded(x, random, signed)
    out = torch.empty_like(code), torch.empty_like(scale), torch.empty_like(x)
    with sanitizing():
        code_kernel[(1,)](x, random, *out, BLOCK=n, SIGNED=signed)
    assert torch.equal(scale, out[1])
    assert (code != out[0]).sum() <= 2  # a root's last bit may decide one
    torch.testing.assert_close(formats.decoded(out[0], out[1]), out[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_a_group_that_is_not_finite_says_so(signed: bool) -> None:
    for odd in (torch.nan, torch.inf):
        x = torch.rand(256) + 0.1
        x[3] = odd
        code, scale = formats.encoded(x, bits(256), signed)
        back = formats.decoded(code, scale)
        assert not back[3].isfinite() and back[128:].isfinite().all()
        out = torch.empty_like(code), torch.empty_like(scale), torch.empty_like(x)
        code_kernel[(1,)](x, bits(256), *out, BLOCK=256, SIGNED=signed)
        assert not out[2][3].isfinite() and out[2][128:].isfinite().all()


def test_codes_survive_being_decoded_and_encoded() -> None:
    for signed in (True, False):
        x = torch.randn(1024) if signed else torch.rand(1024)
        code, scale = formats.encoded(x, bits(1024), signed)
        again, scale_again = formats.encoded(formats.decoded(code, scale), None, signed)
        assert torch.equal(code, again) and torch.equal(scale, scale_again)


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("away", "known"), [(0.25, True), (0.75, True), (1.0, True), (1.25, False), (-0.75, True)])
def test_bits_are_kept_for_either_neighbour_of_a_value(bits: int, away: float, known: bool) -> None:
    """A parameter further away than its neighbour was set by the user, and is all that is known."""
    kept = formats.PARAM_FORMATS["split16" if bits == 16 else "split8"]
    p, value = torch.tensor([1.0, -1.0], dtype=torch.bfloat16), torch.tensor([1.0, -1.0]) * (1 + away * 2.0**-7)
    low = torch.ones(2, dtype=kept.dtype)
    kept.keep(p, low, value)
    assert torch.equal(kept.read(p, low, torch.float32), value if known else torch.tensor([1.0, -1.0]))
