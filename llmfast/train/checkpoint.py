"""Checkpoints of a run, written by torch.distributed.checkpoint (DCP) while training continues.

A folder `checkpoint-<step>` holds what DCP writes, `meta.json`, and `checksums.json` with the size and SHA-256 of each
file. It gets its name once all of that is on disk, so it is never incomplete. Until then, the earlier ones remain.
"""

import hashlib
import inspect
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import distribute_tensor

from llmfast._dtensor import is_dtensor
from llmfast._units import in_bytes
from llmfast.optim import FusedOptimizer, formats
from llmfast.train.durable import remove, sync
from llmfast.train.parallel import World, plain
from llmfast.train.reading import Planner, Reader

# A single process is intended; every save and load warns about it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

CHECKSUMS, META = "checksums.json", "meta.json"
_MEMBERS = ("params", "param_names")  # members of a parameter group that are not settings
_UNREADABLE = (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, CheckpointException)
# Other exceptions that an invalid pickle can raise, by Python's documentation and by what reads its fields.
_NO_METADATA = (
    *_UNREADABLE,
    OSError,
    LookupError,
    ArithmeticError,
    AttributeError,
    ImportError,
    TypeError,
    MemoryError,
)


class Checkpoints:
    """The checkpoints of one run, written by all ranks."""

    def __init__(
        self, run: Path, world: World, *, keep_last: int = 2, keep_every: int = 0, tell: Callable[[str], None] = print
    ) -> None:
        self.run, self._world, self._tell = run, world, tell
        self._keep_last, self._keep_every = keep_last, keep_every
        self._writing: tuple[Path, Future[None]] | None = None
        self._last = -1  # step of the checkpoint that was last written, begun or loaded
        self._own = False  # whether the checkpoints in `run` are this run's

    def is_saved(self, step: int) -> bool:
        """Return True if the last checkpoint is of this step: nothing was trained since."""
        return step == self._last

    def expect_own(self) -> None:
        """Raise FileExistsError for checkpoints of a run that was not resumed: they would be taken for this one's."""
        if self._world.agreed(not self._own and bool(_checkpoints(self.run))):
            raise FileExistsError(f"{self.run} holds checkpoints of another run: resume it, or choose another folder")

    def save(
        self,
        step: int,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        meta: Mapping[str, Any],
        sums: Mapping[str, Tensor],
    ) -> None:
        """Copy the state and begin to write it, once the checkpoint before it is on disk.

        Raises:
            OSError: the one before could not be written, or there is no room for this one. The message names the last
                good one.
        """
        self.wait()
        final = self.run / f"checkpoint-{step:08d}"
        partial = _partial(final)
        state = {**_state(module, optimizer), "sums": dict(sums), "rng": _rng(self._world.rank)}
        self._agree_on(self._make_room(final, _bytes_of(state)) if self._world.main else "")
        # torch 2.8 does not have this argument. Without process groups, torch finds out by itself.
        alone: dict[str, Any] = {"no_dist": True} if self._world.size == 1 and dist.is_initialized() else {}
        alone = alone if "no_dist" in inspect.signature(async_save).parameters else {}
        future: Any = async_save(
            state,
            storage_writer=FileSystemWriter(partial, sync_files=True),
            process_group=self._world.background,
            **alone,
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

        self._writing, self._last, self._own = (final, written), step, True
        future.add_done_callback(settle)

    @property
    def failed(self) -> bool:
        """True as soon as this rank knows that writing the last checkpoint has failed; `wait` raises the reason."""
        return self._writing is not None and self._writing[1].done() and self._writing[1].exception() is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raise OSError if it could not be written."""
        if self._writing is None:
            return
        (final, written), self._writing = self._writing, None
        problem = ""
        try:
            written.result()
        except (OSError, *_UNREADABLE) as e:
            problem = f"{final.name} could not be written: {_last_line(e)}; {self.last_good()}"
            if self._world.main:  # free the space for others
                remove(_partial(final))
        self._agree_on(problem)

    def load(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, accept: Callable[[dict[str, Any]], None]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Restore the newest whole checkpoint, on however many ranks; return what was saved with it.

        Groups of the optimizer keep those settings that differ from the ones the saved run was started with; see
        `settings_of`.

        Args:
            accept: called with what was saved next to the tensors, before anything is restored; it may raise.

        Raises:
            FileNotFoundError: there is none.
            OSError: none can be read, or it is of another model or optimizer.
        """
        folder = self._newest()
        self._last, self._own = _step_of(folder), True
        meta, keys = _meta(folder), _keys(folder)
        accept(meta)
        # Read before `_state` takes a step with gradients of zero, which an optimizer may count.
        own, now = [dict(group) for group in optimizer.param_groups], settings_of(optimizer)
        sums = {
            name.removeprefix("sums."): torch.empty(found.size, dtype=found.properties.dtype, device="cpu")
            for name, found in keys.items()
            if name.startswith("sums.") and isinstance(found, TensorStorageMetadata)
        }
        rng = {name: t for name, t in _rng(self._world.rank).items() if f"rng.{name}" in keys}
        state = {**_state(module, optimizer), "sums": sums, "rng": rng}
        states: dict[str, Any] = state["optimizer"]["state"]
        # A parameter that had no gradient by then has no state there.
        there = {prefix for name in keys for prefix in accumulate(name.split("."), "{}.{}".format)}
        for name in [name for name in states if f"optimizer.state.{name}" not in there]:
            del states[name]
        params = dict(plain(module).named_parameters())
        if isinstance(optimizer, FusedOptimizer):  # which converts any format to its own
            states.update({name: _as_saved(params[name], name, mine, keys) for name, mine in states.items()})
        groups: list[dict[str, Any]] = state["optimizer"]["param_groups"]
        for i, group in enumerate(groups):
            for name in [name for name in group if f"optimizer.param_groups.{i}.{name}" not in there]:
                del group[name]
        try:
            load(state, storage_reader=Reader(folder), planner=Planner(), no_dist=self._world.size == 1)
            for name, saved in states.items():
                _spread_codes(params[name], saved)
            set_model_state_dict(plain(module), state["model"])
        except _UNREADABLE as e:
            raise OSError(f"{folder} is damaged or of another model: {_reason(e)}") from e
        for group, mine, today, then in zip(groups, own, now, meta.get("groups") or _settings_then(optimizer, now)):
            group |= {name: mine[name] for name in today if name not in group or today[name] != then.get(name)}
        try:
            lenient = StateDictOptions(strict=False)
            set_optimizer_state_dict(plain(module), optimizer, state["optimizer"], options=lenient)
        except _UNREADABLE as e:
            raise OSError(f"{folder} does not fit the current optimizer: {_reason(e)}") from e
        for name, value in rng.items():
            (torch.cuda if name.startswith("cuda") else torch).set_rng_state(value)
        return meta, sums

    def retire_newer(self) -> None:
        """Rename the damaged checkpoints that `load` has skipped: they would be taken for newer ones. Call it last."""
        if self._world.main:
            for damaged in _checkpoints(self.run, after=self._last):
                _retire(damaged)

    # While writing.

    def _agree_on(self, problem: str) -> None:
        """Raise OSError on all ranks if the first one has a problem; DCP tells it when another rank cannot write."""
        if problem := self._world.agreed(problem):
            self._last = -1
            raise OSError(problem)

    def _make_room(self, final: Path, needed: int) -> str:
        """Make room for a checkpoint; return a description of the problem, "" if there is none."""
        try:
            for stale in self.run.glob(".*.partial"):
                remove(stale)
            free = shutil.disk_usage(self.run).free
            if free < 1.05 * needed:
                raise OSError(f"it takes about {in_bytes(needed)}, and {in_bytes(free)} are free")
            _partial(final).mkdir()
        except OSError as e:
            return f"{final.name} cannot be written to {self.run}: {e}; {self.last_good()}"
        return ""

    def _finish(self, partial: Path, final: Path, meta: dict[str, Any]) -> None:
        (partial / META).write_text(json.dumps(meta))
        sums = {file.name: [file.stat().st_size, _sha256(file)] for file in sorted(partial.iterdir())}
        (partial / CHECKSUMS).write_text(json.dumps(sums))
        for path in (partial / META, partial / CHECKSUMS, partial):
            sync(path)
        partial.rename(final)
        sync(self.run)  # the new name is on disk before old ones go
        for old in _checkpoints(self.run)[: -self._keep_last]:
            if not self._keep_every or _step_of(old) % self._keep_every:
                remove(_retire(old))

    # While reading.

    def _newest(self) -> Path:
        """Find the newest checkpoint that is whole, on the first rank; report and skip those that are damaged."""
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


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    """Record the settings of each parameter group, to see later which of them a program has changed.

    Some optimizers also keep in their groups what they have counted: only a change tells settings from counts.
    """
    return [
        {name: repr(v.tolist() if isinstance(v, Tensor) else v) for name, v in group.items() if name not in _MEMBERS}
        for group in optimizer.param_groups
    ]


def _settings_then(optimizer: torch.optim.Optimizer, now: list[dict[str, str]]) -> list[dict[str, str]]:
    """Guess what `settings_of` returned when a run began whose version did not save it.

    Groups of our optimizers hold only settings, so all of today's take effect. Those of others count as unchanged.
    """
    return [{} for _ in now] if isinstance(optimizer, FusedOptimizer) else now


def load_weights(run: Path, model: nn.Module, accept: Callable[[dict[str, Any]], None]) -> None:
    """Load only the weights of the newest checkpoint, to begin another run; every rank loads the same.

    Args:
        accept: called with what the trainer was told about the weights, before they are read; it may raise.

    Raises:
        OSError: there is none, or it is of another model.
    """
    folder = Checkpoints(run, World(torch.device("cpu")))._newest()
    accept(_meta(folder).get("about", {}))
    inner = nn.ModuleDict({"model": model})  # as it is within `WithLoss`
    state = {"model": get_model_state_dict(inner)}
    _keys(folder)
    try:
        load(state, storage_reader=Reader(folder), planner=Planner(), no_dist=True)
        set_model_state_dict(inner, state["model"])
    except _UNREADABLE as e:
        raise OSError(f"{folder} is damaged or of another model: {_reason(e)}") from e


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """Gather all weights of the model within `WithLoss` on the CPU of the first rank; all ranks must call."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: dict[str, Any] = get_model_state_dict(plain(module), options=options)
    return {name.removeprefix("model."): t for name, t in weights.items()}


def _state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    fresh = not optimizer.state
    both: Any = get_state_dict(plain(module), optimizer)
    model, states = both
    if fresh:  # `get_state_dict` has taken a step with gradients of zero, so that there are states
        for state in (*optimizer.state.values(), *states["state"].values()):
            if "step" in state:
                state["step"] = state["step"] * 0
    return {"model": model, "optimizer": states}


def _as_saved(p: Tensor, name: str, mine: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """Allocate one parameter's state in the formats of the checkpoint, which may differ from those of `mine`."""
    prefix = f"optimizer.state.{name}."
    found: dict[str, Any] = {}
    for key, saved in keys.items():
        state = key.removeprefix(prefix)
        if not key.startswith(prefix) or "." in state:  # or the key of a parameter whose name is longer
            continue
        if state in mine:
            found[state] = mine[state]
        elif not isinstance(saved, TensorStorageMetadata):
            continue
        elif saved.size == p.shape and not (is_dtensor(p) and state.endswith(("_code", "_scale"))):
            found[state] = torch.empty_like(p, dtype=saved.properties.dtype, requires_grad=False)
        else:  # step counters, and codes with their scales, which a run of one process has written
            found[state] = torch.empty(saved.size, dtype=saved.properties.dtype, device=p.device)
    return found


def _spread_codes(p: Tensor, state: dict[str, Any]) -> None:
    """Decode 8-bit states from a run of one process if the parameter is now a DTensor; see `StateSaver.state_dict`."""
    if not is_dtensor(p):
        return
    for name in [name.removesuffix("_code") for name in state if name.endswith("_code")]:
        code, scale = state.pop(f"{name}_code"), state.pop(f"{name}_scale")
        whole = formats.decoded(code.flatten(), scale).view(code.shape)
        mesh, placements = p.device_mesh, p.placements  # type: ignore[attr-defined]
        state[name] = distribute_tensor(whole, mesh, placements, src_data_rank=None)


def _rng(rank: int) -> dict[str, Tensor]:
    states = {f"cpu{rank}": torch.get_rng_state()}
    return states | ({f"cuda{rank}": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _last_line(e: BaseException) -> str:
    return ([type(e).__name__, *str(e).strip().splitlines()])[-1]


def _meta(folder: Path) -> dict[str, Any]:
    """Read what was saved next to the tensors; raise OSError if a trainer did not save it."""
    try:
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise OSError(f"{folder / META} is not JSON: {e}") from e
    counts = ("step", "sequences", "tokens", "skipped", "logged_step")
    if (
        not isinstance(meta, dict)
        or any(type(meta.get(key)) is not int or not 0 <= meta[key] < 2**63 for key in counts)
        or meta["step"] != _step_of(folder)
        or not isinstance(meta.get("recent"), list)
        or any(type(x) is not float for x in meta["recent"])
        or not isinstance(meta.get("about", {}), dict)
        or not isinstance(groups := meta.get("groups", []), list)
        or any(not isinstance(group, dict) for group in groups)
    ):
        raise OSError(
            f"{folder / META} must have the counts {', '.join(counts)}, the folder's step and recent losses, and may "
            f"have settings of groups and what the trainer was told; got {meta!r:.200}"
        )
    return meta


def _keys(folder: Path) -> dict[str, Any]:
    """Read the names of what a checkpoint holds; raise OSError if that is not possible."""
    try:
        keys = Reader(folder).read_metadata().state_dict_metadata
        return dict(keys)
    except _NO_METADATA as e:
        raise OSError(f"{folder}/.metadata is damaged: {_reason(e)}") from e


def _reason(e: BaseException) -> str:
    if isinstance(e, CheckpointException) and e.failures:  # the first failed rank's, without traceback
        e = next(iter(e.failures.values()))[0]
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    telling = [line for line in lines if "mismatch" in line.lower() or "missing" in line.lower()]
    return telling[0] if telling else " ".join(lines) or type(e).__name__


def _damage(folder: Path) -> str:
    """Describe what is wrong with a checkpoint's files; empty if nothing is."""
    try:
        sums = json.loads((folder / CHECKSUMS).read_text())
        if META not in sums:
            return f"{META} is not among {CHECKSUMS}"
        for name, (size, digest) in sums.items():
            file = folder / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes of {size}"
            if _sha256(file) != digest:
                return f"{name} has changed"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        return f"{CHECKSUMS}: {e}"
    return ""


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _bytes_of(state: Any) -> int:
    """Count the bytes of the tensors in a state, on all ranks together."""
    if isinstance(state, Mapping):
        return sum(map(_bytes_of, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(_bytes_of, state))
    return state.numel() * state.element_size() if isinstance(state, Tensor) else 0


def newest_step(run: Path) -> int | None:
    """Return the step of a run's newest checkpoint, whole or not; None if there is none."""
    found = _checkpoints(run)
    return _step_of(found[-1]) if found else None


def _checkpoints(run: Path, after: int = -1) -> list[Path]:
    """List the checkpoints after a step, the oldest first."""
    found = (f for f in run.glob("checkpoint-*") if f.name.removeprefix("checkpoint-").isdecimal())
    return sorted((f for f in found if _step_of(f) > after), key=_step_of)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _partial(checkpoint: Path) -> Path:
    """Name the folder in which a checkpoint is written; folders with such names are removed before the next one."""
    return checkpoint.with_name(f".{checkpoint.name}.partial")


def _retire(checkpoint: Path) -> Path:
    """Rename a checkpoint that will be removed: a half-removed one must not have its name."""
    gone = _partial(checkpoint)
    remove(gone)
    return checkpoint.rename(gone)
