"""Dry execution of torch operators on tensors too large to compute with: results in memory that is never touched."""

import mmap
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class _Outcome:
    """Result of an operator for arguments of certain shapes."""

    runs: bool  # on small tensors: compute it
    results: Any = None  # meta tensors
    given: dict[int, int] = field(default_factory=dict)  # which argument each meta tensor stands for, by its id


_outcomes: dict[object, _Outcome] = {}  # operators are repeated for each chunk, and asking torch takes longer


def run_dry(func: Any, args: Any, kwargs: Any) -> Any:
    """Return the operator's result: computed if all tensors are small, otherwise tensors of the right shape."""
    if func.is_view:
        return func(*args, **kwargs)
    tensors: list[Tensor] = []
    key = (func, _outline(args, tensors), *((name, _outline(value, tensors)) for name, value in kwargs.items()))
    outcome = _outcomes.get(key)
    if outcome is None:
        outcome = _outcomes[key] = _outcome_of(func, args, kwargs, tensors)
    return func(*args, **kwargs) if outcome.runs else _made(outcome.results, outcome.given, tensors)


def _outline(value: Any, tensors: list[Tensor]) -> object:
    """Describe an argument by all that its operator's result depends on but numbers, and collect its tensors."""
    if isinstance(value, Tensor):
        tensors.append(value)
        same = next(i for i, t in enumerate(tensors) if t is value)
        return same, value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, list | tuple):
        return tuple([_outline(member, tensors) for member in value])
    return type(value), value  # 1, 1.0 and True are equal, but lead to other dtypes


def _outcome_of(func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> _Outcome:
    given: dict[int, int] = {}
    metas: list[Tensor] = []

    def outline(value: Any) -> Any:
        if isinstance(value, torch.device):
            return torch.device("meta")
        if not isinstance(value, Tensor):
            return value
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        given[id(meta)] = len(metas)
        metas.append(meta)
        return meta

    meta_args, meta_kwargs = tree_map(outline, args), tree_map(outline, kwargs)
    small = all(t.numel() <= LARGE for t in tensors)
    if not small and not func._schema.returns:
        return _Outcome(False)  # it only changes its arguments, and the values of large tensors do not matter
    try:
        results = (
            _product_into_float32(meta_args, meta_kwargs)
            if func in PRODUCTS_INTO_OTHER_DTYPES
            else func(*meta_args, **meta_kwargs)
        )
    except (NotImplementedError, RuntimeError):
        if small:
            return _Outcome(True)  # the result depends on values, as that of item and nonzero does
        raise
    if small and all(t.numel() <= LARGE for t in tree_leaves(results) if isinstance(t, Tensor)):
        return _Outcome(True)
    return _Outcome(False, results, given)


def _made(result: Any, given: dict[int, int], tensors: list[Tensor]) -> Any:
    """Return the result of meta tensors for these arguments."""
    if isinstance(result, Tensor):
        return tensors[given[id(result)]] if id(result) in given else _reserve_like(result)
    if isinstance(result, list | tuple):
        return type(result)([_made(member, given, tensors) for member in result])
    return result


def _product_into_float32(args: Any, kwargs: Any) -> Tensor:
    """Return the product of meta tensors, for which torch lacks this operator."""
    if "out" in kwargs:
        out: Tensor = kwargs["out"]
        return out
    a, b = args[-3:-1]
    return torch.empty(a.shape[0], b.shape[1], dtype=args[-1], device="meta")
