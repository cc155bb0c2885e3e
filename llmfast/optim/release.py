"""Stepping inside backward: each parameter as soon as its gradient is there, which is then freed."""

import torch
from torch import Tensor, nn

from llmfast._checks import expect
from llmfast.optim.base import FusedOptimizer, Plan

_REDUCE_LATER = frozenset({"DistributedDataParallel", "FullyShardedDataParallel"})


class ReleaseHandle:
    """Ends what `optimizer_in_backward` began."""

    def __init__(self, optimizer: FusedOptimizer) -> None:
        self._optimizer = optimizer
        self._plans: dict[Tensor, Plan] = {}
        params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        optimizer.steps_in_backward = True
        self._handles = [p.register_post_accumulate_grad_hook(self._step) for p in params]

    @torch.no_grad()
    def _step(self, p: Tensor) -> None:
        optimizer = self._optimizer
        plan = self._plans.get(p)
        if plan is None or not optimizer.still_holds(plan):
            plan = self._plans[p] = optimizer.make_plan(p)
        optimizer.follow(plan)
        p.grad = None

    def remove(self) -> None:
        """From now on gradients stay, and `optimizer.step()` is needed again."""
        for handle in self._handles:
            handle.remove()
        self._plans.clear()
        self._optimizer.steps_in_backward = False


def optimizer_in_backward(model: nn.Module, optimizer: FusedOptimizer) -> ReleaseHandle:
    """Step each of the model's parameters in backward, as soon as its gradient is complete, and free the gradient.

    There is then never more than a few gradients at a time. A training step is `loss.backward()`; calling
    `optimizer.step()` after it does nothing more, and keeps learning-rate schedulers content. The numbers are those of
    stepping after backward. Every backward steps, so that gradients cannot be accumulated over several. With FSDP2
    (`fully_shard` comes first) a gradient is complete when it has been reduced; wrappers that reduce later are refused.

    Args:
        model: all of its parameters that require gradients must be the optimizer's.
        optimizer: without `max_grad_norm`, which needs all gradients at once.

    Returns:
        A handle, whose `remove()` ends it.

    Raises:
        ValueError: a parameter of the model is not the optimizer's, the optimizer has `max_grad_norm` or
            differentiable groups, or the model contains DistributedDataParallel or FSDP1.
    """
    for index in range(len(optimizer.param_groups)):
        limit = optimizer.option(index, "max_grad_norm")
        expect(
            limit is None,
            f"max_grad_norm={limit} needs all gradients at once, which stepping in backward never has; clip by value "
            "in a hook, or step after backward",
        )
    expect(
        not any(group["differentiable"] for group in optimizer.param_groups),
        "differentiable groups cannot be stepped in backward",
    )
    for module in model.modules():
        for wrapper in _REDUCE_LATER.intersection(kind.__name__ for kind in type(module).__mro__):
            raise ValueError(f"{wrapper} reduces gradients after the hooks that would step; use fully_shard")
    known = {p for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        expect(not p.requires_grad or p in known, f"parameter {name} of the model is not the optimizer's")
    return ReleaseHandle(optimizer)
