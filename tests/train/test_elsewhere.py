"""Runs whose folder is on another disk, behind a link or a mount point."""

import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from llmfast.cli import main
from llmfast.train.config import load_config
from llmfast.train.run import _remove, train


def test_a_run_on_another_disk_stays_there(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Overwrite a run behind a link twice, also next to a link that a version before left, and where nothing is."""
    folder, disk = (
        train(load_config(None, [*settings, "name=kept", "train.steps=1"])),
        Path(settings[0].removeprefix("runs=")).parent / "disk",
    )
    folder.rename(disk)
    folder.symlink_to(disk)
    folder.with_name(".kept.gone").symlink_to(disk)
    overwrite = ["train", *(f"--set={text}" for text in settings), "--name=kept", "--overwrite"]
    for steps in (2, 3):
        assert main([*overwrite, f"--set=train.steps={steps}"]) == 0
        assert [p.name for p in disk.glob("checkpoint-*")] == [f"checkpoint-0000000{steps}"]
        assert folder.is_symlink() and [p.name for p in folder.parent.iterdir()] == ["kept"]
        assert not (disk / ".kept.gone").exists() and "could be removed" not in capsys.readouterr().out
    shutil.rmtree(disk)
    assert main([*overwrite, "--set=train.steps=1"]) == 0
    assert (disk / "checkpoint-00000001").exists()


def test_what_cannot_be_removed_from_another_disk_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Empty a mount point, whose own name cannot be changed; what no other name is given is removed."""
    folder, original = tmp_path / "run", Path.rename
    (folder / "lost").mkdir(parents=True)
    (folder / "config.toml").touch()
    moved: list[str] = []

    def rename(path: Path, to: Path) -> Path:
        moved.append(path.name)
        if path.name in ("lost", "run"):
            raise PermissionError(13, "Permission denied")
        return original(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == folder)
    _remove(folder, Console())
    assert list(folder.iterdir()) == [] and moved[-1] == "config.toml" and capsys.readouterr().out == ""
    (folder / "lost").mkdir()
    monkeypatch.setattr("shutil.rmtree", lambda path, ignore_errors: None)
    _remove(folder, Console(width=999))
    assert capsys.readouterr().out.endswith(f"the rest is in {folder / '.run.gone'}\n")
