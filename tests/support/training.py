"""Parameters, gradients and flags for the tests of optimizers, in all memory layouts."""

import copy
import inspect
import io
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedOptimizer, FusedRMSprop, FusedSGD

Options = dict[str, Any]


class Case(NamedTuple):
    """An optimizer of ours with some of torch's flags."""

    ours: type[FusedOptimizer]
    options: Options

    @property
    def torchs(self) -> type[torch.optim.Optimizer]:
        """The namesake in torch."""
        cls: type[torch.optim.Optimizer] = getattr(torch.optim, self.ours.__name__.removeprefix("Fused"))
        return cls

    def make(self, cls: type[torch.optim.Optimizer], params: Any, **others: Any) -> Any:
        # A schedule writes into a learning rate that is a tensor: no two optimizers may share one.
        return cls(params, **copy.deepcopy(self.options), **others)

    def make_ours(self, params: Any, **extras: Any) -> Any:
        return self.make(self.ours, params, **extras)

    def make_torchs(self, params: Any, **others: Any) -> Any:
        """Create torch's optimizer in float32 arithmetic, fused if a working fused one exists.

        torch's fused SGD fails for a parameter whose first gradient comes later than another's.
        """
        if "fused" not in inspect.signature(self.torchs).parameters or "momentum" in self.options:
            return self.make(self.torchs, params, foreach=False, **others)
        return self.make(self.torchs, params, fused=True, **others)

    def make_exact(self, params: Any, **others: Any) -> Any:
        """Create torch's plain optimizer, in the arithmetic of the parameters."""
        return self.make(self.torchs, params, foreach=False, **others)

    def __str__(self) -> str:
        return "-".join([self.torchs.__name__, *self.options])


PLAIN = [Case(cls, {}) for cls in (FusedAdamW, FusedAdam, FusedSGD, FusedRMSprop, FusedAdagrad)]
# With as many states, and as much arithmetic, as each can have.
FULL = [
    Case(FusedAdamW, {"amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.95), "lr": 1e-2}),
    Case(FusedAdam, {"weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    Case(FusedSGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True, "lr": 1e-2}),
    Case(FusedRMSprop, {"centered": True, "momentum": 0.9, "weight_decay": 0.1, "maximize": True, "alpha": 0.9}),
    Case(FusedAdagrad, {"initial_accumulator_value": 0.5, "lr_decay": 0.1, "weight_decay": 0.1, "maximize": True}),
]
CASES = [
    *PLAIN,
    *FULL,
    Case(FusedAdamW, {"betas": (0.0, 0.0), "lr": torch.tensor(1e-3)}),
    Case(FusedAdamW, {"maximize": True, "weight_decay": 0.0, "eps": 1e-6}),
    Case(FusedAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    Case(FusedAdam, {"lr": torch.tensor(1e-2), "weight_decay": 0.1}),
    Case(FusedSGD, {"weight_decay": 0.1, "lr": torch.tensor(1e-2)}),
    Case(FusedSGD, {"momentum": 0.9}),
    Case(FusedSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    Case(FusedRMSprop, {"momentum": 0.9, "lr": torch.tensor(1e-3)}),
    Case(FusedRMSprop, {"centered": True}),
    Case(FusedAdagrad, {"lr": torch.tensor(1e-2), "eps": 1e-6}),
]

STRAIGHT, SCALAR, EMPTY, TRANSPOSED = range(4)
LATE = 7  # the step at which the scalar gets its first gradient


def parameters(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Create a whole tile, a scalar, an empty tensor, and a transposed matrix at an odd address."""
    generator = torch.Generator().manual_seed(1)
    shapes: list[tuple[int, ...]] = [(512,), (), (0, 4), (31,)]
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    tensors[TRANSPOSED] = tensors[TRANSPOSED][1:].view(6, 5).T
    return [t.requires_grad_() for t in tensors]


def groups(params: list[Tensor], options: Options) -> list[Options]:
    """Return two groups; if there is a learning rate, it is doubled for the transposed matrix."""
    faster = {} if "lr" not in options else {"lr": options["lr"] * 2}
    return [{"params": params[:TRANSPOSED]}, {"params": params[TRANSPOSED:], **faster}]


def gradients(step: int, params: list[Tensor], dtype: torch.dtype | None = None) -> None:
    """Return equal gradients for any optimizer; the scalar's first comes late, the transposed matrix's now and then.

    With a dtype, gradients have the values that they have for parameters of that dtype.
    """
    generator = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        value = torch.randn(p.shape, generator=generator).to(dtype or p.dtype)
        g = torch.empty_like(p, requires_grad=False).copy_(value)
        p.grad = None if (i == SCALAR and step < LATE) or (i == TRANSPOSED and step % 3 == 1) else g


def values(params: list[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in params])


def through_a_file(state_dict: Options) -> Options:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: Options = torch.load(file, weights_only=True)
    return loaded


def scaled(optimizer: torch.optim.Optimizer, grad_scale: float | None = None, found_inf: float = 0.0) -> None:
    """Set the attributes with which GradScaler informs an optimizer before a step."""
    told = {
        "grad_scale": None if grad_scale is None else torch.tensor(grad_scale, dtype=torch.float32),
        "found_inf": torch.tensor(found_inf, dtype=torch.float32),
    }
    vars(optimizer).update(told)
