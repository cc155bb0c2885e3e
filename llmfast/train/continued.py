"""Continued pretraining: a trained model learns new text, while the old text is replayed and validated."""

import os
from collections.abc import Sequence
from pathlib import Path

from llmfast.data.dataset import source_name
from llmfast.data.mixture import continued_weights
from llmfast.data.split import Split
from llmfast.models.llama import CONFIG
from llmfast.train.config import Config, ModelConfig, load_config
from llmfast.train.earlier import resume_command
from llmfast.train.settings import ConfigError


def continued_config(
    run: Path,
    target: Sequence[str],
    *,
    general: Sequence[str] = (),
    start: float = 0.1,
    end: float = 0.7,
    floor: float = 0.1,
    replay: bool = True,
    overrides: Sequence[str] = (),
) -> Config:
    """Make settings that continue from a run's last weights: its model, tokenizer and optimizer, and new text.

    The learning rate warms up and decays again. Every source is validated on its own, also the old ones, before the
    first step and after the last; the closing table shows what was forgotten.

    Args:
        run: the folder of a run, or of a Hugging Face model.
        target: sources of new text, as in `data.sources`. One that the run was trained on is not replayed as well, and
            the part of it that was held out stays so.
        general: sources to replay; by default those that the run was trained on.
        start, end, floor, replay: as in `continued_weights`.
        overrides: `section.key=value`, applied last.

    Raises:
        ConfigError: the run has no settings, or an argument or override is wrong.
    """
    config = _settings(run)
    if not general and not config.data.sources:
        raise ConfigError(f"--general must name the old text: {run} is a model that does not say what it has read")
    # Versions that did not save data.split held out whole documents.
    split: dict[str, Split] = dict.fromkeys((source_name(source)[0] for source in config.data.sources), "documents")
    split |= config.data.split
    read = {_place(source): source_name(source)[0] for source in config.data.sources}
    places = {_place(source) for source in target}
    if not general:
        general = [source for source in config.data.sources if _place(source) not in places]
        if not general and replay:
            raise ConfigError(
                f"--target is all that {run} was trained on, so nothing is left to replay: give --no-replay, or more "
                f"steps to that run, {resume_command(run.name, config.runs, 'train.steps=...')}"
            )
    _expect_apart(target, general)
    config.name = ""
    config.data.sources = [*target, *general]
    config.data.tokenizer = str(run / "tokenizer.json")
    if config.model.pretrained:
        config.model.pretrained = str(run)
    else:
        config.train.init_from = str(run)
    names = [[source_name(source)[0] for source in sources] for sources in (target, general)]
    before = {source_name(source)[0]: read.get(_place(source), "") for source in [*target, *general]}
    config.data.split = {name: split[was] for name, was in before.items() if was in split}
    try:
        config.data.weights = continued_weights(*names, start=start, end=end, floor=floor, replay=replay)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    return load_config(None, overrides, base=config)


def _place(source: str) -> str:
    """Return where a source's text is; two sources with the same place are the same."""
    where = source_name(source)[1]
    return os.path.realpath(where) if Path(where).exists() else where


def _expect_apart(target: Sequence[str], general: Sequence[str]) -> None:
    """Raise ConfigError if new text is replayed as well, under whatever name, or if two sources have one name."""
    replayed = {_place(source) for source in general}
    names = {source_name(source)[0]: source for source in general}
    for source in target:
        if _place(source) in replayed:
            raise ConfigError(f"--target {source} must not be replayed as well: leave it out of --general")
    for source in target:
        name, where = source_name(source)
        if name in names:
            raise ConfigError(
                f"--target must have another name than {names[name]}, which is replayed: give --target "
                f"new-{name}={where}"
            )


def _settings(run: Path) -> Config:
    """Read a run's settings; for a folder of a Hugging Face model, return defaults without text."""
    if (run / "config.toml").exists() or not (run / CONFIG).exists():
        config = load_config(run / "config.toml")
        config.runs = str(run.parent)
        return config
    config = Config(model=ModelConfig(pretrained=str(run)))
    config.data.sources = []
    return config
