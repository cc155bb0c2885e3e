"""Distillation from files: a teacher writes its likeliest bytes once, and a student learns from them without it.

Each file has one row of packed lines: tokens, and for each token the ids and log-probabilities of the teacher's K
likeliest next bytes, in 16 bits. The rest of the probability is one more class, for teacher and student. The
student never has all logits at once.

python examples/top_k_distillation.py
"""

import argparse  # the models learn its source
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from perplexity import trained
from safetensors.torch import load_file, save_file
from tiny_gpt import Packing, TinyGPT
from torch import Tensor

from llmfast.losses import TeacherTopK, linear_distillation
from llmfast.optim import FusedAdamW

Loss = Callable[[Tensor, Tensor, TeacherTopK, Tensor], Tensor]  # of hidden, weight, teacher and targets
K, TEMPERATURE, HARD = 16, 2.0, 0.25


def sequences(rows: int) -> Iterator[list[Tensor]]:
    """Yield lists of lines of the text, from its beginning to its end."""
    lines = [line for line in Path(argparse.__file__).read_bytes().splitlines() if 2 <= len(line) <= 100]
    for start in range(0, len(lines) - rows + 1, rows):
        yield [torch.tensor([*line]) for line in lines[start : start + rows]]


@torch.no_grad()
def write(model: TinyGPT, folder: Path, files: int, rows: int = 8) -> None:
    """Write the teacher's answers for `files` rows of packed lines, one file each."""
    device = model.head.weight.device
    for number, lines in zip(range(files), sequences(rows)):
        packed = Packing([line.to(device) for line in lines], [1] * len(lines))
        hidden = model(packed.tokens, packed)[0]
        found = []
        for some in hidden.split(512):  # so that logits of few tokens exist at a time
            found.append((model.head(some).float() / TEMPERATURE).log_softmax(-1).topk(K))
        said = {
            "lines": torch.cat(lines).to(torch.uint8),
            "lengths": torch.tensor([len(line) for line in lines], dtype=torch.int32),
            "ids": torch.cat([top.indices for top in found]).to(torch.int16).cpu(),
            "logprobs": torch.cat([top.values for top in found]).half().cpu(),
        }
        save_file(said, folder / f"{number:05}.safetensors")


def read(file: Path, device: str) -> tuple[Packing, TeacherTopK]:
    """Read a row of packed lines, and the teacher's answers for it."""
    said = load_file(file, device=device)
    lines = said["lines"].long().split(said["lengths"].tolist())
    top = TeacherTopK(said["ids"][None].int(), said["logprobs"][None].float(), tail="bucket")  # llmfast
    return Packing(lines, [1] * len(lines)), top


def fused(hidden: Tensor, weight: Tensor, top: TeacherTopK, targets: Tensor) -> Tensor:
    """Mix the divergence from the teacher with the cross-entropy of the text."""
    return linear_distillation(  # llmfast
        hidden,
        weight,
        top,
        targets,
        temperature=TEMPERATURE,
        soft_weight=(1 - HARD) * TEMPERATURE**2,  # gradients of the same size at every temperature
        hard_weight=HARD,
    )


def train(folder: Path, steps: int, device: str = "cpu", loss: Loss = fused) -> list[float]:
    """Train a smaller model from the files alone, and return its losses."""
    torch.manual_seed(1)
    student = TinyGPT(width=32, layers=1).to(device)
    optimizer = FusedAdamW(student.parameters(), lr=3e-3)  # llmfast
    files, losses = sorted(folder.glob("*.safetensors")), []
    for step in range(steps):
        packed, top = read(files[step % len(files)], device)
        found = loss(student(packed.tokens, packed), student.head.weight, top, packed.ids)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.item())
    return losses


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as name:
        write(trained(100, device), Path(name), files=20)
        losses = train(Path(name), 100, device)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
