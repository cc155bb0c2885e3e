"""Estimate, before a run begins, how much memory it takes, and list ways to take less."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from llmfast._gpus import GB
from llmfast.models import DecoderConfig
from llmfast.models.memory import MemoryEstimate, Precision, estimate_memory, fits
from llmfast.train.config import Config, load_config
from llmfast.train.parallel import World, micro_batch_size, shard_count
from llmfast.train.settings import ConfigError, overrides

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
    if not is_modelled(config, gpus):
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
        shards=shard_count(config, gpus),
    )


def is_modelled(config: Config, gpus: int) -> bool:
    """Return True if `estimate_run` knows what a run holds on each of so many GPUs."""
    return gpus == 1 or not config.train.vocab_parallel


def most_rows(
    config: Config, model: DecoderConfig, *, gpus: int, gpu_memory: int, least: int, most: int
) -> tuple[Config, MemoryEstimate]:
    """Find the largest micro-batch that fits, of rows that divide `most` and are at least `least`; else the smallest.

    Raises:
        ConfigError: The settings do not go together, or not with so many GPUs.
    """

    def of(rows: int) -> tuple[Config, MemoryEstimate]:
        changed = load_config(None, [f"train.micro_batch_size={rows}"], base=config)
        return changed, estimate_run(changed, model, gpus=gpus, gpu_memory=gpu_memory)

    found = of(most)
    fewer = [rows for rows in _divisors(most) if least <= rows < most]
    # A step in one micro-batch accumulates no gradients and may take less than one in two: it is tried by itself.
    if fits(found[1].peak, gpu_memory) or not fewer:
        return found
    found, low, high = of(fewer[0]), 0, len(fewer)
    if not fits(found[1].peak, gpu_memory):
        return found
    while high - low > 1:
        middle = (low + high) // 2
        tried = of(fewer[middle])
        if fits(tried[1].peak, gpu_memory):
            found, low = tried, middle
        else:
            high = middle
    return found


def _divisors(n: int) -> list[int]:
    """List the divisors of `n`, ascending."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


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

    Sharding comes before computing activations again, which is a third more work, and HSDP, which shards within
    machines, before FSDP2, which shards across them.
    """
    spread = [Way("ddp" if gpus > 1 else "")]
    if gpus > NODE and gpus % NODE == 0:
        spread.append(Way("hsdp"))
    if gpus > 1:
        spread.append(Way("fsdp"))
    for formats in (False, True)[: 1 + small]:
        for again in (False, True):
            yield from (replace(way, again=again, small=formats) for way in spread)
