"""A run from its settings to its closing table: what `llmfast train` does."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from llmfast._gpus import named
from llmfast._units import in_bytes, short
from llmfast.data import BestFitRows, Dataset, Mixed
from llmfast.models import Decoder
from llmfast.models.cost import step_flops
from llmfast.train.checkpoint import load_weights
from llmfast.train.config import Config, decoder_config, dump_config, expect_resumable
from llmfast.train.durable import make_folder, remove, write_whole
from llmfast.train.earlier import (
    digest,
    expect_checkpoint_resumable,
    expect_weights_usable,
    resume_command,
    saved_settings,
)
from llmfast.train.estimate import estimate_run, is_modelled
from llmfast.train.finish import finish, held_out_entropy, whole_model
from llmfast.train.metrics import outliving, plot_loss, print_table, read_metrics, say
from llmfast.train.parallel import World, micro_batch_size, shard_count
from llmfast.train.parts import (
    choose_device,
    doubts,
    make_mixture,
    make_model,
    make_objective,
    make_optimizer,
    make_validation,
    prepare_data,
    settle,
)
from llmfast.train.pretrained import copy_files, open_pretrained
from llmfast.train.settings import ConfigError
from llmfast.train.signals import handled
from llmfast.train.trainer import Hooks, Trainer


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    profile: bool = False,
    console: Console | None = None,
) -> Path:
    """Train as `config` says and report; return the run's folder. Under torchrun, every rank calls it.

    The folder holds config.toml (resolved), tokenizer.json, metrics.jsonl, checkpoints, and at the end
    model.safetensors, loss.png and sample.txt; with `model.pretrained` also all else that transformers needs. With
    `dry_run` the plan is printed and nothing else is done. With `profile` a few steps are traced, into trace.json for
    chrome://tracing or perfetto.dev.

    Raises:
        ConfigError: the settings cannot be met (device, data, shape of the model), or differ from those of the run
            that is resumed in what cannot change.
        FileExistsError: the named run exists, and neither `resume` nor `overwrite` was given.
        FileNotFoundError: there is nothing to resume.
        KeyboardInterrupt: SIGINT, SIGTERM or SIGHUP ended the run before its last step. It can be resumed, unless that
            was before the first step: then no folder is left.
        NonFinite, OSError: see `Trainer.fit`.
    """
    device, dtype = choose_device(config)
    world = World.join(device)
    console = console or Console(quiet=not world.main)
    with outliving(console):
        return _train(config, world, dtype, console, resume=resume, overwrite=overwrite, dry=dry_run, profile=profile)


def _train(
    config: Config,
    world: World,
    dtype: torch.dtype,
    console: Console,
    *,
    resume: bool,
    overwrite: bool,
    dry: bool,
    profile: bool,
) -> Path:
    started, t = time.perf_counter(), config.train
    run = Path(world.agreed(str(_choose_run(config, resume=resume, overwrite=overwrite) if world.main else "")))
    config.name = run.name
    if resume:
        saved = saved_settings(run)
        config.data.split = config.data.split or saved.data.split  # the run may have chosen it, not its settings
        expect_resumable(saved, config, run, str(run))
    micro_batch_size(config, world)  # only to raise errors, like everything up to the seed
    shard_count(config, world.size)
    if not config.model.pretrained:
        decoder_config(config, config.data.vocab_size)
    config.optimizer.make([torch.nn.Parameter(torch.zeros(1, dtype=torch.float32, device="cpu"))])
    if t.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("train.tensorboard needs tensorboard: pip install tensorboard")
    torch.manual_seed(t.seed)

    source = run if resume else Path(config.model.pretrained)
    pretrained = open_pretrained(config, source, weights=not resume) if config.model.pretrained else None
    say(console, f"reading {', '.join(config.data.sources)} ...")
    tokenizer = str(source / "tokenizer.json") if resume or pretrained is not None else config.data.tokenizer
    data = prepare_data(config, tokenizer, partial(say, console))
    settle(config, data)
    order = Mixed(data, make_mixture(config, data))
    model = pretrained or _model_to_train(config, data, world, None if resume else partial(say, console))
    model.to(world.device)
    torch.manual_seed(t.seed + world.rank)  # random numbers in training must differ between ranks
    _print_plan(config, data, order, model, f"{world.device} in {dtype}", world, console)
    if dry:
        say(console, f"{_memory_in_words(config, model, world.size)}nothing was trained")
        world.leave()
        return run
    trainer = Trainer(
        model,
        make_objective(config, model, list(data.train)),
        partial(make_optimizer, config),
        order,
        config,
        run=run,
        validation=make_validation(config, data),
        world=world,
        dtype=dtype,
        console=console,
        hooks=_hooks(config, model, order, world, console, run if profile else None),
        about={"settings": asdict(config)},
    )
    if resume:
        _resume(trainer, config, run)
    if world.main and overwrite and run.exists():  # only now, after everything else has worked
        _remove(run, console)
    with handled(signal.default_int_handler), _interruptible(trainer, config, run, console, resume=resume):
        if world.main:
            _write_settings(trainer, data, run, resume=resume)
        say(console, f"run folder {run}, {_begun(trainer, resume)}ready after {time.perf_counter() - started:.0f} s")
        finished = _fit(trainer, config, data, console)
    world.leave()
    if not finished:
        raise KeyboardInterrupt
    return run


def _begun(trainer: Trainer, resume: bool) -> str:
    if not resume:
        return ""
    if trainer.step >= trainer.config.train.steps:
        return f"all {trainer.step} steps were done before: more need a larger train.steps; "
    return f"going on after step {trainer.step}, "


def _hooks(
    config: Config, model: nn.Module, order: Mixed, world: World, console: Console, trace: Path | None
) -> list[Hooks]:
    hooks: list[Hooks] = [Shares(order)]
    if isinstance(model, Decoder):
        hooks.append(Utilisation(config, model, world, console))
    return [*hooks, Profile(trace)] if trace is not None else hooks


def _model_to_train(config: Config, data: Dataset, world: World, say: Any) -> Decoder:
    """Make the model, with the weights of `train.init_from` unless the run is resumed: then `say` is None."""
    t = config.train
    model = make_model(config, data.tokenizer).to(world.device)
    if t.init_from and say is not None:
        begun = Path(t.init_from)
        load_weights(begun, model, lambda about: expect_weights_usable(about, begun, config, data.tokenizer, say))
    return model.to(getattr(torch, t.param_dtype))


def _print_plan(
    config: Config, data: Dataset, order: Mixed, model: nn.Module, where: str, world: World, console: Console
) -> None:
    t, row = config.train, config.data.seq_len
    say(
        console,
        f"{short(sum(p.numel() for p in model.parameters()))} parameters on {where}"
        f"{f', {world.size} ranks, {t.parallel}' if world.size > 1 else ''}; "
        f"{short(sum(map(len, data.train.values())) * row)} training tokens, "
        f"vocabulary of {data.tokenizer.vocab_size}; {t.steps} steps of {t.batch_size * row} tokens",
    )
    print_table(console, order.mixture.table())
    say(
        console,
        f"a row is {row} tokens, and one more as the last target; epochs are how often the whole run reads each row of "
        "a source",
    )
    for doubt in doubts(config, order.mixture, sum(p.numel() for p in model.parameters())):
        say(console, f"warning: {doubt}")
    for name, rows in data.train.items():
        packed = getattr(rows, "rows", rows)
        if isinstance(packed, BestFitRows):
            say(console, f"{name}: {packed}")


def _memory_in_words(config: Config, model: nn.Module, gpus: int) -> str:
    if not isinstance(model, Decoder):
        return ""
    if not is_modelled(config, gpus):
        return "what train.vocab_parallel takes on several GPUs is not modelled; "
    peak = in_bytes(estimate_run(config, model.config, gpus=gpus).peak)
    return f"{'each' if gpus > 1 else 'a'} GPU would hold about {peak}, by `llmfast plan memory`; "


def _resume(trainer: Trainer, config: Config, run: Path) -> None:
    """Go on from the newest checkpoint; errors are found before anything changes."""
    try:
        if trainer.world.main and (log := run / "metrics.jsonl").exists():
            read_metrics(log)
    except ValueError as e:
        raise ConfigError(str(e)) from e
    try:
        trainer.resume(lambda meta: expect_checkpoint_resumable(meta, config, run))
    except ConfigError:
        raise
    except ValueError as e:
        raise ConfigError(f"data: {e}") from e


def _remove(run: Path, console: Console) -> None:
    """Remove a run, first of all its name: a kill must not leave half a run.

    What is elsewhere, behind a link or a mount point, stays there: only what it holds is removed, config.toml last.
    """
    gone = run.with_name(f".{run.name}.gone")
    remove(gone)
    if elsewhere := _is_elsewhere(run):
        gone = run / gone.name
        remove(gone)
        gone.mkdir(exist_ok=True)
        for entry in sorted({*run.iterdir()} - {gone}, key=lambda entry: entry.name == "config.toml"):
            try:
                entry.rename(gone / entry.name)
            except OSError:
                remove(entry)
    else:
        run.rename(gone)
    remove(gone)
    if os.path.lexists(gone) or (elsewhere and any(run.iterdir())):
        rest = gone if os.path.lexists(gone) else run
        say(console, f"not all of the run before could be removed; the rest is in {rest}")


def _is_elsewhere(run: Path) -> bool:
    return run.is_symlink() or os.path.ismount(run)


def _write_settings(trainer: Trainer, data: Dataset, run: Path, *, resume: bool) -> None:
    make_folder(run)
    if not resume:  # a resumed run has read its tokenizer from there
        write_whole(run / "tokenizer.json", data.tokenizer.save)
        if trainer.config.model.pretrained:
            copy_files(Path(trainer.config.model.pretrained), run)
    trainer.about["tokenizer"] = digest(run / "tokenizer.json")
    write_whole(run / "config.toml", lambda path: path.write_text(dump_config(trainer.config), encoding="utf-8"))


@contextmanager
def _interruptible(trainer: Trainer, config: Config, run: Path, console: Console, *, resume: bool) -> Iterator[None]:
    """Let an interrupt before a new run's first step leave nothing behind, and a later one say how to go on."""
    try:
        yield
    except KeyboardInterrupt as e:
        if not trainer.world.main:
            raise
        if trainer.step == 0 and not resume:
            if run.exists():
                _remove(run, console)
            done = "emptied" if _is_elsewhere(run) else "removed"
            raise KeyboardInterrupt(f"no step was taken, and {run} was {done}") from e
        if any(run.glob("checkpoint-*")):
            raise KeyboardInterrupt(
                f"go on from the last checkpoint with: {resume_command(config.name, config.runs)}"
            ) from e
        raise KeyboardInterrupt(f"{run} has no checkpoint yet: start it again with --overwrite") from e


def _fit(trainer: Trainer, config: Config, data: Dataset, console: Console) -> bool:
    """Train to the last step and report, or say how to go on after a signal; return True if it was the last step."""
    before, run = trainer.tokens, trainer.run
    assert run is not None
    finished = trainer.fit()
    whole = whole_model(config, trainer, data.tokenizer) if finished else None
    if not trainer.world.main:
        return finished
    if whole is not None:
        finish(config, trainer, whole, data, before, console)
        return True
    again = resume_command(config.name, config.runs)
    say(console, f"stopped after step {trainer.step} of {config.train.steps}; go on with: {again}")
    plot_loss(run / "metrics.jsonl", run / "loss.png", unigram_entropy=held_out_entropy(config, data))
    return False


def _choose_run(config: Config, *, resume: bool, overwrite: bool) -> Path:
    """Choose the run's folder; refuse to touch one that exists, unless told how."""
    runs = Path(config.runs)
    if not config.name:
        number = 1
        while (runs / (name := "demo" if number == 1 else f"demo-{number}")).exists():
            number += 1
        config.name = name
    run = runs / config.name
    if resume and not (run / "config.toml").exists():
        raise FileNotFoundError(f"nothing to resume: {run} holds no run")
    if run.exists() and not resume and any(run.iterdir()):
        if not overwrite:
            raise FileExistsError(f"{run} exists: go on with --resume, replace it with --overwrite, or choose a --name")
        if not (run / "config.toml").exists():
            raise FileExistsError(f"{run} exists and is not a run of llmfast; --overwrite will not remove it")
    return run


class Shares(Hooks):
    """A hook that adds to each line of the log the share of each source in the mixture at that step."""

    def __init__(self, data: Mixed) -> None:
        self._data = data

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        values["shares"] = self._data.mixture.shares(trainer.step / trainer.config.train.steps)


class Utilisation(Hooks):
    """A hook that adds to each line of the log the share of the GPUs' peak rate that the model's products reach.

    That is MFU (Chowdhery et al. 2022, arXiv:2204.02311), by the FLOPs of `step_flops`.
    """

    def __init__(self, config: Config, model: Decoder, world: World, console: Console) -> None:
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        gpu = named(name)
        if name and gpu is None:
            say(console, f"no MFU is logged: the peak rate of {name} is not known")
        self._peak = gpu.tensor_cores * world.size if gpu else 0.0
        self._flops = step_flops(model.config, 1, config.data.seq_len).flops  # per token

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        if self._peak:
            values["mfu"] = values["tokens_per_s"] * self._flops / self._peak


class Profile(Hooks):
    """A hook that traces steps 3 to 6 on the first rank, because the first two also set things up.

    Of a run with fewer steps left, it traces the last four.
    """

    def __init__(self, run: Path) -> None:
        self._file, self._profile = run / "trace.json", torch.profiler.profile()
        self._begun = self._first = self._last = 0

    def before_step(self, trainer: Trainer) -> None:
        if self._begun == 0:
            self._last = min(6, trainer.config.train.steps - trainer.step)
            self._first = max(1, self._last - 3)
        self._begun += 1
        if self._begun == self._first and trainer.world.main:
            self._profile.start()

    def after_step(self, trainer: Trainer) -> None:
        if self._begun == self._last and trainer.world.main:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._file))
            trainer.say(f"profile of steps {self._first} to {self._last}: {self._file}")
