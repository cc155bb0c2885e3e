"""Checkpoints of a run: written by torch.distributed.checkpoint while training goes on; whole, or not there.

A folder `checkpoint-<step>` holds what DCP writes, `meta.json`, and `checksums.json` with each file's size and SHA-256.
It gets its name when all that is on disk. Whatever happens meanwhile, the ones before it are still there.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from llmfast.train.parallel import World, plain

# One process is one process; said anew by every save and load.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

CHECKSUMS, META = "checksums.json", "meta.json"
_UNREADABLE = (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, CheckpointException)


class Checkpoints:
    """Those of one run, written by all ranks."""

    def __init__(
        self, run: Path, world: World, *, keep_last: int = 2, keep_every: int = 0, tell: Callable[[str], None] = print
    ) -> None:
        self.run, self._world, self._tell = run, world, tell
        self._keep_last, self._keep_every = keep_last, keep_every
        self._writing: tuple[Path, Future[None]] | None = None

    def save(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        """Copy the state and begin to write it; the one before must be on disk first.

        Raises:
            OSError: the one before could not be written, or there is no room for this one. Names the last good one.
        """
        self.wait()
        final = self.run / f"checkpoint-{step:08d}"
        if self._world.agreed(final.exists()):  # nothing was trained since
            return
        partial = self.run / f".{final.name}.partial"
        state = self._state(module, optimizer, tensors)
        if self._world.main:
            self._make_room(partial, _bytes_of(state))
        future: Any = async_save(
            state,
            storage_writer=FileSystemWriter(partial, sync_files=True),
            process_group=self._world.background,
            no_dist=self._world.size == 1,
        )
        written: Future[None] = Future()
        meta = {**meta, "step": step, "ranks": self._world.size}

        def settle(done: "Future[Any]") -> None:  # in the thread that writes
            try:
                done.result()
                if self._world.main:
                    self._finish(partial, final, meta)
                written.set_result(None)
            except BaseException as e:
                written.set_exception(e)

        self._writing = final, written
        future.add_done_callback(settle)

    def poll(self) -> None:
        """Raises OSError if what is being written has failed."""
        if self._writing is not None and self._writing[1].done():
            self.wait()

    def wait(self) -> None:
        """Until the last one is on disk; raises OSError if it is not."""
        if self._writing is None:
            return
        (final, written), self._writing = self._writing, None
        try:
            written.result()
        except (OSError, *_UNREADABLE) as e:
            reason = str(e).strip().splitlines()[-1:] or [type(e).__name__]
            raise OSError(f"{final.name} could not be written: {reason[0]}; {self.last_good()}") from e

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Restore the newest whole checkpoint, on however many ranks; what was saved with it.

        Raises:
            FileNotFoundError: there is none.
            OSError: none can be read, or it is of another model.
        """
        folder = self._newest()
        keys = FileSystemReader(folder).read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {}
        for key, found in keys.items():
            name = key.removeprefix("tensors.")
            if not isinstance(found, TensorStorageMetadata):
                continue
            if name != key and (not name.startswith("rng") or name == f"rng{self._world.rank}"):
                tensors[name] = torch.empty(found.size, dtype=found.properties.dtype)
        state = self._state(module, optimizer, tensors, rng=False)
        try:
            load(state, storage_reader=FileSystemReader(folder), no_dist=self._world.size == 1)
            set_state_dict(
                plain(module), optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        except _UNREADABLE as e:
            raise OSError(f"{folder} is damaged or of another model: {_reason(e)}") from e
        if (rng := tensors.pop(f"rng{self._world.rank}", None)) is not None:
            torch.set_rng_state(rng)
        if torch.cuda.is_available() and (rng := tensors.pop(f"rng_cuda{self._world.rank}", None)) is not None:
            torch.cuda.set_rng_state(rng)
        return json.loads((folder / META).read_text()), tensors

    # While writing.

    def _state(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rng: bool = True
    ) -> dict[str, Any]:
        model, states = get_state_dict(plain(module), optimizer)
        kept = dict(tensors)
        if rng:
            kept[f"rng{self._world.rank}"] = torch.get_rng_state()
            if torch.cuda.is_available():
                kept[f"rng_cuda{self._world.rank}"] = torch.cuda.get_rng_state()
        return {"model": model, "optimizer": states, "tensors": kept}

    def _make_room(self, partial: Path, needed: int) -> None:
        try:
            for stale in self.run.glob(".*.partial"):
                shutil.rmtree(stale)
            free = shutil.disk_usage(self.run).free
            if free < 1.05 * needed * self._world.size:
                raise OSError(f"it takes about {needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free")
            partial.mkdir()
        except OSError as e:
            name = partial.name.strip(".").removesuffix(".partial")
            raise OSError(f"{name} cannot be written to {self.run}: {e}; {self.last_good()}") from e

    def _finish(self, partial: Path, final: Path, meta: dict[str, Any]) -> None:
        (partial / META).write_text(json.dumps(meta))
        sums = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps(sums))
        for path in (partial / META, partial / CHECKSUMS, partial):
            _sync(path)
        partial.rename(final)
        _sync(self.run)  # the new name is on disk before old ones go
        self._prune()

    def _prune(self) -> None:
        every = self._keep_every
        kept = [f for f in _checkpoints(self.run) if not (every and int(f.name.split("-")[1]) % every == 0)]
        for old in kept[: -self._keep_last]:
            gone = old.with_name(f".{old.name}.partial")  # never half a checkpoint by that name
            old.rename(gone)
            shutil.rmtree(gone)

    # While reading.

    def _newest(self) -> Path:
        """Checked by the first rank; what is damaged is told of and passed over."""
        found, damage = "", ""
        if self._world.main:
            for folder in reversed(_checkpoints(self.run)):
                if (damage := _damage(folder)) == "":
                    found = str(folder)
                    break
                self._tell(f"{folder} is damaged ({damage}); trying the one before it")
        found = self._world.agreed(found)
        if not found:
            some = bool(_checkpoints(self.run))
            raise (OSError if some else FileNotFoundError)(f"no {'whole ' * some}checkpoint in {self.run}")
        return Path(found)

    def last_good(self) -> str:
        good = next((f for f in reversed(_checkpoints(self.run)) if not _damage(f)), None)
        return "there is no earlier one" if good is None else f"the last good one is {good}"


def load_weights(run: Path, model: nn.Module) -> None:
    """The newest checkpoint's weights alone, to begin another run with; on every rank the same.

    Raises:
        OSError: there is none, or it is of another model.
    """
    folder = Checkpoints(run, World(torch.device("cpu")))._newest()
    inner = nn.ModuleDict({"model": model})  # as it is within `WithLoss`
    state = {"model": get_model_state_dict(inner)}
    try:
        load(state, storage_reader=FileSystemReader(folder), no_dist=True)
        set_model_state_dict(inner, state["model"])
    except _UNREADABLE as e:
        raise OSError(f"{folder} is damaged or of another model: {_reason(e)}") from e


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """All weights of the model within `WithLoss`, on the CPU; on the first rank, none on others. All must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(plain(module), options=options)
    return {name.removeprefix("model."): t for name, t in weights.items()}


def _reason(e: BaseException) -> str:
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    telling = [line for line in lines if "mismatch" in line.lower() or "missing" in line.lower()]
    return (telling or lines or [type(e).__name__])[0]


def _damage(folder: Path) -> str:
    """What is wrong with a checkpoint's files; empty if nothing is."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        for name, (size, digest) in sums.items():
            file = folder / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
            if _sha256(file) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, TypeError, AttributeError) as e:
        return f"{CHECKSUMS}: {e}"
    return ""


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes_of(state: Any) -> int:
    """Of the tensors that this rank has."""
    if isinstance(state, Mapping):
        return sum(map(_bytes_of, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(_bytes_of, state))
    if not isinstance(state, Tensor):
        return 0
    local = getattr(state, "to_local", lambda: state)()
    return int(local.numel() * local.element_size())


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"))
