"""Several GPUs: data parallel, FSDP2 and vocab-parallel, by a process per device."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from llmfast._checks import worst
from llmfast.checkup.comparing import Inputs
from llmfast.checkup.record import Finding
from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW, FusedSGD

MOST = 4  # devices: more say no more
N, D, V = 24, 16, 261


def findings(device: torch.device, processes: int | None = None) -> Iterator[Finding]:
    """Compare what several processes compute with what one does; a note where there is one device only."""
    count = min(MOST, torch.cuda.device_count()) if processes is None else processes
    if count < 2:
        yield Finding("one device only", None, {"devices": count})
        return
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, (count, device.type, folder), nprocs=count)
        results = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(count)]
    for what in results[0]:
        error = worst(float(result[what]) for result in results)
        yield Finding(what, error < 1e-4, {"relative_error": error, "devices": count})


def _rank(rank: int, count: int, kind: str, folder: str) -> None:
    """Do everything on one device, and write how far each result is from what one device gives."""
    import torch.distributed as dist

    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count
    )
    errors = {"vocab-parallel": _vocab_parallel(device, rank, count), "DDP": _data_parallel(device, rank, count)}
    errors["FSDP2"] = _sharded(device, rank, count)
    torch.save(errors, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def _error(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.double() - wanted.double()).norm() / wanted.double().norm())


def _vocab_parallel(device: torch.device, rank: int, count: int) -> float:
    import torch.distributed as dist

    inputs = Inputs(device)
    hidden, weight, targets = inputs.normal(N, D), inputs.normal(V, D), inputs.classes(V, N)
    whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    linear_cross_entropy(whole[0], whole[1], targets).backward()
    part = [hidden.clone().requires_grad_(), weight.chunk(count)[rank].clone().requires_grad_()]
    group = dist.group.WORLD
    assert group is not None
    linear_cross_entropy(part[0], part[1], targets, process_group=group, vocab_size=V).backward()
    wanted = whole[0].grad, None if whole[1].grad is None else whole[1].grad.chunk(count)[rank]
    return worst(_error(p.grad, w) for p, w in zip(part, wanted) if p.grad is not None and w is not None)


class _Model(nn.Module):
    """A linear layer and an unembedding, with the loss as its output."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        inputs = Inputs(device, seed=1)
        self.layer = nn.Linear(D, D, device=device, dtype=torch.float32)
        self.head = nn.Linear(D, V, bias=False, device=device, dtype=torch.float32)
        for p in self.parameters():
            p.data = inputs.normal(*p.shape, scale=0.3)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = linear_cross_entropy(self.layer(x), self.head.weight, targets, reduction="sum")
        return loss


def _batch(device: torch.device, step: int, rank: int) -> tuple[Tensor, Tensor]:
    inputs = Inputs(device, seed=10 + 10 * step + rank)
    return inputs.normal(N, D), inputs.classes(V, N)


# Adam's steps are the same for any clip of them all, and SGD's are not.
OPTIMIZERS: tuple[tuple[Any, dict[str, float]], ...] = ((FusedAdamW, {}), (FusedSGD, {"momentum": 0.9}))


def _trained(model: nn.Module, rule: int, backward: Callable[[int], None]) -> list[Tensor]:
    """Return a model's parameters after a few steps."""
    cls, options = OPTIMIZERS[rule]
    optimizer = cls(model.parameters(), lr=1e-2, max_grad_norm=1.0, **options)
    for step in range(3):
        backward(step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def _reference(device: torch.device, count: int, rule: int) -> list[Tensor]:
    """Return the parameters that one device has after the steps of all ranks."""
    model = _Model(device)

    def backward(step: int) -> None:
        for rank in range(count):
            (model(*_batch(device, step, rank)) / count).backward()

    return _trained(model, rule, backward)


def _data_parallel(device: torch.device, rank: int, count: int) -> float:
    def parameters(rule: int) -> list[Tensor]:
        model = _Model(device)
        parallel = nn.parallel.DistributedDataParallel(model)
        return _trained(model, rule, lambda step: parallel(*_batch(device, step, rank)).backward())

    return _worst(device, count, parameters)


def _sharded(device: torch.device, rank: int, count: int) -> float:
    from torch.distributed.fsdp import fully_shard

    def parameters(rule: int) -> list[Tensor]:
        model = _Model(device)
        fully_shard(model)
        found: list[Any] = _trained(model, rule, lambda step: model(*_batch(device, step, rank)).backward())
        return [p.full_tensor() for p in found]

    return _worst(device, count, parameters)


def _worst(device: torch.device, count: int, parameters: Callable[[int], list[Tensor]]) -> float:
    """Return how far any parameter, by any rule, is from that of one device."""
    rules = range(len(OPTIMIZERS))
    return worst(_error(p, w) for r in rules for p, w in zip(parameters(r), _reference(device, count, r), strict=True))
