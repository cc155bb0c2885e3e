"""The parts of a run, made as its settings say: device, data, model, optimizer, objective and validation."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch

from llmfast._units import short
from llmfast.data import FIM, Batch, Dataset, Mixture, Rows, Tokenizer, prepare
from llmfast.models import Decoder
from llmfast.optim import FusedOptimizer, optimizer_in_backward
from llmfast.optim.scaling import optimal_lr
from llmfast.train.config import SCHEMA, Config, decoder_config
from llmfast.train.objective import FurtherTokens, NextToken, Objective
from llmfast.train.pretrained import OwnLoss
from llmfast.train.schedule import head_weights_at, highest_lr
from llmfast.train.settings import ConfigError

LARGE = 200_000_000  # from so many parameters on, the default learning rates, made for the demo, may be too high
MOST_EPOCHS = 4  # up to so many passes teach about as much as new text


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    """Choose the device to train on, and autocast's dtype there."""
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


def prepare_data(config: Config, tokenizer: str, say: Callable[[str], None]) -> Dataset:
    """Read the sources and cut them into rows."""
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


def settle(config: Config, data: Dataset) -> None:
    """Note in the settings what depends on the text: how it was split, and the steps that `train.epochs` takes."""
    t = config.train
    config.data.split = dict(data.split)
    if t.epochs:
        t.steps = max(1, math.ceil(t.epochs * sum(map(len, data.train.values())) / t.batch_size))
        t.epochs = 0.0  # a resumed run has the steps


def doubts(config: Config, mixture: Mixture, parameters: int) -> Iterator[str]:
    """Yield warnings about the run's length, and about the learning rate of a large or pretrained model."""
    yield from _doubts_of_rate(config, parameters)
    o, t = config.optimizer, config.train
    for name, epochs in mixture.epochs().items():
        if epochs > MOST_EPOCHS:
            yield (
                f"the run reads {name} {epochs:.1f} times. After {MOST_EPOCHS} passes, repeated text teaches less "
                "and less (Muennighoff et al. 2023, arXiv:2305.16264): take more text or fewer steps"
            )
    if t.steps <= o.warmup_steps:
        yield (
            f"the learning rate never falls: optimizer.warmup_steps={o.warmup_steps} is not below train.steps={t.steps}"
        )


def _doubts_of_rate(config: Config, parameters: int) -> Iterator[str]:
    """Yield a warning if a rate at or above the default is too high. Limits known for adamw scale with the defaults."""
    o, t, rates = config.optimizer, config.train, SCHEMA.settings["optimizer.lr"].by
    default = rates[o.name]
    if o.lr < default:
        return
    known = rates.first  # adamw's
    other = "" if default == known else f", and {o.name} as large a share of its default"
    if config.model.pretrained:
        yield (
            f"optimizer.lr={o.lr:g} is for small models that are trained from scratch, and can undo what "
            f"{config.model.pretrained} has learned. Continued pretraining usually takes 1e-5 to 1e-4 with adamw"
            f"{other}: try optimizer.lr={2e-5 / known * default:.2g}"
        )
        return
    tokens = t.steps * t.batch_size * config.data.seq_len
    best = optimal_lr(6 * parameters * tokens) / known * default
    if parameters >= LARGE and o.lr > 1.5 * best:
        yield (
            f"optimizer.lr={o.lr:g} is for small models: with {short(parameters)} parameters and {short(tokens)} "
            f"tokens adamw takes less by DeepSeek LLM's law{other}: try optimizer.lr={best:.2g}"
        )


def make_mixture(config: Config, data: Dataset) -> Mixture:
    """Order all rows by the sources' weights over the run."""
    t = config.train
    rows = {name: len(rows) for name, rows in data.train.items()}
    try:
        return Mixture(rows, config.data.weights, total=t.steps * t.batch_size, seed=t.seed)
    except ValueError as e:
        raise ConfigError(f"data.weights: {e}") from e


def make_model(config: Config, tokenizer: Tokenizer) -> Decoder:
    """Make the decoder, with random weights."""
    return Decoder(decoder_config(config, tokenizer.vocab_size))


def make_optimizer(config: Config, model: torch.nn.Module) -> FusedOptimizer:
    """Make the optimizer that the settings name."""
    o = config.optimizer
    limit = None if o.in_backward else o.max_grad_norm or math.inf  # infinity still measures the norm
    optimizer = o.make(model.parameters(), max_grad_norm=limit)
    for group in optimizer.param_groups:
        if "lr_max" in group:
            group["lr_max"] = highest_lr(config)
    if o.in_backward:
        optimizer_in_backward(model, optimizer)
    return optimizer


def make_objective(config: Config, model: Any, sources: list[str]) -> Objective:
    """Make the objective that the model's heads are trained by."""
    if not isinstance(model, Decoder):
        return OwnLoss()
    m, K = config.model, model.config.targets
    if m.mtp == "none":
        return NextToken(sources)
    return FurtherTokens(
        K,
        lambda step: head_weights_at(step, K, config),
        shared=m.mtp == "shared",
        detached=m.mtp == "sequential" and m.mtp_detach,
    )


def make_validation(config: Config, data: Dataset) -> dict[str, Callable[[], Iterable[Batch]]]:
    """Return, by source, a function that begins its validation batches."""
    t = config.train
    return {
        name: partial(evaluation_batches, rows, t.eval_rows, t.micro_batch_size or t.batch_size)
        for name, rows in data.validation.items()
    }


def evaluation_batches(rows: Rows, most: int, batch_size: int) -> Iterator[Batch]:
    """Yield the first `most` rows in batches."""
    count = min(most, len(rows))
    for start in range(0, count, batch_size):
        yield rows.batch(list(range(start, min(start + batch_size, count))))
