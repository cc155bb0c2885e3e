"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from llmfast.optim.base import FusedOptimizer
from llmfast.optim.table import PointerTable

ON_DEVICE = -1.0  # stands for a learning rate that the host does not look at


class FusedAdamW(FusedOptimizer, torch.optim.AdamW):
    """`torch.optim.AdamW` with all tensors of a dtype signature updated by one launch.

    Same constructor, parameter groups, state names and state_dict, so checkpoints go both ways, and schedulers,
    hooks, closures, GradScaler, `maximize` and `amsgrad` work. Moments have the parameter's dtype; arithmetic is
    float32, bias corrections float64. Step counters live on the parameter's device, and a step waits for nothing
    there; a learning rate given as a device tensor is read there.

    Args:
        params: parameters or groups of them, as for any torch optimizer.
        lr: float, or a one-element tensor.
        betas, eps, weight_decay, amsgrad, maximize: as in torch.
        foreach, capturable, fused: accepted so that existing calls work, and without effect: there is one path.
        differentiable: only False; `torch.optim.AdamW` can be differentiated through.

    Raises:
        ValueError: a hyperparameter is out of range, or `differentiable=True`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable=True is not fused; use torch.optim.AdamW")
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)

    def _state_names(self, group: dict[str, Any]) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")

    def _hyper(self, group: dict[str, Any]) -> list[float]:
        lr = group["lr"]
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        sign = -1.0 if group["maximize"] else 1.0
        return [ON_DEVICE if on_device else float(lr), *group["betas"], group["eps"], group["weight_decay"], sign]

    def _launch(self, table: PointerTable, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        from llmfast_kernels import optimizer as kernels

        signature = table.signature
        kernels.adamw(
            table.table, table.grads, table.hyper, table.steps, table.coefficients, table.chunk_tensor,
            param_dtype=signature.param_dtype, grad_dtype=signature.grad_dtype, state_dtype=signature.state_dtype,
            amsgrad="max_exp_avg_sq" in signature.state_names, grad_scale=grad_scale, found_inf=found_inf,
        )  # fmt: skip

    def _torch_update(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        fused: bool,
        amp: dict[str, Tensor | None],
    ) -> None:
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            foreach=False, fused=fused, grad_scale=amp.get("grad_scale"), found_inf=amp.get("found_inf"),
            has_complex=any(p.is_complex() for p in params),
            amsgrad=group["amsgrad"], beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=group["maximize"],
        )  # fmt: skip
