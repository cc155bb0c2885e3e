"""A short training run on the GPU, by the kernels and by plain torch: the two curves must coincide."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.checkup import clock
from llmfast.checkup.record import Case, Finding, Size
from llmfast.losses import linear_cross_entropy
from llmfast.models import Decoder, DecoderConfig
from llmfast.optim import FusedAdamW

# The curves may part by this much (nats per token) at their ends: bfloat16 products differ in order and rounding.
ALLOWED = 0.05


def cases(device: torch.device, size: Size) -> list[Case]:
    """Return the cases of this section."""
    steps, rows, length = (200, 32, 256) if size == "full" else (3, 2, 16)
    config = DecoderConfig(256, width=384, layers=6, heads=6) if size == "full" else DecoderConfig(256, 12, 1, 2)
    run = partial(curves, config, steps, rows, length, device)
    return [Case(f"{steps} steps on Python's sources, bytes as tokens", run, 60.0, 8 << 30)]


def batches(steps: int, rows: int, length: int, device: torch.device) -> Iterator[Tensor]:
    """Yield (rows, length + 1) bytes of this Python's own sources."""
    paths = sorted(Path(sys.modules["argparse"].__file__ or "").parent.glob("*.py"))
    text = b"".join(path.read_bytes() for path in paths[:150])
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(tokens) - length, (rows,), generator=generator, dtype=torch.int64, device="cpu")
        yield torch.stack([tokens[start : start + length + 1] for start in starts.tolist()]).long().to(device)


def trained(
    ours: bool, config: DecoderConfig, steps: int, rows: int, length: int, device: torch.device
) -> tuple[list[float], float]:
    """Train a decoder; return its losses (nats per token) and the seconds per step, without the first steps."""
    torch.manual_seed(0)
    model = Decoder(config).to(device)
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    optimizer: torch.optim.Optimizer
    optimizer = (
        FusedAdamW(model.parameters(), **settings)
        if ours
        else torch.optim.AdamW(model.parameters(), fused=True, **settings)
    )
    losses = []
    data = list(batches(steps, rows, length, device))

    def step(tokens: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            hidden, targets = model(tokens[:, :-1]), tokens[:, 1:]
            if ours:
                loss = linear_cross_entropy(hidden, model.unembedding, targets)
            else:
                logits = F.linear(hidden, model.unembedding).float()
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    warm = min(10, steps // 2)
    for tokens in data[:warm]:
        step(tokens)

    def rest() -> None:
        for tokens in data[warm:]:
            step(tokens)

    seconds = clock.timed(rest)
    return torch.stack(losses).tolist(), seconds / (steps - warm)


def curves(config: DecoderConfig, steps: int, rows: int, length: int, device: torch.device) -> Iterator[Finding]:
    """Train twice and compare."""
    ours, our_seconds = trained(True, config, steps, rows, length, device)
    plain, plain_seconds = trained(False, config, steps, rows, length, device)
    last = max(1, steps // 10)
    ends = [sum(curve[-last:]) / last for curve in (ours, plain)]
    apart = abs(ends[0] - ends[1])
    figures = {"ours": ends[0], "plain_torch": ends[1], "apart": apart, "allowed": ALLOWED}
    yield Finding("last losses", apart <= ALLOWED, figures)
    yield Finding("it learns", ends[0] < ours[0], {"first": ours[0], "last": ends[0]})
    yield Finding("curves", None, {"ours": ours, "plain_torch": plain})
    figures = {"seconds": our_seconds, "plain_torch_seconds": plain_seconds}
    yield Finding("time per step", None, figures | {"ours_to_plain": our_seconds / plain_seconds})
