"""Update rules as plain functions of one tensor, in the dtype they are given.

The tests compare the kernels with these functions, which also update tensors that no kernel supports. All work in
place. `l2` times the parameter is added to the gradient; `decay` is the fraction by which the parameter shrinks in
addition to the update. `step` counts from 1 at the first update; `step`, `lr` and `decay` may be tensors.
"""

from typing import Any

import torch
from torch import Tensor

Number = float | Tensor


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
    grad = _with_l2(grad, param, l2)
    exp_avg.mul_(beta1).add_(grad, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    second = exp_avg_sq
    if max_exp_avg_sq is not None:
        second = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    denominator = second.sqrt() / (1 - beta2**step) ** 0.5 + eps
    _fall(param, decay, lr / (1 - beta1**step) * (exp_avg / denominator))


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
    grad = _with_l2(grad, param, l2)
    change = grad
    if momentum_buffer is not None:
        later: Any = step > 1
        rate = 1 - dampening * (later.to(grad) if isinstance(later, Tensor) else later)
        momentum_buffer.mul_(momentum).add_(rate * grad)
        change = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    _fall(param, decay, lr * change)


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
    grad = _with_l2(grad, param, l2)
    square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
    variance = square_avg
    if grad_avg is not None:
        grad_avg.mul_(alpha).add_(grad, alpha=1 - alpha)
        variance = (square_avg - grad_avg * grad_avg).clamp(min=0)  # rounding must not make it negative
    change = grad / (variance.sqrt() + eps)
    if momentum_buffer is not None:
        change = momentum_buffer.mul_(momentum).add_(change)
    _fall(param, decay, lr * change)


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
    grad = _with_l2(grad, param, l2)
    sum.addcmul_(grad, grad)
    _fall(param, decay, lr / (1 + (step - 1) * lr_decay) * (grad / (sum.sqrt() + eps)))


def lion(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    step: Number,
    lr: Number,
    beta1: float,
    beta2: float,
    l2: float = 0.0,
    decay: Number = 0.0,
) -> None:
    """Apply Lion (Chen et al. 2023), which does not use `step`; its weight decay is `decay=lr * weight_decay`."""
    grad = _with_l2(grad, param, l2)
    direction = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
    sign = torch.where(direction.isnan(), direction, direction.sign())  # torch's sign of NaN is 0
    _fall(param, decay, lr * sign)


def _bounded(param: Tensor) -> Tensor:
    """Keep an infinite weight infinite after subtracting a share of it, instead of NaN."""
    largest = torch.finfo(param.dtype).max
    return param.clamp(-largest, largest)


def _with_l2(grad: Tensor, param: Tensor, l2: float) -> Tensor:
    return grad + l2 * _bounded(param) if l2 else grad


def _fall(param: Tensor, decay: Number, change: Tensor) -> None:
    param.sub_(decay * _bounded(param) + change)
