"""Standard output and standard error that may be missing, or fail: a reader that stops early, a full disk, `>&-`."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, TextIO, cast


class OutputLost(Exception):
    """Error that ends a command whose output is all it is for, once that cannot be written; its cause says why."""


class Lasting:
    """A text stream that is written to until a write fails, and that is silent from then on.

    Args:
        stream: where text goes; all but writing and flushing is its own.
        lost: called with the first error; what it raises reaches the writer.
    """

    def __init__(self, stream: IO[str], lost: Callable[[Exception], None] = lambda error: None) -> None:
        self._stream, self.lost = stream, lost
        self.is_lost = False

    def write(self, text: str) -> int:
        if not self.is_lost:
            try:
                return self._stream.write(text)
            except (OSError, ValueError) as e:
                self._lose(e)
        return len(text)

    def flush(self) -> None:
        if not self.is_lost:
            try:
                self._stream.flush()
            except (OSError, ValueError) as e:
                self._lose(e)

    def discard(self) -> None:
        """Send what is left in the stream nowhere: else Python would fail to write it at its exit."""
        with suppress(OSError, ValueError, AttributeError):
            number = self._stream.fileno()
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)

    def _lose(self, error: Exception) -> None:
        if not isinstance(error, OSError) and not self._stream.closed:
            raise error  # of the text, such as a UnicodeEncodeError
        self.is_lost = True
        self.lost(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def going_on(error: Exception) -> None:
    """Say on stderr, if that is possible, that output ends and work does not."""
    stderr = getattr(sys.stderr, "rich_proxied_file", sys.stderr)  # a progress bar sends stderr to its own console
    if stderr is not None:
        with suppress(OSError, ValueError):
            print(f"llmfast: output could not be written, and ends here; all else goes on: {error}", file=stderr)


@contextmanager
def standard_streams() -> Iterator[Lasting]:
    """Guard stdout and stderr; yield stdout, of which a loss raises OutputLost. What is missing is the null device."""
    before = sys.stdout, sys.stderr
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's are: names of files need not be Unicode
    out, err = (Lasting(_nowhere() if stream is None else stream) for stream in before)
    out.lost = _stop
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield out
    finally:
        sys.stdout, sys.stderr = before
        err.flush()
        for stream in (out, err):
            if stream.is_lost:
                stream.discard()


def _stop(error: Exception) -> None:
    raise OutputLost(f"output could not be written: {error}") from error


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")
