"""Files that survive a power failure."""

import os
from pathlib import Path

import pytest

from llmfast.train.durable import make_folder, remove, write_whole
from support.disk import Disk


def test_a_file_and_its_name_are_on_disk_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check at once: no later write may be what brings file and name to disk."""
    disk = Disk(monkeypatch)
    for text in ("first", "second, longer"):
        disk.named.clear()
        write_whole(tmp_path / "x.txt", lambda path, text=text: path.write_text(text))
        disk.expect_names(tmp_path / "x.txt")
        assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]
        assert (tmp_path / "x.txt").read_text() == text


def test_no_handle_stays_open(tmp_path: Path) -> None:
    write_whole(tmp_path / "x.txt", lambda path: path.write_text("a"))
    before = os.dup(0)
    os.close(before)
    write_whole(tmp_path / "x.txt", lambda path: path.write_text("b"))
    after = os.dup(0)  # the lowest number that is free
    os.close(after)
    assert after == before


def test_who_may_read_a_new_file_may_read_it(tmp_path: Path) -> None:
    """Write as safetensors does, whose files only their owner may read, after a run that was killed while writing."""
    (tmp_path / "new").touch()
    left = tmp_path / ".x.partial"
    left.touch(mode=0o600)

    def private(path: Path) -> None:
        path.unlink()
        path.touch(mode=0o600)

    write_whole(tmp_path / "x", private)
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert not left.exists()


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    file.write_text("before")

    def full(path: Path) -> None:
        path.write_text("aft")
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(file, full)
    assert file.read_text() == "before"


def test_what_a_link_points_to_is_made_and_never_removed(tmp_path: Path) -> None:
    link, target = tmp_path / "link", tmp_path / "disk" / "target"
    link.symlink_to(target)
    make_folder(link)
    make_folder(link)
    assert link.is_symlink() and target.is_dir()
    (target / "kept").touch()
    remove(link)
    assert not link.is_symlink() and (target / "kept").exists()
    link.symlink_to(tmp_path / "nowhere")
    remove(link)
    remove(target / "kept")
    remove(target.parent)
    remove(target)  # is gone
    assert list(tmp_path.iterdir()) == []
