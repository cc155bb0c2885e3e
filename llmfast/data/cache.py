"""Cache what takes long to compute from text, by the content of the text, so that the next run starts sooner.

Entries are files in `LLMFAST_CACHE`, by default `~/.cache/llmfast`; an empty value keeps nothing. The least recently
used ones are removed when all take more than `MOST_BYTES`. What cannot be read or written is computed again.
"""

import contextlib
import hashlib
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

LEAST_CHARACTERS = 1_000_000  # less text is not cached, because nothing takes long
MOST_BYTES = 20 << 30
_ENTRY = re.compile(r"[0-9a-f]{40}(\.npz|\.\w+\.partial)")  # whole, or left by a process that was killed

Arrays = dict[str, npt.NDArray[np.generic]]


def cached_texts(texts: Sequence[str], how: str, make: Callable[[], list[str]]) -> list[str]:
    """Return the texts that `make` makes of `texts`, or made of them before; `how` describes all else it depends on."""

    def pack() -> Arrays:
        encoded = [text.encode("utf-8", "surrogatepass") for text in make()]
        return _packed([np.frombuffer(text, dtype=np.uint8) for text in encoded], np.uint8)

    return [part.tobytes().decode("utf-8", "surrogatepass") for part in _parts(_cached(texts, how, pack))]


def cached_ids(
    texts: Sequence[str], how: str, make: Callable[[], list[npt.NDArray[np.int32]]]
) -> list[npt.NDArray[np.int32]]:
    """Return the ids that `make` makes of `texts`, or made of them before; `how` describes all else it depends on."""
    arrays = _cached(texts, how, lambda: _packed(make(), np.int32))
    return [part.astype(np.int32, copy=False) for part in _parts(arrays)]


def _cached(texts: Sequence[str], how: str, make: Callable[[], Arrays]) -> Arrays:
    folder = os.environ.get("LLMFAST_CACHE", os.path.expanduser("~/.cache/llmfast"))
    if not folder or sum(map(len, texts)) < LEAST_CHARACTERS:
        return make()
    file = Path(folder) / f"{_digest(texts, how)}.npz"
    try:
        with np.load(file) as found:
            arrays: Arrays = {name: found[name] for name in ("values", "lengths")}  # the checksums of zip reveal damage
        with contextlib.suppress(OSError):
            os.utime(file)
        return arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        arrays = make()
    with contextlib.suppress(OSError):  # a full disk, or a home that is read-only
        _write(file, arrays)
        _prune(file.parent)
    return arrays


def _digest(texts: Sequence[str], how: str) -> str:
    digest = hashlib.blake2b(digest_size=20)
    for text in (how, *texts):
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()


def _packed(parts: Sequence[npt.NDArray[np.generic]], dtype: type[np.generic]) -> Arrays:
    lengths = np.array([len(part) for part in parts], dtype=np.int64)
    return {"values": np.concatenate([np.empty(0, dtype), *parts]), "lengths": lengths}


def _parts(arrays: Arrays) -> list[npt.NDArray[np.generic]]:
    return (
        np.split(arrays["values"], np.cumsum(arrays["lengths"], dtype=np.int64)[:-1]) if len(arrays["lengths"]) else []
    )


def _write(file: Path, arrays: Arrays) -> None:
    """Write a file as a whole: several processes may write the same one, and each may be killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(".partial", f"{file.stem}.", dir=file.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            np.savez(out, values=arrays["values"], lengths=arrays["lengths"])
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def _prune(folder: Path) -> None:
    ours = [path for path in folder.iterdir() if _ENTRY.fullmatch(path.name)]  # the folder may hold other files
    entries = sorted(((s.st_mtime, s.st_size, path) for path in ours for s in [path.stat()]), reverse=True)
    total = 0
    for _, size, path in entries:
        total += size
        if total > MOST_BYTES:
            path.unlink()
