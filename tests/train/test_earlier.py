"""Tests of what is said of runs, and of how their files are known again."""

import hashlib
import shlex
from pathlib import Path

import pytest

from llmfast.cli import main
from llmfast.data import ByteTokenizer
from llmfast.train import earlier
from llmfast.train.config import Config, load_config
from llmfast.train.earlier import content, digest, resume_command, runs_in, saved_settings
from llmfast.train.settings import ConfigError


@pytest.mark.parametrize(
    ("name", "runs", "changes", "command"),
    [
        ("x", "runs", (), "llmfast train --resume --name x"),
        ("my run", "/else where", (), "llmfast train --resume --name 'my run' --set 'runs=/else where'"),
        ("x", "runs", ("train.steps=9", "a=b c"), "llmfast train --resume --name x --set train.steps=9 --set 'a=b c'"),
        ("x", "y", ("train.steps=9",), "llmfast train --resume --name x --set runs=y --set train.steps=9"),
    ],
)
def test_the_command_that_goes_on(name: str, runs: str, changes: tuple[str, ...], command: str) -> None:
    assert Config().runs == "runs" and resume_command(name, runs, *changes) == command
    assert shlex.split(command)[:5] == ["llmfast", "train", "--resume", "--name", name]


def test_a_command_that_is_not_on_the_path_is_named_as_it_was_called(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "llmfast"
    for called, path, named in (
        (str(program), "", str(program)),
        (str(program), str(tmp_path), "llmfast"),
        ("-c", "", "llmfast"),
    ):
        program.touch(0o755)
        monkeypatch.setattr("sys.argv", [called, "train"])
        monkeypatch.setenv("PATH", path)
        assert resume_command("a", "runs") == f"{named} train --resume --name a"


def test_the_command_is_one_that_is_understood(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *(f"--set={s}" for s in settings), "--set=train.steps=2", "--name=a b"]) == 0
    command = resume_command("a b", str(tmp_path / "runs"), "train.steps=3")
    assert main(shlex.split(command)[1:]) == 0
    assert load_config(tmp_path / "runs" / "a b" / "config.toml").train.steps == 3


@pytest.mark.parametrize(("count", "more"), [(0, None), (1, ""), (10, ""), (11, " and 1 more"), (13, " and 3 more")])
def test_runs_of_a_folder_are_named(count: int, more: str | None, tmp_path: Path) -> None:
    names = [f"r{i:02}" for i in range(count)]
    for name in reversed(names):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.toml").touch()
    (tmp_path / "runs" / "r00" / "inner").mkdir(parents=True, exist_ok=True)
    said = runs_in(tmp_path / "runs")
    assert said == ("" if more is None else f"; it holds runs: {', '.join(names[:10])}{more}")
    inner = runs_in(tmp_path / "runs" / "r00" / "inner")
    assert inner == (f"; did you mean {tmp_path / 'runs' / 'r00'}?" if count else "")


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    ByteTokenizer().save(file)
    assert digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()
    assert content(ByteTokenizer()) == file.read_bytes()


def test_a_run_that_does_not_say_its_column_has_read_none(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("[train]\nsteps = 7\n")
    found = saved_settings(tmp_path, ["train.batch_size=3"])
    assert (found.data.text_column, found.train.steps, found.train.batch_size) == ("", 7, 3)
    (tmp_path / "config.toml").write_text('[data]\ntext_column = "body"\n')
    assert saved_settings(tmp_path).data.text_column == "body" and Config().data.text_column == "text"


def test_a_checkpoint_needs_as_many_steps_and_its_own_tokenizer(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    config, own = load_config(None, ["train.steps=8"]), digest(tmp_path / "tokenizer.json")
    for meta in ({"step": 8}, {"step": 0, "about": {}}, {"step": 3, "about": {"tokenizer": own}}):
        earlier.expect_checkpoint_resumable(meta, config, tmp_path)
    with pytest.raises(ConfigError, match=rf"^train.steps must be at least the 9 that {tmp_path} has done; got 8$"):
        earlier.expect_checkpoint_resumable({"step": 9}, config, tmp_path)
    with pytest.raises(ConfigError, match=rf"its SHA-256 was other, and is {own}\. Put the file back$"):
        earlier.expect_checkpoint_resumable({"step": 3, "about": {"tokenizer": "other"}}, config, tmp_path)
