"""The command `llmfast clean`: what it prints and returns, however the cleaning ends."""

import argparse
from typing import Any
from unittest import mock

import pytest

from llmfast.clean import Report, Stage, add_arguments, run


@pytest.mark.parametrize(
    ("ended", "code", "told"),
    [
        (3, 0, ""),
        (0, 1, "llmfast: nothing was kept\n"),
        *((kind("why"), 2, "llmfast: error: why\n") for kind in (ValueError, FileExistsError, ImportError)),
        (KeyboardInterrupt(), 130, "llmfast: interrupted; nothing was written\n"),
    ],
)
def test_how_the_command_ends(
    ended: Any, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = Report({}, {}, [Stage("read", "", 5, ended, 9, bytes_out=7, reasons={}, samples={})], None)
    wrong = ended if isinstance(ended, BaseException) else None
    monkeypatch.setattr("llmfast.clean.command.clean", mock.Mock(return_value=report, side_effect=wrong))
    add_arguments(parser := argparse.ArgumentParser())
    assert run(parser.parse_args(["in", "some/out"])) == code
    out, err = capsys.readouterr()
    shown = "" if wrong else f"{report.table()}\nremoved documents and reasons: some/out/report.md\n"
    assert (out, err) == (shown, told)
