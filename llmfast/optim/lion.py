"""Lion (Chen et al. 2023, arXiv:2302.06675): steps of the size of lr, in the direction of a sign."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmfast._checks import expect
from llmfast.optim import reference
from llmfast.optim.base import Decay, FusedOptimizer, TorchCall
from llmfast.optim.options import Extras
from llmfast.optim.state import Names

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FusedLion(FusedOptimizer):
    """Lion, with all tensors of a dtype signature updated by one launch; torch has none.

    p falls by lr * (sign(beta1 * exp_avg + (1 - beta1) * g) + weight_decay * p), and then exp_avg becomes
    beta2 * exp_avg + (1 - beta2) * g. Its one state has half the bytes of Adam's two. The constructor and the state's
    name are those of the authors' own code. A gradient that is NaN makes the parameter NaN; one that is infinite moves
    it by lr, like any other. In all else it is like `FusedAdam`.

    Args:
        params: parameters or groups of them, named or not, as for any torch optimizer.
        lr: float, or a one-element tensor. The authors advise a third to a tenth of AdamW's, and as many times its
            weight decay.
        betas: of the direction, and of the average that is kept.
        weight_decay: a parameter loses lr * weight_decay of itself in a step.
        maximize: climb instead of falling.
        extras: see `llmfast.optim.Extras`.

    Raises:
        ValueError: a hyperparameter or an option is out of range, or a parameter cannot be kept as an option says.
        TypeError: an unknown keyword.
    """

    rule = "lion"
    cpu_kernel_dtypes = ()

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **extras: "Unpack[Extras]",
    ) -> None:
        expect(bool(lr >= 0), f"lr must be at least 0; got {lr}")
        expect(all(0 <= beta < 1 for beta in betas), f"betas must be in [0, 1); got {betas}")
        expect(weight_decay >= 0, f"weight_decay must be at least 0; got {weight_decay}")
        self._take(extras)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults | {"differentiable": False})  # a sign has no gradient

    def _state_names(self, group: dict[str, Any]) -> Names:
        return "exp_avg", None, None

    def _rule_arguments(self, group: dict[str, Any]) -> dict[str, float]:
        beta1, beta2 = group["betas"]
        return {"beta1": beta1, "beta2": beta2}

    def _decay(self, group: dict[str, Any]) -> Decay:
        return Decay(decay_by_lr=float(group["weight_decay"]))

    def _torch_update(self, call: TorchCall) -> None:
        """Of complex parameters, whose real and imaginary parts count as two numbers. Torch has no function of it."""
        group = call.group
        arguments = self._rule_arguments(group) | {"lr": group["lr"], "decay": self._total_decay(group)}
        for p, g, state in zip(call.params, call.grads, call.states):
            state["step"] += 1
            g = -g if group["maximize"] else g
            parts = [torch.view_as_real(t.detach()) for t in (p, g, state["exp_avg"])]
            reference.lion(*parts, step=state["step"], **arguments)
