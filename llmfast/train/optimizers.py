"""The optimizers that settings can name, the settings that each of them has, and how it is made from these."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import ConfigDict
from torch import nn

from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedOptimizer, FusedRMSprop, FusedSGD
from llmfast.optim.decay import DecayMode
from llmfast.optim.formats import STATE_FORMATS, MasterWeights, StateDtype
from llmfast.optim.scaling import ScalingRule
from llmfast.train.settings import RUN, By, ConfigError, fill, had, setting

# Each optimizer, and its defaults for training a language model where they are not those of its constructor. Its other
# settings follow from the constructor's arguments.
OPTIMIZERS: dict[str, tuple[type[FusedOptimizer], dict[str, Any]]] = {
    "adamw": (FusedAdamW, {"lr": 1.5e-3, "beta2": 0.95, "weight_decay": 0.1}),
    "adam": (FusedAdam, {"lr": 1.5e-3, "beta2": 0.95}),
    "sgd": (FusedSGD, {"lr": 0.1, "momentum": 0.9}),
    "rmsprop": (FusedRMSprop, {"lr": 1.5e-3}),
    "adagrad": (FusedAdagrad, {}),
    "lion": (FusedLion, {"lr": 5e-4, "weight_decay": 0.3}),
}
# The values of state_dtype, and what the optimizer calls them: "float32" is torch.float32, "" is None.
STATE_DTYPES: dict[str, StateDtype | None] = {str(dtype or "").removeprefix("torch."): dtype for dtype in STATE_FORMATS}
if TYPE_CHECKING:
    OptimizerName: TypeAlias = str
    StateName: TypeAlias = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    StateName = Literal[tuple(STATE_DTYPES)]
BETAS = ("beta1", "beta2")  # settings that are one argument, `betas`


def _arguments(kind: type[FusedOptimizer]) -> Mapping[str, Any]:
    """Return the constructor's arguments with their defaults, each beta by itself."""
    found = {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}
    return found | dict(zip(BETAS, found.get("betas", ())))


def _own(name: str) -> By:
    """Return the default of a setting for each optimizer that has it."""
    found = {key: own.get(name, _arguments(kind).get(name)) for key, (kind, own) in OPTIMIZERS.items()}
    # torch writes some numbers as integers.
    return By({key: float(x) if type(x) is int else x for key, x in found.items() if x is not None})


@dataclass
class OptimizerConfig:
    """The optimizer with its hyperparameters, and the schedule of its learning rate.

    Where defaults are listed for some optimizers, only these have the setting.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: OptimizerName = setting(
        "adamw", "the update rule", kept=RUN, aka=("optim", "optimizer_name", "optimizer_type")
    )
    lr: float = setting(_own("lr"), "highest learning rate", ge=0, aka=("learning_rate", "max_lr"))
    beta1: float | None = setting(
        _own("beta1"), "decay of the first moment; lion: its share in a step", ge=0, lt=1, aka=("adam_beta1",)
    )
    beta2: float | None = setting(
        _own("beta2"), "decay of the second moment; lion: of the first", ge=0, lt=1, aka=("adam_beta2",)
    )
    eps: float | None = setting(
        _own("eps"), "added to the root of the squares", ge=0, aka=("adam_epsilon", "adam_eps", "epsilon")
    )
    amsgrad: bool | None = setting(_own("amsgrad"), "divide by the largest second moment so far")
    momentum: float | None = setting(_own("momentum"), "share of the last step that is repeated", ge=0, lt=1)
    nesterov: bool | None = setting(_own("nesterov"), "look ahead along the momentum")
    dampening: float | None = setting(_own("dampening"), "share of a gradient that momentum leaves out", ge=0, le=1)
    alpha: float | None = setting(_own("alpha"), "decay of the squares' average", ge=0, lt=1)
    centered: bool | None = setting(_own("centered"), "divide by the variance instead of the squares")
    lr_decay: float | None = setting(_own("lr_decay"), "the rate is divided by 1 + steps times this", ge=0)
    initial_accumulator_value: float | None = setting(
        _own("initial_accumulator_value"), "what the sum of squares begins with", ge=0, kept=RUN
    )
    weight_decay: float = setting(
        _own("weight_decay"),
        "decay of matrices, an L2 penalty except for adamw and lion; gains are not decayed",
        ge=0,
        aka=("wd",),
    )
    decay: DecayMode | None = setting(
        _own("decay"), "a step's decay: weight_decay times lr; times lr / highest lr (relative); itself (independent)"
    )
    max_grad_norm: float = setting(
        1.0,
        "gradients are clipped to this norm; 0: no clipping",
        ge=0,
        aka=("grad_clip", "max_norm", "clip_grad", "gradient_clip_val", "clip_grad_norm"),
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = setting(
        "cosine",
        "how the rate falls after warm-up; wsd stays, then decays",
        aka=("lr_scheduler", "lr_scheduler_type", "lr_schedule", "scheduler", "decay_type", "lr_decay_style"),
    )
    warmup_steps: int = setting(
        50,
        "steps in which the rate rises from 0",
        ge=0,
        aka=("warmup", "warmup_iters", "warmup_ratio", "lr_warmup_steps", "lr_warmup_iters", "num_warmup_steps"),
    )
    decay_share: float = setting(
        0.2, "wsd: share of the steps after warm-up in which the rate falls", gt=0, le=1, aka=("decay_ratio",)
    )
    final_lr: float = setting(
        0.1,
        "learning rate at the last step, as a share of lr",
        ge=0,
        le=1,
        aka=("min_lr", "min_lr_factor", "min_lr_ratio"),
    )
    lr_scaling: Literal["none", ScalingRule] = setting(
        "none", "how lr, which is for base_batch_size, follows train.batch_size"
    )
    base_batch_size: int = setting(0, "the batch size that lr is for, with lr_scaling", ge=0)
    master_weights: Literal["", MasterWeights] = setting("", "how 16-bit parameters get more bits; '': not at all")
    state_dtype: StateName = setting("", "format of the states; '': the parameters'")
    in_backward: bool = setting(
        False, "step while gradients are made, and free them at once; without clipping and skipping"
    )

    def __post_init__(self) -> None:
        fill(self)

    @property
    def formats(self) -> dict[str, Any]:
        """The formats of parameters and states, as an optimizer takes them."""
        return {"master_weights": self.master_weights or None, "state_dtype": STATE_DTYPES[self.state_dtype]}

    def make(self, params: Iterable[nn.Parameter], **extras: Any) -> FusedOptimizer:
        """Make the optimizer, which decays matrices and not gains.

        Args:
            params: all parameters.
            extras: `llmfast.optim.Extras`, which take precedence over the settings' formats.

        Raises:
            ConfigError: it does not have one of the settings, or they contradict each other.
        """
        arguments = had(self, "optimizer")
        if betas := tuple(arguments.pop(beta) for beta in BETAS if beta in arguments):
            arguments["betas"] = betas
        params = list(params)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in params if p.dim() >= 2]},  # decayed
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
        kind, _ = OPTIMIZERS[self.name]
        try:
            return kind(groups, **arguments, **(self.formats | extras))
        except ValueError as e:
            raise ConfigError(f"optimizer: {e}") from e
