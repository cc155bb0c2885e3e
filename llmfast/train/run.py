"""A run from its settings to its report: `llmfast train` is this."""

import hashlib
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from llmfast._gpus import named
from llmfast._units import in_bytes
from llmfast.data import (
    FIM,
    Batch,
    BestFitRows,
    Dataset,
    Mixed,
    Mixture,
    Rows,
    Tokenizer,
    load_tokenizer,
    prepare,
    unigram_entropy,
)
from llmfast.models import Decoder
from llmfast.models.cost import step_flops
from llmfast.mtp import speculative_generate
from llmfast.optim import FusedAdamW, optimizer_in_backward
from llmfast.train.checkpoint import load_weights, whole_weights
from llmfast.train.config import (
    STATE_DTYPES,
    Config,
    DataConfig,
    config_of,
    decoder_config,
    dump_config,
    expect_resumable,
    expect_same_weights,
    load_config,
)
from llmfast.train.durable import write_whole
from llmfast.train.estimate import estimate_run
from llmfast.train.metrics import peak_memory_bytes, plot_loss, print_table, read_metrics, say
from llmfast.train.objective import FurtherTokens, NextToken, Objective
from llmfast.train.parallel import World
from llmfast.train.schedule import head_weights_at
from llmfast.train.settings import ConfigError
from llmfast.train.trainer import Hooks, Trainer, micro_batch_size

ACCEPTANCE_PROMPTS = 2  # of each source


def train(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    profile: bool = False,
    console: Console | None = None,
) -> Path:
    """Train as `config` says and report; returns the run's folder. Under torchrun, every rank calls it.

    The folder holds config.toml (resolved), tokenizer.json, metrics.jsonl, checkpoints, and at the end
    model.safetensors, loss.png and sample.txt. With `dry_run` the plan is printed and nothing else is done. With
    `profile` a few steps are traced, into trace.json for chrome://tracing or perfetto.dev.

    Raises:
        ConfigError: the settings cannot be met (device, data, shape of the model), or differ from those of the run
            that is resumed in what cannot change.
        FileExistsError: the named run exists, and neither `resume` nor `overwrite` was given.
        FileNotFoundError: there is nothing to resume.
        NonFinite, OSError: see `Trainer.fit`.
    """
    started, t = time.perf_counter(), config.train
    device, dtype = choose_device(config)
    world = World.join(device)
    device = world.device
    console = console or Console(quiet=not world.main)
    run = Path(world.agreed(str(_choose_run(config, resume=resume, overwrite=overwrite) if world.main else "")))
    config.name = run.name
    if resume:
        saved = _saved_settings(run)
        config.data.split = config.data.split or saved.data.split  # chosen by the run, not by its settings
        expect_resumable(saved, config, run, str(run))
    micro_batch_size(config, world)
    if t.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError("train.tensorboard needs tensorboard: pip install tensorboard")
    torch.manual_seed(t.seed)

    say(console, f"reading {', '.join(config.data.sources)} ...")
    data = _prepare(config, str(run / "tokenizer.json") if resume else config.data.tokenizer, partial(say, console))
    config.data.split = dict(data.split)
    mixture = _mixture(config, data)
    model = _model(config, data.tokenizer).to(device)
    if t.init_from and not resume:
        begun = Path(t.init_from)
        load_weights(begun, model, lambda about: _expect_same_weights(about, begun, config, data.tokenizer, console))
    model = model.to(getattr(torch, t.param_dtype))
    torch.manual_seed(t.seed + world.rank)  # what is random in training is not to be the same on all ranks
    say(
        console,
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {device} in {dtype}"
        f"{f', {world.size} ranks, {t.parallel}' if world.size > 1 else ''}; "
        f"{sum(map(len, data.train.values())) * config.data.seq_len / 1e6:.2f} M training tokens, "
        f"{data.tokenizer.vocab_size} kinds; {t.steps} steps of {t.batch_size * config.data.seq_len} tokens",
    )
    print_table(console, mixture.table())
    for name, rows in data.train.items():
        packed = getattr(rows, "rows", rows)
        if isinstance(packed, BestFitRows):
            say(console, f"{name}: {packed}")
    if dry_run:
        peak = in_bytes(estimate_run(config, model.config).peak)
        say(console, f"about {peak} on a GPU, by `llmfast plan memory`; nothing was trained")
        world.leave()
        return run
    order = Mixed(data, mixture)
    hooks = [Shares(order), Utilisation(config, model, world, console), *([Profile(run)] if profile else [])]
    trainer = Trainer(
        model, _objective(config, model, list(data.train)), lambda model: make_optimizer(config, model), order, config,
        run=run, validation=_validation(config, data), world=world, dtype=dtype, console=console, hooks=hooks,
        about={"settings": asdict(config)},
    )  # fmt: skip
    if resume:
        try:
            if world.main and (log := run / "metrics.jsonl").exists():
                read_metrics(log)  # what cannot be gone on with is told of before anything changes
        except ValueError as e:
            raise ConfigError(str(e)) from e
        try:
            trainer.resume(lambda meta: _expect_resumable(meta, config, run))
        except ConfigError:
            raise
        except ValueError as e:
            raise ConfigError(f"data: {e}") from e
    if world.main:
        if overwrite and run.exists():  # only now that everything else has been seen to work
            gone = run.with_name(f".{run.name}.gone")  # at once, or a kill would leave half a run
            shutil.rmtree(gone, ignore_errors=True)
            shutil.rmtree(run.rename(gone), ignore_errors=True)
            if gone.exists():
                say(console, f"not all of the run before could be removed; the rest is in {gone}")
        run.mkdir(parents=True, exist_ok=True)
        if not resume:  # where it was read from
            write_whole(run / "tokenizer.json", data.tokenizer.save)
        trainer.about["tokenizer"] = _digest(run / "tokenizer.json")
        write_whole(run / "config.toml", lambda path: path.write_text(dump_config(config), encoding="utf-8"))
    say(console, f"run folder {run}, ready after {time.perf_counter() - started:.0f} s")

    before = trainer.tokens
    finished = trainer.fit()
    whole = _whole_model(config, trainer, data.tokenizer) if finished else None
    if world.main:
        if whole is None:
            elsewhere = [] if config.runs == Config().runs else ["--set", f"runs={config.runs}"]
            again = shlex.join(["llmfast", "train", "--resume", "--name", run.name, *elsewhere])
            say(console, f"stopped after step {trainer.step} of {t.steps}; go on with: {again}")
            plot_loss(run / "metrics.jsonl", run / "loss.png", unigram_entropy=_held_out_entropy(config, data))
        else:
            _report(config, trainer, whole, data, before, console)
    world.leave()
    return run


def _report(
    config: Config, trainer: Trainer, model: Decoder, data: Dataset, tokens_before: int, console: Console
) -> None:
    """The closing table, and what else a finished run leaves in its folder."""
    from safetensors.torch import save_model

    t, run = config.train, trainer.run
    assert run is not None and trainer.metrics is not None
    save_model(model, str(run / "model.safetensors"))
    guesses: list[tuple[str, str]] = []
    if model.mtp is not None and model.config.targets > 1:
        acceptance, per_pass = _acceptance(config, model, data, trainer.device)
        written = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "acceptance" in line]
        if trainer.step not in written:  # by this run, before it was started again
            trainer.metrics.write(
                step=trainer.step, tokens=trainer.tokens, acceptance=acceptance, tokens_per_pass=per_pass
            )
        guesses = [
            ("guesses accepted, by head", ", ".join(f"{100 * a:.0f} %" for a in acceptance)),
            ("tokens a pass, decoding greedily", f"{per_pass:.2f}"),
        ]
    trainer.metrics.close()
    try:
        text = _sample(config, model, data.tokenizer, trainer.device) if t.sample_tokens > 0 else ""
    except ValueError as e:
        text = ""
        say(console, f"no sample: {e}")
    if text:
        (run / "sample.txt").write_text(text, encoding="utf-8")
    entropy = _held_out_entropy(config, data)
    plot_loss(run / "metrics.jsonl", run / "loss.png", unigram_entropy=entropy)
    lines = read_metrics(run / "metrics.jsonl")
    validation = [line["validation_mean"] for line in lines if "validation_mean" in line]
    speed = (trainer.tokens - tokens_before) / max(trainer.seconds, 1e-9)
    print_table(
        console,
        [
            ("validation loss, first", f"{validation[0]:.3f} nats a token"),
            ("validation loss, last", f"{validation[-1]:.3f}"),
            ("unigram entropy of the same text", f"{entropy:.3f}"),
            *(_changes(lines) if t.init_from else []),
            *guesses,
            ("tokens a second", f"{speed:,.0f}" if trainer.seconds else "-"),
            ("peak memory", in_bytes(peak_memory_bytes(trainer.device))),
            ("steps skipped", f"{trainer.skipped}"),
            ("in the run folder", ", ".join(sorted(p.name for p in run.iterdir()))),
        ],
    )
    if text:
        console.rule("a sample")
        say(console, text)


class Shares(Hooks):
    """Adds to each line what each source's part of the mixture is by then."""

    def __init__(self, data: Mixed) -> None:
        self._data = data

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        values["shares"] = self._data.mixture.shares(trainer.step / trainer.config.train.steps)


class Utilisation(Hooks):
    """Adds to each line the share of the GPUs' peak rate that the model's products make up.

    That is MFU (Chowdhery et al. 2022, arXiv:2204.02311), by the FLOPs that `llmfast.plan` counts.
    """

    def __init__(self, config: Config, model: Decoder, world: World, console: Console) -> None:
        name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
        gpu = named(name)
        if name and gpu is None:
            say(console, f"no MFU is logged: the peak rate of {name} is not known")
        self._peak = gpu.tensor_cores * world.size if gpu else 0.0
        self._flops = step_flops(model.config, 1, config.data.seq_len).flops  # a token

    def on_log(self, trainer: Trainer, values: dict[str, Any]) -> None:
        if self._peak:
            values["mfu"] = values["tokens_per_s"] * self._flops / self._peak


class Profile(Hooks):
    """Traces steps 3 to 6, after what the first ones set up."""

    def __init__(self, run: Path) -> None:
        self._file, self._profile, self._begun = run / "trace.json", torch.profiler.profile(), 0

    def before_step(self, trainer: Trainer) -> None:
        self._begun += 1
        if self._begun == 3:
            self._profile.start()

    def after_step(self, trainer: Trainer) -> None:
        if self._begun == 6 and trainer.world.main:
            self._profile.stop()
            self._profile.export_chrome_trace(str(self._file))
            trainer.say(f"profile of steps 3 to 6: {self._file}")


def _objective(config: Config, model: Decoder, sources: list[str]) -> Objective:
    m, K = config.model, model.config.targets
    if m.mtp == "none":
        return NextToken(sources)
    return FurtherTokens(
        K, lambda step: head_weights_at(step, K, config), shared=m.mtp == "shared",
        detached=m.mtp == "sequential" and m.mtp_detach,
    )  # fmt: skip


def _validation(config: Config, data: Dataset) -> dict[str, Callable[[], Iterable[Batch]]]:
    t = config.train
    return {
        name: partial(evaluation_batches, rows, t.eval_rows, t.micro_batch_size or t.batch_size)
        for name, rows in data.validation.items()
    }


def evaluation_batches(rows: Rows, most: int, batch_size: int) -> Iterator[Batch]:
    count = min(most, len(rows))
    for start in range(0, count, batch_size):
        yield rows.batch(list(range(start, min(start + batch_size, count))))


def _whole_model(config: Config, trainer: Trainer, tokenizer: Tokenizer) -> Decoder | None:
    """On the first rank, whatever the ranks share; all must call."""
    if trainer.world.size == 1:
        return trainer.model  # type: ignore[return-value]
    weights = whole_weights(trainer.module)
    if not trainer.world.main:
        return None
    model = _model(config, tokenizer).to(trainer.device, getattr(torch, config.train.param_dtype))
    model.load_state_dict(weights)
    return model


def resumed_config(run: Path, overrides: list[str]) -> Config:
    """Read the settings of a run, wherever it has been moved to, with overrides of what may change.

    Raises:
        ConfigError: the run has no readable settings, or an override changes what a resumed run keeps.
    """
    config = _saved_settings(run, overrides)
    config.name, config.runs = run.name, str(run.parent)
    expect_resumable(_saved_settings(run), config, run, str(run))
    return config


def _saved_settings(run: Path, overrides: Iterable[str] = ()) -> Config:
    # A run that does not say which column is the text has read no files with columns.
    return load_config(run / "config.toml", overrides, base=Config(data=DataConfig(text_column="")))


def _expect_resumable(meta: Mapping[str, Any], config: Config, run: Path) -> None:
    """Check the settings against those that a checkpoint was written with: files beside it may have been edited."""
    about, done = meta.get("about", {}), meta["step"]
    if "settings" in about:  # by earlier versions nothing was written down
        found = f"the checkpoint in {run}"
        expect_resumable(config_of(about["settings"], found), config, run, found)
    _expect_own_tokenizer(about, run)
    if config.train.steps < done:
        raise ConfigError(f"train.steps must be at least the {done} that {run} has done; got {config.train.steps}")


def _expect_same_weights(
    about: Mapping[str, Any], run: Path, config: Config, tokenizer: Tokenizer, console: Console
) -> None:
    """Check that weights of `run` mean what they meant there. Shapes do not show heads or tokenizers."""
    if "settings" in about:
        before = config_of(about["settings"], f"the checkpoint in {run}")
    elif (run / "config.toml").exists():
        before = _saved_settings(run)
    else:  # of a program with its own model
        say(console, f"{run} does not say how its weights were trained: only their shapes are compared")
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
    if _content(theirs) != _content(tokenizer):
        raise ConfigError(
            f"data.tokenizer must be that of the weights in train.init_from={run}, of {theirs.vocab_size} ids; got "
            f"{config.data.tokenizer!r}, of {tokenizer.vocab_size} others. Give data.tokenizer={file}"
        )


def _expect_own_tokenizer(about: Mapping[str, Any], run: Path) -> None:
    if about.get("tokenizer", digest := _digest(run / "tokenizer.json")) != digest:
        raise ConfigError(
            f"{run / 'tokenizer.json'} is not the tokenizer that {run} was trained with: its SHA-256 was "
            f"{about['tokenizer']}, and is {digest}. Put the file back"
        )


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _content(tokenizer: Tokenizer) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(file := Path(folder) / "tokenizer.json")
        return file.read_bytes()


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device to train on, and autocast's dtype there."""
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, dtype=torch.float32, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        raise ConfigError(f"train.device = {config.train.device!r} is not usable: {str(e).splitlines()[0]}") from e
    low = config.train.dtype == "bfloat16" or (config.train.dtype == "auto" and device.type == "cuda")
    return device, torch.bfloat16 if low else torch.float32


def make_optimizer(config: Config, model: torch.nn.Module) -> FusedAdamW:
    """AdamW that decays matrices and leaves gains alone."""
    o = config.optimizer
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    extras: dict[str, Any] = {
        "max_grad_norm": None if o.in_backward else o.max_grad_norm or math.inf,  # which measures all the same
        "master_weights": o.master_weights or None,
        "state_dtype": STATE_DTYPES[o.state_dtype],
    }
    optimizer = FusedAdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, **extras)
    if o.in_backward:
        optimizer_in_backward(model, optimizer)
    return optimizer


def _choose_run(config: Config, *, resume: bool, overwrite: bool) -> Path:
    """The run's folder; refuses to touch one that exists, unless told how."""
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


def _prepare(config: Config, tokenizer: str, say: Callable[[str], None]) -> Dataset:
    d = config.data
    options: dict[str, Any] = {"packing": d.packing, "fim_unit": d.fim_unit, "text_column": d.text_column}
    options |= {"split": d.split, "say": say}
    if d.fim_rate > 0:
        how: dict[str, Any] = {"level": d.fim_level, "spm_variant": d.fim_spm_variant, "loss": d.fim_loss}
        options["fim"] = partial(FIM, rate=d.fim_rate, spm_rate=d.fim_spm_rate, seed=config.train.seed, **how)
    try:
        return prepare(
            d.sources, tokenizer=tokenizer, vocab_size=d.vocab_size, seq_len=d.seq_len, held_out=d.held_out, **options
        )
    except (ValueError, FileNotFoundError) as e:
        raise ConfigError(f"data: {e}") from e


def _model(config: Config, tokenizer: Tokenizer) -> Decoder:
    try:
        return Decoder(decoder_config(config, tokenizer.vocab_size))
    except ValueError as e:
        raise ConfigError(f"model: {e}") from e


def _mixture(config: Config, data: Dataset) -> Mixture:
    t = config.train
    rows = {name: len(rows) for name, rows in data.train.items()}
    try:
        return Mixture(rows, config.data.weights, total=t.steps * t.batch_size, seed=t.seed)
    except ValueError as e:
        raise ConfigError(f"data.weights: {e}") from e


def _changes(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Each source's validation loss before and after."""
    first, *_, last = [line["validation"] for line in lines if "validation" in line]
    return [
        (f"... of {name}", f"{first[name]:.3f} -> {x:.3f}, {abs(x - first[name]):.3f} {_verdict(first[name], x)}")
        for name, x in last.items()
    ]


def _verdict(before: float, after: float) -> str:
    return "better" if after <= before else "worse: forgotten"


def _held_out_entropy(config: Config, data: Dataset) -> float:
    """Of the labels that validation looks at: the loss of a model that knows frequencies and no context."""
    t = config.train
    labels = [
        batch.labels.numpy().ravel()
        for rows in data.validation.values()
        for batch in evaluation_batches(rows, t.eval_rows, t.batch_size)
    ]
    return unigram_entropy(np.concatenate(labels), data.tokenizer.vocab_size)


def _acceptance(config: Config, model: Decoder, data: Dataset, device: torch.device) -> tuple[list[float], float]:
    """Of greedy self-speculative decoding after half a row of held-out text: accepted / guessed of each further head,
    and tokens a pass. Of text the model makes itself: one that repeats itself is easy to guess."""
    half = config.data.seq_len // 2
    count = min(config.data.seq_len - half, 64)
    guessed, accepted, passes, made = [0] * (model.config.targets - 1), [0] * (model.config.targets - 1), 0, 0
    model.eval()
    for rows in data.validation.values():
        for i in range(min(ACCEPTANCE_PROMPTS, len(rows))):
            prompt = rows.batch([i]).tokens[0, :half].to(device)
            found = speculative_generate(model, prompt, count)
            guessed = [a + b for a, b in zip(guessed, found.guessed)]
            accepted = [a + b for a, b in zip(accepted, found.accepted)]
            passes, made = passes + found.passes, made + count
    return [a / max(1, g) for a, g in zip(accepted, guessed)], made / passes


def _sample(config: Config, model: Decoder, tokenizer: Tokenizer, device: torch.device) -> str:
    t = config.train
    prompt = tokenizer.encode(t.sample_prompt)
    ids = torch.as_tensor(prompt if len(prompt) else [tokenizer.eot_id], dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(t.seed)
    model.eval()
    return tokenizer.decode(
        model.generate(ids, t.sample_tokens, context=config.data.seq_len, generator=generator).cpu().numpy()
    )
