"""Output that is missing, or cannot be written: what is silent, what ends, and what goes on."""

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from llmfast import _output, cli
from llmfast._output import Lasting, OutputLost, standard_streams
from llmfast.cli import main

FULL = "[Errno 28] No space left on device"


class Broken(io.StringIO):
    """A stream that takes so many characters; its file is a real one."""

    def __init__(self, takes: int = 0, number: int = errno.ENOSPC) -> None:
        super().__init__()
        self.left, self.number, self.tries = takes, number, 0
        self.descriptor = os.open(os.devnull, os.O_RDONLY)

    def write(self, text: str) -> int:
        self.tries += 1
        self.left -= len(text)
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)

    def fileno(self) -> int:
        return self.descriptor


@pytest.mark.parametrize("missing", [("stdout",), ("stderr",), ("stdout", "stderr")])
def test_streams_may_be_missing(missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command that ends well and one that does not, as under `>&-`."""
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    assert main(["settings", "warmup"]) == 0
    assert main(["settings", "nothing has this in its name"]) == 2
    with pytest.raises(SystemExit):
        main(["--help"])
    assert all(getattr(sys, name) is None for name in missing)


@pytest.mark.parametrize(("number", "status", "says"), [(errno.EPIPE, 1, ""), (errno.ENOSPC, 2, FULL)])
@pytest.mark.parametrize("arguments", [["settings"], ["--help"], ["train", "--help"], ["plan", "memory"]], ids=" ".join)
def test_a_command_that_only_prints_ends_with_its_output(
    number: int,
    status: int,
    says: str,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tell a reader that has seen enough, of which nothing is said, from a disk that is full."""
    out = Broken(takes=3, number=number)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(arguments) == status and sys.stdout is out
    assert capsys.readouterr().err == (f"llmfast: error: output could not be written: {says}\n" if says else "")
    os.write(out.fileno(), b"what is left is not read")  # the null device, now open for writing


@pytest.mark.parametrize(
    "arguments", [["examples"], ["doctor", "--json=x"], ["doctor"], ["train", "--dry-run"]], ids=str
)
def test_a_command_that_writes_files_goes_on(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("run_examples", "_doctor", "_train"):
        monkeypatch.setattr(cli, command, lambda args: print("a") or print("b") or 0)
    out = Broken()
    monkeypatch.setattr(sys, "stdout", out)
    goes_on = arguments in (["examples"], ["doctor", "--json=x"])
    assert main([*arguments, *["to"] * (arguments == ["examples"])]) == (0 if goes_on else 2)
    told = f"output could not be written, and ends here; all else goes on: {FULL}"
    assert capsys.readouterr().err == f"llmfast: {told if goes_on else f'error: output could not be written: {FULL}'}\n"
    assert out.tries == 1


@pytest.mark.parametrize(
    ("arguments", "writes"),
    [
        (["train"], True),
        (["train", "--dry-run"], False),
        (["continue", "run", "--target", "x"], True),
        (["generate", "run"], False),
        (["export", "run", "to"], True),
        (["clean", "from", "to"], True),
        (["plan"], False),
        (["plan", "memory"], False),
        (["report", "run"], True),
        (["compile", "--gpu", "H100", "--out", "x"], True),
        (["examples", "to"], True),
        (["settings"], False),
        (["doctor"], False),
        (["doctor", "--full"], False),
        (["doctor", "--full", "--json", "x"], True),
        (["doctor", "--full", "--markdown", "x"], True),
    ],
    ids=str,
)
def test_what_writes_files(arguments: list[str], writes: bool) -> None:
    assert cli._writes_files(cli._parser().parse_args(arguments)) is writes


def test_a_broken_stderr_changes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    err = Broken()
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["examples", str(tmp_path)]) == 0 and err.tries == 0
    assert main(["examples", str(tmp_path)]) == 2 and err.tries == 1  # not empty any more
    monkeypatch.setattr(sys, "stdout", Broken())
    assert main(["examples", str(tmp_path / "more")]) == 0 and (tmp_path / "more" / "README.md").exists()


def test_only_a_failed_write_is_a_loss() -> None:
    """Pass on errors of the text; take a closed stream for lost."""
    errors: list[Exception] = []
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    lasting = Lasting(stream, errors.append)
    with pytest.raises(UnicodeEncodeError):
        lasting.write("é")
    assert not lasting.is_lost and lasting.encoding == "ascii"
    stream.close()
    assert lasting.write("abc") == lasting.write("def\n") - 1 == 3
    lasting.flush()
    assert lasting.is_lost and [type(e) for e in errors] == [ValueError]
    lasting.discard()  # a closed stream has no file
    with pytest.raises(OutputLost, match="could not be written"), standard_streams() as out:
        out.lost(OSError("gone"))


def test_a_loss_is_said_past_a_progress_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy = io.StringIO()
    proxy.rich_proxied_file = sys.stderr  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stderr", proxy)
    _output.going_on(OSError("gone"))
    assert proxy.getvalue() == "" and capsys.readouterr().err.endswith("all else goes on: gone\n")
    monkeypatch.setattr(sys, "stderr", None)
    _output.going_on(OSError("gone"))
    assert capsys.readouterr().out == ""  # where print(file=None) would go
