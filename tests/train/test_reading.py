"""A checkpoint crafted to run code is rejected and runs none."""

import io
import pickle
from contextlib import suppress
from enum import Enum
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from llmfast.train.reading import Planner, Reader


class Attack:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


def read(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {"weight": torch.zeros(3, 2), "lr": 0.0, "betas": (0.0, 0.0), "kind": ""}
    load(state, storage_reader=Reader(folder), planner=Planner(), no_dist=True)
    return state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    state = {"weight": torch.ones(3, 2), "lr": 1e-3, "betas": (0.9, 0.99), "kind": "x"}
    save(state, checkpoint_id=tmp_path / "saved", no_dist=True)
    return tmp_path / "saved"


def test_what_was_saved_is_read(folder: Path) -> None:
    found = read(folder)
    assert torch.equal(found["weight"], torch.ones(3, 2))
    assert (found["lr"], found["betas"], found["kind"]) == (1e-3, (0.9, 0.99), "x")


def test_metadata_runs_nothing(folder: Path) -> None:
    proof = folder / "proof"
    (folder / ".metadata").write_bytes(pickle.dumps(Attack(proof)))
    with pytest.raises(pickle.UnpicklingError, match="which no checkpoint needs"):
        Reader(folder).read_metadata()
    with pytest.raises(CheckpointException, match="which no checkpoint needs"):
        read(folder)
    assert not proof.exists()


class AsPython3112(pickle._Pickler):
    """Pickler that writes members of an enumeration as Python 3.11.2, for one, does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_of_another_python_is_read(folder: Path) -> None:
    buffer = io.BytesIO()
    AsPython3112(buffer).dump(Reader(folder).read_metadata())
    assert b"getattr" in buffer.getvalue()
    (folder / ".metadata").write_bytes(buffer.getvalue())
    test_what_was_saved_is_read(folder)


@pytest.mark.parametrize(
    ("owner", "name"), [(Metadata, "__init__"), (PosixPath, "touch"), (_MEM_FORMAT_ENCODING, "mro")]
)
def test_metadata_gets_nothing_but_members(owner: type, name: str, folder: Path) -> None:
    class Asked:
        def __reduce__(self) -> Any:
            return getattr, (owner, name)

    (folder / ".metadata").write_bytes(pickle.dumps(Asked()))
    with pytest.raises(pickle.UnpicklingError, match=r"asks .* which no checkpoint needs"):
        Reader(folder).read_metadata()


def test_values_run_nothing(folder: Path, tmp_path: Path) -> None:
    proof = folder / "proof"
    state = {"weight": torch.ones(3, 2), "lr": Attack(proof), "betas": (0.9, 0.99), "kind": "x"}
    save(state, checkpoint_id=tmp_path / "bad", no_dist=True)
    with pytest.raises(CheckpointException, match=r"(?i)weights.only"):
        read(tmp_path / "bad")
    assert not proof.exists()


@pytest.mark.parametrize("where", ["metadata", "values"])
def test_torchs_own_reader_runs_what_it_reads(where: str, tmp_path: Path) -> None:
    """SECURITY.md says so; where this fails, torch protects its readers itself."""
    proof, weight = tmp_path / "proof", torch.ones(2)
    save({"weight": weight, "lr": Attack(proof)}, checkpoint_id=tmp_path / "saved", no_dist=True)
    if where == "metadata":
        (tmp_path / "saved" / ".metadata").write_bytes(pickle.dumps(Attack(proof)))
        with suppress(AttributeError):  # after it has run it
            FileSystemReader(tmp_path / "saved").read_metadata()
    else:
        load({"weight": weight, "lr": 0.0}, storage_reader=FileSystemReader(tmp_path / "saved"), no_dist=True)
    assert proof.exists()


def test_a_file_that_is_cut_short_is_refused(folder: Path) -> None:
    whole = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        Reader(folder).read_metadata()


def test_a_rank_reads_its_own_metadata(folder: Path) -> None:
    (folder / ".metadata").rename(folder / "__3.metadata")
    found = Reader(folder).read_metadata(rank=3)
    assert found.state_dict_metadata.keys() >= {"weight"}
    for given in ({}, {"rank": None}, {"rank": 0}):
        with pytest.raises(FileNotFoundError):
            Reader(folder).read_metadata(**given)


def test_every_load_has_an_id(folder: Path) -> None:
    reader = Reader(folder)
    for _ in range(2):
        reader.reset()
        found = reader.read_metadata()
        assert found.storage_meta is not None and found.storage_meta.load_id == reader.load_id
