"""The block-sparse product against float64, with NaN and infinity wherever it must not look."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llmfast_kernels.filtered_matmul import BLOCK, filtered_matmul, vectors
from support.launched import unrecorded
from support.numerics import assert_close_in_norm

pytestmark = pytest.mark.usefixtures("kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(128, 256, 128), (130, 264, 72), (1, 1, 1), (72, 129, 131), (136, 136, 264)]


def random_blocks(M: int, K: int) -> Tensor:
    return torch.rand(-(-M // BLOCK), -(-K // BLOCK)) < 0.6


def by_element(alive: Tensor, M: int, K: int) -> Tensor:
    return alive.bool().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:M, :K]


def padded(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Return a view (rows, width) of a wider slab that is NaN elsewhere."""
    slab = torch.full((rows, -(-width // 64) * 64 + 64), torch.nan, dtype=dtype)
    slab[:, :width] = torch.randn(rows, width).to(dtype)
    return slab[:, :width]


def left(M: int, K: int, dtype: torch.dtype, alive: Tensor, transposed: bool) -> Tensor:
    """Create the left factor, with NaN and infinity in its dead blocks."""
    a = padded(K, M, dtype).T if transposed else padded(M, K, dtype)
    dead = ~by_element(alive, M, K)
    a[dead] = torch.tensor([torch.nan, torch.inf], dtype=dtype).repeat(int(dead.sum()) // 2 + 1)[: int(dead.sum())]
    return a


def check(a: Tensor, b: Tensor, alive: Tensor, out: Tensor, add: bool) -> None:
    clean = a.masked_fill(~by_element(alive, *a.shape), 0.0)
    before = out.double() if add else 0.0
    truth = clean.double() @ b.double() + before
    torchs = (clean.float() @ b.float() + (out.float() if add else 0.0)).to(out.dtype)
    if not add:
        out.fill_(torch.nan)
    filtered_matmul(a, b, alive, out=out, add=add)
    assert_close_in_norm(out, torchs, truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("M", "K", "D"), SHAPES)
def test_equals_the_dense_product_of_what_lives(dtype: torch.dtype, transposed: bool, M: int, K: int, D: int) -> None:
    alive = random_blocks(M, K)
    a, b = left(M, K, dtype, alive, transposed), padded(K, D, dtype)
    # To a compiler float16 is bfloat16 by another name.
    with unrecorded() if dtype == torch.float16 else nullcontext():
        check(a, b, alive, padded(M, D, dtype), add=False)
        check(a, b, alive, padded(M, D, torch.float32), add=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_dead_is_the_dense_product(dtype: torch.dtype) -> None:
    a, b = torch.randn(136, 264).to(dtype), torch.randn(264, 136).to(dtype)
    check(a, b, torch.ones(2, 3, dtype=torch.int8), torch.empty(136, 136), add=False)
    check(a, b, torch.ones(2, 3, dtype=torch.int8), torch.randn(136, 136).to(dtype), add=True)


@pytest.mark.parametrize("fate", [[0, 0, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
def test_the_block_that_is_cut_off_lives_or_not(fate: list[int]) -> None:
    alive = torch.tensor([fate, [1, 1, 1]], dtype=torch.int8)
    a = left(256, 300, torch.bfloat16, alive, False)
    check(a, padded(300, 128, torch.bfloat16), alive, torch.empty(256, 128), add=False)


def test_blocks_may_come_transposed() -> None:
    """Read blocks by classes, then tokens, as for the weight's gradient."""
    alive = torch.tensor([[True, False, True], [False, True, True]])
    slab = left(200, 300, torch.float16, alive, False)
    check(slab.T, padded(200, 64, torch.float16), alive.T, torch.randn(300, 64), add=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_dead(dtype: torch.dtype) -> None:
    alive = torch.zeros(2, 2, dtype=torch.bool)
    a, b = torch.full((200, 200), torch.nan, dtype=dtype), torch.full((200, 40), torch.nan, dtype=dtype)
    out = torch.randn(200, 40).to(dtype)
    before = out.clone()
    filtered_matmul(a, b, alive, out=out, add=True)
    assert torch.equal(out, before)
    filtered_matmul(a, b, alive, out=out)
    assert out.eq(0).all()


def test_nan_that_lives_reaches_its_rows_and_no_others() -> None:
    a, b, out = torch.randn(140, 140), torch.randn(140, 8), torch.empty(140, 8)
    a[3, 139] = torch.nan
    filtered_matmul(a, b, torch.ones(2, 2, dtype=torch.bool), out=out)
    assert out.isnan().all(1).nonzero().tolist() == [[3]]
    assert out.isnan().sum() == 8


def test_same_bits_every_time() -> None:
    alive = random_blocks(200, 700)
    a, b = left(200, 700, torch.bfloat16, alive, True), padded(700, 136, torch.bfloat16)
    outs = [torch.empty(200, 136) for _ in range(2)]
    for out in outs:
        filtered_matmul(a, b, alive, out=out)
    assert torch.equal(*outs)


@pytest.mark.parametrize(("M", "K", "D"), [(0, 5, 5), (5, 0, 5), (5, 5, 0)])
@pytest.mark.parametrize("add", [False, True])
def test_empty(M: int, K: int, D: int, add: bool) -> None:
    out = torch.ones(M, D)
    filtered_matmul(torch.randn(M, K), torch.randn(K, D), random_blocks(M, K) | True, out=out, add=add)
    if K == 0:
        assert out.eq(1.0 if add else 0.0).all()


@given(
    M=st.integers(1, 150),
    K=st.integers(1, 280),
    D=st.integers(1, 150),
    transposed=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape(M: int, K: int, D: int, transposed: bool, add: bool, seed: int) -> None:
    torch.manual_seed(seed)
    alive = random_blocks(M, K)
    a = left(M, K, torch.float32, alive, transposed)
    check(a, torch.randn(K, D), alive, torch.randn(M, D), add)


def test_widest_access_that_strides_allow() -> None:
    b, out = torch.empty(50257, 64, dtype=torch.bfloat16), torch.empty(256, 64)
    slab = torch.empty(256, 50304, dtype=torch.bfloat16)
    assert vectors(slab, b, out) == {"VECTOR": 8, "VECTOR_TAIL": True}
    # A vocabulary that is no multiple of 8 in padded rows: narrow accesses where it ends, and there alone.
    assert vectors(slab[:, :50257], b, out) == {"VECTOR": 8, "VECTOR_TAIL": False}
    assert vectors(slab[:, :50257].T, b, out) == {"VECTOR": 8, "VECTOR_TAIL": False}
    assert vectors(slab[:250], b, out) == {"VECTOR": 8, "VECTOR_TAIL": True}
    assert vectors(slab[:, 8:], b, out)["VECTOR"] == 8
    assert vectors(slab[:, 4:], b, out)["VECTOR"] == 1
    assert vectors(slab, b[:, :60], out[:, :60])["VECTOR"] == 4
    assert vectors(slab.float(), b.float(), out)["VECTOR"] == 4
    assert vectors(slab, b[:, :63], out)["VECTOR"] == 1


def test_accesses_are_as_wide_as_every_address_allows() -> None:
    whole = {"a": torch.zeros(8, 16), "b": torch.zeros(16, 8), "out": torch.zeros(8, 8)}
    assert vectors(*whole.values())["VECTOR"] == 4
    for name, t in whole.items():
        moved = torch.zeros(t.numel() + 1)[1:].view(t.shape)  # 4 bytes past a multiple of 16
        assert vectors(*(whole | {name: moved}).values()) == {"VECTOR": 1, "VECTOR_TAIL": True}
        odd = torch.zeros(t.shape[0], t.shape[1] + 2)[:, : t.shape[1]]
        assert vectors(*(whole | {name: odd}).values())["VECTOR"] == 2


def test_more_blocks_live_than_a_byte_counts() -> None:
    """A vocabulary of 50257 has 393 blocks of columns."""
    K = 130 * BLOCK - 5
    alive = torch.ones(1, 130, dtype=torch.int8)
    alive[0, 7] = 0
    check(torch.randn(1, K).half(), torch.randn(K, 4).half(), alive, torch.empty(1, 4), add=False)
