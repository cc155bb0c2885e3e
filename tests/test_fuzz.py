"""Tests of the command-line fuzzer: a few cases, and whether it detects each kind of fault."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools import fuzz, fuzz_cases, fuzz_process

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits memory by /proc")


def test_some_malformed_input_ends_with_a_message() -> None:
    said: list[str] = []
    counts, failed = fuzz.fuzz(0, range(7), 1.0, fuzz.prepare_process(), say=said.append)
    assert failed == 0, "\n".join(said)
    assert counts.total() == 7 and {count.split()[1] for count in counts} == {"0", "2"}


def test_a_case_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("tokens.ds", "tokens.ds.index", "tokens.bin", "tokens.idx", "tokens.ds.metadata"):
            (tmp_path / name / file).write_bytes(bytes(range(200)))
    before = fuzz_process.tree(tmp_path / "a")
    for number in range(20):
        made = [fuzz_cases.make(3, number, tmp_path / name, "tokens")[1] for name in ("a", "b")]
        assert made[0] == made[1]
    assert fuzz_process.tree(tmp_path / "a") == fuzz_process.tree(tmp_path / "b") != before


def _good(arguments: Sequence[str]) -> int:
    print("llmfast: error: no such file or folder: x", file=sys.stderr)
    return 2


def _traceback(arguments: Sequence[str]) -> int:
    raise KeyError("step")


def _traceback_and_on(arguments: Sequence[str]) -> int:
    print("Traceback (most recent call last):\n  File ...\nValueError: x", file=sys.stderr)
    return _good(arguments)


def _overwrite(arguments: Sequence[str]) -> int:
    Path("kept", "text").write_text("other")
    return 0


def _remove_and_fail(arguments: Sequence[str]) -> int:
    Path("kept", "text").unlink()
    return _good(arguments)


def _leave_something(arguments: Sequence[str]) -> int:
    Path("half").touch()
    return _good(arguments)


def _keep_nothing(arguments: Sequence[str]) -> int:
    _leave_something(arguments)
    print("llmfast: nothing was kept", file=sys.stderr)
    return 1


def _hang(arguments: Sequence[str]) -> int:
    time.sleep(60)
    return 0


def _crash(arguments: Sequence[str]) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def _much_memory(arguments: Sequence[str]) -> int:
    return len(bytearray(2 * fuzz_process.MEMORY))


def _wrong_status(arguments: Sequence[str]) -> int:
    return 3


def _no_message(arguments: Sequence[str]) -> int:
    print("it did not work", file=sys.stderr)
    return 2


@pytest.mark.parametrize(
    ("main", "may_change", "faults"),
    [
        (_good, (), []),
        (_traceback, (), ["exit status 1", "a traceback"]),
        (_traceback_and_on, (), ["a traceback"]),
        (_overwrite, (), ["changed: kept/text"]),
        (_overwrite, ("kept",), []),
        (_remove_and_fail, ("kept",), ["changed: kept/text"]),
        (_leave_something, (), ["left behind: half"]),
        (_keep_nothing, (), []),
        (_hang, (), ["it did not end"]),
        (_crash, (), ["killed by SIGKILL"]),
        (_much_memory, (), ["exit status 1", "a traceback"]),
        (_wrong_status, (), ["exit status 3", "the last line of stderr is not a message: ''"]),
        (_no_message, (), ["the last line of stderr is not a message: 'it did not work'"]),
    ],
)
def test_what_must_not_happen_is_noticed(
    tmp_path: Path, main: fuzz_process.Main, may_change: tuple[str, ...], faults: list[str]
) -> None:
    folder = tmp_path / "case"
    (folder / "kept").mkdir(parents=True)
    (folder / "kept" / "text").write_text("a text")
    case = fuzz_process.Case([], may_change)
    found = fuzz_process.judge(case, fuzz_process.run(case, folder, main, seconds=1.0 if main is _hang else 30.0))
    assert found[: len(faults)] == faults and bool(found) == bool(faults)
