"""Lion (Chen et al. 2023, arXiv:2302.06675): steps of size lr in the direction of a sign."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmfast._checks import expect
from llmfast._kinds import expect_kind, kind_of
from llmfast.optim.base import FusedOptimizer, TorchCall
from llmfast.optim.decay import DecayMode, DecoupledDecay
from llmfast.optim.options import Extras
from llmfast.optim.plain import Number, fall, with_l2
from llmfast.optim.state import Names

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FusedLion", "lion"]


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
    grad = with_l2(grad, param, l2)
    direction = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg.mul_(beta2).add_(grad, alpha=1 - beta2)
    sign = torch.where(direction.isnan(), direction, direction.sign())  # torch's sign of NaN is 0
    fall(param, decay, lr * sign)


class FusedLion(DecoupledDecay, FusedOptimizer):
    """Lion with one launch for all tensors of a dtype signature; torch has no Lion.

    p decreases by lr * (sign(beta1 * exp_avg + (1 - beta1) * g) + weight_decay * p), and then exp_avg becomes
    beta2 * exp_avg + (1 - beta2) * g. Its one state has half the bytes of Adam's two. The constructor and the state's
    name are those of the authors' code. A NaN gradient makes the parameter NaN; an infinite one moves it by lr, like
    any other. Everything else is as in `FusedAdam`.

    Args:
        params: Parameters or groups of them, named or not, as for any torch optimizer.
        lr: A float, or a one-element tensor. The authors recommend a value 3 to 10 times smaller than AdamW's, with a
            weight decay larger by the same factor.
        betas: Coefficients of the direction, and of the stored average.
        weight_decay: A step shrinks a parameter by the fraction lr * weight_decay.
        maximize: Maximize instead of minimizing.
        decay: The fraction by which a step shrinks a parameter: see `FusedAdamW`.
        extras: See `llmfast.optim.Extras`.

    Raises:
        ValueError: A hyperparameter or an option is out of range, or an option does not support a parameter.
        TypeError: A keyword is unknown.
    """

    rule = staticmethod(lion)
    late = frozenset({"step"})  # the authors' code has no counter
    cpu_kernel_dtypes = ()
    whole_arguments = ("decay",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        decay: DecayMode = "lr",
        **extras: "Unpack[Extras]",
    ) -> None:
        expect_kind("lr", lr, kind_of(float | Tensor))
        expect_kind("betas", betas, kind_of(Sequence[float | Tensor]))
        expect_kind("weight_decay", weight_decay, kind_of(float | Tensor))
        expect(bool(lr >= 0), f"lr must be at least 0; got {lr}")
        expect(all(0 <= beta < 1 for beta in betas), f"betas must be in [0, 1); got {betas}")
        expect(weight_decay >= 0, f"weight_decay must be at least 0; got {weight_decay}")
        self._take_decay(decay, extras)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults | {"differentiable": False})  # a sign has no gradient

    def _state_names(self, group: dict[str, Any]) -> Names:
        return "exp_avg", None, None

    def _rule_arguments(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2}

    def _torch_update(self, call: TorchCall) -> None:
        """Update complex parameters, as pairs of real numbers. torch has no Lion."""
        group = call.group
        arguments = self._rule_arguments(group) | {"lr": group["lr"], "decay": self._total_decay(group)}
        for p, g, state in zip(call.params, call.grads, call.states):
            state["step"] += 1
            g = -g if group["maximize"] else g
            parts = [torch.view_as_real(t.detach()) for t in (p, g, state["exp_avg"])]
            lion(*parts, step=state["step"], **arguments)
