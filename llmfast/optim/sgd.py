"""Stochastic gradient descent, with momentum, dampening and Nesterov's momentum (Sutskever et al. 2013)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as torch_sgd

from llmfast.optim.base import FusedOptimizer, TorchCall
from llmfast.optim.formats import param_format
from llmfast.optim.options import Extras
from llmfast.optim.plain import Number, fall, with_l2
from llmfast.optim.state import Names

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FusedSGD", "sgd"]


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: Number,
    lr: Number,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    l2: float = 0.0,
    decay: Number = 0.0,
) -> None:
    """Apply gradient descent; the first gradient enters the buffer undamped, as in torch."""
    grad = with_l2(grad, param, l2)
    change = grad
    if momentum_buffer is not None:
        later: Any = step > 1
        rate = 1 - dampening * (later.to(grad) if isinstance(later, Tensor) else later)
        momentum_buffer.mul_(momentum).add_(rate * grad)
        change = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    fall(param, decay, lr * change)


class FusedSGD(FusedOptimizer, torch.optim.SGD):
    """`torch.optim.SGD` with one launch for all tensors of a dtype signature: see `FusedAdam`.

    As in torch, the first gradient of a parameter enters its momentum buffer undamped, whenever it comes.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, differentiable: As in torch.
        foreach, fused: Accepted for compatibility, without effect: there is only one path.
        extras: See `llmfast.optim.Extras`.

    Raises:
        ValueError: A hyperparameter or an option is out of range, or an option does not support a parameter.
        TypeError: A keyword is unknown.
    """

    rule = staticmethod(sgd)
    torch_counts_steps = False
    late = frozenset({"momentum_buffer"})
    takes_sparse = True
    cpu_kernel_dtypes = (torch.float32, torch.float64)  # with fewer bits, it skips whole vectors: pytorch#191763

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **extras: "Unpack[Extras]",
    ) -> None:
        self._take(extras)
        super().__init__(
            params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize, differentiable=differentiable
        )

    def _state_names(self, group: dict[str, Any]) -> Names:
        return "momentum_buffer" if group["momentum"] != 0 else None, None, None

    def _rule_arguments(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: group[name] for name in ("momentum", "dampening", "nesterov")}

    def _torch_update(self, call: TorchCall) -> None:
        group, params, grads, states, *_ = call
        if group["momentum"] != 0:  # torch's buffer of sparse gradients is sparse too, and what it adds has to be
            grads = [g if g.layout == torch.strided else g.to_dense() for g in grads]
        # Torch creates the buffer from the first gradient, undamped and detached. Here the buffer exists before that.
        started = [bool(state["step"] > 0) for state in states]
        for first in (False, True):
            chosen = [i for i, has in enumerate(started) if has != first]
            if not chosen:
                continue
            mine = [states[i] for i in chosen]
            buffers = [None if first else state.get("momentum_buffer") for state in mine]
            torch_sgd(
                [params[i] for i in chosen],
                [grads[i] for i in chosen],
                buffers,
                has_sparse_grad=any(grads[i].layout != torch.strided for i in chosen),
                foreach=False,
                fused=call.fused,
                grad_scale=call.grad_scale,
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                lr=group["lr"],
                dampening=group["dampening"],
                nesterov=group["nesterov"],
                maximize=group["maximize"],
            )
            for state, buffer in zip(mine, buffers):
                state["step"] += 1
                if first and buffer is not None:
                    state["momentum_buffer"].copy_(buffer)

    def _exported(self, p: Tensor, index: int, state: dict[str, Any]) -> dict[str, Any]:
        """Export as torch does: no buffer before the first step, and a counter only where rounding depends on it."""
        exported = super()._exported(p, index, state)
        if "step" not in state:
            return exported
        buffers = {"momentum_buffer", "momentum_buffer_code", "momentum_buffer_scale"}.intersection(exported)
        if buffers and float(state["step"]) == 0:
            for name in buffers:
                del exported[name]
        options = self.options_of(index)
        if not (param_format(options.master_weights).noisy or options.state_format.coded):
            del exported["step"]
        return exported
