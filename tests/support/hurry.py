"""A plugin for pytest that leaves out the tests for which no time is left: `-p support.hurry --seconds 60`."""

import time

import pytest

_began = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=float("inf"), help="skip the tests that have not begun by then")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() - _began > item.config.getoption("--seconds"):
        pytest.skip("the time is up; make test runs all")
