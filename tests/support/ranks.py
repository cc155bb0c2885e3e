"""Processes of one gloo group, started once, that run functions of the tests together."""

import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PRELOADED = [
    *("torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch.distributed.tensor.parallel"),
    *("torch._dynamo", "evidence.interpreter"),
]
PATIENCE = 120  # seconds


class Ranks:
    """`run(function, *args)` calls `function(rank, world, *args)` in every process and returns what each returned."""

    def __init__(self, world: int, folder: Path) -> None:
        assert os.environ["TRITON_INTERPRET"] == "1"
        # Forked from a process that has imported what takes long, once for all groups.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run all ranks; end every process if one fails, because the others would wait for it."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failures: list[str] = []
        deadline = time.monotonic() + PATIENCE
        while len(results) < len(self._pipes) and time.monotonic() < deadline:
            for rank, pipe in enumerate(self._pipes):
                if rank not in results and pipe.poll(0.01):
                    try:
                        good, results[rank] = pipe.recv()
                    except EOFError:
                        good, results[rank] = False, "ended"
                    if not good:
                        failures.append(f"rank {rank}: {results[rank]}")
                        deadline = min(deadline, time.monotonic() + 1)  # for those that fail in the same way
        missing = sorted(set(range(len(self._pipes))) - set(results))
        if failures or missing:
            self.close()
            raise AssertionError("\n".join([*failures, f"no answer from ranks {missing}" if missing else ""]))
        return [results[rank] for rank in range(len(self._pipes))]

    def close(self) -> None:
        for process, pipe in zip(self._processes, self._pipes):
            process.kill()
            process.join()
            pipe.close()


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    from evidence import interpreter

    torch.set_num_threads(1)
    interpreter.install()
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        function, args = pipe.recv()
        try:
            torch.manual_seed(0)
            pipe.send((True, function(rank, world, *args)))
        except BaseException:  # which checkpoints raise
            pipe.send((False, traceback.format_exc()))
