"""An output layer that is divided over the ranks: each has some of the classes, for the tokens of all ranks.

A rank alone holds the parameters, gradients, optimizer states and logits of its classes, so no gradient is reduced.
Hidden states are sent instead: every rank receives those of all W ranks, (W N, D), and the sum of their gradients.
That is less than the output layer where V > W N.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from llmfast.train.batch import map_tensors
from llmfast.train.objective import Objective, Sums
from llmfast.train.settings import ConfigError


def split_unembedding(model: nn.Module, mesh: DeviceMesh) -> str:
    """Leave each rank some rows of `model.unembedding`, as `torch.chunk` splits them; return the parameter's name.

    Raises:
        ConfigError: the model has none that is a parameter of its own.
    """
    whole = getattr(model, "unembedding", None)
    names = [name for name, p in model.named_parameters(remove_duplicate=False) if p is whole]
    if not isinstance(whole, nn.Parameter) or not names:
        raise ConfigError(
            f"train.vocab_parallel needs unembedding, a parameter of the model; {type(model).__name__} has none"
        )
    owner, _, name = names[0].rpartition(".")
    if len(names) > 1 or isinstance(model.get_submodule(owner), nn.Embedding):
        raise ConfigError(
            f"train.vocab_parallel splits the unembedding, which is also something else: {', '.join(names)}"
        )
    split = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]), requires_grad=whole.requires_grad)
    setattr(model.get_submodule(owner), name, split)
    return names[0]


class OfAllRanks:
    """An objective whose loss every rank computes from the tokens of all ranks; each returns its share of it.

    The wrapped objective need not know: it receives the labels of all ranks, and a model that returns the hidden states
    of all ranks. Both those and the unembedding are DTensors, which tells `linear_cross_entropy` what to do.

    In evaluation all ranks have the same batch, and nothing is gathered.
    """

    def __init__(self, objective: Objective, mesh: DeviceMesh) -> None:
        self._objective, self._mesh = objective, mesh
        self.num_valid, self.logged = objective.num_valid, objective.logged

    def __call__(self, model: nn.Module, batch: Any, num_valid: Tensor, step: int, detail: bool) -> tuple[Tensor, Sums]:
        whole: Any = _Whole(model, self._mesh)
        if not model.training:
            return self._objective(whole, batch, num_valid, step, detail)
        everything = map_tensors(batch, lambda t: _gathered(t, 0, self._mesh))
        loss, sums = self._objective(whole, everything, num_valid, step, detail)
        world = self._mesh.size()
        return loss / world, {name: t / world for name, t in sums.items()}


class _Whole:
    """A model that takes the tokens of all ranks, reads its own, and returns the hidden states of all.

    In evaluation it takes and returns what all ranks have.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        self._model, self._mesh = model, mesh

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._model.training:
            rank, world = self._mesh.get_local_rank(), self._mesh.size()
            args, kwargs = map_tensors((args, kwargs), lambda t: t.chunk(world)[rank])
        hidden: Tensor = self._model(*args, **kwargs)  # (..., B, T, D)
        if self._model.training:
            hidden = _Gather.apply(hidden, self._mesh)
        return DTensor.from_local(hidden, self._mesh, [Replicate()], run_check=False)


class _Gather(torch.autograd.Function):
    """An operation that gathers the hidden states of all ranks along the dimension of sequences."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return _gathered(hidden, hidden.dim() - 3, mesh)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (grad,) = upstream
        # The whole gradient is here. It is multiplied by the number of ranks, because the loss is this rank's share.
        own = grad.chunk(ctx.mesh.size(), dim=grad.dim() - 3)[ctx.mesh.get_local_rank()]
        return own * ctx.mesh.size(), None


def _gathered(t: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(mesh.size())]
    dist.all_gather(parts, t.contiguous(), group=mesh.get_group())
    return torch.cat(parts, dim)
