"""What the fused optimizers can do beyond torch's, in one place."""

from dataclasses import dataclass, fields
from typing import Literal, TypedDict

import torch
from torch import Tensor

from llmfast._checks import describe, expect
from llmfast.optim.formats import LOW, MasterWeights

StateDtype = torch.dtype | Literal["8bit"]
_STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, "8bit")


class Extras(TypedDict, total=False):
    """Keywords of every fused optimizer, beyond those of its namesake in torch.

    Attributes:
        max_grad_norm: gradients are clipped to this global norm in the update itself, as
            `torch.nn.utils.clip_grad_norm_` would before it, over all parameters and all shards of DTensors. The norm
            before clipping is left in `optimizer.grad_norm`, on the device; a step where it is not finite changes
            nothing. `math.inf` clips nothing, and still measures. Parameters that are not DTensors count as whole and
            as the same on all ranks: with FSDP1, or the parts of ZeroRedundancyOptimizer, the norm would be each rank's
            own.
        master_weights: how parameters of bfloat16 or float16 are given more bits than their own. "fp32": a float32 copy
            beside each, which from then on is the parameter: who sets a parameter to something else has to set
            `state[p]["master_param"]` too. "split16", "split8": 16 or 8 more bits beside each, which with the
            parameter's own make a float32, or one of 24 bits (relative steps below 1e-5 are lost then); bfloat16 only.
            "kahan": what rounding lost, in the parameter's dtype, is added back before the next step. "stochastic":
            nothing beside it, but rounding up or down with the odds that make it right on average; bfloat16 only.
            Float32 parameters need none of it.
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
            self.master_weights is None or self.master_weights in LOW or self.master_weights == "stochastic",
            f"master_weights must be None or one of {[*LOW, 'stochastic']}; got {self.master_weights!r}",
        )
        expect(
            self.state_dtype is None or self.state_dtype in _STATE_DTYPES,
            f"state_dtype must be None or one of {list(_STATE_DTYPES)}; got {self.state_dtype!r}",
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

    def master_of(self, p: Tensor) -> MasterWeights | None:
        """How this parameter is given more bits: float32 and float64 have them."""
        return self.master_weights if p.dtype in (torch.bfloat16, torch.float16) else None

    def expect_fits(self, p: Tensor, name: str) -> None:
        """Raises ValueError if the parameter cannot be kept as the options say."""
        bfloat16_only = self.master_weights in ("split16", "split8", "stochastic")
        if bfloat16_only and p.dtype == torch.float16:
            raise ValueError(
                f"master_weights={self.master_weights!r} works on bits of bfloat16, and {name} is {describe(p)}; "
                "'fp32' and 'kahan' take float16"
            )
        plain = self.master_weights is None and self.state_dtype is None and self.ema_decay is None
        if p.is_complex() and not plain:
            raise ValueError(f"{name}, {describe(p)}, is complex: master_weights, state_dtype and ema_decay are not")
