"""torch.compile: forward and loss as one graph, their backward as another, and the optimizer uncompiled.

    python examples/torch_compile.py            # without a GPU it needs a C++ compiler and a minute to compile
    python examples/torch_compile.py whole      # pass the whole step to torch.compile

The model, the loss and their backward are compiled. The loss is one operator, so `fullgraph=True` works.
`FusedAdamW.step` does not need compiling: it already takes two launches for all tensors of a dtype.

The whole step can be passed to torch.compile as well. The graph then breaks at `backward()`, which is not traced by
default; `optimizer.step()` and `zero_grad()` break it too and run uncompiled. The losses are the same.
"""

import sys
from collections.abc import Callable

import torch
from tiny_gpt import TinyGPT, batches
from torch import Tensor

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW

Compile = Callable[..., Callable[[Tensor, Tensor], Tensor]]


def make_step(model: TinyGPT, compiled: Compile = torch.compile, whole: bool = False) -> Callable[..., Tensor]:
    """Return a training step from tokens and targets to the loss; `compiled` is torch.compile or a replacement."""
    optimizer = FusedAdamW(model.parameters(), lr=3e-3)  # llmfast

    def forward_and_loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(model(tokens), model.head.weight, targets)  # llmfast

    loss_of = forward_and_loss if whole else compiled(forward_and_loss, fullgraph=True)

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        loss = loss_of(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return compiled(step) if whole else step


def train(steps: int = 60, rows: int = 16, compiled: Compile = torch.compile, whole: bool = False) -> list[float]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = make_step(TinyGPT().to(device), compiled, whole)
    data = batches(rows, device)
    losses = [step(*next(data)) for _ in range(steps)]  # does not wait for the device before the end
    return torch.stack(losses).tolist()


if __name__ == "__main__":
    losses = train(whole="whole" in sys.argv)
    for step in range(0, len(losses), 10):
        print(f"step {step}: loss {losses[step]:.4f}")
