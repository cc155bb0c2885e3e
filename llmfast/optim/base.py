"""What every fused optimizer shares: which parameter takes which path, and the step itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmfast._checks import describe
from llmfast._dispatch import KERNEL_DTYPES, eager, use_kernels
from llmfast.optim.table import PointerTable, Row, Signature


class Plan(NamedTuple):
    """Who goes where, until something changes."""

    groups: list[tuple[tuple[str, ...], list[int]]]  # state names and parameters' ids, as the plan found them
    tables: list[PointerTable]  # through the kernels, one launch each
    torch_groups: list[tuple[int, list[Tensor]]]  # through torch's own functions: group index and parameters
    waiting: list[Tensor]  # had no gradient yet


class FusedOptimizer(torch.optim.Optimizer, ABC):
    """Comes before a torch optimizer among the bases; constructor, groups, state names and state_dict stay torch's.

    Parameters on an accelerator go through pointer tables, one update launch per dtype signature for all groups. The
    rest goes through torch's own update for that parameter alone: CPU tensors through its fused CPU kernels, and
    whatever neither can take (float64 on a GPU, tensor subclasses, gradients of another memory order) one by one.
    """

    # torch.amp.GradScaler then leaves `grad_scale` and `found_inf` on the device for `step` to read.
    _step_supports_amp_scaling = True
    _plan: Plan | None = None

    @abstractmethod
    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the states that are shaped like the parameter, in the order of the table's rows."""

    @abstractmethod
    def _hyper(self, group: dict[str, Any]) -> list[float]:
        """The group's hyperparameters in the order the kernels read them."""

    @abstractmethod
    def _launch(self, table: PointerTable, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """One step of all tensors of the table, by the kernels."""

    @abstractmethod
    def _torch_update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        fused: bool,
        amp: dict[str, Tensor | None],
    ) -> None:
        """One step of `params` by torch's function; `fused` says that its fused kernels are safe here.

        `amp` holds `grad_scale` and `found_inf`, which only the fused kernels know: it is empty for the others.
        """

    @torch.no_grad()
    @eager
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Where `self.grad_scale` or `self.found_inf` are set (one-element float32 tensors, as GradScaler sets them),
        gradients count as divided by the first, and nothing at all changes if the second is not 0.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        amp: dict[str, Tensor | None] = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}

        if self._plan is None or not self._still_holds(self._plan):
            self._refuse_sparse_gradients()
            self._plan = self._make_plan()
        hyper = [self._hyper(group) for group in self.param_groups]
        for table in self._plan.tables:
            table.refresh(hyper, [group["lr"] for group in self.param_groups])
            device = table.signature.device
            self._launch(table, **{k: None if v is None else v.to(device, non_blocking=True) for k, v in amp.items()})
        for index, params in self._plan.torch_groups:
            self._torch_step(self.param_groups[index], [p for p in params if p.grad is not None], amp)
        return loss

    def _still_holds(self, plan: Plan) -> bool:
        return (
            self._groups() == plan.groups
            and all(table.holds(self.state) for table in plan.tables)
            and all(p.grad is None for p in plan.waiting)
            and not any(p.grad is not None and p.grad.is_sparse for _, params in plan.torch_groups for p in params)
        )

    def _refuse_sparse_gradients(self) -> None:
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                if p.grad is not None and p.grad.is_sparse:
                    raise ValueError(
                        f"the gradient of parameter {i} of group {index}, {describe(p)}, is sparse; "
                        "give that parameter to torch.optim.SparseAdam"
                    )

    def _groups(self) -> list[tuple[tuple[str, ...], list[int]]]:
        """What shows that somebody added, removed or replaced parameters, or switched an option that adds a state."""
        return [(self._state_names(group), [id(p) for p in group["params"]]) for group in self.param_groups]

    def _make_plan(self) -> Plan:
        signatures: dict[Signature, list[Row]] = {}
        torch_groups: list[tuple[int, list[Tensor]]] = []
        waiting: list[Tensor] = []
        for index, group in enumerate(self.param_groups):
            names = self._state_names(group)
            others: list[Tensor] = []
            for p in group["params"]:
                if p.grad is None and "step" not in self.state.get(p, {}):
                    waiting.append(p)
                elif _kernels_can_take(p) and _share_dtype(state := self._state_of(p, names), names):
                    grad_dtype = p.dtype if p.grad is None else p.grad.dtype
                    signature = Signature(p.device, p.dtype, grad_dtype, state[names[0]].dtype, names)
                    signatures.setdefault(signature, []).append(Row(p, index, state))
                else:
                    others.append(p)
            if others:
                torch_groups.append((index, others))
        tables = [PointerTable(signature, rows) for signature, rows in signatures.items()]
        return Plan(self._groups(), tables, torch_groups, waiting)

    def _state_of(self, p: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
        """The parameter's state, made where missing, in the parameter's memory order."""
        state: dict[str, Any] = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
            elif state[name].device != p.device or state[name].shape != p.shape:  # of another model, or left behind
                raise ValueError(f"state {name} is {describe(state[name])}, its parameter {describe(p)}")
            elif state[name].stride() != p.stride():  # loaded from a run where it lay otherwise
                state[name] = torch.empty_like(p, dtype=state[name].dtype).copy_(state[name])
        return state

    def _torch_step(self, group: dict[str, Any], params: list[Tensor], amp: dict[str, Tensor | None]) -> None:
        names = self._state_names(group)
        for p in params:
            self._state_of(p, names)
        # torch's fused CPU kernels walk parameter and gradient in memory order, right only where the orders agree.
        safe = [p for p in params if p.device.type == "cpu" and _is_ordinary(p) and _matches(p)]
        if safe:
            self._torch_update(group, safe, [_grad(p) for p in safe], fused=True, amp=amp)
        chosen = set(safe)
        odd = [p for p in params if p not in chosen]
        if odd and (amp["found_inf"] is None or not bool(amp["found_inf"])):
            scale = amp["grad_scale"]
            grads = [_grad(p) if scale is None else _grad(p) / scale.to(p.device) for p in odd]
            self._torch_update(group, odd, grads, fused=False, amp={})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._plan = None

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict, unpickling and deepcopy come this way
        super().__setstate__(state)
        self._plan = None


def _grad(p: Tensor) -> Tensor:
    """The gradient as torch's functions want it, in the parameter's dtype."""
    assert p.grad is not None
    return p.grad.to(p.dtype)


def _kernels_can_take(p: Tensor) -> bool:
    return use_kernels(p) and _is_ordinary(p) and (p.grad is None or (_matches(p) and p.grad.dtype in KERNEL_DTYPES))


def _share_dtype(state: dict[str, Any], names: tuple[str, ...]) -> bool:
    return len({state[name].dtype for name in names}) == 1 and state[names[0]].dtype in KERNEL_DTYPES


def _is_ordinary(p: Tensor) -> bool:
    return type(p) in (torch.nn.Parameter, Tensor) and not p.is_complex() and _is_dense(p)


def _matches(p: Tensor) -> bool:
    """True if the gradient lies in memory as the parameter does."""
    g = p.grad
    return g is not None and g.layout == torch.strided and g.stride() == p.stride()


def _is_dense(t: Tensor) -> bool:
    """True if the elements fill their memory without gaps or overlaps, in whatever order."""
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
