"""A run that is killed at any instant, repeatedly, ends as it would have without that when it is restarted."""

import multiprocessing as mp
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from llmfast.train.checkpoint import _damage
from llmfast.train.metrics import read_metrics
from support.ranks import PRELOADED

TOUCHING = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
KILLS = 20


class Instant(NamedTuple):
    """Moment to kill a process: before its n-th access to the run's folder, or after some seconds."""

    touched: int = 0
    seconds: float = 0.0


class Nursery:
    """A process that has imported all that takes long, and forks others that train."""

    def __init__(self) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_nurse, args=(theirs,), daemon=True)
        self._process.start()

    def train(self, overrides: list[str], how: str, instant: Instant | None = None) -> tuple[bool, int]:
        """Train; return whether the run finished instead of being killed, and how often it accessed its folder."""
        self._pipe.send((overrides, how, instant))
        assert self._pipe.poll(60)
        status, touched = self._pipe.recv()
        if instant is None or status != -signal.SIGKILL:
            assert status == 0, status
        return status == 0, touched

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _nurse(pipe: Connection) -> None:
    import matplotlib.figure  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    import llmfast.train.run  # noqa: F401

    torch.set_num_threads(1)
    while True:
        given = pipe.recv()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _child(writer, *given)
        os.close(writer)
        instant = given[2]
        if instant is not None and instant.seconds:
            time.sleep(instant.seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with os.fdopen(reader) as told:
            pipe.send((os.waitstatus_to_exitcode(status), int(told.read() or "0")))


def _child(writer: int, overrides: list[str], how: str, instant: Instant | None) -> None:
    status = 1
    try:
        from rich.console import Console

        from llmfast.train.config import load_config
        from llmfast.train.earlier import resumed_config
        from llmfast.train.run import train

        config = load_config(None, overrides)
        if how == "resume":
            config = resumed_config(Path(config.runs) / config.name, [])
        touched = _watch(Path(config.runs) / config.name, 0 if instant is None else instant.touched)
        if instant is not None and instant.seconds:
            _slow_down()
        train(config, console=Console(quiet=True), resume=how == "resume", overwrite=how == "overwrite")
        os.write(writer, str(touched()).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _watch(folder: Path, fatal: int) -> Callable[[], int]:
    """Count opens, renames, creations and removals of files in the folder, and kill the process at the n-th."""
    count, inside = 0, str(folder)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in TOUCHING and isinstance(args[0], str | Path) and str(args[0]).startswith(inside):
            count += 1
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return lambda: count


def _slow_down() -> None:
    """Slow down writing, so that a process killed by time is mostly writing a checkpoint."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from llmfast.train import checkpoint

    for owner, name in ((checkpoint, "_sha256"), (checkpoint, "sync"), (FileSystemWriter, "write_data")):
        original = getattr(owner, name)

        def slow(*args: Any, original: Any = original) -> Any:
            time.sleep(0.02)
            return original(*args)

        setattr(owner, name, slow)


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    started = Nursery()
    yield started
    started.close()


def lines(run: Path) -> list[dict[str, Any]]:
    times = ("tokens_per_s", "memory_bytes")
    return [{k: v for k, v in line.items() if k not in times} for line in read_metrics(run / "metrics.jsonl")]


def test_a_run_killed_twenty_times_is_the_run_it_would_have_been(
    nursery: Nursery, settings: list[str], tmp_path: Path
) -> None:
    settings = [*settings, "train.save_every=2", "train.steps=60", "train.log_every=3", "train.eval_every=20"]
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    finished, touched = nursery.train([*settings, "name=whole"], "new")
    assert finished

    dice = random.Random(0)
    kills = writing = resumed = 0
    finished = False
    while kills < KILLS or not finished:
        before = sorted(killed.glob("checkpoint-*"))
        instant = None
        if kills < KILLS and dice.random() < 0.3:
            instant = Instant(seconds=dice.uniform(0.1, 0.8))
        elif kills < KILLS:
            instant = Instant(touched=dice.randint(1 if before else 10, touched // 8))
        how = "resume" if before else "overwrite" if (killed / "config.toml").exists() else "new"
        finished, _ = nursery.train([*settings, "name=killed"], how, instant)
        kills += not finished
        writing += not finished and any(killed.glob(".*.partial"))
        resumed += how == "resume"
        after = sorted(killed.glob("checkpoint-*"))
        assert all(_damage(checkpoint) == "" for checkpoint in after)
        assert not before or after[-1] >= before[-1]
        assert kills + resumed < 4 * KILLS
    assert writing >= KILLS // 4 and resumed >= KILLS // 2
    assert lines(killed) == lines(whole)
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
