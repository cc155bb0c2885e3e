"""What the fused optimizers can do beyond torch's, in one place."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast.optim.formats import (
    PARAM_FORMATS,
    STATE_FORMATS,
    MasterWeights,
    StateDtype,
    StateFormat,
    param_format,
)


class Extras(TypedDict, total=False):
    """Keywords of every fused optimizer, beyond those of its namesake in torch.

    A parameter group may have `max_grad_norm`, `master_weights`, `state_dtype` and `ema_decay` of its own, None among
    them: `[{"params": embedding, "state_dtype": torch.float32}, {"params": others}]`. The optimizer takes them out of
    the group and keeps them in `group_options`, a dict for each group that may be changed between steps. They are
    settings of the run, not part of its state: `state_dict` does not have them, and loading does not change them.

    Attributes:
        max_grad_norm: gradients are clipped to this global norm in the update itself, as
            `torch.nn.utils.clip_grad_norm_` would before it, over all parameters and all shards of DTensors. The norm
            before clipping is left in `optimizer.grad_norm`, on the device; a step where it is not finite changes
            nothing. `math.inf` clips nothing, and still measures. A group with a `max_grad_norm` of its own is clipped
            to the norm of its own gradients alone, and the groups without are clipped together, to the norm of theirs;
            a group with None is neither clipped nor measured. `grad_norm` is then the norm of all gradients that are
            measured, and if it is not finite, no group changes. Parameters that are not DTensors count as whole and as
            the same on all ranks: with FSDP1, or the parts of ZeroRedundancyOptimizer, the norm would be each rank's
            own.
        master_weights: how parameters of bfloat16 or float16 are given more bits than their own. "fp32": a float32 copy
            beside each, which from then on is the parameter: who sets a parameter to something else has to set
            `state[p]["master_param"]` too, unless a state dict is loaded before the next step. "split16", "split8": 16
            or 8 more bits beside each, which with the parameter's own make a float32, or one of 24 bits (relative steps
            below 1e-5 are lost then); bfloat16 only. "kahan": what rounding lost, in the parameter's dtype, is added
            back before the next step. "stochastic": nothing beside it, but rounding up or down with the odds that make
            it right on average; bfloat16 only. Float32 parameters need none of it.
        state_dtype: of the moments, in place of the parameter's: float32, bfloat16, float16, or "8bit", where 128
            elements share a float32 scale and every element is rounded stochastically. (A maximum would keep whatever
            that adds: `max_exp_avg_sq` is float32 then.)
        ema_decay: keep a float32 average of each parameter, ema = ema_decay * ema + (1 - ema_decay) * p, in
            `state[p]["ema_param"]`; see `ema_weights`.
        zero_grads: leave zeros in the gradients, also when a step is skipped, so that no `zero_grad` is needed.
        seed: of stochastic rounding. The noise depends on it, on the step, on the parameter's place among the
            optimizer's parameters and on the element's place in the whole parameter: not on how the work is divided,
            nor on how a DTensor is, unless it is cut along two dimensions beyond the first.
    """

    max_grad_norm: float | None
    master_weights: MasterWeights | None
    state_dtype: StateDtype | None
    ema_decay: float | None
    zero_grads: bool
    seed: int


@dataclass
class Options:
    """`Extras` with their defaults. `max_grad_norm` and `ema_decay` may be set to other numbers between steps."""

    PER_GROUP: ClassVar = frozenset({"max_grad_norm", "master_weights", "state_dtype", "ema_decay"})

    max_grad_norm: float | None = None
    master_weights: MasterWeights | None = None
    state_dtype: StateDtype | None = None
    ema_decay: float | None = None
    zero_grads: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        norm, decay = self.max_grad_norm, self.ema_decay
        expect(norm is None or norm > 0, f"max_grad_norm must be greater than 0, or None; got {norm}")
        expect(
            self.master_weights is None or self.master_weights in PARAM_FORMATS,
            f"master_weights must be None or one of {[*PARAM_FORMATS]}; got {self.master_weights!r}",
        )
        expect(
            self.state_dtype in STATE_FORMATS,
            f"state_dtype must be None or one of {[f for f in STATE_FORMATS if f is not None]}; "
            f"got {self.state_dtype!r}",
        )
        expect(decay is None or 0 <= decay < 1, f"ema_decay must be in [0, 1), or None; got {decay}")
        expect(0 <= self.seed < 1 << 53, f"seed must be in [0, 2^53); got {self.seed}")

    @classmethod
    def given(cls, extras: Extras) -> "Options":
        names = [field.name for field in fields(cls)]
        for name in extras:
            if name not in names:
                raise TypeError(f"got an unexpected keyword argument {name!r}; those beyond torch's are {names}")
        return cls(**extras)

    def given_in(self, group: dict[str, Any], allowed: Collection[str], optimizer: type) -> dict[str, Any]:
        """Return the options that a parameter group has of its own.

        Other keys are torch's, named in `allowed`, or what the caller wants to find in the group again.

        Raises:
            ValueError: an option is out of range or holds for whole optimizers alone, or a key is nearly an option.
        """
        names = [field.name for field in fields(self)]
        whole = {*names, *getattr(optimizer, "whole_arguments", ())} - self.PER_GROUP
        long = [name for name in names if "_" in name]  # "speed" is near "seed", and somebody's own
        for key in group:
            if key in whole:
                raise ValueError(
                    f"{key} must hold for all parameter groups: give it to {optimizer.__name__} itself; got "
                    f"{key}={group[key]!r} in a group"
                )
            known = key in allowed or key in self.PER_GROUP or not isinstance(key, str)
            if not known and (near := difflib.get_close_matches(key, long, 1, 0.85)):
                raise ValueError(f"a parameter group must name options right: {near[0]!r}; got {key!r}")
        own = {key: group[key] for key in group if key in self.PER_GROUP}
        replace(self, **own)  # raises what the constructor raises
        return own

    def master_of(self, p: Tensor) -> MasterWeights | None:
        """Return how this parameter has more bits than its own; float32 and float64 need none."""
        return self.master_weights if p.dtype in (torch.bfloat16, torch.float16) else None

    @property
    def state_format(self) -> StateFormat:
        """How states are kept."""
        return STATE_FORMATS[self.state_dtype]

    def expect_fits(self, p: Tensor, name: str) -> None:
        """Raise ValueError if the parameter cannot be kept as the options say."""
        if param_format(self.master_weights).bfloat16_only and p.dtype == torch.float16:
            others = [repr(master) for master, other in PARAM_FORMATS.items() if not other.bfloat16_only]
            raise ValueError(
                f"master_weights={self.master_weights!r} works on bits of bfloat16, and {name} is {describe(p)}; "
                f"{' and '.join(others)} take float16"
            )
        plain = self.master_weights is None and self.state_dtype is None and self.ema_decay is None
        if p.is_complex() and not plain:
            raise ValueError(f"{name}, {describe(p)}, is complex: master_weights, state_dtype and ema_decay are not")
