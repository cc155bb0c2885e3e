"""Ranks, and how a model is spread over them: torch's DDP and FSDP2, under torchrun."""

import os
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from llmfast.models.blocks import blocks_of
from llmfast.train.config import Config
from llmfast.train.settings import ConfigError


@dataclass(frozen=True)
class World:
    """This process among all ranks."""

    device: torch.device
    rank: int = 0
    size: int = 1
    background: Any = None  # a process group for checkpoints, which are written while training continues

    @property
    def main(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device: torch.device) -> "World":
        """Join the ranks that torchrun has started; without torchrun, this process is alone.

        Raises:
            ConfigError: they do not find each other.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1 or "RANK" not in os.environ:
            return cls(device)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
            except (RuntimeError, ValueError) as e:
                raise ConfigError(f"the ranks do not find each other: {str(e).splitlines()[0]}") from e
        return cls(device, dist.get_rank(), dist.get_world_size(), dist.new_group(backend="gloo"))

    def sum(self, t: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(t)
        return t

    def agreed(self, value: Any) -> Any:
        """Return the first rank's value on every rank; any value that can be pickled."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.background)
        return values[0]

    def any(self, flag: bool) -> bool:
        """Return True on every rank if the flag is true on one."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(int(flag), dtype=torch.int64, device=self.device)).item())

    def leave(self) -> None:
        """End the process group when every rank is done: if one process fails at its exit, torchrun ends the others."""
        if self.size > 1 and dist.is_initialized():
            dist.barrier(group=self.background)
            dist.destroy_process_group()


def micro_batch_size(config: Config, world: World) -> int:
    """Return the rows that a rank processes at once.

    Raises:
        ConfigError: the batch does not divide into the ranks' micro-batches.
    """
    t = config.train
    if t.batch_size % world.size:
        raise ConfigError(f"train.batch_size={t.batch_size} does not divide by {world.size} ranks")
    rows = t.micro_batch_size or t.batch_size // world.size
    if t.batch_size % (rows * world.size):
        raise ConfigError(
            f"train.batch_size={t.batch_size} does not divide into micro-batches of {rows} rows on {world.size} ranks"
        )
    return rows


def shard_count(config: Config, ranks: int) -> int:
    """Return how many ranks share one set of parameters: 1 alone or with DDP.

    Raises:
        ConfigError: the ranks do not divide into sets of `train.shard_size`.
    """
    t = config.train
    if ranks == 1 or t.parallel == "ddp":
        return 1
    if t.parallel == "fsdp":
        return ranks
    if ranks % t.shard_size:
        raise ConfigError(
            f"train.shard_size must divide the number of ranks, {ranks}, for train.parallel='hsdp'; got {t.shard_size}"
        )
    return t.shard_size


def prepare_blocks(model: nn.Module, config: Config) -> None:
    """Compile the blocks and let them recompute activations, as the settings say; names of parameters do not change."""
    for block in blocks_of(model):
        if config.train.checkpoint_activations:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if config.train.compile:
            block.compile()


def spread(module: nn.Module, config: Config, world: World, own: Sequence[str] = ()) -> nn.Module:
    """Spread the module over all ranks, except the parameters named in `own`, which each rank has to itself.

    FSDP2 replaces parameters by DTensors, so optimizers are made afterwards.

    Raises:
        ConfigError: the ranks do not divide into sets of `train.shard_size`.
    """
    t = config.train
    if world.size == 1:
        return module
    if t.parallel == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, list(own))
        return DistributedDataParallel(module, gradient_as_bucket_view=True)
    shards = shard_count(config, world.size)
    if t.parallel == "fsdp":
        mesh = init_device_mesh(world.device.type, (shards,))
    else:
        mesh = init_device_mesh(
            world.device.type, (world.size // shards, shards), mesh_dim_names=("replicate", "shard")
        )
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh, ignored_params={module.get_parameter(name) for name in own})
    return module


def syncing(module: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Reduce gradients over the ranks in the last micro-batch of a step only."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(last)
    elif isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def plain(module: nn.Module) -> nn.Module:
    """Return the module without DDP around it."""
    inner: nn.Module = module.module if isinstance(module, DistributedDataParallel) else module
    return inner


def clip_grad_norm_(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Clip like torch's function, but also mixtures of plain tensors and DTensors, and DTensors of several meshes."""
    kinds: dict[Any, list[nn.Parameter]] = {}
    for p in parameters:
        if p.grad is not None:
            kinds.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    if not kinds:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    norms = [nn.utils.get_total_norm([p.grad for p in some if p.grad is not None]) for some in kinds.values()]
    norm: Tensor = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for some in kinds.values():
        nn.utils.clip_grads_with_norm_(some, most, norm)
    return norm
