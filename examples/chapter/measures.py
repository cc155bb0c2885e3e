"""Measures of a trained model that its log does not have."""

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

import llmfast
from llmfast.data import FIM, Dataset, FIMRows, Mixed, PackedRows, Rows, Tokenizer, fim_prompt
from llmfast.losses import linear_cross_entropy
from llmfast.train import Config, Hooks, Trainer
from llmfast.train.metrics import read_metrics
from llmfast.train.parts import evaluation_batches, make_mixture, make_objective, make_optimizer, prepare_data

Array = npt.NDArray[Any]
GROUPS = 5  # of tokens by frequency, each about as much of the held-out text
GAP = ("Return the ", " of the list.")  # what stands before and after the text to fill in
MOST_FILLED = 40  # bytes
TIMED = 40  # steps, of which the fastest counts
SMOOTHING = 5.0  # counts by which a bigram's frequencies lean on the single tokens'


def opened(run: Path, config: Config) -> tuple[Any, Dataset]:
    """Load a run's model, and its text as the run cut it into rows."""
    return llmfast.load_run(run).model, prepare_data(config, str(run / "tokenizer.json"), lambda text: None)


@torch.no_grad()
def token_losses(model: Any, rows: Rows, config: Config) -> Iterator[tuple[Array, Array]]:
    """Yield the labels of the first held-out rows and their losses, without those that do not count."""
    for batch in evaluation_batches(rows, config.train.eval_rows, config.train.batch_size):
        hidden = model(batch.tokens, positions=batch.positions, document_ids=batch.document_ids)
        loss = linear_cross_entropy(hidden, model.unembedding, batch.labels, reduction="none")
        counted = (batch.labels >= 0).flatten()
        yield batch.labels.flatten()[counted].numpy(), loss.flatten()[counted].numpy()


def labels_of(rows: Rows, count: int) -> Array:
    """Return the labels of the first rows in their order, -100 where one begins another document."""
    return rows.batch(np.arange(min(count, len(rows)))).labels.numpy()


def middles(run: Path, config: Config) -> dict[str, Any]:
    """Measure the loss of middles with both sides given, prefix first and suffix first, and fill in a gap."""
    model, data = opened(run, config)
    found: dict[str, Any] = {}
    for name, spm_rate in (("middle, PSM", 0.0), ("middle, SPM", 1.0)):
        rule = FIM(data.tokenizer, rate=1.0, spm_rate=spm_rate, loss="middle")
        losses = []
        for rows in data.validation.values():
            assert isinstance(rows, PackedRows)
            losses += [loss for _, loss in token_losses(model, FIMRows(rows, rule), config)]
        found[name] = round(float(np.concatenate(losses).mean()), 5)
    return found | {"filled": filled(model, data.tokenizer, config)}


def filled(model: Any, tokenizer: Tokenizer, config: Config) -> str:
    """Write what stands in the gap, with each token drawn by its probability."""
    prompt = torch.from_numpy(fim_prompt(tokenizer, *GAP))
    drawn = torch.Generator().manual_seed(config.train.seed)
    (ids,) = model.generate_batch(
        [prompt], MOST_FILLED, context=config.data.seq_len, temperature=1, generator=drawn, stop=tokenizer.eot_id
    )
    return tokenizer.decode([i for i in ids[len(prompt) :].tolist() if i != tokenizer.eot_id])


def by_frequency(run: Path, config: Config) -> dict[str, Any]:
    """Measure the loss of held-out tokens in groups, from the tokens most frequent in training to the rarest."""
    model, data = opened(run, config)
    seen = np.zeros(data.tokenizer.vocab_size, dtype=np.int64)
    for rows in data.train.values():
        labels = labels_of(rows, len(rows))
        seen += np.bincount(labels[labels >= 0], minlength=len(seen))
    pairs = [pair for rows in data.validation.values() for pair in token_losses(model, rows, config)]
    labels, losses = (np.concatenate(each) for each in zip(*pairs))
    order = np.argsort(-seen, kind="stable")
    held_out = np.bincount(labels, minlength=len(seen))[order]
    middle = (np.cumsum(held_out) - held_out / 2) / max(1, held_out.sum())
    group = np.empty(len(seen), dtype=np.int64)
    group[order] = np.minimum((middle * GROUPS).astype(np.int64), GROUPS - 1)
    means = [losses[group[labels] == g] for g in range(GROUPS)]
    return {
        "loss by group": [round(float(part.mean()), 5) if len(part) else None for part in means],
        "tokens by group": [int((group == g).sum()) for g in range(GROUPS)],
    }


def entropies(run: Path, config: Config) -> dict[str, Any]:
    """Measure what single tokens and pairs of tokens in the training text say about the held-out text."""
    _, data = opened(run, config)
    size = data.tokenizer.vocab_size
    single, pair = np.zeros(size), np.zeros((size, size))
    for rows in data.train.values():
        tokens, labels = _pairs(rows, len(rows))
        single += np.bincount(labels, minlength=size)
        np.add.at(pair, (tokens, labels), 1.0)
    share = (single + 1.0) / (single.sum() + size)
    found: dict[str, list[Array]] = {"unigram": [], "bigram": []}
    for rows in data.validation.values():
        tokens, labels = _pairs(rows, config.train.eval_rows)
        found["unigram"].append(-np.log(share[labels]))
        after = pair[tokens].sum(1)
        found["bigram"].append(-np.log((pair[tokens, labels] + SMOOTHING * share[labels]) / (after + SMOOTHING)))
    curve = [
        [line["tokens"], round(line["validation_mean"], 5)]
        for line in read_metrics(run / "metrics.jsonl")
        if "validation" in line
    ]
    return {name: round(float(np.concatenate(x).mean()), 5) for name, x in found.items()} | {"held out": curve}


class Clock(Hooks):
    """The processor time of each step: unlike the time on the wall, it does not count what other programs take."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._begun = 0.0

    def before_step(self, trainer: Trainer) -> None:
        self._begun = time.process_time()

    def after_step(self, trainer: Trainer) -> None:
        self.seconds.append(time.process_time() - self._begun)


def step_time(run: Path, config: Config) -> dict[str, Any]:
    """Measure the processor time of a training step."""
    model, data = opened(run, config)
    timed, clock = replace(config, train=replace(config.train, steps=TIMED)), Clock()
    Trainer(
        model,
        make_objective(timed, model, list(data.train)),
        partial(make_optimizer, timed),
        Mixed(data, make_mixture(timed, data)),
        timed,
        hooks=[clock],
        console=Console(quiet=True),
    ).fit()
    return {"step_s": round(min(clock.seconds), 6)}


def _pairs(rows: Rows, count: int) -> tuple[Array, Array]:
    """Return tokens and the tokens after them."""
    batch = rows.batch(np.arange(min(count, len(rows))))
    counted = batch.labels >= 0
    return batch.tokens[counted].numpy(), batch.labels[counted].numpy()
