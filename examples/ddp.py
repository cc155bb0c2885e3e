"""DistributedDataParallel with gradient accumulation, and a loss that does not depend on how the step is split.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py

Rows are padded, so ranks and micro-batches differ in their number of valid tokens. A mean of means would give tokens
of short rows more weight. `num_valid` divides by the number in the whole step instead, so N ranks with M micro-batches
give the same result as one process with all rows.
"""

import os
from collections.abc import Iterator
from contextlib import nullcontext

import torch
import torch.distributed as dist
from tiny_gpt import TinyGPT, batches
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW


def padded_batches(rank: int, rows: int, context: int, device: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's tokens and targets, (rows, context) each; targets past a row's end are -100 and are ignored."""
    lengths = torch.Generator().manual_seed(rank)
    for tokens, targets in batches(rows, device, context, seed=rank):
        ends = torch.randint(1, context + 1, (rows, 1), generator=lengths).to(device)
        yield tokens, targets.masked_fill(torch.arange(context, device=device) >= ends, -100)


def train(steps: int = 40, rows: int = 8, accumulate: int = 2, context: int = 128) -> list[float]:
    """Train on one rank of an existing process group; return the losses of whole steps, equal on all ranks."""
    torch.manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    model = TinyGPT(context=context).to(device)
    ddp = DistributedDataParallel(model)
    optimizer = FusedAdamW(model.parameters(), lr=3e-3)  # llmfast
    data = padded_batches(rank, rows, context, device)
    losses = []
    for step in range(steps):
        micro_batches = [next(data) for _ in range(accumulate)]
        valid = torch.stack([(targets != -100).sum() for _, targets in micro_batches]).sum()
        dist.all_reduce(valid)  # over all micro-batches of all ranks
        total = torch.zeros((), device=device)
        for i, (tokens, targets) in enumerate(micro_batches):
            # Gradients are reduced once per step. The forward pass has to be inside no_sync, too.
            with ddp.no_sync() if i < accumulate - 1 else nullcontext():
                hidden = ddp(tokens)
                loss = linear_cross_entropy(hidden, model.head.weight, targets, num_valid=valid)  # llmfast
                (world * loss).backward()  # DDP averages over ranks, but these are parts of a sum
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        losses.append(total.item())
        if rank == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("torchrun --standalone --nproc-per-node 2 examples/ddp.py")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train()
    dist.destroy_process_group()
