"""Memory that a run with given settings takes, estimated before it begins."""

import torch

from llmfast._checks import expect
from llmfast.models import DecoderConfig
from llmfast.models.memory import GB, MemoryEstimate, Precision, estimate_memory
from llmfast.train.config import Config


def estimate_run(
    config: Config, model: DecoderConfig, *, precision: Precision | None = None, gpu_memory: int | None = None
) -> MemoryEstimate:
    """Estimate what a run holds on one GPU, with the settings' own precision or another one."""
    t = config.train
    rows, parts = micro_batches(config)
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
    )


def micro_batches(config: Config) -> tuple[int, int]:
    """Count the rows of a micro-batch and the micro-batches of a step, on one GPU."""
    t = config.train
    rows = t.micro_batch_size or t.batch_size
    expect(
        t.batch_size % rows == 0, f"train.batch_size={t.batch_size} does not divide into micro-batches of {rows} rows"
    )
    return rows, t.batch_size // rows
