"""Choosing each parameter's update path: through the kernels, through torch's functions, or through neither."""

from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor

from llmfast._checks import describe
from llmfast._dispatch import KERNEL_DTYPES, use_kernels
from llmfast._dtensor import is_dtensor, local
from llmfast.optim.row import SHARED, Batch, Bucket, Kind, Place, Row, bring_together, is_dense, places, shard_of
from llmfast.optim.state import StateKeeper
from llmfast.optim.table import PointerTable, Signature, capturing, signature
from llmfast.optim.watch import Watch

FORMATS = ("master_weights", "state_dtype", "ema_decay")
Gradients = list[list[int]]  # addresses, for each table of a plan
KERNEL_STATES = (*KERNEL_DTYPES, torch.int16, torch.int8, torch.uint8)


class Plan(NamedTuple):
    """Cached assignment of parameters to update paths."""

    settings: Any  # those of groups and options that the plan depends on
    watch: Watch
    tables: list[PointerTable]  # through the kernels, one update launch each
    batches: list[Batch]  # through torch's own functions or `update_plainly`
    waiting: list[Tensor]  # without a gradient so far
    dtensors: list[Tensor]  # on any of the paths
    # Buckets of clipped DTensors. They are the same on all ranks, even if gradients are missing on some.
    buckets: dict[tuple[int, Bucket], torch.device]
    clips: frozenset[int | None]  # of all planned parameters: see `Row.clip`
    devices: list[torch.device]  # on which something is updated, here or on other ranks


class Planner(StateKeeper):
    """An optimizer that knows which path each of its parameters takes."""

    takes_sparse: ClassVar[bool] = False  # whether torch's update takes sparse gradients
    # Dtypes in which torch's fused CPU kernel is right.
    cpu_kernel_dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float64, *KERNEL_DTYPES)

    def gradients_of(self, plan: Plan) -> Gradients | None:
        """Return the addresses of the gradients for each of the plan's tables; None if the plan no longer holds."""
        bring_together(plan.dtensors)
        if plan.settings != self._settings():
            return None
        gradients = []
        for table in plan.tables:
            if (addresses := table.gradients()) is None:
                return None
            gradients.append(addresses)
        holds = (
            all(batch.looks() for batch in plan.batches)
            and all(p.grad is None for p in plan.waiting)
            and plan.watch.holds(self.param_groups, self.state)
        )
        return gradients if holds else None

    def _settings(self) -> Any:
        self._match_groups()
        o, found = self.options, []
        for index, (group, own) in enumerate(zip(self.param_groups, self.group_options)):
            clip = None if o.max_grad_norm is None else SHARED
            formats: Any = o.master_weights, o.state_dtype, o.ema_decay is None, clip
            if own:
                master, state, ema_decay = (self.option(index, name) for name in FORMATS)
                formats = master, state, ema_decay is None, self._clip_of(index)
            found.append((self._state_names(group), group["differentiable"], formats))
        return found

    def make_plan(self, chosen: Place | None = None) -> tuple[Plan, Gradients]:
        """Plan for all parameters, or for the `chosen` one, in a time that does not depend on the number of others."""
        if any(capturing(p.device) for group in self.param_groups for p in group["params"][:1]):
            raise RuntimeError("take one step before a CUDA graph is captured: the first makes states and tables")
        settings = self._settings()
        planned = places(self.param_groups) if chosen is None else [chosen]
        self._refuse_what_no_path_takes(planned)
        self._check_states(planned)
        dtensors = [place.param for place in planned if is_dtensor(place.param)]
        bring_together(dtensors)
        clips = {place.param: self._clip_of(place.group) for place in planned}
        buckets: dict[tuple[int, Bucket], torch.device] = {}
        for p in dtensors:
            if (bucket := shard_of(p).bucket) is not None and (clip := clips[p]) is not None:
                buckets[clip, bucket] = local(p).device
        signatures: dict[Signature, list[Row]] = {}
        batches: dict[Kind, list[Row]] = {}
        waiting: list[Tensor] = []
        for p, index, _, identity in planned:
            if p.grad is None and not self.state.get(p):
                waiting.append(p)
                continue
            row, group = self._row(p, index, identity), self.param_groups[index]
            row.fused = self._is_for_cpu_kernel(row)
            if self._is_for_kernels(row, group):
                signatures.setdefault(signature(row), []).append(row)
            else:
                kind = Kind(
                    device=row.local.device,
                    dtype=row.local.dtype,
                    clip=row.clip,
                    group=index,
                    by_torch=self._is_for_torch(row, group),
                    fused=row.fused,
                )
                batches.setdefault(kind, []).append(row)
        tables = [PointerTable(key, rows, self.rule.__name__) for key, rows in signatures.items()]
        gradients = [cast("list[int]", table.gradients()) for table in tables]
        only = None if chosen is None else chosen.param
        watch = Watch(self.param_groups, self.state, only)  # after the tables, which move step counters into one buffer
        self._loaded = self._loaded - clips.keys()
        here = [*(table.signature.device for table in tables), *(kind.device for kind in batches)]
        devices = [*dict.fromkeys([*here, *buckets.values()])]
        plan = Plan(
            settings=settings,
            watch=watch,
            tables=tables,
            batches=[Batch(kind, rows) for kind, rows in batches.items()],
            waiting=waiting,
            dtensors=dtensors,
            buckets=buckets,
            clips=frozenset(clips.values()),
            devices=devices,
        )
        return plan, gradients

    def _is_for_kernels(self, row: Row, group: dict[str, Any]) -> bool:
        p, g = row.local, row.grad
        plain = type(row.param) in (torch.nn.Parameter, Tensor) or is_dtensor(row.param)
        states = [t for t in (*row.states, row.low, row.ema) if t is not None]
        return (
            use_kernels(p)
            and plain
            and not group["differentiable"]
            and is_dense(p)
            and (g is None or (row.matches(g) and g.dtype in KERNEL_DTYPES))
            and all(t.dtype in KERNEL_STATES and t.stride() == p.stride() for t in states)
        )

    def _is_for_torch(self, row: Row, group: dict[str, Any]) -> bool:
        g = row.param.grad
        sparse = g is not None and g.layout != torch.strided
        return sparse or row.local.is_complex() or group["differentiable"] or row.fused

    def _is_for_cpu_kernel(self, row: Row) -> bool:
        """Return True if torch has a CPU kernel for exactly this update: everything is kept in the same dtype."""
        p, g = row.local, row.grad
        return (
            p.dtype in self.cpu_kernel_dtypes
            and p.device.type == "cpu"
            and row.master is None
            # It reads parameter and gradient in memory order, which must be the same for both.
            and (g is None or (g.dtype == p.dtype and row.matches(g)))
            and all(t is None or t.dtype == p.dtype for t in row.states)
            and not self.param_groups[row.group]["differentiable"]
        )

    def _refuse_what_no_path_takes(self, planned: list[Place]) -> None:
        """Raise ValueError for gradients that no path supports, before anything changes."""
        for p, index, number, _ in planned:
            if p.grad is None:
                continue
            name, sparse = f"parameter {number} of group {index}, {describe(p)}", p.grad.layout != torch.strided
            if sparse and not self.takes_sparse:
                raise ValueError(
                    f"the gradient of {name}, must not be sparse; give that parameter to torch.optim.SparseAdam"
                )
            differentiable = self.param_groups[index]["differentiable"]
            odd = "is sparse" if sparse else "is of a differentiable group" if differentiable else None
            if odd is None:
                continue
            o = self.options_of(index)
            if o.master_of(p) is not None or o.state_dtype is not None:
                raise ValueError(f"the gradient of {name}, {odd}: master_weights and state_dtype must be None for it")
