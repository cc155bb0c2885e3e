"""Options of the fused optimizers beyond torch's."""

import difflib
from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast._kinds import expect_kinds, kinds_of
from llmfast.optim.formats import (
    PARAM_FORMATS,
    STATE_FORMATS,
    MasterWeights,
    StateDtype,
    StateFormat,
    param_format,
)


class Extras(TypedDict, total=False):
    """Keywords of every fused optimizer, beyond those of the corresponding torch optimizer.

    A parameter group may set its own `max_grad_norm`, `master_weights`, `state_dtype` and `ema_decay`, including None:
    `[{"params": embedding, "state_dtype": torch.float32}, {"params": others}]`. The optimizer removes these from the
    group and keeps them in `group_options`, one dict per group, which may be changed between steps. They are settings
    of the run, not part of its state: `state_dict` does not contain them, and loading does not change them.

    Attributes:
        max_grad_norm: Clip gradients to this global norm in the update itself, with the result of a preceding
            `torch.nn.utils.clip_grad_norm_`, over all parameters and all shards of DTensors. The norm before clipping
            is stored in `optimizer.grad_norm`, on the device; a step where it is not finite changes nothing. `math.inf`
            measures without clipping. A group with its own `max_grad_norm` is clipped by the norm of its own gradients
            only. The groups without one are clipped together by the norm of theirs. A group with None is neither
            clipped nor measured. `grad_norm` is then the norm of all measured gradients, and if it is not finite, no
            group changes. Parameters that are not DTensors count as whole and equal on all ranks; with FSDP1 or
            ZeroRedundancyOptimizer, the norm would cover only the local rank.
        master_weights: Add bits to bfloat16 or float16 parameters. Float32 parameters are not affected. "fp32": keep a
            float32 copy of each, which is then the actual parameter: code that sets the parameter has to set
            `state[p]["master_param"]` too, unless a state dict is loaded before the next step. "split16", "split8":
            keep 16 or 8 more bits, which extend the parameter to a float32, or to 24 bits (relative steps below 1e-5
            are lost then); bfloat16 only. "kahan": keep the rounding error in the parameter's dtype and add it before
            the next step. "stochastic": keep nothing, but round up or down with the probabilities that are right on
            average; bfloat16 only.
        state_dtype: The dtype of the moments, instead of the parameter's: float32, bfloat16, float16, or "8bit", where
            128 elements share a float32 scale and every element is rounded stochastically. (A maximum would accumulate
            the rounding errors, so `max_exp_avg_sq` is then float32.)
        ema_decay: Keep a float32 average of each parameter, ema = ema_decay * ema + (1 - ema_decay) * p, in
            `state[p]["ema_param"]`; see `ema_weights`.
        zero_grads: Set the gradients to zero, also when a step is skipped, so that no `zero_grad` is needed.
        seed: The seed of stochastic rounding. The noise depends on it, on the step, on the parameter's position among
            the optimizer's parameters and on the element's position in the whole parameter. It does not depend on how
            the work is divided, nor on how a DTensor is sharded, unless it is sharded along two dimensions beyond the
            first.
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
        expect_kinds(_NUMBERS, vars(self))
        norm, decay = self.max_grad_norm, self.ema_decay
        expect(norm is None or norm > 0, f"max_grad_norm must be greater than 0, or None; got {norm}")
        expect(
            self.master_weights is None or self.master_weights in [*PARAM_FORMATS],
            f"master_weights must be None or one of {[*PARAM_FORMATS]}; got {self.master_weights!r}",
        )
        expect(
            self.state_dtype in [*STATE_FORMATS],
            f"state_dtype must be None or one of {[f for f in STATE_FORMATS if f is not None]}; "
            f"got {self.state_dtype!r}",
        )
        expect(decay is None or 0 <= decay < 1, f"ema_decay must be in [0, 1), or None; got {decay}")
        expect(0 <= self.seed < 1 << 53, f"seed must be in [0, 2^53); got {self.seed}")

    @classmethod
    def given(cls, extras: Extras) -> "Options":
        """Make options from a constructor's keywords; raise TypeError for an unknown one."""
        names = [field.name for field in fields(cls)]
        for name in extras:
            if name not in names:
                raise TypeError(f"got an unexpected keyword argument {name!r}; those beyond torch's are {names}")
        return cls(**extras)

    def given_in(self, group: dict[str, Any], allowed: Collection[str], optimizer: type) -> dict[str, Any]:
        """Return the options that a parameter group sets for itself.

        `allowed` are the optimizer's own keys. Any other key is the caller's and stays in the group.

        Raises:
            ValueError: an option is out of range or can only be set for the whole optimizer, or a key resembles the
                name of an option.
        """
        names = [field.name for field in fields(self)]
        whole = {*names, *getattr(optimizer, "whole_arguments", ())} - self.PER_GROUP
        long = [name for name in names if "_" in name]  # "speed" resembles "seed" but may be the caller's own key
        for key in group:
            if key in whole:
                raise ValueError(
                    f"{key} must hold for all parameter groups: give it to {optimizer.__name__} itself; got "
                    f"{key}={group[key]!r} in a group"
                )
            known = key in allowed or key in self.PER_GROUP or not isinstance(key, str)
            if not known and (near := difflib.get_close_matches(key, long, 1, 0.85)):
                raise ValueError(f"a parameter group must spell its options correctly: {near[0]!r}; got {key!r}")
        own = {key: group[key] for key in group if key in self.PER_GROUP}
        replace(self, **own)  # raises what the constructor raises
        return own

    def master_of(self, p: Tensor) -> MasterWeights | None:
        """Return the setting that adds bits to this parameter: None for float32 and float64, which need none."""
        return self.master_weights if p.dtype in (torch.bfloat16, torch.float16) else None

    @property
    def state_format(self) -> StateFormat:
        """Return the format of the states."""
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
            raise ValueError(
                "master_weights, state_dtype and ema_decay must be None for complex parameters; got "
                f"{name}, {describe(p)}"
            )


_NUMBERS = {n: kind for n, kind in kinds_of(Options).items() if n not in ("master_weights", "state_dtype")}
