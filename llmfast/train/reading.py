"""Checkpoints of torch.distributed.checkpoint, read without running what is in them.

Its own reader unpickles `.metadata`, and whatever is no tensor, without restriction. Here the first may name what
metadata is made of and nothing else, and the second what `weights_only` lets through.
"""

import io
import pickle
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


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"its .metadata names {module}.{name}, which no checkpoint needs")


class Reader(FileSystemReader):
    """Raises UnpicklingError for metadata that names anything else than metadata is made of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        rank = kwargs.get("rank")  # ranks may have their own, which DCP looks for first
        name = ".metadata" if rank is None else f"__{rank}.metadata"
        with Path(self.path).joinpath(name).open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """Raises UnpicklingError for a number, string or list that is something else."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        clean = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), clean)  # what torch reads without restriction, we have written
        clean.seek(0)
        super().load_bytes(read_item, clean)
