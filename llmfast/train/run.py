"""A run from its settings to its report: `llmfast train` is this."""

import math
import shlex
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from llmfast.data import Dataset, Mixture, Tokenizer, prepare, unigram_entropy
from llmfast.models import Decoder, DecoderConfig
from llmfast.mtp import speculative_generate
from llmfast.optim import FusedAdamW
from llmfast.train.checkpoint import load_checkpoint, load_weights
from llmfast.train.config import Config, ConfigError, dump_config, load_config
from llmfast.train.loop import Trainer, evaluation_batches
from llmfast.train.metrics import MetricsFile, peak_memory_bytes, plot_loss, print_table, read_metrics, say

ACCEPTANCE_PROMPTS = 2  # of each source


def train(config: Config, *, resume: bool = False, overwrite: bool = False, console: Console | None = None) -> Path:
    """Train as `config` says and report; returns the run's folder.

    The folder holds config.toml (resolved), tokenizer.json, metrics.jsonl, checkpoint-<step>, loss.png and sample.txt.

    Raises:
        ConfigError: the settings cannot be met (device, data, shape of the model), or differ from those of the run
            that is resumed in what cannot change.
        FileExistsError: the named run exists, and neither `resume` nor `overwrite` was given.
        FileNotFoundError: there is nothing to resume.
    """
    console = console or Console()
    started = time.perf_counter()
    device, dtype = choose_device(config)
    run = _choose_run(config, resume=resume, overwrite=overwrite)
    torch.manual_seed(config.train.seed)

    say(console, f"reading {', '.join(config.data.sources)} ...")
    data = _prepare(config, str(run / "tokenizer.json") if resume else config.data.tokenizer)
    model = _model(config, data.tokenizer).to(device)
    optimizer = make_optimizer(config, model)
    entropy = _held_out_entropy(config, data)
    mixture = _mixture(config, data)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "sequences": 0}
    if resume:
        state = load_checkpoint(run, model, optimizer)
        mixture = _resumed(mixture, state)
    elif config.train.init_from:
        load_weights(Path(config.train.init_from), model)
    if overwrite and run.exists():  # only now that everything else has been seen to work
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.toml").write_text(dump_config(config))
    data.tokenizer.save(run / "tokenizer.json")

    t = config.train
    say(
        console,
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters on {device} in {dtype}; "
        f"{sum(map(len, data.train.values())) * config.data.seq_len / 1e6:.2f} M training tokens, "
        f"{data.tokenizer.vocab_size} kinds; {t.steps} steps of {t.batch_size * t.accumulate * config.data.seq_len} "
        "tokens",
    )
    print_table(console, mixture.table())
    say(console, f"run folder {run}, ready after {time.perf_counter() - started:.0f} s")
    metrics = MetricsFile(run / "metrics.jsonl", resume_at=state["step"])
    trainer = Trainer(
        config, model, optimizer, data, mixture, run=run, device=device, dtype=dtype, console=console, metrics=metrics,
        step=state["step"], tokens=state["tokens"], sequences=state["sequences"],
    )  # fmt: skip
    finished = trainer.fit()
    guesses: list[tuple[str, str]] = []
    if finished and model.mtp is not None and model.config.targets > 1:
        acceptance, per_pass = _acceptance(config, model, data, device)
        if trainer.step > state["step"]:  # else it is written there already
            metrics.write(step=trainer.step, tokens=trainer.tokens, acceptance=acceptance, tokens_per_pass=per_pass)
        guesses = [
            ("guesses accepted, by head", ", ".join(f"{100 * a:.0f} %" for a in acceptance)),
            ("tokens a pass, decoding greedily", f"{per_pass:.2f}"),
        ]
    metrics.close()

    plot_loss(run / "metrics.jsonl", run / "loss.png", unigram_entropy=entropy)
    if not finished:
        elsewhere = [] if config.runs == Config().runs else ["--set", f"runs={config.runs}"]
        again = shlex.join(["llmfast", "train", "--resume", "--name", run.name, *elsewhere])
        say(console, f"stopped after step {trainer.step} of {t.steps}; go on with: {again}")
        return run
    speed = (trainer.tokens - state["tokens"]) / max(trainer.seconds, 1e-9)
    lines = read_metrics(run / "metrics.jsonl")
    validation = [line["validation_mean"] for line in lines if "validation_mean" in line]
    print_table(
        console,
        [
            ("validation loss, first", f"{validation[0]:.3f} nats a token"),
            ("validation loss, last", f"{validation[-1]:.3f}"),
            ("unigram entropy of the same text", f"{entropy:.3f}"),
            *(_changes(lines) if t.init_from else []),
            *guesses,
            ("tokens a second", f"{speed:,.0f}" if trainer.seconds else "-"),
            ("peak memory", f"{peak_memory_bytes(device) / 2**20:,.0f} MiB"),
            ("steps skipped", f"{int(trainer.skipped.item())}"),
            ("in the run folder", ", ".join(sorted(p.name for p in run.iterdir()))),
        ],
    )
    if t.sample_tokens > 0:
        text = _sample(config, model, data.tokenizer, device)
        (run / "sample.txt").write_text(text)
        console.rule("a sample")
        say(console, text)
    return run


def resumed_config(run: Path, overrides: list[str]) -> Config:
    """The settings a run was started with, with overrides of what may change.

    Raises:
        ConfigError: the run has no readable settings, or an override changes the model or the data.
    """
    saved = load_config(run / "config.toml")
    config = load_config(run / "config.toml", overrides)
    for section in ("model", "data"):
        before, after = asdict(getattr(saved, section)), asdict(getattr(config, section))
        for key in before:
            if before[key] != after[key] and key != "weights":  # those of sequences to come
                raise ConfigError(f"{section}.{key} cannot change on --resume; {run} has {before[key]!r}")
    return config


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """The device to train on, and autocast's dtype there."""
    name = config.train.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
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
    max_grad_norm = o.max_grad_norm or math.inf  # which measures all the same
    return FusedAdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, max_grad_norm=max_grad_norm)


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
    if run.exists() and not resume:
        if not overwrite:
            raise FileExistsError(f"{run} exists: go on with --resume, replace it with --overwrite, or choose a --name")
        if not (run / "config.toml").exists():
            raise FileExistsError(f"{run} exists and is not a run of llmfast; --overwrite will not remove it")
    return run


def _prepare(config: Config, tokenizer: str) -> Dataset:
    d = config.data
    try:
        return prepare(d.sources, tokenizer=tokenizer, vocab_size=d.vocab_size, seq_len=d.seq_len, held_out=d.held_out)
    except (ValueError, FileNotFoundError) as e:
        raise ConfigError(f"data: {e}") from e


def _model(config: Config, tokenizer: Tokenizer) -> Decoder:
    try:
        return Decoder(DecoderConfig(tokenizer.vocab_size, **asdict(config.model)))
    except ValueError as e:
        raise ConfigError(f"model: {e}") from e


def _mixture(config: Config, data: Dataset) -> Mixture:
    t = config.train
    rows = {name: len(rows) for name, rows in data.train.items()}
    try:
        return Mixture(rows, config.data.weights, total=t.steps * t.accumulate * t.batch_size, seed=t.seed)
    except ValueError as e:
        raise ConfigError(f"data.weights: {e}") from e


def _resumed(mixture: Mixture, state: dict[str, Any]) -> Mixture:
    """What was consumed stays what it was; from there on the mixture is this one."""
    try:
        return mixture.resumed(state["mixture"], state["sequences"])
    except ValueError as e:
        raise ConfigError(f"data: {e}") from e
    except KeyError as e:
        raise ConfigError(f"the checkpoint was made by an older version: it has no {e}") from e


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
