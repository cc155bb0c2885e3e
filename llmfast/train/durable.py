"""Files that survive a power failure: whole, or as they were."""

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file by what `write` writes to the path it is given."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    sync(partial)  # or the new name may be on disk without what it names
    partial.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
