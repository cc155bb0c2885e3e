"""Estimates of what each rank holds against counts, and the ways to take less."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llmfast.data.packing import batch_of
from llmfast.models import Decoder
from llmfast.models.memory import MemoryEstimate, Precision
from llmfast.train import estimate as estimates
from llmfast.train.config import Config, decoder_config, load_config
from llmfast.train.estimate import Way, estimate_run, micro_batches, most_rows, ways
from llmfast.train.objective import FurtherTokens, NextToken
from llmfast.train.parallel import World
from llmfast.train.parts import make_optimizer
from llmfast.train.settings import ConfigError, overrides
from llmfast.train.trainer import Trainer
from support.ranks import Ranks

VOCABULARY, T, ROWS = 263, 16, 2
SMALL = [
    *("model.width=32", "model.layers=2", "model.heads=2", f"data.seq_len={T}", f"data.vocab_size={VOCABULARY}"),
    *(f"train.batch_size={ROWS}", "train.steps=1"),
]


class Zeros:
    def batch(self, first: int, count: int) -> Any:
        tokens = torch.zeros(count, T + 1, dtype=torch.int64).numpy()
        batch = batch_of(tokens, tokens, tokens == 0)
        return dataclasses.replace(batch, sources=torch.zeros(count, dtype=torch.int64))


def held(rank: int, size: int, overrides: list[str]) -> tuple[int, int]:
    """Take a step, and count the bytes of a rank's parameters and of the optimizer's states."""
    config = load_config(None, [*SMALL, *overrides])
    model = Decoder(decoder_config(config, VOCABULARY)).to(getattr(torch, config.train.param_dtype))
    K = model.config.targets
    objective: Any = NextToken(["zeros"])
    if K > 1:
        objective = FurtherTokens(K, lambda step: [1.0] * K, shared=False, detached=False)
    world = World(torch.device("cpu"), rank, size, dist.new_group(backend="gloo"))
    trainer = Trainer(model, objective, lambda model: make_optimizer(config, model), Zeros(), config, world=world)
    assert trainer.fit()
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return _bytes(model.parameters()), _bytes(states)


def _bytes(tensors: Any) -> int:
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def estimate(overrides: list[str], gpus: int) -> MemoryEstimate:
    config = load_config(None, [*SMALL, *overrides])
    return estimate_run(config, decoder_config(config, VOCABULARY), gpus=gpus)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


FORMATS: list[list[str]] = [
    [],
    ["optimizer.name=lion", "model.tie_embeddings=false"],
    ["optimizer.state_dtype=8bit", "model.mtp=sequential", "model.mtp_heads=2"],
    ["optimizer.name=rmsprop", "optimizer.momentum=0.9", "model.mtp=parallel", "model.mtp_heads=2"],
    [
        *("train.param_dtype=bfloat16", "optimizer.master_weights=split16", "optimizer.state_dtype=float32"),
        "train.checkpoint_activations=true",
    ],
]


@pytest.mark.parametrize("formats", FORMATS, ids=" ".join)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_parameters_and_states_are_counted_exactly(two: Ranks, parallel: str, formats: list[str]) -> None:
    """Use a vocabulary that does not divide by two: no rank has more than the first."""
    settings = [*formats, f"train.parallel={parallel}"]
    first, second = two.run(held, settings)
    found = estimate(settings, 2)
    assert first == (found.parameters, found.optimizer)
    whole = estimate(formats, 1)
    if parallel == "ddp":
        assert first == second == (whole.parameters, whole.optimizer)
    else:
        assert second[0] < first[0] and first[0] + second[0] == whole.parameters


def test_sets_of_ranks_are_counted_exactly(tmp_path: Path) -> None:
    settings = ["train.parallel=hsdp", "train.shard_size=2", "train.batch_size=4"]
    ranks = Ranks(4, tmp_path)
    try:
        first, second, third, _ = ranks.run(held, settings)
    finally:
        ranks.close()
    found = estimate(settings, 4)
    assert first == third == (found.parameters, found.optimizer) != second
    assert found.parameters == estimate(["train.parallel=fsdp"], 2).parameters


def test_rows_of_a_step_are_divided_over_gpus() -> None:
    config = load_config(None, ["train.batch_size=16", "train.micro_batch_size=2"])
    assert micro_batches(config) == (2, 8) and micro_batches(config, 4) == (2, 2)
    assert micro_batches(load_config(None, ["train.batch_size=16"]), 4) == (4, 1)
    with pytest.raises(ConfigError, match=r"train.batch_size=16 does not divide by 3 ranks"):
        micro_batches(config, 3)
    whole = ["train.batch_size=16", "train.parallel=fsdp"]
    assert estimate(whole, 4).unreduced == 0 < estimate([*whole, "train.micro_batch_size=2"], 4).unreduced
    with pytest.raises(ConfigError, match=r"train.shard_size must divide the number of ranks, 12, .*; got 8"):
        estimate(["train.batch_size=12", "train.parallel=hsdp", "train.shard_size=8"], 12)
    with pytest.raises(ConfigError, match=r"train.vocab_parallel must be false: .*not modelled"):
        estimate(["train.vocab_parallel=true", "model.tie_embeddings=false"], 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_every_setting_that_takes_memory_is_counted(dtype: str, stored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = mock.Mock()
    monkeypatch.setattr("llmfast.train.estimate.estimate_memory", counted)
    settings = ["train.batch_size=48", "data.seq_len=128", f"train.dtype={dtype}"]
    settings += ["train.parallel=hsdp", "train.shard_size=4", f"train.param_dtype={stored}"]
    if stored == "bfloat16":
        settings += ["optimizer.master_weights=split16", "optimizer.state_dtype=8bit"]
    for again, backward in ((False, True), (True, False)):
        flags = [f"train.checkpoint_activations={again}".lower(), f"optimizer.in_backward={backward}".lower()]
        flags += [] if backward else ["train.micro_batch_size=2"]
        config = load_config(None, [*settings, *flags])
        model = decoder_config(config, VOCABULARY)
        estimate_run(config, model, gpus=8, gpu_memory=7)
        (got,), given = counted.call_args
        low = stored == "bfloat16"
        precision = Precision("as set", getattr(torch, stored), "split16" if low else None, "8bit" if low else None)
        assert got is model and given == {
            "batch_size": 6 if backward else 2,
            "seq_len": 128,
            "accumulate": 1 if backward else 3,
            "precision": precision,
            "autocast": dtype != "float32" and not low,
            "checkpoint_activations": again,
            "in_backward": backward,
            "optimizer": config.optimizer.make,
            "gpu_memory": 7,
            "ranks": 8,
            "shards": 4,
        }
        other = Precision("another", torch.float32)
        estimate_run(config, model, gpus=8, precision=other)
        assert counted.call_args.kwargs["precision"] is other
        assert counted.call_args.kwargs["gpu_memory"] == 80_000_000_000
        assert counted.call_args.kwargs["autocast"] == (dtype != "float32")


def test_ways_are_settings() -> None:
    assert [way.name for way in ways(1)] == ["one GPU", "one GPU, recomputing"]
    assert [way.name for way in ways(4)] == ["DDP", "FSDP2", "DDP, recomputing", "FSDP2, recomputing"]
    assert [way.parallel for way in ways(16)] == ["ddp", "hsdp", "fsdp"] * 2
    assert [way.parallel for way in ways(12)] == [way.parallel for way in ways(8)] == ["ddp", "fsdp"] * 2
    assert list(ways(16, small=True))[:6] == list(ways(16))
    config = load_config(None, ["train.checkpoint_activations=true", "train.batch_size=64"])
    for gpus in (1, 8, 64):
        peaks = []
        for way in ways(gpus, small=True):
            changed = way.of(config)
            assert changed.train.batch_size == 64 and changed.train.checkpoint_activations == way.again
            assert overrides(way.settings) == [] or load_config(None, overrides(way.settings)) == way.of(Config())
            peaks.append(estimate_run(changed, decoder_config(changed, VOCABULARY), gpus=gpus).peak)
        assert len(set(peaks)) > len(peaks) / 2
    assert config.train.checkpoint_activations and config.train.parallel == "ddp"


def test_the_largest_micro_batch_that_fits() -> None:
    config = load_config(None, ["train.batch_size=36", "data.seq_len=256", "data.tokenizer=bytes"])
    model = decoder_config(config, VOCABULARY)
    peaks = {}
    for rows in (36, 18, 12, 9, 6, 4, 3, 2, 1):
        config.train.micro_batch_size = rows
        peaks[rows] = estimate_run(config, model).peak
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for rows, peak in peaks.items():
        have = int(peak / 0.9) + 1
        changed, found = most_rows(Way().of(config), model, gpus=1, gpu_memory=have, least=1, most=36)
        assert changed.train.micro_batch_size == rows and found.peak <= peak
    changed, _ = most_rows(config, model, gpus=1, gpu_memory=1 << 20, least=4, most=36)
    assert changed.train.micro_batch_size == 4
    changed, _ = most_rows(config, model, gpus=1, gpu_memory=1 << 20, least=36, most=36)  # there is no other
    assert changed.train.micro_batch_size == 36


def test_a_batch_of_any_size_is_searched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of rows has few divisors, and of those some ten are tried."""
    most, tried = 1_000_000_000, list[int]()
    config = load_config(None, [f"train.batch_size={most}", "train.steps=1", "data.tokenizer=bytes"])
    model, counted = decoder_config(config, VOCABULARY), estimate_run

    def counting(config: Config, *args: Any, **how: Any) -> MemoryEstimate:
        tried.append(config.train.micro_batch_size)
        return counted(config, *args, **how)

    monkeypatch.setattr(estimates, "estimate_run", counting)
    changed, found = most_rows(config, model, gpus=1, gpu_memory=80 * 10**9, least=1, most=most)
    rows = changed.train.micro_batch_size
    assert len(tried) <= 10 and most % rows == 0 and found.peak <= 0.9 * 80e9
    larger = min(n for n in range(rows + 1, 2 * rows + 1) if most % n == 0)
    changed.train.micro_batch_size = larger
    assert counted(changed, model, gpu_memory=80 * 10**9).peak > 0.9 * 80e9


def test_each_way_has_a_name_and_its_settings() -> None:
    spread: dict[str, dict[str, Any]] = {
        "DDP": {"train.parallel": "ddp"},
        "HSDP by 8": {"train.parallel": "hsdp", "train.shard_size": 8},
        "FSDP2": {"train.parallel": "fsdp"},
    }
    again = {"train.checkpoint_activations": True}
    small = {"train.param_dtype": "bfloat16", "optimizer.master_weights": "split16", "optimizer.state_dtype": "float32"}
    wanted = [
        (name + recomputing * bool(more) + bf16 * bool(formats), settings | more | formats)
        for formats, bf16 in (({}, ""), (small, ", bf16"))
        for more, recomputing in (({}, ""), (again, ", recomputing"))
        for name, settings in spread.items()
    ]
    assert [(way.name, way.settings) for way in ways(16, small=True)] == wanted
    assert [(way.name, way.settings) for way in ways(16)] == wanted[:6]
    assert (Way().name, Way().settings) == ("one GPU", {})
