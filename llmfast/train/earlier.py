"""Settings and tokenizer that a run takes over from an earlier one, and that must agree with its weights."""

import hashlib
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llmfast.data import Tokenizer, load_tokenizer
from llmfast.train.config import Config, DataConfig, config_of, expect_resumable, expect_same_weights, load_config
from llmfast.train.settings import ConfigError


def resumed_config(run: Path, overrides: list[str]) -> Config:
    """Read the settings of a run, wherever it has been moved to, with overrides of what may change.

    Raises:
        ConfigError: the run does not exist, has no readable settings, or an override changes what a resumed run keeps.
    """
    if not run.exists():
        raise ConfigError(f"there is no run {run}{runs_in(run.parent)}")
    config = saved_settings(run, overrides)
    config.name, config.runs = run.name, str(run.parent)
    expect_resumable(saved_settings(run), config, run, str(run))
    return config


def resume_command(name: str, runs: str, *changes: str) -> str:
    """Return the command that resumes a run with such changes, `section.key=value`."""
    settings = [*([] if runs == Config().runs else [f"runs={runs}"]), *changes]
    flags = [word for setting in settings for word in ("--set", setting)]
    # As this one was called, where the command is not on the PATH: `.venv/bin/llmfast`, as `make train` calls it.
    here = sys.argv[0] if Path(sys.argv[0]).name == "llmfast" and shutil.which("llmfast") is None else "llmfast"
    return shlex.join([here, "train", "--resume", "--name", name, *flags])


def runs_in(folder: Path) -> str:
    """Return the end of a message that a folder is not a run: the runs that it holds or is part of, "" if none."""
    if (folder.parent / "config.toml").is_file():  # a checkpoint or a file of a run
        return f"; did you mean {folder.parent}?"
    names = sorted(file.parent.name for file in folder.glob("*/config.toml"))
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return f"; it holds runs: {', '.join(names[:10])}{more}" if names else ""


def saved_settings(run: Path, overrides: Iterable[str] = ()) -> Config:
    """Read the settings of a run, with overrides."""
    # Versions that did not save data.text_column read no files with columns.
    return load_config(run / "config.toml", overrides, base=Config(data=DataConfig(text_column="")))


def expect_checkpoint_resumable(meta: Mapping[str, Any], config: Config, run: Path) -> None:
    """Compare settings with those in the checkpoint: the files next to it may have been edited."""
    about, done = meta.get("about", {}), meta["step"]
    if "settings" in about:  # earlier versions wrote none
        found = f"the checkpoint in {run}"
        expect_resumable(config_of(about["settings"], found), config, run, found)
    _expect_own_tokenizer(about, run)
    if config.train.steps < done:
        raise ConfigError(f"train.steps must be at least the {done} that {run} has done; got {config.train.steps}")


def expect_weights_usable(
    about: Mapping[str, Any], run: Path, config: Config, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Check that the weights of `run` mean what they meant there: shapes do not show heads or tokenizers."""
    if "settings" in about:
        before = config_of(about["settings"], f"the checkpoint in {run}")
    elif (run / "config.toml").exists():
        before = saved_settings(run)
    else:  # a program trained its own model
        say(f"{run} does not say how its weights were trained: only their shapes are compared")
        return
    expect_same_weights(before, config, run)
    file = run / "tokenizer.json"
    try:
        theirs = load_tokenizer(file)
        _expect_own_tokenizer(about, run)
    except ConfigError:
        raise
    except (OSError, ValueError) as e:
        raise ConfigError(f"train.init_from={run} needs the tokenizer of its weights: {e}") from e
    if content(theirs) != content(tokenizer):
        raise ConfigError(
            f"data.tokenizer must be that of the weights in train.init_from={run}, of {theirs.vocab_size} ids; got "
            f"{config.data.tokenizer!r}, of {tokenizer.vocab_size} others. Give data.tokenizer={file}"
        )


def _expect_own_tokenizer(about: Mapping[str, Any], run: Path) -> None:
    if about.get("tokenizer", found := digest(run / "tokenizer.json")) != found:
        raise ConfigError(
            f"{run / 'tokenizer.json'} is not the tokenizer that {run} was trained with: its SHA-256 was "
            f"{about['tokenizer']}, and is {found}. Put the file back"
        )


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content(tokenizer: Tokenizer) -> bytes:
    """Return what a tokenizer saves; two with the same content give the same ids."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(file := Path(folder) / "tokenizer.json")
        return file.read_bytes()
