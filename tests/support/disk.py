"""Simulation of a power failure: which files were on disk when they were renamed into place."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest


class Disk:
    """A watch on renamed files, whose content must be on disk before they get their final names."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.named: list[Path] = []
        self._synced: set[tuple[int, int]] = set()  # inode and size of files, inode of folders
        self._folders: dict[int, list[Path]] = {}  # whose names are not on disk yet
        fsync = os.fsync

        def watched(handle: int) -> None:
            fsync(handle)
            self._synced.add(_look(os.fstat(handle)))
            self._folders.pop(os.fstat(handle).st_ino, None)

        patch.setattr(os, "fsync", watched)
        for method in ("rename", "replace"):
            patch.setattr(Path, method, self._watching(getattr(Path, method)))

    def _watching(self, method: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def give(path: Path, target: Path) -> Path:
            if not target.name.startswith("."):  # or it is on its way out
                for part in [path, *path.rglob("*")]:
                    assert _look(part.stat()) in self._synced, f"{part} was not on disk when it became {target}"
                self._folders.setdefault(target.parent.stat().st_ino, []).append(target)
                self.named.append(target)
            return method(path, target)

        return give

    def expect_names(self, *names: Path) -> None:
        """Raise AssertionError unless each name was given to a file that was already on disk."""
        assert set(names) <= set(self.named)
        assert not self._folders, f"names that may not be on disk: {self._folders}"


def _look(found: os.stat_result) -> tuple[int, int]:
    is_folder = found.st_mode & 0o170000 == 0o040000
    return found.st_ino, 0 if is_folder else found.st_size
