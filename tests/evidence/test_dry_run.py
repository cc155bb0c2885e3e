"""Results of dry runs: shapes of large tensors, values of small ones."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evidence.dry_run import LARGE, reserve, run_dry


class Dry(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run_dry(func, args, kwargs or {})


def touched(t: Tensor) -> bool:
    """Return True if a result of ones is there."""
    return bool(t.flatten()[0] != 0)


def test_what_is_computed_depends_on_the_size() -> None:
    small, large = torch.ones(LARGE), reserve(LARGE + 1) + 0
    with Dry():
        computed, not_computed = small + 1, large + 1
        from_small = small[: LARGE // 2, None].expand(-1, 4) + 1.0  # a small operand and a large result
    assert touched(computed) and not touched(not_computed) and not touched(from_small)
    assert from_small.shape == (LARGE // 2, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_reserved_memory_has_shape_type_and_zeros(dtype: torch.dtype) -> None:
    t = reserve(3, 5, dtype=dtype)
    assert t.shape == (3, 5) and t.stride() == (5, 1) and t.dtype == dtype and t.is_cpu and not t.any()
    t[2, 4] = 1
    assert t.sum() == 1
    assert reserve(0, 4).shape == (0, 4) and reserve().shape == ()


def test_results_have_the_strides_and_the_devices_of_real_ones() -> None:
    side = 1 << 11
    x = reserve(side, side)
    with Dry():
        results = [torch.empty_like(x.T), x.T + 1, torch.zeros(side, side, device=torch.device("cpu")), x.max(1)]
    assert [t.stride() for t in results[:3]] == [(1, side), (1, side), (side, 1)]
    assert all(t.is_cpu for t in (*results[:3], *results[3])) and results[3].indices.dtype == torch.int64


def test_a_large_tensor_is_changed_in_place_by_name_alone() -> None:
    x, small = reserve(LARGE + 1), torch.ones(3)
    with Dry():
        assert x.add_(1) is x and not touched(x)
        assert torch.add(x, 1, out=x) is x and x.view(-1).data_ptr() == x.data_ptr()
        torch._foreach_add_([x], 1.0)
        torch._foreach_add_([small], 1.0)
    assert not touched(x) and small.tolist() == [2, 2, 2]


def test_values_of_small_tensors_are_there_and_of_large_ones_missed() -> None:
    with Dry():
        assert torch.tensor([0, 3]).nonzero().tolist() == [[1]] and torch.tensor(2.5).item() == 2.5
        with pytest.raises((NotImplementedError, RuntimeError)):
            reserve(LARGE + 1).nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_into_another_type(dtype: torch.dtype) -> None:
    """The operators are called by name: no CPU has them."""
    a, b = reserve(1 << 10, 1 << 11, dtype=torch.bfloat16), reserve(1 << 11, 3, dtype=torch.bfloat16)
    out = torch.zeros(1 << 10, 3, dtype=dtype)
    mm, addmm = torch.ops.aten.mm, torch.ops.aten.addmm
    for func, given in ((mm.dtype, (a, b, dtype)), (addmm.dtype, (out, a, b, dtype))):
        found = run_dry(func, given, {})
        assert found.shape == (1 << 10, 3) and found.dtype == dtype and found.is_cpu
    assert run_dry(mm.dtype_out, (a, b, dtype), {"out": out}) is out
    assert run_dry(addmm.dtype_out, (out, a, b, dtype), {"out": out}) is out
