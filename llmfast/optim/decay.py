"""Weight decay that is decoupled from the gradient (Loshchilov & Hutter 2019, arXiv:1711.05101)."""

from typing import Any, Literal, get_args

from llmfast._checks import expect
from llmfast.optim.base import Decay
from llmfast.optim.groups import GroupedOptions
from llmfast.optim.options import Extras, Options

DecayMode = Literal["lr", "independent", "relative"]


class DecoupledDecay(GroupedOptions):
    """A mixin for optimizers: `decay` selects the fraction by which a step shrinks a parameter.

    "lr": lr * weight_decay. "independent": weight_decay for every lr, but nothing at lr 0. "relative": weight_decay
    times lr / lr_max, where `lr_max` is a key of the group, by default its first lr.
    """

    own_group_keys = ("lr_max",)
    decay: DecayMode = "lr"

    def _take_decay(self, decay: DecayMode, extras: Extras) -> None:
        """Take the mode and the extra options; call this before torch's constructor."""
        expect(decay in get_args(DecayMode), f"decay must be one of {get_args(DecayMode)}; got {decay!r}")
        self._take(extras)
        self.decay = decay

    def _decay(self, group: dict[str, Any]) -> Decay:
        weight_decay = float(group["weight_decay"])
        if self.decay == "relative":
            return Decay(decay_by_lr=weight_decay / group["lr_max"])
        return Decay(decay_by_lr=weight_decay) if self.decay == "lr" else Decay(decay=weight_decay)

    def _complete_group(self, group: dict[str, Any], options: Options) -> None:
        super()._complete_group(group, options)
        if self.decay == "relative":
            if "lr_max" not in group:
                group["lr_max"] = float(group["lr"])
            expect(
                group["lr_max"] > 0, f"decay='relative' needs a group's lr, or lr_max, above 0; got {group['lr_max']}"
            )
