"""Signals that end a run: Ctrl-C, the system's or torchrun's request to end, and a terminal that was closed."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


@contextmanager
def handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Let `handler` take SIGINT, SIGTERM and SIGHUP, unless that is ignored already, as under nohup."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers.remove(signal.SIGHUP)
    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread, where nobody sends signals
        before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
