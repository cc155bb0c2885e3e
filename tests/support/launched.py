"""After the tests, with `--machine-code`: compile whatever they launched for five GPUs, and hold it to its budget.

Nobody keeps a list of launches. The recorder hears of every one in the interpreter, in all of xdist's workers; each
kernel on each target is then reported like a test. pytest finds the functions here through `tests/conftest.py`.

Tests that were chosen, as in `make test ARGS=tests/losses`, have all their launches compiled for all GPUs. The whole
suite launches hundreds of kinds, which differ in few ways: `covering` picks those that are compiled then.
"""

import dataclasses
import json
import pkgutil
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import combinations
from typing import Any

import pytest

import llmfast_kernels
from evidence.compiler import TARGETS, Compiled, compile_jobs
from evidence.launches import Recorder, Specialization
from evidence.observers import Launch, Run, observing
from support.budgets import violations
from support.devices import CHOICES

CLOSELY = ("sm_90", "gfx942")  # of the targets: one of each vendor, for which any two properties meet


class PausingRecorder(Recorder):
    """Hears of nothing inside `unrecorded()`."""

    paused = False

    def launch(self, launch: Launch, programs: Sequence[int], run: Run) -> None:
        if self.paused:
            run(programs)
        else:
            super().launch(launch, programs, run)


recorder = PausingRecorder()


@contextmanager
def unrecorded() -> Iterator[None]:
    """Disable recording for tests that combine options at random, which would add hundreds of redundant binaries."""
    recorder.paused = True
    try:
        yield
    finally:
        recorder.paused = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--machine-code", action="store_true", help="compile what the tests launched for five GPUs, and check that"
    )
    parser.addoption("--device", default="cpu", choices=CHOICES, help="where tests make their tensors (default: cpu)")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> Generator[None, object, object]:
    with observing(recorder):
        result = yield
    is_worker = hasattr(session.config, "workeroutput")
    if session.config.option.machine_code and not session.config.option.collectonly and not is_worker:
        check(session)
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["launches"] = [dataclasses.asdict(kind) for kind in recorder.kinds.values()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    for fields in getattr(node, "workeroutput", {}).get("launches", []):
        recorder.add(Specialization(**fields))


def check(session: pytest.Session) -> None:
    """Report the machine code of every kernel on every target, and the kernels that no test launched."""
    kinds = [kind for kind in recorder.kinds.values() if kind.kernel.startswith(f"{llmfast_kernels.__name__}.")]
    if is_whole_suite(session):
        launched = {kind.kernel for kind in kinds}
        missing = sorted(all_kernels() - launched)
        report(session, "every kernel is launched by a test", [f"{kernel} is not" for kernel in missing])
    start = time.perf_counter()
    compiled = compile_jobs([(kind, target) for target in TARGETS for kind in chosen(kinds, target, session)])
    seconds = time.perf_counter() - start
    for target in TARGETS:
        for name in sorted({kind.name for kind in kinds}):
            mine = [c for c in compiled if (c.target, c.kind.name) == (target, name)]
            report(session, f"{target}-{name}", failures(mine), seconds * len(mine) / len(compiled))


def chosen(kinds: Sequence[Specialization], target: str, session: pytest.Session) -> list[Specialization]:
    """Return the kinds to compile for a target."""
    return covering(kinds, together=2 if target in CLOSELY else 1) if is_whole_suite(session) else list(kinds)


def covering(kinds: Sequence[Specialization], together: int) -> list[Specialization]:
    """Choose kinds of each kernel greedily, until any `together` properties that one of them has are in one chosen.

    A property is the value of one argument, of one member of a record or of one option.
    """
    picked: list[Specialization] = []
    for kernel in sorted({kind.kernel for kind in kinds}):
        mine = sorted((kind for kind in kinds if kind.kernel == kernel), key=lambda kind: kind.key)
        sets = [set(combinations(sorted(properties(kind)), together)) for kind in mine]
        missing = set().union(*sets)
        found: list[Specialization] = []
        while missing or not found:
            best = max(range(len(mine)), key=lambda i: len(sets[i] & missing))
            found.append(mine[best])
            missing -= sets[best]
        picked += found
    return picked


def properties(kind: Specialization) -> Iterator[str]:
    for name, value in (kind.arguments | kind.options).items():
        members = value["record"] if isinstance(value, dict) and "record" in value else {"": value}
        for member, is_this in members.items():
            yield f"{name}.{member}={json.dumps(is_this, sort_keys=True)}"


def failures(compiled: list[Compiled]) -> list[str]:
    return [f"{c} {problem}\n    launched by {c.kind.first_test}" for c in compiled for problem in violations(c)]


def all_kernels() -> set[str]:
    """Return every kernel of the library as "package.module:name"."""
    found = pkgutil.walk_packages(llmfast_kernels.__path__, f"{llmfast_kernels.__name__}.")
    kernels = [(name, kernel) for m in found for name, kernel in vars(import_module(m.name)).items()]
    return {f"{kernel.fn.__module__}:{name}" for name, kernel in kernels if name.endswith("_kernel")}


def is_whole_suite(session: pytest.Session) -> bool:
    config = session.config
    # Of pytest's plugins, any may be turned off, and with it its options.
    chosen = any(getattr(config.option, name, None) for name in ("keyword", "markexpr", "deselect", "lf"))
    return not chosen and not session.shouldstop and config.args_source == pytest.Config.ArgsSource.TESTPATHS


def report(session: pytest.Session, name: str, problems: list[str], seconds: float = 0.0) -> None:
    """Report as if a test of this name had passed, or failed for these reasons."""
    session.testscollected += 1
    session.config.hook.pytest_runtest_logreport(
        report=pytest.TestReport(
            nodeid=f"machine code::{name}",
            location=("machine code", None, name),
            keywords={},
            outcome="failed" if problems else "passed",
            longrepr="\n".join(problems) or None,
            when="call",
            duration=seconds,
        )
    )
