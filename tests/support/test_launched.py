"""The check of machine code after the tests, on a session that is none."""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from evidence.compiler import Compiled
from evidence.launches import Recorder, Specialization
from evidence.machine_code import Code, KernelFacts
from support import launched

TESTS = Path(__file__).parent.parent
CODE = Code(10, {128: 2}, {128: 2}, 1, 0, 0, 0, {})
FACTS = KernelFacts(
    num_warps=4,
    shared_bytes=0,
    registers=32,
    spill_bytes=0,
    occupancy=1.0,
    stack_bytes=0,
    scalar_spills=0,
    code=CODE,
    hot_loops=(CODE,),
    orders=(),
)
KIND = Specialization(
    "llmfast_kernels.optimizer.coefficients:prepare_kernel", {}, {"enable_fp_fusion": True}, "tests/a.py::test_b"
)


class Session(SimpleNamespace):
    def __init__(self, *, whole: bool) -> None:
        source = pytest.Config.ArgsSource.TESTPATHS if whole else pytest.Config.ArgsSource.ARGS
        options = SimpleNamespace(keyword="", markexpr="", deselect=None, lf=False)
        self.reports: list[pytest.TestReport] = []
        hook = SimpleNamespace(pytest_runtest_logreport=lambda report: self.reports.append(report))
        super().__init__(
            config=SimpleNamespace(option=options, args_source=source, hook=hook), testscollected=0, shouldstop=False
        )


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(launched, "recorder", recorder)
    monkeypatch.setattr(launched, "TARGETS", ("sm_90", "gfx942"))
    return recorder


def check(monkeypatch: pytest.MonkeyPatch, facts: KernelFacts, *, whole: bool = False) -> dict[str, pytest.TestReport]:
    def compiled(jobs: list[tuple[Specialization, str]]) -> list[Compiled]:
        return [Compiled(kind, target, facts) for kind, target in jobs]

    monkeypatch.setattr(launched, "compile_jobs", compiled)
    session: Any = Session(whole=whole)
    launched.check(session)
    assert session.testscollected == len(session.reports)
    return {report.nodeid: report for report in session.reports}


def test_each_kernel_on_each_target_is_reported(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder.add(KIND)
    recorder.add(replace(KIND, kernel="elsewhere:other_kernel"))
    reports = check(monkeypatch, FACTS)
    assert {name: report.outcome for name, report in reports.items()} == {
        "machine code::sm_90-prepare_kernel": "passed",
        "machine code::gfx942-prepare_kernel": "passed",
    }


def test_a_broken_budget_fails_and_names_the_test(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder.add(KIND)
    report = check(monkeypatch, replace(FACTS, spill_bytes=16))["machine code::sm_90-prepare_kernel"]
    assert report.outcome == "failed"
    assert "prepare_kernel(enable_fp_fusion=True) for sm_90 spills 16 bytes" in str(report.longrepr)
    assert "launched by tests/a.py::test_b" in str(report.longrepr)


def test_a_kernel_that_no_test_launches_fails_the_whole_suite(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder.add(KIND)
    assert not any("launched" in name for name in check(monkeypatch, FACTS))
    report = check(monkeypatch, FACTS, whole=True)["machine code::every kernel is launched by a test"]
    assert report.outcome == "failed"
    missing = str(report.longrepr).splitlines()
    assert "llmfast_kernels.scale:scale_kernel is not" in missing
    assert not any("prepare_kernel" in line for line in missing)
    monkeypatch.setattr(launched, "violations", lambda compiled: iter(()))
    for kernel in launched.all_kernels():
        recorder.add(replace(KIND, kernel=kernel))
    assert check(monkeypatch, FACTS, whole=True)["machine code::every kernel is launched by a test"].outcome == "passed"


def test_it_needs_no_plugin_that_can_be_turned_off(tmp_path: Path) -> None:
    """Run a session in its own process, on a folder whose only test launches nothing."""
    (tmp_path / "test_nothing.py").write_text("def test_nothing() -> None: ...\n")
    (tmp_path / "conftest.py").write_text("from support.launched import *\n")
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {TESTS} {TESTS.parent} {TESTS.parent / 'kernels'}\n")
    off = [
        option for name in ("cacheprovider", "stepwise", "xdist", "hypothesispytest") for option in ("-p", f"no:{name}")
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--machine-code", "-q", *off, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr


def kinds_of(*each: dict[str, Any]) -> list[Specialization]:
    return [replace(KIND, arguments={name: {"constant": value} for name, value in one.items()}) for one in each]


def test_any_two_properties_meet_in_a_kind_that_is_compiled() -> None:
    kinds = kinds_of(*({"a": a, "b": b, "c": c} for a in range(3) for b in range(3) for c in range(3)))
    for together, fewest in ((1, 3), (2, 9), (3, 27)):
        picked = launched.covering(kinds, together)
        assert fewest <= len(picked) <= fewest + 3 and picked == launched.covering(kinds[::-1], together)
        for values in product(range(3), repeat=together):
            for names in combinations("abc", together):
                wanted = {name: {"constant": value} for name, value in zip(names, values)}
                assert any(wanted.items() <= kind.arguments.items() for kind in picked)


def test_members_of_records_are_properties_and_no_kernel_is_left_out() -> None:
    records = [{"record": {"x": x, "y": y}, "name": "R"} for x in (1, None) for y in (1, None)]
    kinds = [replace(KIND, arguments={"r": record}) for record in records]
    assert len(launched.covering(kinds, 1)) == 2 and len(launched.covering(kinds, 2)) == 4
    assert launched.covering([KIND], 2) == [KIND]  # it has one property alone


def test_what_is_compiled_for_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = kinds_of(*({"a": a, "b": b} for a in range(3) for b in range(3)))
    whole, part = (cast(Any, Session(whole=whole)) for whole in (True, False))
    assert [len(launched.chosen(kinds, target, whole)) for target in launched.TARGETS] == [3, 9, 3, 9, 3]
    assert all(launched.chosen(kinds, target, part) == kinds for target in launched.TARGETS)


@pytest.mark.parametrize("name", ["keyword", "markexpr", "deselect", "lf", None])
def test_a_part_of_the_suite_is_not_the_whole(name: str | None) -> None:
    session: Any = Session(whole=True)
    vars(session.config.option).clear()  # as without the plugins
    if name is not None:
        setattr(session.config.option, name, "chosen")
    assert launched.is_whole_suite(session) == (name is None)
    assert not launched.is_whole_suite(cast(Any, Session(whole=False)))


def test_launches_of_other_processes_are_added(recorder: Recorder) -> None:
    recorder.add(KIND)
    launched.pytest_testnodedown(SimpleNamespace(workeroutput={"launches": [asdict(replace(KIND, count=3))]}), None)
    launched.pytest_testnodedown(SimpleNamespace(), "crashed")
    assert [kind.count for kind in recorder.kinds.values()] == [4]
