"""Files that survive a power failure, complete or as they were before; folders that may be links."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file with what `write` writes to the path that it is given; its permissions are those of a new file."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    write(partial)
    partial.chmod(mode)  # safetensors lets only the owner read its files
    sync(partial)  # else the new name may be on disk before the content
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of names in a folder, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, if there is none; where a link points to nothing, make it there."""
    Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a folder, as far as that is possible; of a link or file only itself, not what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
