"""Behaviour shared by all commands: exit codes, errors in one line, extras that are missing, files that are kept."""

import argparse
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmfast import _commands, cli
from llmfast.cli import main
from llmfast.generate import _print
from llmfast.train.config import SCHEMA
from llmfast.train.settings import ConfigError
from llmfast.train.trainer import NonFinite
from support.names import parsers

TRAIN = "; training needs the extra: pip install 'llmfast-torch[train]'"
ADVICE = "out of memory; try a smaller train.micro_batch_size, data.seq_len or model: "


def raising(error: BaseException) -> Callable[..., Any]:
    def run(*args: Any, **options: Any) -> Any:
        raise error

    return run


# What may go wrong while a command trains: the exit code, and the line on stderr.
WRONG: list[tuple[BaseException, int, str]] = [
    (ConfigError("train.steps must be\nabove 0"), 2, "llmfast: error: train.steps must be above 0\n"),
    (NonFinite("no step was finite"), 2, "llmfast: error: no step was finite\n"),
    (OSError("disk full"), 2, "llmfast: error: disk full\n"),
    (ImportError("No module named 'rich'"), 2, f"llmfast: error: No module named 'rich'{TRAIN}\n"),
    (ImportError("it needs: pip install x"), 2, "llmfast: error: it needs: pip install x\n"),
    (MemoryError("all of it"), 2, f"llmfast: error: {ADVICE}all of it\n"),
    (torch.OutOfMemoryError("CUDA out of memory"), 2, f"llmfast: error: {ADVICE}CUDA out of memory\n"),
    (
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        2,
        f"llmfast: error: {ADVICE}[enforce fail] DefaultCPUAllocator: can't allocate memory\n",
    ),
    (KeyboardInterrupt("step 3 was saved"), 130, "llmfast: interrupted; step 3 was saved\n"),
    (KeyboardInterrupt(), 130, "llmfast: interrupted\n"),
    (BrokenPipeError(32, "Broken pipe"), 2, "llmfast: error: [Errno 32] Broken pipe\n"),  # of a file, not of stdout
]


@pytest.mark.parametrize(("error", "status", "says"), WRONG, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("command", ["train", "continue", "settings"])
def test_what_goes_wrong_is_one_line_and_an_exit_code(
    command: str,
    error: BaseException,
    status: int,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llmfast.train.run.train", raising(error))
    monkeypatch.setattr("llmfast.train.continued.continued_config", raising(error))
    if command == "settings":
        monkeypatch.setattr(type(SCHEMA), "listing", raising(error))
    assert main([command, *(["run", "--target=x"] if command == "continue" else [])]) == status
    captured = capsys.readouterr()
    assert captured.err == says and captured.out == ""


@pytest.mark.parametrize("command", ["train", "continue"])
def test_a_fault_of_the_program_is_not_taken_for_a_lack_of_memory(
    command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError("shapes do not match")
    monkeypatch.setattr("llmfast.train.run.train", raising(error))
    monkeypatch.setattr("llmfast.train.continued.continued_config", raising(error))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main([command, *(["run", "--target=x"] if command == "continue" else [])])


@pytest.mark.parametrize("command", ["generate", "export"])
@pytest.mark.parametrize("extra", [True, False])
def test_a_missing_extra_is_named(
    command: str, extra: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "No module named 'safetensors'" if extra else "it needs: pip install x"
    monkeypatch.setattr("llmfast.train.loading.open_run", raising(ImportError(told)))
    more = ["--prompt=a"] if command == "generate" else [str(tmp_path / "to")]
    assert main([command, "run", *more]) == 2
    verb = {"generate": "generating", "export": "exporting"}[command]
    advice = f"; {verb} needs the extra: pip install 'llmfast-torch[train]'"
    assert capsys.readouterr().err == f"llmfast: error: {told}{advice if extra or command == 'export' else ''}\n"


def test_a_reader_that_stops_early_ends_generating_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """End with the first text that nobody reads."""
    out, printed = SimpleNamespace(write=raising(BrokenPipeError(32, "Broken pipe"))), list[int]()

    def generate(args: argparse.Namespace) -> None:
        for i in range(3):
            printed.append(i)
            _print(f"{i}")

    monkeypatch.setattr("llmfast.generate._generate", generate)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["generate", "run", "--prompt=a"]) == 1
    assert capsys.readouterr().err == "" and printed == [0]


@pytest.mark.parametrize("before", [0, 4078, 4079, 9000])
@pytest.mark.parametrize("after", [0, 4078, 4079, 9000])
def test_a_file_is_replaced_if_a_command_wrote_it(before: int, after: int, tmp_path: Path) -> None:
    """Look for the mark in 4096 bytes at either end, and leave every other file as it is."""
    file = tmp_path / "out.html"
    _commands.expect_replaceable(file)  # there is none
    file.write_bytes(b"")
    _commands.expect_replaceable(file)
    mark = b"written by llmfast"
    file.write_bytes(b"x" * before + mark + b"x" * after)
    if min(before, after) + len(mark) <= 4096:
        _commands.expect_replaceable(file)
    else:
        with pytest.raises(FileExistsError, match=r"out.html exists and was not written by llmfast: remove it first"):
            _commands.expect_replaceable(file)
    file.write_bytes(b"x" * (before + after + 1))
    with pytest.raises(FileExistsError, match="or choose another --out"):
        _commands.expect_replaceable(file)


def test_a_new_folder_is_one_that_is_missing_or_empty(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "full" / "more").mkdir(parents=True)
    for name in ("missing", "empty"):
        _commands.expect_new(tmp_path / name)
    for name in ("file", "full"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not an empty folder: remove it first"):
            _commands.expect_new(tmp_path / name)


def test_an_error_is_one_line_whatever_it_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert _commands.fail("there is  no 'a\nb'\tfile\n") == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "llmfast: error: there is no 'a b' file\n")


def test_a_column_of_words_is_told_by_any_of_its_cells() -> None:
    assert _commands.columns([("a", "b"), ("1", "22"), ("333", "x")]) == ["a     b", "1     22", "333   x"]
    assert _commands.columns([("a", "bbb"), ("1", "2"), ("3", "")]) == ["a   bbb", "1     2", "3"]


def test_names_that_are_not_unicode_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print them as stderr does, whatever the terminal's encoding is."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii", errors="strict"))
    monkeypatch.setattr(cli, "_settings", lambda args: print("a\udcff\u4e2d") or 0)
    assert main(["settings"]) == 0
    assert written.getvalue() == b"a\\udcff\\u4e2d\n"


def test_a_default_in_a_help_text_is_the_options() -> None:
    found = 0
    for command, parser in parsers():
        for action in parser._actions:
            told = re.search(r"\(default: ([^()]*)\)", str(action.help) % {"default": action.default})
            if told is None or action.default in (argparse.SUPPRESS, None, []):
                continue
            default = action.default if isinstance(action.default, list) else [action.default]
            assert told[1] == " ".join(map(str, default)), f"{command}: {action.help}"
            found += 1
    assert found > 10


def test_no_arguments_list_the_commands(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["llmfast"])
    for given in ([], None):
        assert main(given) == 2
        told = capsys.readouterr()
        assert told.out == "" and "train a small model on text" in told.err and "doctor" in told.err


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"llmfast {cli.llmfast.__version__}\n"


@pytest.mark.parametrize("name", ["7", "true", 'a"b', "a b", "x=y", "été"])
def test_any_name_of_a_run_is_text(name: str) -> None:
    """Pass it on as TOML, so that a run can be called 7."""
    from llmfast.train.config import load_config

    args = argparse.Namespace(name=name, set=["train.steps=3"])
    config = load_config(None, cli._overrides(args))
    assert (config.name, config.train.steps) == (name, 3)
    assert cli._overrides(argparse.Namespace(name=None, set=["a"])) == ["a"]


def test_metavars_say_what_a_setting_takes() -> None:
    parser = _commands.CommandParser(prog="x")
    parser.take_settings(lambda: SCHEMA)
    parser.parse_args([])
    wanted = {bool: "BOOL", int: "INT", float: "NUMBER", str: "TEXT", list: "LIST", dict: "TABLE"}
    actions = {option: action for action in parser._actions for option in action.option_strings}
    for name, s in SCHEMA.settings.items():
        action = actions[f"--{name}"]
        assert action.metavar == wanted[type(s.default)], name
        told = s.by or json.dumps(s.default)
        assert action.help is not None and action.help.replace("%%", "%").endswith(f"default: {told})"), name
        assert action.help.replace("%%", "%").startswith(s.meaning), name
        assert parser.parse_args([f"--{name}", "1"]).set == [f"{name}=1"]
