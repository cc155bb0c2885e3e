"""Reading checkpoints of torch.distributed.checkpoint without running code that they contain.

Its own reader unpickles `.metadata`, and everything that is not a tensor, without restriction. Here the first may only
name the types that metadata consists of, and the second what `weights_only` allows.
"""

import io
import pickle
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *(("pathlib", "PosixPath"), ("pathlib._local", "PosixPath"), ("torch", "Size")),
    *(("torch.serialization", "_get_layout"), ("torch.distributed.checkpoint.filesystem", "_StorageInfo")),
    *((_METADATA, name) for name in ("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex")),
    *((_METADATA, name) for name in ("StorageMeta", "TensorProperties", "TensorStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


def _member(owner: Any, name: str) -> Any:
    """Stand in for getattr, by which some releases of Python 3.11 pickle the members of an enumeration."""
    if isinstance(owner, EnumMeta) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"its .metadata asks {owner!r:.100} for {name!r:.100}, which no checkpoint needs")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which no checkpoint needs")


class Reader(FileSystemReader):
    """A reader that raises UnpicklingError for metadata that names other types than its own."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")  # ranks may have their own, which DCP looks for first
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        with Path(self.path).joinpath(name).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """A planner that raises UnpicklingError for a pickle of anything but plain values and tensors."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        clean = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), clean)  # torch reads this copy without restriction
        clean.seek(0)
        super().load_bytes(read_item, clean)
