"""Files that survive a power failure: either complete, or as they were before."""

import os
from collections.abc import Callable
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
