"""Memory that a run with given settings takes, estimated before it begins, and ways to take less."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from llmfast._gpus import GB
from llmfast.models import DecoderConfig
from llmfast.models.memory import FITS, MemoryEstimate, Precision, estimate_memory, verdict
from llmfast.train.config import Config, load_config
from llmfast.train.parallel import World
from llmfast.train.settings import ConfigError
from llmfast.train.trainer import micro_batch_size

NODE = 8  # GPUs in a machine, which share parameters faster than machines do


def estimate_run(
    config: Config,
    model: DecoderConfig,
    *,
    gpus: int = 1,
    precision: Precision | None = None,
    gpu_memory: int | None = None,
) -> MemoryEstimate:
    """Estimate what a run holds on each GPU, with the settings' own precision or another one.

    Raises:
        ConfigError: The settings do not go together with so many GPUs.
    """
    t = config.train
    if gpus > 1 and t.vocab_parallel:
        raise ConfigError("train.vocab_parallel must be false: what it takes on several GPUs is not modelled; got True")
    rows, parts = micro_batches(config, gpus)
    precision = precision or Precision("as set", getattr(torch, t.param_dtype), **config.optimizer.formats)
    return estimate_memory(
        model,
        batch_size=rows,
        seq_len=config.data.seq_len,
        accumulate=parts,
        precision=precision,
        autocast=t.dtype != "float32" and precision.parameters == torch.float32,
        checkpoint_activations=t.checkpoint_activations,
        in_backward=config.optimizer.in_backward,
        optimizer=config.optimizer.make,
        gpu_memory=gpu_memory or 80 * GB,
        ranks=gpus,
        shards={"ddp": 1, "fsdp": gpus, "hsdp": t.shard_size}[t.parallel] if gpus > 1 else 1,
    )


def most_rows(
    config: Config, model: DecoderConfig, *, gpus: int, gpu_memory: int, least: int, most: int
) -> tuple[Config, MemoryEstimate]:
    """Find the largest micro-batch that fits, of rows that divide `most` and are at least `least`; else the smallest.

    Raises:
        ConfigError: The settings do not go together, or not with so many GPUs.
    """
    rows = most
    while True:
        config = load_config(None, [f"train.micro_batch_size={rows}"], base=config)
        memory = estimate_run(config, model, gpus=gpus, gpu_memory=gpu_memory)
        fewer = [n for n in range(least, rows) if most % n == 0]
        if not fewer or verdict(memory.peak, gpu_memory) == FITS:
            return config, memory
        rows = fewer[-1]


def micro_batches(config: Config, gpus: int = 1) -> tuple[int, int]:
    """Count the rows of a micro-batch and the micro-batches of a step, on each GPU."""
    rows = micro_batch_size(config, World(torch.device("cpu"), size=gpus))
    return rows, config.train.batch_size // (rows * gpus)


@dataclass(frozen=True)
class Way:
    """One way to spread a run over GPUs and to save memory, as settings of the trainer."""

    parallel: Literal["", "ddp", "fsdp", "hsdp"] = ""  # "": one GPU
    again: bool = False  # activations are computed again
    small: bool = False  # parameters of 16 bits, and 16 more in the optimizer

    @property
    def name(self) -> str:
        """Return what users call it, such as "FSDP2, recomputing"."""
        spread = {"": "one GPU", "ddp": "DDP", "fsdp": "FSDP2", "hsdp": f"HSDP by {NODE}"}[self.parallel]
        return spread + ", recomputing" * self.again + ", bf16" * self.small

    @property
    def settings(self) -> dict[str, str | int | bool]:
        """Return the settings that it changes."""
        found: dict[str, str | int | bool] = {}
        if self.parallel:
            found["train.parallel"] = self.parallel
        if self.parallel == "hsdp":
            found["train.shard_size"] = NODE
        if self.again:
            found["train.checkpoint_activations"] = True
        if self.small:
            found |= {"train.param_dtype": "bfloat16"}
            found |= {"optimizer.master_weights": "split16", "optimizer.state_dtype": "float32"}
        return found

    def of(self, config: Config) -> Config:
        """Return the settings with this way instead of their own."""
        return load_config(None, overrides({"train.checkpoint_activations": False, **self.settings}), base=config)


def ways(gpus: int, *, small: bool = False) -> Iterator[Way]:
    """Yield the ways to train on so many GPUs, those that cost the least time first.

    Sharding comes before activations that are computed again, which is a third more work, and HSDP within machines
    before FSDP2 between them.
    """
    spread = [Way("ddp" if gpus > 1 else "")]
    if gpus > NODE and gpus % NODE == 0:
        spread.append(Way("hsdp"))
    if gpus > 1:
        spread.append(Way("fsdp"))
    for formats in (False, True)[: 1 + small]:
        for again in (False, True):
            yield from (replace(way, again=again, small=formats) for way in spread)


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as `load_config` and the command line take them."""
    return [f"{name}={json.dumps(value)}" for name, value in settings.items()]
