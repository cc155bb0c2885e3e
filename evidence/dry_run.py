"""Dry execution of torch operators on tensors too large to compute with: results in memory that is never touched."""

import mmap
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from evidence.pretend_cuda import PRODUCTS_INTO_OTHER_DTYPES

LARGE = 1 << 20  # elements; larger tensors are not computed

_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def reserve(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Reserve a CPU tensor of zeros of any size. The system allocates a page only when it is written."""
    return _reserve_like(torch.empty(shape, dtype=dtype, device="meta"))


def _reserve_like(meta: Tensor) -> Tensor:
    size = max(1, meta.untyped_storage().nbytes())
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=meta.dtype).set_(storage, 0, meta.shape, meta.stride())


def run_dry(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the operator's result: computed if all tensors are small, otherwise tensors of the right shape."""
    if func.is_view:
        return func(*args, **kwargs)
    given: dict[int, Tensor] = {}  # by the id of the corresponding meta tensor

    def outline(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, Tensor):
            return value
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        given[id(meta)] = value
        return meta

    meta_args, meta_kwargs = tree_map(outline, args), tree_map(outline, kwargs)
    small = all(t.numel() <= LARGE for t in given.values())
    if not small and not func._schema.returns:
        return None  # it only changes its arguments, and the values of large tensors do not matter
    try:
        results = (
            _product_into_float32(meta_args, meta_kwargs)
            if func in PRODUCTS_INTO_OTHER_DTYPES
            else func(*meta_args, **meta_kwargs)
        )
    except (NotImplementedError, RuntimeError):
        if small:
            return func(*args, **kwargs)  # the result depends on values, as that of item and nonzero does
        raise
    if small and all(t.numel() <= LARGE for t in tree_leaves(results) if isinstance(t, Tensor)):
        return func(*args, **kwargs)

    def made(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return given[id(value)] if id(value) in given else _reserve_like(value)

    return tree_map(made, results)


def _product_into_float32(args: Any, kwargs: Any) -> Tensor:
    """Return the product of meta tensors, for which torch lacks this operator."""
    if "out" in kwargs:
        out: Tensor = kwargs["out"]
        return out
    a, b = args[-3:-1]
    return torch.empty(a.shape[0], b.shape[1], dtype=args[-1], device="meta")
