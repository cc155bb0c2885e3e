"""Adam (Kingma & Ba 2015, arXiv:1412.6980) and AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adam import adam as torch_adam

from llmfast.optim.base import Decay, FusedOptimizer, TorchCall
from llmfast.optim.decay import DecayMode, DecoupledDecay
from llmfast.optim.options import Extras
from llmfast.optim.plain import Number, fall, with_l2
from llmfast.optim.state import Names

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FusedAdam", "FusedAdamW", "adam"]


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: Number,
    lr: Number,
    beta1: float,
    beta2: float,
    eps: float,
    l2: float = 0.0,
    decay: Number = 0.0,
) -> None:
    """Apply Adam (Kingma & Ba 2015) with eps after the bias correction; AdamW is `decay=lr * weight_decay`."""
    grad = with_l2(grad, param, l2)
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    denominator = second.sqrt() / (1 - beta2**step) ** 0.5 + eps
    fall(param, decay, lr / (1 - beta1**step) * (exp_avg / denominator))


class _Adam(DecoupledDecay, FusedOptimizer):
    rule = staticmethod(adam)
    squares = frozenset({"exp_avg_sq"})
    late = frozenset({"max_exp_avg_sq"})
    never_coded = frozenset({"max_exp_avg_sq"})  # a maximum would accumulate the rounding errors

    def _state_names(self, group: dict[str, Any]) -> Names:
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group["amsgrad"] else None

    def _rule_arguments(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2, "eps": group["eps"]}

    def _decay(self, group: dict[str, Any]) -> Decay:
        return super()._decay(group) if group["decoupled_weight_decay"] else Decay(l2=float(group["weight_decay"]))

    def _decay_before_torch(self, group: dict[str, Any]) -> bool:
        return bool(group["decoupled_weight_decay"]) and self.decay != "lr"

    def _torch_update(self, call: TorchCall) -> None:
        group, params, grads, states, *_ = call
        names = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        exp_avgs, exp_avg_sqs, *most = ([state[name] for state in states] for name in names)
        max_exp_avg_sqs, steps = most[0] if most else [], [state["step"] for state in states]
        tensors = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps)
        beta1, beta2 = group["betas"]
        numbers = {name: group[name] for name in ("amsgrad", "lr", "weight_decay", "eps", "maximize")}
        numbers |= {"beta1": beta1, "beta2": beta2}
        decoupled = group["decoupled_weight_decay"]
        if call.fused:
            # `torch_adam` would call these too, but would first create a tensor of the number 1 for each parameter.
            one = torch.ones((), dtype=torch.float32, device="cpu")
            torch._foreach_add_(steps, one)  # pyright: ignore[reportPrivateImportUsage]
            kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_  # pyright: ignore[reportPrivateImportUsage]
            kernel(*tensors, **numbers, grad_scale=call.grad_scale, found_inf=None)
            return
        torch_adam(
            *tensors,
            **numbers,
            foreach=False,
            fused=False,
            differentiable=call.differentiable,
            has_complex=call.has_complex,
            decoupled_weight_decay=decoupled,
        )


class FusedAdam(_Adam, torch.optim.Adam):
    """`torch.optim.Adam` with one launch for all tensors of a dtype signature; weight decay is an L2 penalty.

    Constructor, parameter groups, state names and state_dict are the same, so checkpoints are interchangeable, and
    schedulers, hooks, closures, GradScaler, `maximize` and `amsgrad` work. Arithmetic is float32 (float64 for float64
    parameters), and bias corrections are float64; gradients may have any dtype. Step counters are on the parameter's
    device, and a step never waits for the device; a learning rate in a device tensor is read there. A step can be
    captured in a CUDA graph.

    Args:
        params: Parameters or groups of them, named or not, as for any torch optimizer.
        lr: A float, or a one-element tensor.
        betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: As in torch.
        differentiable: Use torch's own update, through which gradients can flow.
        foreach, capturable, fused: Accepted for compatibility, without effect: there is only one path.
        extras: See `llmfast.optim.Extras`.

    Raises:
        ValueError: A hyperparameter or an option is out of range, or an option does not support a parameter.
        TypeError: A keyword is unknown.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **extras: "Unpack[Extras]",
    ) -> None:
        self._take(extras)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            differentiable=differentiable,
            decoupled_weight_decay=decoupled_weight_decay,
        )


class FusedAdamW(_Adam, torch.optim.AdamW):
    """`torch.optim.AdamW` with one launch for all tensors of a dtype signature: see `FusedAdam`.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, differentiable: As in torch.
        foreach, capturable, fused: Accepted for compatibility, without effect: there is only one path.
        decay: The fraction by which a step shrinks a parameter. "lr": lr * weight_decay, as in torch. "independent":
            weight_decay for every lr (but nothing at lr 0). "relative": weight_decay * lr / lr_max, where `lr_max` is a
            key of the group, by default its first lr; this is the form of Loshchilov & Hutter, whose schedule
            multiplies both.
        extras: See `llmfast.optim.Extras`.

    Raises:
        ValueError: A hyperparameter or an option is out of range, or an option does not support a parameter.
        TypeError: A keyword is unknown.
    """

    whole_arguments = ("decay",)

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
        decay: DecayMode = "lr",
        **extras: "Unpack[Extras]",
    ) -> None:
        self._take_decay(decay, extras)
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, differentiable=differentiable
        )
