"""Each option of the command line reaches what it is for."""

import argparse
import json
import runpy
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import llmfast
from llmfast import cli
from llmfast.cli import main
from llmfast.data.reader import SUFFIXES as TEXTS
from llmfast.data.token_files import SUFFIXES as TOKENS
from llmfast.train.config import SCHEMA, Config, dump_config, load_config


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Record the arguments of `train` and `continued_config` instead of calling them."""
    seen: dict[str, Any] = {}

    def train(config: Config, **options: Any) -> None:
        seen["config"], seen["train"] = config, options

    def continued_config(*arguments: Any, **options: Any) -> Config:
        seen["continued"] = (*arguments, options)
        return Config(name="continued")

    monkeypatch.setattr("llmfast.train.run.train", train)
    monkeypatch.setattr("llmfast.train.continued.continued_config", continued_config)
    return seen


NOTHING = {"resume": False, "overwrite": False, "dry_run": False, "profile": False}


@pytest.mark.parametrize("flag", ["", "--overwrite", "--dry-run", "--profile"])
def test_flags_of_train(flag: str, calls: dict[str, Any]) -> None:
    assert main(["train", "--name=7", "--set=train.steps=3", *([flag] if flag else [])]) == 0
    assert calls["config"] == load_config(None, ["name='7'", "train.steps=3"])
    assert calls["train"] == NOTHING | ({flag[2:].replace("-", "_"): True} if flag else {})


def test_settings_are_flags_too(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Apply settings in the order given, as --set or as flags; suggest the closest name for a misspelled one."""
    flags = [
        "--train.steps",
        "3",
        "--set=train.steps=4",
        "--data.sources",
        "['a', 'b']",
        "--model.tie_embeddings=false",
    ]
    assert main(["train", "--set=train.log_every=5", *flags, "--runs", "here"]) == 0
    expected = ["train.log_every=5", "train.steps=4", "data.sources=['a','b']", "model.tie_embeddings=false"]
    assert calls["config"] == load_config(None, [*expected, "runs=here"])
    for wrong, meant in (
        ("--train.stpes", "--train.steps"),
        ("--learning_rate", "--optimizer.lr"),
        ("--dryrun", "--dry-run"),
        ("--warmup", "--optimizer.warmup_steps? That is: steps in which the rate rises from 0"),
        ("--learning-rate", "--optimizer.lr"),
        ("--bf16", "--train.dtype"),
        ("--training.global_batch_size", "--train.batch_size? That is: rows of seq_len tokens per step"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["train", f"{wrong}=3"])
        message = f"unrecognized option {wrong}; did you mean {meant}{'' if '?' in meant else '?'}"
        assert left.value.code == 2 and message in capsys.readouterr().err


def test_settings_without_the_extra_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_schema", mock.Mock(side_effect=ImportError("No module named 'pydantic'")))
    with pytest.raises(SystemExit):
        main(["train", "--train.steps", "2"])
    message = "No module named 'pydantic'; --train.steps needs the extra: pip install 'llmfast-torch[train]'"
    assert message in capsys.readouterr().err


def test_an_unknown_option_is_not_taken_for_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["plan", "--gpu", "H100", "--gpu-count", "8"], "unrecognized option --gpu-count; did you mean --gpus?"),
        (["plan", "--vocabulary-size", "8"], "unrecognized option --vocabulary-size; did you mean --vocab-size?"),
        (["--vresion", "train"], "unrecognized option --vresion; did you mean --version?"),
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 2 and message in capsys.readouterr().err
    assert main(["plan", "--flo", "1e20"]) == 0  # argparse completes what is unique
    assert main(["plan", "lr", "--lr=1", "--base-batch=1", "--batch=4"]) == 0


def test_an_unknown_command_is_told_the_closest_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    for word, advice in (("trian", "did you mean train?"), ("xyz", "choose from train, continue, generate, export")):
        with pytest.raises(SystemExit) as left:
            main([word, "--train.steps", "2"])
        assert left.value.code == 2 and f"unrecognized command {word}; {advice}" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["llmfast", "llmfast.cli"])
def test_the_package_and_its_command_line_run_as_modules(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["llmfast", "--version"])
    monkeypatch.delitem(sys.modules, "llmfast.cli", raising=False)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    assert left.value.code == 0 and capsys.readouterr().out == f"llmfast {llmfast.__version__}\n"


@pytest.mark.parametrize("arguments", [["settings"], ["plan", "budget", "--flops=1e20"], ["train", "--dry-run"]])
def test_an_interrupt_before_a_run_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupt the reading of arguments, which imports the trainer."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", interrupted)
    assert main(arguments) == 130
    assert capsys.readouterr() == ("", "llmfast: interrupted\n")


@pytest.mark.parametrize("name", ["text.txt", "mine.toml"])
@pytest.mark.parametrize(("command", "option"), [(["train"], "--data.sources"), (["continue", "run"], "--target")])
def test_a_file_without_an_option_is_told_where_it_goes(
    command: list[str], option: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / name
    option = "--config" if (name, command) == ("mine.toml", ["train"]) else option
    text.write_text("hello")
    with pytest.raises(SystemExit) as left:
        main([*command, str(text), "--target=x"][: len(command) + 1 + (option == "--target")])
    assert left.value.code == 2
    assert f"unrecognized argument {text}; did you mean {option} {text}?" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "nothing-of-that-name"])
    assert "unrecognized arguments: nothing-of-that-name" in capsys.readouterr().err


def test_help_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train"], ["continue"], ["plan", "memory"]):
        with pytest.raises(SystemExit) as left:
            main([*command, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert left.value.code == 0 and "--train.steps INT steps of the run (at least 1; default: 1000)" in text
        assert all(
            f"--{name} " in text and s.meaning.split()[0] in text for name, s in SCHEMA.settings.items() if "." in name
        )


def test_help_lists_the_suffixes_that_are_read() -> None:
    meaning = SCHEMA.settings["data.sources"].meaning
    assert all(suffix in meaning for suffix in (*TEXTS, *TOKENS))


def test_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """List all of them, or those with a word in their name, their meaning or their name in another trainer."""
    assert main(["settings"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(" = ")[0] for line in lines[::2]] == list(SCHEMA.settings)
    for line, below, s in zip(lines[::2], lines[1::2], SCHEMA.settings.values()):
        assert json.loads(line.partition(" = ")[2]) == s.default
        assert below.startswith(f"    {s.meaning}") and s.values in below
    for word in ("grad_clip", "clipped to THIS", "max_grad_norm"):
        assert main(["settings", word]) == 0
        assert capsys.readouterr().out.startswith(
            "optimizer.max_grad_norm = 1.0\n    gradients are clipped to this norm;"
        )
    assert main(["settings", "nowhere"]) == 2
    assert "WORD must be part of a setting's name or meaning; got 'nowhere'" in capsys.readouterr().err


def test_settings_of_train(calls: dict[str, Any], tmp_path: Path) -> None:
    """Settings come from the file, then the options, and on --resume from the run, wherever it is kept."""
    run = tmp_path / "x"
    run.mkdir()
    (run / "config.toml").write_text(dump_config(load_config(None, ["name=x", "train.steps=5", "train.log_every=7"])))
    assert main(["train", f"--config={run / 'config.toml'}", "--set=train.steps=6", "--name=y"]) == 0
    assert calls["config"] == load_config(None, ["name=y", "train.steps=6", "train.log_every=7"])
    assert calls["train"] == NOTHING
    where = f"runs={tmp_path}"
    assert main(["train", "--resume", "--name=x", f"--set={where}", "--set=train.steps=6"]) == 0
    assert calls["config"] == load_config(None, ["name=x", where, "train.steps=6", "train.log_every=7"])
    assert calls["train"] == NOTHING | {"resume": True}


def test_options_of_continue(calls: dict[str, Any]) -> None:
    usual = {"general": [], "start": 0.1, "end": 0.7, "floor": 0.1, "replay": True, "overrides": []}
    for arguments, options, overwrite in (
        ([], {}, False),
        (["--general", "c", "d"], {"general": ["c", "d"]}, False),
        (["--start=0.2", "--end=0.6", "--floor=0.3"], {"start": 0.2, "end": 0.6, "floor": 0.3}, False),
        (["--no-replay"], {"replay": False}, False),
        (["--dry-run"], {}, False),
        (["--name=z", "--set=train.steps=3", "--overwrite"], {"overrides": ["train.steps=3", 'name="z"']}, True),
    ):
        assert main(["continue", "runs/before", "--target", "a", "b", *arguments]) == 0
        assert calls["continued"] == (Path("runs/before"), ["a", "b"], usual | options)
        assert calls["config"] == Config(name="continued")
        assert NOTHING | calls["train"] == NOTHING | {"overwrite": overwrite, "dry_run": "--dry-run" in arguments}
