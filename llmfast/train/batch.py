"""Batches of any kind: tensors, or dataclasses, mappings, lists and tuples of them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return the same batch with each tensor replaced by `function` of it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: map_tensors(getattr(batch, f.name), function) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **fields)
    if isinstance(batch, Mapping):
        return {key: map_tensors(value, function) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        values = [map_tensors(value, function) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)  # a NamedTuple, or not
    return batch


def on_device(batch: Any, device: torch.device) -> Any:
    """Move a batch to a device without waiting for it."""

    def moved(t: Tensor) -> Tensor:
        pinned = t.pin_memory() if device.type == "cuda" and t.device.type == "cpu" else t
        return pinned.to(device, non_blocking=device.type != "cpu")

    return map_tensors(batch, moved)
