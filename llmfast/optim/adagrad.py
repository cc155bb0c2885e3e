"""AdaGrad (Duchi, Hazan & Singer 2011, JMLR 12)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad as torch_adagrad

from llmfast.optim.base import FusedOptimizer, TorchCall
from llmfast.optim.options import Extras
from llmfast.optim.plain import Number, fall, with_l2
from llmfast.optim.state import Names

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FusedAdagrad", "adagrad"]


def adagrad(
    param: Tensor,
    grad: Tensor,
    sum: Tensor,
    *,
    step: Number,
    lr: Number,
    lr_decay: float = 0.0,
    eps: float,
    l2: float = 0.0,
    decay: Number = 0.0,
) -> None:
    """Apply AdaGrad (Duchi et al. 2011)."""
    grad = with_l2(grad, param, l2)
    sum.addcmul_(grad, grad)
    fall(param, decay, lr / (1 + (step - 1) * lr_decay) * (grad / (sum.sqrt() + eps)))


class FusedAdagrad(FusedOptimizer, torch.optim.Adagrad):
    """`torch.optim.Adagrad` with one launch for all tensors of a dtype signature: see `FusedAdam`.

    As in torch, states exist from the start, so that `share_memory` can share them.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize, differentiable: As in torch.
        foreach, fused: Accepted for compatibility, without effect: there is only one path.
        extras: See `llmfast.optim.Extras`.

    Raises:
        ValueError: A hyperparameter or an option is out of range, or an option does not support a parameter.
        TypeError: A keyword is unknown.
    """

    rule = staticmethod(adagrad)
    squares = frozenset({"sum"})
    takes_sparse = True
    cpu_kernel_dtypes = (torch.float32, torch.float64, torch.bfloat16)  # in float16 its eps is 0, and 0 / 0 is NaN

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: "Unpack[Extras]",
    ) -> None:
        self._take(extras)
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            maximize=maximize,
            differentiable=differentiable,
        )
        for state in self.state.values():  # torch has made them on its default device
            state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")

    def _state_names(self, group: dict[str, Any]) -> Names:
        return "sum", None, None

    def _first_value(self, group: dict[str, Any]) -> float:
        return float(group["initial_accumulator_value"])

    def _rule_arguments(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: group[name] for name in ("lr_decay", "eps")}

    def _torch_update(self, call: TorchCall) -> None:
        group, params, grads, states, *_ = call
        torch_adagrad(
            params,
            grads,
            [state["sum"] for state in states],
            [state["step"] for state in states],
            foreach=False,
            fused=call.fused,
            grad_scale=call.grad_scale,
            differentiable=call.differentiable,
            has_sparse_grad=any(g.layout != torch.strided for g in grads),
            has_complex=call.has_complex,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            lr_decay=group["lr_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
