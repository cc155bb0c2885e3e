"""A corpus and settings small enough to train on in a second."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute in one thread, where more would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def hangup() -> Iterator[None]:
    """Let a closed terminal end the process, as it does where the tests do not run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Write twelve short files, of which held_out=0.3 gives some to validation."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(12):
        (folder / f"file{i}.txt").write_text("".join(f"line {j}: {i} and {j} make {i + j}.\n" for j in range(40)))
    return folder


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> list[str]:
    return [
        f"runs={tmp_path / 'runs'}",
        f'data.sources=["{corpus}"]',
        "data.tokenizer=bytes",
        "data.seq_len=32",
        "data.held_out=0.3",
        "model.width=32",
        "model.layers=1",
        "model.heads=2",
        "optimizer.warmup_steps=2",
        "train.steps=8",
        "train.batch_size=2",
        "train.eval_every=4",
        "train.eval_rows=4",
        "train.log_every=2",
        "train.save_every=4",
        "train.sample_tokens=8",
        "train.device=cpu",
    ]
