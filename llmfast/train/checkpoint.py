"""Checkpoints of a run: one folder each, complete or absent."""

import os
import shutil
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn


def save_checkpoint(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **extra: Any) -> Path:
    """Write `checkpoint-<step>` and then remove the older ones.

    The folder gets its name only once everything in it is on disk, so a crash at any instant leaves either the new
    checkpoint or the one before it.
    """
    from safetensors.torch import save_model

    final = run / f"checkpoint-{step:08d}"
    if final.exists():  # nothing was trained since
        return final
    partial = run / f".{final.name}.partial"
    for stale in run.glob(".checkpoint-*.partial"):
        shutil.rmtree(stale)
    partial.mkdir()
    save_model(model, str(partial / "model.safetensors"))
    state = {
        "step": step,
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        **extra,
    }
    torch.save(state, partial / "state.pt")
    for file in partial.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
    partial.rename(final)
    folder = os.open(run, os.O_RDONLY)
    os.fsync(folder)  # the new name is on disk before the old ones go
    os.close(folder)
    for old in _checkpoints(run):
        if old != final:
            shutil.rmtree(old)
    return final


def load_checkpoint(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore the newest checkpoint into model, optimizer and random generators; returns what was saved with it.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        OSError: the checkpoint cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    checkpoints = _checkpoints(run)
    if not checkpoints:
        raise FileNotFoundError(f"no checkpoint in {run}")
    newest = checkpoints[-1]
    try:
        load_model(model, str(newest / "model.safetensors"))
        state: dict[str, Any] = torch.load(newest / "state.pt", map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError, SafetensorError) as e:
        raise OSError(f"{newest} is damaged or of another model: {str(e).splitlines()[0]}") from e
    torch.set_rng_state(state["rng"])
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all(state["cuda_rng"][: torch.cuda.device_count()])
    return state


def load_weights(run: Path, model: nn.Module) -> None:
    """The newest checkpoint's weights alone, to begin another run with.

    Raises:
        OSError: there is none, or it is of another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    checkpoints = _checkpoints(run)
    if not checkpoints:
        raise FileNotFoundError(f"no checkpoint in {run}")
    try:
        load_model(model, str(checkpoints[-1] / "model.safetensors"))
    except (RuntimeError, SafetensorError) as e:
        raise OSError(f"{checkpoints[-1]} is damaged or of another model: {str(e).splitlines()[0]}") from e


def _checkpoints(run: Path) -> list[Path]:
    return sorted(run.glob("checkpoint-*"))
