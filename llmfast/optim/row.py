"""One parameter from an optimizer's view: its local piece, and the states kept for it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmfast._dtensor import is_dtensor, local
from llmfast.optim.formats import MasterWeights, ParamFormat, param_format

SHARED = -1  # the clip of all groups without their own `max_grad_norm`: see `Row.clip`


class Bucket(NamedTuple):
    """Sharding of a tensor: a device mesh, and the mesh dimensions that shard it."""

    mesh: Any
    dims: tuple[int, ...]


class Shard(NamedTuple):
    """Position of a piece in the whole tensor: its element e is element e // run * stride + e % run + offset there."""

    run: int = 1
    stride: int = 1
    offset: int = 0
    bucket: Bucket | None = None

    @property
    def strided(self) -> bool:
        return self.run != self.stride


class Place(NamedTuple):
    """Position of a parameter in an optimizer."""

    param: Tensor
    group: int
    number: int  # in its group
    identity: int  # among all parameters

    def holds(self, groups: list[dict[str, Any]]) -> bool:
        """Return True if the parameter is still at this position in its group."""
        params = groups[self.group]["params"] if self.group < len(groups) else []
        return self.number < len(params) and params[self.number] is self.param


def places(groups: list[dict[str, Any]]) -> list[Place]:
    """Return the positions of all parameters of an optimizer."""
    found = [(p, index, i) for index, group in enumerate(groups) for i, p in enumerate(group["params"])]
    return [Place(*place, identity) for identity, place in enumerate(found)]


@dataclass
class Row:
    """One parameter, the index of its group, its number among all parameters, and its state.

    `local`, `states` and the following are plain tensors: for a DTensor, the local piece.
    """

    param: Tensor
    group: int
    identity: int
    state: dict[str, Any]
    local: Tensor
    shard: Shard
    clip: int | None  # rows with the same number are clipped together; None: neither clipped nor measured
    master: MasterWeights | None
    names: tuple[str | None, ...]
    states: tuple[Tensor | None, ...]  # three
    scales: tuple[Tensor | None, ...]  # of the first two, where they have 8 bits
    low: Tensor | None
    ema: Tensor | None
    fused: bool = False  # whether torch's fused CPU kernel updates it

    def __post_init__(self) -> None:
        found = {name: t for name, t in zip(self.names, self.states) if name is not None and t is not None}
        # The part of the state that torch's own update knows.
        self.named_states: dict[str, Tensor] = found | {"step": self.state["step"]}

    @property
    def format(self) -> ParamFormat:
        """Format that adds bits to the parameter."""
        return param_format(self.master)

    @property
    def grad(self) -> Tensor | None:
        return grad_of(self.param)

    @property
    def tensors(self) -> list[Tensor]:
        """Tensors that a step changes."""
        return [self.local, *(local(t) for t in self.state.values() if isinstance(t, Tensor))]

    def matches(self, g: Tensor | None) -> bool:
        """Return True if the gradient has the parameter's memory layout, and neither has gaps."""
        fits = g is not None and g.layout == torch.strided and g.stride() == self.local.stride()
        return fits and is_dense(self.local)


class Kind(NamedTuple):
    """Properties that the rows of a batch share."""

    device: torch.device
    dtype: torch.dtype
    clip: int | None
    group: int
    by_torch: bool  # through torch's own function, not `update_plainly`
    fused: bool  # in torch's fused CPU kernel


class Batch:
    """Rows that are updated together without kernels. Facts that no step changes are looked up once."""

    def __init__(self, kind: Kind, rows: list[Row]) -> None:
        self.kind, self.rows = kind, rows
        self.has_complex = any(row.local.is_complex() for row in rows)
        self._params = [row.param for row in rows]
        self._sharded = any(map(is_dtensor, self._params))
        self._seen = _gradient_kinds(self._params)

    def looks(self) -> bool:
        """Return False if a gradient differs in kind from the one for which the batch was made."""
        now = _gradient_kinds(self._params)
        return now == self._seen or all(kind is None or kind == seen for kind, seen in zip(now, self._seen))

    def used(self) -> tuple[list[Row], list[Tensor]]:
        """Return the rows that have a gradient, and the local pieces of their gradients."""
        grads = [*map(grad_of, self._params)] if self._sharded else [p.grad for p in self._params]
        found = [g for g in grads if g is not None]
        if len(found) == len(grads):
            return self.rows, found
        return [row for row, g in zip(self.rows, grads) if g is not None], found


def _gradient_kinds(params: list[Tensor]) -> list[Any]:
    """Return dtype, layout and strides of each parameter's gradient."""
    grads = [p.grad for p in params]
    strided = torch.strided
    return [g if g is None else (g.dtype, g.stride() if g.layout is strided else g.layout) for g in grads]


def grad_of(p: Tensor) -> Tensor | None:
    """Return the gradient of the local piece of `p`.

    A gradient with a different placement, such as partial sums, is redistributed first and keeps the new placement.
    """
    g: Any = p.grad
    if g is None or g is local(g):
        return g
    placements = p.placements  # type: ignore[attr-defined]
    if g.placements != placements:
        p.grad = g = g.redistribute(placements=placements)
    return local(g)


def bring_together(dtensors: list[Tensor]) -> None:
    """Redistribute gradients whose placement differs from their parameters', in the same order on all ranks."""
    for p in dtensors:
        grad_of(p)


def shard_of(p: Tensor) -> Shard:
    """Return the position of the local piece of `p` in the whole tensor."""
    if not is_dtensor(p):
        return Shard()
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements, shape = p.device_mesh, p.placements, p.shape  # type: ignore[attr-defined]
    if mesh.get_coordinate() is None:  # this rank has no piece
        return Shard()
    dims = tuple(i for i, placement in enumerate(placements) if not placement.is_replicate())
    bucket = Bucket(mesh, dims) if dims else None
    sizes, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    strides = [1] * len(shape)
    for d in reversed(range(len(shape) - 1)):
        strides[d] = strides[d + 1] * shape[d + 1]
    offset = sum(offset * stride for offset, stride in zip(offsets, strides))
    # If only dimension 0 is cut, all elements of a piece are consecutive, otherwise those from the last cut dimension
    # on. A piece that is cut along two further dimensions is numbered as if it were cut along the last one only: its
    # noise is as random, but differs from that of other shardings.
    cut = [d for d in range(1, len(shape)) if sizes[d] != shape[d]]
    if not cut:
        return Shard(1, 1, offset, bucket)
    return Shard(max(sizes[cut[-1]], 1) * strides[cut[-1]], strides[cut[-1] - 1], offset, bucket)


def is_dense(t: Tensor) -> bool:
    """Return True if the elements fill their memory without gaps or overlaps, in any order."""
    if t.layout != torch.strided:
        return False
    if t.is_contiguous():
        return True
    filled = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size > 1:
            if stride != filled:
                return False
            filled *= size
    return True
