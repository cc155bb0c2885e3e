"""FSDP2: sharded float32 parameters, bfloat16 arithmetic, float32 reduction, and clipping inside the optimizer.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py

Outside the root module's forward, the head's weight is a shard. The loss is therefore computed inside, where the weight
is whole and in bfloat16, and its gradient is reduced like all others.
"""

import os

import torch
import torch.distributed as dist
from tiny_gpt import TinyGPT, batches
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW


class WithLoss(nn.Module):
    """Model with its loss, as the root module for which FSDP2 gathers parameters."""

    def __init__(self, model: TinyGPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(self.model(tokens), self.model.head.weight, targets)  # llmfast


def train(steps: int = 40, rows: int = 16, context: int = 128, dtype: torch.dtype = torch.bfloat16) -> list[float]:
    """Train on one rank of an existing process group; return each step's mean loss over all ranks."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = WithLoss(TinyGPT(context=context).to(device))
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in net.model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    # Create it after fully_shard, which replaces the parameters. The norm covers all shards of all ranks.
    optimizer = FusedAdamW(net.parameters(), lr=3e-3, max_grad_norm=1.0)  # llmfast
    data = batches(rows, device, context, seed=dist.get_rank())
    losses = []
    for step in range(steps):
        loss = net(*next(data))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
        if dist.get_rank() == 0 and (step % 10 == 0 or step == steps - 1):
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    if "RANK" not in os.environ:
        raise SystemExit("torchrun --standalone --nproc-per-node 2 examples/fsdp2.py")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train()
    dist.destroy_process_group()
