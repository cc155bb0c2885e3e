"""Run one case in its own process, with limits, and judge how it ended."""

import contextlib
import ctypes
import hashlib
import io
import os
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llmfast.clean.command import EMPTY, NOTHING

SECONDS = 90.0  # limit per case, generous for a busy machine
MEMORY = 4 * 2**30  # bytes of address space per case, beyond that of the parent process
MESSAGE = re.compile(r"^llmfast( \w+)*: error: .+$", re.MULTILINE)
BEGUN = "run folder "  # printed by `train` after all checks; afterwards a run may be incomplete

Main = Callable[[Sequence[str]], int]


@dataclass
class Case:
    """Call to make, and the existing files that it may change if it succeeds."""

    arguments: list[str]
    may_change: tuple[str, ...] = ()  # relative to the workspace, including everything below
    damage: list[str] = field(default_factory=list)  # description of the damaged files
    obeys: bool = False  # True if file permissions apply to root too


@dataclass(frozen=True)
class Outcome:
    status: int | None  # None if it timed out; negative for a signal
    out: str
    err: str
    changed: list[str]  # files that changed
    new: list[str]


# The process of a case.


def run(case: Case, folder: Path, main: Main, seconds: float = SECONDS) -> Outcome:
    """Call `main` in a fork of this process, in `folder`."""
    before = tree(folder)
    logs = folder.with_name(folder.name + ".logs")
    logs.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _child(case, folder, logs, main)
    status, end = None, time.monotonic() + seconds
    while time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):  # also processes that the child started
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    after = tree(folder)
    texts = [(logs / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
    changed = [name for name, state in before.items() if after.get(name) != state]
    return Outcome(status, *texts, changed, sorted(after.keys() - before.keys()))


def _child(case: Case, folder: Path, logs: Path, main: Main) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(n, "w", closefd=False), "utf-8", errors)
            for n, errors in ((1, "strict"), (2, "backslashreplace"))  # like Python's own streams
        )
        os.chdir(folder)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if case.obeys:
            _obey_permissions()
        status = main(case.arguments)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _obey_permissions() -> None:
    """Drop the capabilities with which root ignores permissions; files stay readable by their owner. Linux only.

    `sets` holds the effective, permitted and inheritable capabilities, then their upper halves.
    """
    libc, words = ctypes.CDLL(None), ctypes.c_uint32 * 6
    header, sets = (
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        words(),
    )
    libc.capget(header, sets)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        sets[0] &= ~(1 << capability)
    libc.capset(header, sets)


def tree(folder: Path) -> dict[str, str]:
    """Map every file below the folder to a digest of its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def judge(case: Case, outcome: Outcome) -> list[str]:
    """List the faults in how a case ended; an empty list means none."""
    if outcome.status is None:
        return ["it did not end"]
    faults = []
    emptied = outcome.status == EMPTY and outcome.err.endswith(f"{NOTHING}\n")  # `clean` has written a report of why
    if outcome.status < 0:
        faults.append(f"killed by {signal.Signals(-outcome.status).name}")
    elif outcome.status not in (0, 2) and not emptied:
        faults.append(f"exit status {outcome.status}")
    if "Traceback (most recent call last)" in outcome.err:
        faults.append("a traceback")
    elif outcome.status and not emptied:
        last = outcome.err.rstrip("\n").rpartition("\n")[2]
        broken = any("\n" in argument for argument in case.arguments)  # argparse repeats arguments unchanged
        if not MESSAGE.search(outcome.err if broken else last):
            faults.append(f"the last line of stderr is not a message: {last[:200]!r}")
    whole = outcome.status == 0 or emptied or BEGUN in outcome.out
    allowed = case.may_change if whole else ()
    changed = [
        name for name in outcome.changed if not any(Path(a) in (Path(name), *Path(name).parents) for a in allowed)
    ]
    if changed:
        faults.append(f"changed: {', '.join(changed[:5])}")
    if outcome.new and not whole:
        faults.append(f"left behind: {', '.join(outcome.new[:5])}")
    return faults
