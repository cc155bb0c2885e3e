"""The place of targets among the classes of their row: how many logits are larger."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of

from llmfast_kernels import row as parts
from llmfast_kernels.cross_entropy import tile, vectors
from llmfast_kernels.launch import FP_FUSION, cdiv, expect_contiguous, next_power_of_2
from llmfast_kernels.terms import Terms

MOST_IDS = 8  # that a program counts for in one pass: one register per id and thread


@triton.jit
def count_tile(row, start, keys, counts, TAIL: tl.constexpr, BLOCK_V: tl.constexpr, VECTOR: tl.constexpr):
    """Return `counts` (IDS, THREADS) with the logits of a tile that are above `keys` (IDS, 1) added."""
    v = (start + tl.arange(0, BLOCK_V))[None, :]
    inside = v < row.V if TAIL else None
    x = parts.read_logits(row, v, inside, inside)
    above = x > keys
    if TAIL:
        above = above & inside
    IDS: tl.constexpr = counts.shape[0]
    THREADS: tl.constexpr = counts.shape[1]
    # As in `fold_tile`: every thread counts its own elements.
    above = tl.reshape(above.to(tl.int32), (IDS, BLOCK_V // (THREADS * VECTOR), THREADS, VECTOR))
    return counts + tl.sum(tl.sum(above, axis=3), axis=1)


@triton.jit(do_not_specialize=["V", "logits_stride_n"], do_not_specialize_on_alignment=["keys_ptr", "counts_ptr"])
def count_above_kernel(
    # in
    logits_ptr,  # (N, V)
    keys_ptr,  # (N, K) f32
    terms,  # RowTerms; those that change the order of a row's logits
    # out
    counts_ptr,  # (N, K) int64
    # sizes
    V,
    # strides
    logits_stride_n,
    # tile
    K: tl.constexpr,
    IDS: tl.constexpr,  # of a program
    BLOCK_V: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    row = parts.Row(logits_ptr + n * parts.known_multiple(logits_stride_n, VECTOR), terms, V, V)
    k = tl.program_id(1) * IDS + tl.arange(0, IDS)
    keys = tl.load(keys_ptr + n * K + k, mask=k < K, other=float("inf"))[:, None]
    counts = tl.zeros((IDS, THREADS), tl.int32)
    full = V // BLOCK_V * BLOCK_V
    for start in range(0, full, BLOCK_V):
        counts = count_tile(row, start, keys, counts, TAIL=False, BLOCK_V=BLOCK_V, VECTOR=VECTOR)
    if full < V:
        counts = count_tile(row, full, keys, counts, TAIL=True, BLOCK_V=BLOCK_V, VECTOR=VECTOR)
    tl.store(counts_ptr + n * K + k, tl.sum(counts, axis=1).to(tl.int64), mask=k < K)


def count_above(
    logits: Tensor,  # (N, V or more)
    keys: Tensor,  # (N, K) f32
    terms: Terms,
    *,
    V: int,
) -> Tensor:
    """Return how many of each row's logits are larger than each of its keys, (N, K) int64.

    They are compared with their bias and scale. A softcap keeps their order, and would make some equal by rounding.
    """
    (N, K), bias = keys.shape, terms.bias
    expect_contiguous(keys=keys, bias=bias)
    counts = torch.empty(keys.shape, dtype=torch.int64, device=keys.device)
    if N == 0:
        return counts
    ids = min(next_power_of_2(K), MOST_IDS)
    own = parts.RowTerms(*[None] * len(parts.RowTerms._fields))._replace(bias=bias, logit_scale=terms.logit_scale)
    vector = vectors(V, logits, None)["VECTOR"]
    with device_of(logits):
        count_above_kernel[(N, cdiv(K, ids))](
            logits_ptr=logits,
            keys_ptr=keys,
            terms=own,
            counts_ptr=counts,
            V=V,
            logits_stride_n=logits.stride(0),
            K=K,
            IDS=ids,
            VECTOR=vector,
            **tile(V, many_terms=True),
            **FP_FUSION,
        )
    return counts
