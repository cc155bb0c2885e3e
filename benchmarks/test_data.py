"""Time of creating batches, compared with torch's DataLoader that only slices the same stream."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.conftest import Add, Race
from llmfast.checkup.clock import Timing
from llmfast.data import Mixture, PackedRows, pack

B, T, ROWS = 8, 1024, 4096
BATCHES = 100


def documents() -> list[np.ndarray]:
    random = np.random.default_rng(0)
    lengths = random.geometric(1 / 400, size=ROWS * T // 400 + 100)
    return [random.integers(1, 30_000, size=n) for n in lengths]


class Slices(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Dataset of rows of a stream and their labels, without document boundaries or positions."""

    def __init__(self, stream: torch.Tensor) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.stream[index * T : (index + 1) * T + 1].long()
        return row[:-1], row[1:]


def test_batches(race: Race, add: Add) -> None:
    rows = pack(documents(), T, eot_id=0)
    loader = DataLoader(Slices(torch.from_numpy(rows.tokens)), batch_size=B, shuffle=True, drop_last=True)

    def endless() -> Iterator[object]:
        while True:
            yield from loader

    theirs = endless()
    mixture = Mixture({"text": len(rows)}, {}, total=len(rows))
    step = 0

    def ours() -> None:
        nonlocal step
        for _ in range(BATCHES):
            rows.batch(mixture.sequences(step * B, (step + 1) * B)[1])
            step += 1

    def torchs() -> None:
        for _ in range(BATCHES):
            next(theirs)

    record(add, race({"llmfast, with documents and positions": ours, "torch DataLoader, slices": torchs}), "batches")


def test_packing(race: Race, add: Add) -> None:
    """Time packing documents into rows, compared with only joining the arrays."""
    given = documents()

    def ours() -> PackedRows:
        return pack(given, T, eot_id=0)

    def joined() -> torch.Tensor:
        return torch.from_numpy(np.concatenate(given)[: ROWS * T + 1].astype(np.int32))

    record(add, race({"llmfast": ours, "numpy.concatenate": joined}), "packing")


def record(add: Add, timings: dict[str, Timing], what: str) -> None:
    tokens = BATCHES * B * T if what == "batches" else ROWS * T
    for name, timing in timings.items():
        add(
            "clock",
            operation=what,
            shape=f"{tokens / 1e6:.1f} M tokens",
            way=name,
            seconds=timing.seconds,
            ratio=timing.ratio,
            spread=timing.spread,
        )
