"""Pretended graphs, streams, clocks and memory statistics: all that a check-up asks of a GPU beyond its tensors.

As a program it is a check-up's worker on the pretended GPU: `python -m support.pretended_gpu SECTION --journal FILE`.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch

from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import counting
from llmfast.checkup import behaviour, clock, memory, speed
from llmfast.checkup.record import Finding

MEMORY = 80 << 30
# Of a linear loss: the interpreter computes one after another. A small budget needs the first of these.
ROWS, ROWS_TIMED = 24, 4


class Graph:
    """Work that is done again where a graph would replay it."""

    def __init__(self, work: Callable[[], Any], warm_up: Callable[[], Any]) -> None:
        warm_up()
        self._work = work
        self.made: Any = None

    def replay(self) -> None:
        made = self._work()
        self.made = made if self.made is None else [old.copy_(new) for old, new in zip(self.made, made)]


def peak_bytes(run: Callable[[], object]) -> int:
    with counting() as counts:
        run()
    return counts.peak_bytes


def kernel_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def linear_in_memory(shape: tuple[int, int, int], mode: str, device: torch.device) -> Iterator[Finding]:
    return _linear_in_memory((ROWS, *shape[1:]), mode, device)


def linear_in_time(model: str, N: int, D: int, V: int) -> Iterator[Finding]:
    return _linear_in_time(model, ROWS_TIMED, D, V)


_linear_in_memory, _linear_in_time = memory.linear, speed.linear


@contextmanager
def pretending_a_gpu() -> Iterator[None]:
    """Pretend CUDA tensors and all that a check-up does with the device."""
    autocast, is_autocast_enabled, get_autocast_dtype = (
        getattr(torch, name) for name in ("autocast", "is_autocast_enabled", "get_autocast_dtype")
    )
    stream = mock.Mock(spec_set=["wait_stream"])
    with ExitStack() as stack:
        for owner, replaced in (
            (behaviour, {"Graph": Graph}),
            (clock, {"gpu_peak_bytes": peak_bytes, "kernel_seconds": kernel_seconds}),
            (memory, {"linear": linear_in_memory}),
            (speed, {"ROUNDS": 1, "linear": linear_in_time}),
            (
                torch,
                {
                    "autocast": lambda kind, *args, **options: autocast("cpu", *args, **options),
                    "is_autocast_enabled": lambda *kind: is_autocast_enabled("cpu"),
                    "get_autocast_dtype": lambda *kind: get_autocast_dtype("cpu"),
                },
            ),
            (
                torch.cuda,
                {
                    "mem_get_info": lambda device: (MEMORY, MEMORY),
                    "empty_cache": lambda: None,
                    "Stream": lambda: stream,
                    "current_stream": lambda: stream,
                    "stream": lambda stream: nullcontext(),
                    "get_sync_debug_mode": lambda: 0,
                    "set_sync_debug_mode": lambda mode: None,
                },
            ),
        ):
            for name, value in replaced.items():
                stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(pretending_cuda())
        yield


if __name__ == "__main__":
    from evidence import interpreter
    from llmfast.checkup import worker

    interpreter.install()
    with pretending_a_gpu():
        sys.exit(worker.main(sys.argv[1:]))
