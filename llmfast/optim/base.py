"""The step that every fused optimizer takes."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from llmfast._dispatch import eager
from llmfast.optim.loading import StateLoader
from llmfast.optim.options import Options
from llmfast.optim.plain import Amount, leave, update_plainly
from llmfast.optim.planner import Gradients, Plan, Planner
from llmfast.optim.row import SHARED, Batch, Bucket, Row
from llmfast.optim.saving import StateSaver
from llmfast.optim.table import Hyper, PointerTable

NUMBERS = {float, int}


class Decay(NamedTuple):
    """Weight decay of a group: the fraction by which a step shrinks a parameter, in two parts, and the L2 penalty."""

    decay_by_lr: float = 0.0  # per unit of lr
    decay: float = 0.0  # whatever lr is, unless it is 0
    l2: float = 0.0


class TorchCall(NamedTuple):
    """Arguments of torch's own update of some parameters."""

    group: dict[str, Any]
    params: list[Tensor]
    grads: list[Tensor]
    states: list[dict[str, Tensor]]
    fused: bool
    grad_scale: Tensor | None
    differentiable: bool
    has_complex: bool


class FusedOptimizer(Planner, StateSaver, StateLoader):
    """The base class of fused optimizers. A subclass names it before the torch optimizer that it replaces.

    Constructor, groups, state names and state_dict stay torch's. Parameters on an accelerator go through pointer
    tables, with one update launch per dtype signature for all groups. Parameters on a CPU go through torch's fused CPU
    kernels where these are right. All others are updated by torch's own unfused function, or one by one by the same
    rule in plain torch.
    """

    # torch.amp.GradScaler then leaves `grad_scale` and `found_inf` on the device for `step` to read.
    _step_supports_amp_scaling = True
    _plan: Plan | None = None

    _in_graphs: tuple[PointerTable, ...] = ()
    _in_backward: Any = None  # the `ReleaseHandle` that steps this optimizer

    grad_norm: Tensor | None = None
    """Norm of the last step's gradients before clipping, if `max_grad_norm` is set: float32, on the device.

    Gradients of groups whose `max_grad_norm` is None do not count. All others do, whatever norm they are clipped to.
    """

    @abstractmethod
    def _rule_arguments(self, group: dict[str, Any]) -> dict[str, float]:
        """Return the rule's own hyperparameters, by the names that the kernels' rule and the plain one take."""

    @abstractmethod
    def _torch_update(self, call: TorchCall) -> None:
        """Take one step with torch's function. Only its fused form takes `grad_scale`."""

    def _decay(self, group: dict[str, Any]) -> Decay:
        """Return the group's weight decay: an L2 penalty, unless the optimizer says otherwise."""
        return Decay(l2=float(group["weight_decay"]))

    def _decay_before_torch(self, group: dict[str, Any]) -> bool:
        """Return True if torch's own update does not support the decay of this group."""
        return False

    @property
    def steps_in_backward(self) -> bool:
        """True from `optimizer_in_backward` until its handle's `remove`; False for copies of the optimizer."""
        return self._in_backward is not None

    @torch.no_grad()
    @eager
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        GradScaler sets `self.grad_scale` and `self.found_inf` (one-element float32 tensors). The step then divides
        gradients by the first, and changes nothing at all if the second is not 0. Afterwards the gradients are divided,
        and clipped if `max_grad_norm` is set, as `GradScaler.unscale_` and `clip_grad_norm_` would leave them. Without
        a scale, clipping changes the gradients on a CPU only: on an accelerator they stay as they are, which saves
        writing them.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.steps_in_backward:
            if getattr(self, "grad_scale", None) is not None:
                raise RuntimeError(
                    "GradScaler does not work with optimizer_in_backward, which has stepped with scaled gradients"
                )
            if all(p.grad is None for group in self.param_groups for p in group["params"]):
                return loss
        gradients = None if self._plan is None else self.gradients_of(self._plan)
        if self._plan is None or gradients is None:
            self._plan, gradients = self.make_plan()
        self.follow(self._plan, gradients)
        return loss

    def follow(self, plan: Plan, gradients: Gradients) -> None:
        """Update the parameters of a plan; `gradients` are the addresses for its tables."""
        amp: list[Tensor | None] = [getattr(self, name, None) for name in ("grad_scale", "found_inf")]
        amp = [t if isinstance(t, Tensor) else None for t in amp]  # without gradients, GradScaler sets the integer 0
        if plan.tables:
            hyper = [*map(self._hyper, range(len(self.param_groups)))]
            mixed = [i for i, numbers in enumerate(hyper) if not NUMBERS.issuperset(map(type, numbers.values()))]
            on_device = [(i, name, x) for i in mixed for name, x in hyper[i].items() if isinstance(x, Tensor)]
            for i, name, _ in on_device:
                hyper[i][name] = -1.0
            for table, addresses in zip(plan.tables, gradients):
                if table.refresh(addresses, hyper, on_device):
                    self._in_graphs += (table,)  # the graph uses its memory even after the plan has changed
        sums = {} if plan.clips == {None} else self._sums(plan)
        amp_on = {device: (_on(device, amp[0]), _on(device, amp[1])) for device in plan.devices}
        if sums and len(plan.clips) > 1:  # a norm that is not finite skips the whole step, not only its groups
            amp_on = {device: (scale, _unless_finite(sums[device], skip)) for device, (scale, skip) in amp_on.items()}
        self.grad_norm = None
        for table in plan.tables:
            device, clip = table.signature.device, table.signature.clip
            norm = table.step(sums.get(device, {}).get(clip), self.options.zero_grads, *amp_on[device])
            self.grad_norm = norm if norm is not None else self.grad_norm
        amounts: dict[Any, Amount] = {}
        for batch in plan.batches:
            rows, grads = batch.used()
            if not rows:
                continue
            device, clip = batch.kind.device, batch.kind.clip
            if (device, clip) not in amounts:
                limit = self._limit(clip)
                amounts[device, clip] = Amount.of(*amp_on[device], sums.get(device, {}).get(clip), limit)
            amount = amounts[device, clip]
            if not amount.skipped:
                update = self._step_by_torch if batch.kind.by_torch else self._step_plainly
                update(batch, rows, grads, amount)
            self.grad_norm = amount.norm if amount.norm is not None else self.grad_norm
            if self.options.zero_grads:
                for row in rows:
                    cast(Tensor, row.param.grad).zero_()
        # With several clips, this is the norm of all their gradients; a rank without any has the norm of the others.
        if sums and (len(plan.clips) > 1 or self.grad_norm is None):
            device, each = next(iter(sums.items()))
            self.grad_norm = Amount.of(_on(device, amp[0]), None, torch.cat([*each.values()]), math.inf).norm
        elif plan.waiting and not sums and plan.clips != {None}:  # no parameter has had a gradient so far
            self.grad_norm = torch.zeros((), dtype=torch.float32, device=plan.waiting[0].device)

    def _limit(self, clip: int | None) -> float | None:
        """Return the norm to which the gradients of a clip are limited; None without a clip."""
        if clip is None:
            return None
        limit: float | None = self.options.max_grad_norm if clip == SHARED else self.option(clip, "max_grad_norm")
        return limit

    # Without kernels.

    def _step_by_torch(self, batch: Batch, rows: list[Row], grads: list[Tensor], amount: Amount) -> None:
        if amount.skip is not None and bool(amount.skip):  # waits for a GPU, if sparse or complex ones are there
            return
        index, fused = batch.kind.group, batch.kind.fused
        group = _with_numbers_on(batch.kind.device, self.param_groups[index])
        params = [row.local for row in rows]
        differentiable = bool(group["differentiable"])
        with torch.set_grad_enabled(differentiable):  # also through what comes before torch's update
            if self._decay_before_torch(group):
                for p in params:
                    p.mul_(1 - self._total_decay(group))
                group = group | {"weight_decay": 0.0}
            used = grads if fused else [amount.scaled(g) for g in grads]
            call = TorchCall(
                group=group,
                params=params,
                grads=used,
                states=[row.named_states for row in rows],
                fused=fused,
                grad_scale=amount.divisor() if fused else None,
                differentiable=differentiable,
                has_complex=batch.has_complex,
            )
            self._torch_update(call)
        if (ema_decay := self.option(index, "ema_decay")) is not None:
            for row in rows:
                if row.ema is not None:
                    row.ema.lerp_(row.local.float(), 1 - ema_decay)
        if amount.factor is not None and not fused:
            for g, scaled in zip(grads, used):
                leave(g, scaled)

    def _total_decay(self, group: dict[str, Any]) -> Any:
        decay, lr = self._decay(group), _scalar(group["lr"])
        moves: Any = lr != 0
        return decay.decay_by_lr * lr + decay.decay * (moves.to(lr.dtype) if isinstance(lr, Tensor) else moves)

    def _step_plainly(self, batch: Batch, rows: list[Row], grads: list[Tensor], amount: Amount) -> None:
        group = _with_numbers_on(batch.kind.device, self.param_groups[batch.kind.group])
        arguments = self._rule_arguments(group) | {"lr": _scalar(group["lr"])}
        arguments |= {"l2": self._decay(group).l2, "decay": self._total_decay(group)}
        sign, options = -1.0 if group["maximize"] else 1.0, self.options_of(batch.kind.group)
        for row in rows:
            update_plainly(self.rule, row, amount, arguments, sign, options)

    # With kernels.

    def _hyper(self, index: int) -> Hyper:
        """Return the group's hyperparameters by the kernels' names. Those that live on a device stay tensors."""
        # For speed, options are read without `self.option`.
        group, own, o = self.param_groups[index], self.group_options[index], self.options
        ema_decay, limit = own.get("ema_decay", o.ema_decay), own.get("max_grad_norm", o.max_grad_norm)
        decay = self._decay(group)
        return {
            "lr": _number(group["lr"]),
            "sign": -1.0 if group["maximize"] else 1.0,
            "decay_by_lr": decay.decay_by_lr,
            "decay": decay.decay,
            "l2": decay.l2,
            "ema_rate": 0.0 if ema_decay is None else 1.0 - ema_decay,
            "max_norm": 0.0 if limit is None else limit,
            "seed": o.seed,
            **{name: _number(number) for name, number in self._rule_arguments(group).items()},
        }

    def _sums(self, plan: Plan) -> dict[torch.device, dict[int | None, Tensor]]:
        """Compute, per device and clip, float64 numbers that add up to the square of the gradients' norm."""
        parts: dict[tuple[int, Bucket | None], list[Tensor]] = {key: [] for key in plan.buckets}
        for table in plan.tables:
            if (clip := table.signature.clip) is not None:
                parts.setdefault((clip, table.signature.bucket), []).append(table.sum_squares())
        for row in (row for batch in plan.batches for row in batch.rows):
            if row.clip is not None:
                parts.setdefault((row.clip, row.shard.bucket), []).append(_square(row))
        totals: dict[int | None, list[Tensor]] = {}
        for (clip, bucket), sums in parts.items():
            total = totals.setdefault(clip, [])
            if bucket is None:
                total += sums
                continue
            # A single number, because other ranks may have divided the pieces into another number of tables.
            sums = sums or [_zero(plan.buckets[clip, bucket])]
            total.append(_stacked(_all_on(sums[0].device, sums)).sum())
            for dim in bucket.dims:
                torch.distributed.all_reduce(total[-1], group=bucket.mesh.get_group(dim))
        if not totals:
            return {}
        return {
            device: {clip: _stacked(_all_on(device, total)) for clip, total in totals.items()}
            for device in plan.devices
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._plan = None
        if self._in_backward is not None:
            self._in_backward.take(self.param_groups[-1]["params"])

    def _complete_group(self, group: dict[str, Any], options: Options) -> None:
        super()._complete_group(group, options)
        if self._in_backward is not None:
            self._in_backward.expect_possible(group, options.max_grad_norm)

    def __setstate__(self, state: dict[str, Any]) -> None:  # called by load_state_dict, unpickling and deepcopy
        super().__setstate__(state)
        self._plan = None


def _scalar(lr: float | Tensor) -> float | Tensor:
    """Drop the dimensions of a one-element tensor: they would broadcast."""
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def _number(x: float | Tensor) -> float | Tensor:
    """Return a float, or a device tensor unchanged, because the host must not read it."""
    return x if isinstance(x, Tensor) and x.device.type != "cpu" else float(x)


def _with_numbers_on(device: torch.device, group: dict[str, Any]) -> dict[str, Any]:
    """Copy hyperparameter tensors from other devices to `device`. CPU tensors stay: they work with any device."""

    def near(x: Any) -> Any:
        return _on(device, x) if isinstance(x, Tensor) and x.device not in (device, torch.device("cpu")) else x

    if isinstance(group["lr"], Tensor):
        group = group | {"lr": near(group["lr"])}
    if any(isinstance(beta, Tensor) for beta in group.get("betas", ())) and not group["differentiable"]:
        betas = map(near, group["betas"])
        group = group | {"betas": tuple(map(_number, betas))}
    return group


def _on(device: torch.device, t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(device, non_blocking=device.type != "cpu")


def _all_on(device: torch.device, tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.to(device, non_blocking=device.type != "cpu") for t in tensors]


def _stacked(tensors: list[Tensor]) -> Tensor:
    return tensors[0].reshape(1) if len(tensors) == 1 else torch.stack(tensors)


def _unless_finite(sums: dict[int | None, Tensor], skip: Tensor | None) -> Tensor:
    """Return `found_inf`, which is also set if a sum of squares is not finite."""
    total = torch.cat([*sums.values()]).sum()
    found = (total.abs() < math.inf).logical_not().float()  # not `>=`, because NaN compares as False
    return found if skip is None else found + skip.reshape(())


def _zero(device: torch.device) -> Tensor:
    return torch.zeros((), dtype=torch.float64, device=device)


def _square(row: Row) -> Tensor:
    """Sum the squares of the local piece of a gradient in float64."""
    g = row.grad
    if g is None:
        return _zero(row.local.device)
    if g.layout != torch.strided:
        g = g.coalesce().values()
    norm: Tensor = torch.linalg.vector_norm(g, dtype=torch.promote_types(g.dtype, torch.float32))
    return norm.double() ** 2
