"""Tests of the signals that end a run."""

import signal

import pytest

from llmfast.train.signals import handled


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("ignored", [False, True])
def test_a_closed_terminal_counts_unless_it_is_ignored_already(ignored: bool) -> None:
    before = signal.SIG_IGN if ignored else signal.SIG_DFL
    signal.signal(signal.SIGHUP, before)
    seen: list[int] = []
    with handled(lambda number, frame: seen.append(number)):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.raise_signal(number)
    assert seen == [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]
    assert signal.getsignal(signal.SIGHUP) == before
