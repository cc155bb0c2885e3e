"""A whole training step in one CUDA graph: forward, loss, backward and the optimizer, replayed without Python.

    python examples/cuda_graph.py       # needs an NVIDIA GPU; otherwise it exits with a message

This recipe has never run on a GPU. What has been checked without one: the captured step learns what an ordinary loop
learns; nothing in it, including the kernel launches, would make the host wait for a GPU; and the optimizer accepts a
captured step after an ordinary one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from tiny_gpt import TinyGPT, batches
from torch import Tensor
from torch.optim.lr_scheduler import LinearLR

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW


class Step:
    """Training step from static inputs to a static loss: a replay uses the same memory as the capture."""

    def __init__(self, rows: int, context: int, device: str) -> None:
        torch.manual_seed(0)
        self.tokens = torch.zeros(rows, context, dtype=torch.int64, device=device)
        self.targets = torch.zeros_like(self.tokens)
        self.loss = torch.zeros((), device=device)
        self.model = TinyGPT(context=context).to(device)
        # A learning rate on the device is read at every replay; a float would become a constant of the graph.
        lr = torch.tensor(3e-3, device=device)
        self.optimizer = FusedAdamW(self.model.parameters(), lr=lr)  # llmfast

    def __call__(self) -> None:
        # Gradients are allocated during the capture, in the graph's own memory.
        self.optimizer.zero_grad(set_to_none=True)
        hidden = self.model(self.tokens)
        loss = linear_cross_entropy(hidden, self.model.head.weight, self.targets)  # llmfast
        loss.backward()
        self.optimizer.step()
        self.loss.copy_(loss.detach())

    def take(self, batch: tuple[Tensor, Tensor]) -> None:
        self.tokens.copy_(batch[0], non_blocking=True)
        self.targets.copy_(batch[1], non_blocking=True)


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """Capture the step as a graph. Nothing is computed during the capture."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step()
    return graph


def train(steps: int = 60, rows: int = 16, context: int = 128, ordinary: int | None = 3) -> list[float]:
    """Train and return the losses. Only the first `ordinary` steps run without the graph; with None, all steps do.

    The ordinary steps compile the kernels and create the optimizer's states and tables, which a capture cannot do.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = Step(rows, context, device)
    schedule = LinearLR(step.optimizer, 1.0, 0.1, steps)  # changes the learning rate in place
    data = batches(rows, device, context)
    run: Callable[[], None] = step
    losses = []
    with side_stream() if device == "cuda" else nullcontext():
        for i in range(steps):
            step.take(next(data))
            if i == ordinary:
                run = captured(step).replay
            run()
            schedule.step()
            losses.append(step.loss.clone())
        return torch.stack(losses).tolist()


@contextmanager
def side_stream() -> Iterator[None]:
    """Switch to another stream, because graphs cannot be captured on the default stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        raise SystemExit("examples/cuda_graph.py captures a CUDA graph, and there is no GPU here")
    losses = train()
    for step in range(0, len(losses), 10):
        print(f"step {step}: loss {losses[step]:.4f}")
