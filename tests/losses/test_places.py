"""Counts of the logits above a key, for every number of keys, tile and term, against plain torch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast_kernels.places import MOST_IDS, count_above
from llmfast_kernels.terms import Terms
from support.pairs import covering

pytestmark = pytest.mark.usefixtures("kernels")

CASES = covering(
    {
        "K": [1, 2, 3, MOST_IDS - 1, MOST_IDS, MOST_IDS + 1, 2 * MOST_IDS + 3],
        "V": [1, 7, 1023, 1024, 1025, 2 * 8192 + 3],
        "padding": [0, 5, 64],
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
        "bias": [False, True],
        "logit_scale": [None, -1.5, 0.5],
        "softcap": [None, 0.25],
        "N": [1, 3],
    }
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_above_each_key_are_counted(case: dict[str, Any]) -> None:
    """Ask for keys that are logits themselves, which are above none of their equals, and for others."""
    N, V, K, dtype = (case[name] for name in ("N", "V", "K", "dtype"))
    slab = torch.full((N, V + case["padding"]), 1e4, dtype=dtype)
    slab[:, :V] = (torch.randn(N, V) * 4).round().to(dtype) / 4
    bias = torch.randn(V).mul(4).round().div(4).to(dtype) if case["bias"] else None
    x = slab[:, :V].float() + (0.0 if bias is None else bias.float())
    x = x * (case["logit_scale"] or 1.0)
    keys = x[:, torch.randint(0, V, (K,))].contiguous()
    keys[:, K // 2] = torch.tensor([torch.inf, -torch.inf, 0.125])[:N]
    terms = Terms(V, bias=bias, logit_scale=case["logit_scale"], softcap=case["softcap"])
    wanted = (x[:, None, :] > keys[:, :, None]).sum(2)
    found = count_above(slab, keys, terms, V=V)
    assert found.dtype == torch.int64 and torch.equal(found, wanted)


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
def test_nothing_lies_above_what_is_no_number_or_infinite(odd: float) -> None:
    x = torch.tensor([[1.0, torch.inf, torch.nan, -torch.inf]])
    keys: Tensor = torch.tensor([[odd, 0.0, -torch.inf]])
    assert count_above(x, keys, Terms(4), V=4).tolist() == [[0, 2, 2]]


def test_no_rows() -> None:
    found = count_above(torch.zeros(0, 5), torch.zeros(0, 3), Terms(5), V=5)
    assert found.shape == (0, 3) and found.dtype == torch.int64
