"""Stepping during backward: each parameter as soon as its gradient is complete; the gradient is then freed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion
from torch.utils.hooks import RemovableHandle

from llmfast._checks import describe, expect
from llmfast._dtensor import is_dtensor, local
from llmfast.optim.base import FusedOptimizer
from llmfast.optim.planner import Plan
from llmfast.optim.row import Place, places

_REDUCE_LATER = frozenset({"DistributedDataParallel", "FullyShardedDataParallel"})


class ReleaseHandle:
    """A handle that ends stepping during backward."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._places: dict[Tensor, Place] = {}
        self._plans: dict[Tensor, Plan] = {}
        self._handles: list[RemovableHandle] = []
        for group in optimizer.param_groups:
            self.take(group["params"])
        optimizer._in_backward = self

    def take(self, params: list[Tensor]) -> None:
        """Step these parameters in backward too, as soon as they require gradients."""
        for p in params:
            if not (p.is_floating_point() or p.is_complex()):  # it can never require gradients
                continue
            # A frozen parameter accepts no hook, but keeps those that it has.
            requires_grad = p.requires_grad
            p.requires_grad_(True)
            self._handles.append(p.register_post_accumulate_grad_hook(self._step))
            p.requires_grad_(requires_grad)

    @staticmethod
    def expect_possible(group: dict[str, Any], max_grad_norm: float | None) -> None:
        """Raise ValueError if a group cannot be stepped in backward."""
        _expect_settings(group, max_grad_norm)
        for p in group["params"]:
            expect(
                not _arrives_late(p),
                f"FSDP2 of torch {torch.__version__} calls hooks before it has copied a gradient to the CPU, where "
                f"CPUOffloadPolicy keeps {describe(p)}; step after backward, leave parameters on the device, or use "
                "torch 2.13 or newer",
            )

    @torch.no_grad()
    def _step(self, p: Tensor) -> None:
        optimizer, groups = self._optimizer, self._optimizer.param_groups
        for index, group in enumerate(groups):  # settings may have changed since the last step
            _expect_settings(group, optimizer.option(index, "max_grad_norm"))
        place = self._places.get(p)
        if place is None or not place.holds(groups):
            self._plans.clear()
            self._places = {place.param: place for place in places(groups)}
            place = self._places.get(p)
        if place is None:  # it has been taken out of its group
            return
        plan = self._plans.get(p)
        gradients = None if plan is None else optimizer.gradients_of(plan)
        if plan is None or gradients is None:
            plan, gradients = optimizer.make_plan(place)
            self._plans[p] = plan
        optimizer.follow(plan, gradients)
        p.grad = None

    def remove(self) -> None:
        """Stop stepping in backward: gradients stay, and `optimizer.step()` is needed again."""
        for handle in self._handles:
            handle.remove()
        self._plans.clear()
        if self._optimizer._in_backward is self:
            self._optimizer._in_backward = None


def _expect_settings(group: dict[str, Any], max_grad_norm: float | None) -> None:
    expect(
        max_grad_norm is None,
        "max_grad_norm must be None for an optimizer that steps in backward, which never has all gradients at once; "
        f"got {max_grad_norm}. Clip by value in a hook, or step after backward",
    )
    expect(not group["differentiable"], "differentiable must be False in groups that are stepped in backward; got True")


def _arrives_late(p: Tensor) -> bool:
    """Return True if FSDP2 calls hooks before its copies of gradients to the CPU have finished: pytorch#180666."""
    waits = TorchVersion(torch.__version__) >= "2.13"
    return not waits and is_dtensor(p) and local(p).device.type == "cpu" != p.device_mesh.device_type  # type: ignore[attr-defined]


def optimizer_in_backward(model: nn.Module, optimizer: FusedOptimizer) -> ReleaseHandle:
    """Step each of the model's parameters in backward, as soon as its gradient is complete, and free the gradient.

    Only a few gradients then exist at a time. A training step is `loss.backward()`; `optimizer.step()` after it changes
    nothing, but learning-rate schedulers expect the call. The results are those of stepping after backward. Every
    backward steps, so gradients cannot be accumulated over several. Frozen parameters are stepped once they require
    gradients, and those of `add_param_group` once they are added. With FSDP2 (call `fully_shard` first) a gradient is
    complete when it has been reduced. Wrappers that reduce later are refused, as is `CPUOffloadPolicy` before torch
    2.13, which calls hooks while gradients are still being copied.

    Args:
        model: all of its parameters that require gradients must be the optimizer's.
        optimizer: must not have `max_grad_norm`, which needs all gradients at once. If it is set later, the next
            backward raises.

    Returns:
        A handle whose `remove()` ends stepping in backward.

    Raises:
        ValueError: a parameter of the model is not the optimizer's, the optimizer has `max_grad_norm` or
            differentiable groups or steps in backward already, or the model contains DistributedDataParallel, FSDP1 or,
            before torch 2.13, parameters that FSDP2 keeps on the CPU.
    """
    expect(
        not optimizer.steps_in_backward, "optimizer must not step in backward already; call its handle's remove() first"
    )
    for index, group in enumerate(optimizer.param_groups):
        ReleaseHandle.expect_possible(group, optimizer.option(index, "max_grad_norm"))
    for module in model.modules():
        for wrapper in _REDUCE_LATER.intersection(kind.__name__ for kind in type(module).__mro__):
            raise ValueError(f"{wrapper} reduces gradients after the hooks that would step; use fully_shard")
    known = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        expect(
            not p.requires_grad or p in known,
            f"optimizer must have every parameter of the model that requires gradients; {name} is not in it",
        )
    return ReleaseHandle(optimizer)
