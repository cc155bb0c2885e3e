"""Three tiers of benchmarks in one command, `make bench`, and one page of results.

On any machine: timings on the CPU, and counts by processes that interpret kernels (`benchmarks/counted.py`). On a GPU
also timings of the kernels. A run of the whole suite writes its results to `benchmarks/results/`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import store
from benchmarks.counted import Job, Result, count
from llmfast.checkup.clock import Run, Timing, compare, timed

PATIENCE = 10.0  # time limit relative to the first implementation; slower ones get fewer rounds
RESULTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        type=Path,
        help="folder for results; a part of the suite replaces only its own rows there",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used at all")  # counts take no time


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    config = session.config
    folder: Path | None = config.option.results
    whole = _is_whole_suite(session)
    if folder is None and whole and exitstatus == pytest.ExitCode.OK:
        folder = store.default_folder()
    if folder is not None and config.stash[RESULTS]:
        store.write(folder, config.stash[RESULTS], part=not whole)
        terminal: Any = config.pluginmanager.get_plugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(f"results: {folder / 'README.md'}")


def _is_whole_suite(session: pytest.Session) -> bool:
    option = session.config.option
    chosen = option.keyword or option.markexpr or option.deselect or getattr(option, "lf", False)
    whole = [Path(argument).resolve() for argument in session.config.args] == [Path(__file__).parent]
    return whole and not chosen and not option.collectonly and not option.benchmark_disable


Add = Callable[..., None]
Race = Callable[..., dict[str, Timing]]


@pytest.fixture
def add(request: pytest.FixtureRequest) -> Add:
    """Return a function that adds a row to the results: `add("clock", operation=..., way=..., seconds=...)`."""
    rows = request.config.stash[RESULTS]
    return lambda section, **fields: rows.append({"section": section, **fields})


@pytest.fixture
def race(benchmark: BenchmarkFixture) -> Race:
    """Return a function that times implementations in turn, so that load affects all of them equally."""

    def run(ways: dict[str, Run], rounds: int = 5, warm: bool = False) -> dict[str, Timing]:
        times: dict[str, list[float]] = {name: [] for name in ways}
        (first, ours), *others = ways.items()

        def others_before() -> None:
            for name, other in others:
                if sum(times[name]) < PATIENCE:
                    times[name].append(timed(other))

        for way in ways.values():
            if not warm:
                way()
        benchmark.pedantic(lambda: times[first].append(timed(ours)), setup=others_before, rounds=rounds)
        timings = compare(times)
        benchmark.extra_info |= {f"time / {name}'s": round(t.ratio, 3) for name, t in timings.items() if name != first}
        return timings

    return run


@pytest.fixture(scope="session")
def counted(request: pytest.FixtureRequest) -> dict[Job, Result]:
    """Count all jobs among the parameters of the selected benchmarks at once, in two processes."""
    jobs: dict[str, Job] = {}
    for item in request.session.items:
        params = getattr(item, "callspec", None)
        for value in params.params.values() if params else ():
            for job in value if isinstance(value, list) else [value]:
                if isinstance(job, Job):
                    jobs[repr(job)] = job
    results = count(list(jobs.values()))
    return _ByJob(zip(jobs.values(), results))


class _ByJob(dict[Job, Result]):
    """Results looked up by a job's repr, because jobs hold dicts and are not hashable."""

    def __init__(self, pairs: Any) -> None:
        super().__init__()
        for job, result in pairs:
            super().__setitem__(repr(job), result)  # type: ignore[index]

    def __getitem__(self, job: Job) -> Result:
        return super().__getitem__(repr(job))  # type: ignore[index]
