"""Results of a finished run: weights, a sample, a picture of its loss, and the closing table."""

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape

from llmfast._units import in_bytes
from llmfast.data import Dataset, Tokenizer, unigram_entropy
from llmfast.models import Decoder
from llmfast.models.sampling import Sampler
from llmfast.mtp import speculative_generate
from llmfast.train.checkpoint import whole_weights
from llmfast.train.config import Config
from llmfast.train.durable import write_whole
from llmfast.train.metrics import peak_memory_bytes, plot_loss, print_table, read_metrics, say
from llmfast.train.parts import evaluation_batches, make_model
from llmfast.train.pretrained import new_model, save_pretrained, stream_of
from llmfast.train.trainer import Trainer

ACCEPTANCE_PROMPTS = 2  # of each source


def finish(config: Config, trainer: Trainer, model: Any, data: Dataset, tokens_before: int, console: Console) -> None:
    """Write what a finished run leaves in its folder, and print the closing table."""
    t, run = config.train, trainer.run
    assert run is not None and trainer.metrics is not None
    _save(model, run)
    guesses: list[tuple[str, str]] = []
    if isinstance(model, Decoder) and model.mtp is not None and model.config.targets > 1:
        acceptance, per_pass = _acceptance(config, model, data, trainer.device)
        written = [line["step"] for line in read_metrics(run / "metrics.jsonl") if "acceptance" in line]
        if trainer.step not in written:  # the run may have finished before and been resumed
            trainer.metrics.write(
                step=trainer.step, tokens=trainer.tokens, acceptance=acceptance, tokens_per_pass=per_pass
            )
        guesses = [
            ("guesses accepted, by head", ", ".join(f"{100 * a:.0f} %" for a in acceptance)),
            ("tokens per pass, decoding greedily", f"{per_pass:.2f}"),
        ]
    trainer.metrics.close()
    try:
        text = _sample(config, model, data.tokenizer, trainer.device) if t.sample_tokens > 0 else ""
    except ValueError as e:
        text = ""
        say(console, f"no sample: {e}")
    if text:
        (run / "sample.txt").write_text(text, encoding="utf-8")
    entropy = held_out_entropy(config, data)
    plot_loss(run / "metrics.jsonl", run / "loss.png", unigram_entropy=entropy)
    lines = read_metrics(run / "metrics.jsonl")
    validation = [line["validation_mean"] for line in lines if "validation_mean" in line]
    several = ", averaged over the held-out tokens of all sources" if len(data.validation) > 1 else ""
    speed = (trainer.tokens - tokens_before) / max(trainer.seconds, 1e-9)
    print_table(
        console,
        [
            ("validation loss, first", f"{validation[0]:.3f} nats per token{several}"),
            ("validation loss, last", f"{validation[-1]:.3f}"),
            ("unigram entropy of held-out text", f"{entropy:.3f}"),
            *(_changes(lines) if t.init_from or config.model.pretrained else []),
            *guesses,
            ("tokens per second", f"{speed:,.0f}" if trainer.seconds else "-"),
            ("peak memory", in_bytes(peak_memory_bytes(trainer.device))),
            ("steps skipped", f"{trainer.skipped}"),
            ("in the run folder", ", ".join(sorted(p.name for p in run.iterdir()))),
        ],
    )
    if text:
        console.rule(f"a sample, begun with {escape(t.sample_prompt)}")
        say(console, text)


def _save(model: Any, run: Path) -> None:
    """Write the weights under the names of the model's own library."""
    from safetensors.torch import save_model

    if isinstance(model, Decoder):
        write_whole(run / "model.safetensors", lambda path: save_model(model, str(path)))
    else:
        save_pretrained(model, run)


def whole_model(config: Config, trainer: Trainer, tokenizer: Tokenizer) -> Any:
    """Return the whole model on the first rank and None on the others; all ranks must call."""
    if trainer.world.size == 1:
        return trainer.model
    weights = whole_weights(trainer.module)
    if not trainer.world.main:
        return None
    dtype: torch.dtype = getattr(torch, config.train.param_dtype)
    if config.model.pretrained:
        assert trainer.run is not None
        model = new_model(trainer.run, dtype).to(trainer.device)
    else:
        model = make_model(config, tokenizer).to(trainer.device, dtype)
    model.load_state_dict(weights)
    return model


def _changes(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """List each source's validation loss before and after."""
    first, *_, last = [line["validation"] for line in lines if "validation" in line]
    return [
        (f"... of {name}", f"{first[name]:.3f} -> {x:.3f}, {abs(x - first[name]):.3f} {_verdict(first[name], x)}")
        for name, x in last.items()
    ]


def _verdict(before: float, after: float) -> str:
    return "better" if after <= before else "worse: forgotten"


def held_out_entropy(config: Config, data: Dataset) -> float:
    """Return the loss of a model that knows the frequencies of validation's labels and no context."""
    t = config.train
    labels = [
        batch.labels.numpy().ravel()
        for rows in data.validation.values()
        for batch in evaluation_batches(rows, t.eval_rows, t.batch_size)
    ]
    return unigram_entropy(np.concatenate(labels), data.tokenizer.vocab_size)


def _acceptance(config: Config, model: Decoder, data: Dataset, device: torch.device) -> tuple[list[float], float]:
    """Decode greedily by self-speculation; return accepted / guessed per further head, and tokens per pass.

    Prompts are half rows of held-out text. What follows is the model's own text, which is easy to guess if it repeats
    itself.
    """
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


def _sample(config: Config, model: Any, tokenizer: Tokenizer, device: torch.device) -> str:
    """Continue the sample prompt."""
    t = config.train
    prompt = [*tokenizer.start_ids, *tokenizer.encode(t.sample_prompt).tolist()]
    ids = torch.as_tensor(prompt or [tokenizer.eot_id], dtype=torch.int64, device=device)
    sampler = Sampler(0.8, generator=torch.Generator(device).manual_seed(t.seed))
    model.eval()
    tokens = stream_of(model, tokenizer, ids, context=config.data.seq_len, sampler=sampler)
    return tokenizer.decode(torch.cat([ids, *islice(tokens, t.sample_tokens)]).cpu().numpy())
