"""Cleaning without what takes datatrove most of the time on a few small texts."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class NoServer:
    """A manager of queues for a process that is alone: datatrove starts a server for them at every stage."""

    Queue = staticmethod(queue.Queue)

    def shutdown(self) -> None:
        """Do nothing: there is none."""


@contextmanager
def quickly() -> Iterator[None]:
    import multiprocess
    from loguru._better_exceptions import ExceptionFormatter

    folders = ExceptionFormatter._get_lib_dirs()  # looked up again at every change of the log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExceptionFormatter, "_get_lib_dirs", staticmethod(lambda: folders))
        patch.setattr(multiprocess, "Manager", NoServer)
        yield


@contextmanager
def with_servers() -> Iterator[None]:
    """Start servers after all, inside `quickly()`."""
    import multiprocess

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocess, "Manager", multiprocess.get_context().Manager)
        yield
