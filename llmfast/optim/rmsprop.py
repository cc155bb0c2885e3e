"""RMSProp (Hinton 2012, "Neural Networks for Machine Learning", 6e); centered: Graves 2013, arXiv:1308.0850."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.rmsprop import rmsprop as torch_rmsprop

from llmfast._checks import expect
from llmfast.optim.base import FusedOptimizer, TorchCall
from llmfast.optim.options import Extras, Options
from llmfast.optim.plain import Number, fall, with_l2
from llmfast.optim.state import Names

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FusedRMSprop", "rmsprop"]


def rmsprop(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor | None = None,
    grad_avg: Tensor | None = None,
    *,
    step: Number,
    lr: Number,
    alpha: float,
    eps: float,
    momentum: float = 0.0,
    l2: float = 0.0,
    decay: Number = 0.0,
) -> None:
    """Apply RMSProp (Hinton 2012) with eps outside the root; centered (Graves 2013) with `grad_avg`."""
    grad = with_l2(grad, param, l2)
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    variance = square_avg
    if grad_avg is not None:
        grad_avg.mul_(alpha).add_(grad, alpha=1 - alpha)
        variance = (square_avg - grad_avg * grad_avg).clamp(min=0)  # rounding must not make it negative
    change = grad / (variance.sqrt() + eps)
    if momentum_buffer is not None:
        change = momentum_buffer.mul_(momentum).add_(change)
    fall(param, decay, lr * change)


class FusedRMSprop(FusedOptimizer, torch.optim.RMSprop):
    """`torch.optim.RMSprop` with one launch for all tensors of a dtype signature: see `FusedAdam`.

    Where `centered` subtracts nearly equal numbers, rounding could make the variance negative, which gives NaN in
    torch; here it is then zero.

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, maximize, differentiable: As in torch.
        capturable, foreach: Accepted for compatibility, without effect: there is only one path.
        extras: See `llmfast.optim.Extras`.

    Raises:
        ValueError: A hyperparameter or an option is out of range, or an option does not support a parameter;
            `centered` with `state_dtype="8bit"`, whose rounding is larger than a small variance.
        TypeError: A keyword is unknown.
    """

    rule = staticmethod(rmsprop)
    squares = frozenset({"square_avg"})
    late = frozenset({"momentum_buffer", "grad_avg"})
    cpu_kernel_dtypes = ()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **extras: "Unpack[Extras]",
    ) -> None:
        self._take(extras)
        super().__init__(
            params, lr, alpha, eps, weight_decay, momentum, centered, maximize=maximize, differentiable=differentiable
        )

    def _complete_group(self, group: dict[str, Any], options: Options) -> None:
        super()._complete_group(group, options)
        expect(
            not (options.state_format.coded and group["centered"]),
            'state_dtype must not be "8bit" with centered=True, which takes a difference of two states',
        )

    def _state_names(self, group: dict[str, Any]) -> Names:
        return (
            "square_avg",
            "momentum_buffer" if group["momentum"] > 0 else None,
            "grad_avg" if group["centered"] else None,
        )

    def _rule_arguments(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: group[name] for name in ("alpha", "momentum", "eps")}

    def _torch_update(self, call: TorchCall) -> None:
        group, params, grads, states, *_ = call
        torch_rmsprop(
            params,
            grads,
            [state["square_avg"] for state in states],
            [state["grad_avg"] for state in states] if group["centered"] else [],
            [state["momentum_buffer"] for state in states] if group["momentum"] > 0 else [],
            [state["step"] for state in states],
            foreach=False,
            differentiable=call.differentiable,
            has_complex=call.has_complex,
            lr=group["lr"],
            alpha=group["alpha"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            centered=group["centered"],
            maximize=group["maximize"],
        )
