"""A run for GPUs and days: the model, its tokens, its batch, how it is spread over the GPUs, and its settings."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from llmfast._checks import expect
from llmfast._gpus import Gpu
from llmfast._units import short
from llmfast.models import DecoderConfig, cost
from llmfast.models.memory import MemoryEstimate, fits
from llmfast.optim.scaling import optimal_batch, optimal_lr
from llmfast.plan import laws
from llmfast.plan.laws import Allocation, ChinchillaLaw

if TYPE_CHECKING:
    from llmfast.train.estimate import Way

ASPECT = 100  # width per layer: Llama's models of 1 to 70 B parameters have 80 to 128
# Least number of parameters, tokens per row, vocabulary.
SIZES = ((1e9, 4096, 32768), (1e8, 2048, 32768), (1e7, 1024, 8192), (0, 256, 8192))
UNTIED = 3e9  # parameters from which on the output layer has weights of its own
LEAST, MOST = 1e6, 1e13  # parameters that a plan is made for
LEAST_TOKENS, MOST_TOKENS = 4096, 32768  # of a micro-batch: fewer keep no GPU busy, more gain nothing
WARMUP = 2000  # steps, or a twentieth of a shorter run
PAUSE = 1800  # seconds between checkpoints, or a tenth of a shorter run
TEXT, TOKENS, TOKENIZER = "path/to/text", "path/to/tokens.ds", "path/to/tokenizer.json"
READ_WHOLE = 1e9  # tokens: a source of text is read into the memory of every process


@dataclass(frozen=True)
class Machine:
    """GPUs, and the share of their peak rate that training is assumed to reach."""

    gpu: Gpu
    gpus: int = 1
    utilisation: float = cost.UTILISATION

    @property
    def rate(self) -> float:
        """Modelled FLOPs per second of all GPUs."""
        return self.gpus * self.utilisation * self.gpu.tensor_cores


@dataclass(frozen=True)
class Wish:
    """Demands on a run: a budget (`flops`, as 6 N D, or `seconds`), a size, tokens. Two of them determine the third."""

    flops: float | None = None
    seconds: float | None = None
    params: float | None = None
    tokens: float | None = None
    seq_len: int | None = None
    vocab_size: int | None = None

    def allocated(self, law: ChinchillaLaw, flops: float | None) -> Allocation:
        """Return the given numbers, completed by the law; they spend `flops` if these are given."""
        N, D = self.params, self.tokens
        if flops is None:
            if N and D:
                return law.spent(N, laws.training_flops(N, D))
            return law.optimal_for_params(N) if N else law.optimal_for_tokens(D or 0)
        if N:
            return law.spent(N, flops)
        return law.spent(flops / (6 * D), flops) if D else law.optimal(flops)


@dataclass(frozen=True)
class Shape:
    """A model, and the length and batch of its run."""

    model: DecoderConfig
    seq_len: int
    params: int
    batch: int  # rows per step
    steps: int
    best_batch: float  # tokens, by `optimal_batch`
    lr: float
    seconds: float  # modelled, of a step

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.seq_len

    @property
    def mapped(self) -> bool:
        """Its tokens have to be in files, which are memory-mapped: as text they would be too many."""
        return self.tokens > READ_WHOLE


@dataclass(frozen=True)
class Tried:
    """A way to train, with the rows that each GPU takes at once and the memory that they need there."""

    way: "Way"
    rows: int
    memory: MemoryEstimate
    fits: bool


@dataclass(frozen=True)
class Advice:
    """A run in the last way that was tried: the first that fits the GPUs, if any does."""

    shape: Shape
    tried: list[Tried]
    settings: dict[str, Any]  # of the trainer, by their names; they fit if the last way does

    @property
    def fits(self) -> bool:
        return self.tried[-1].fits


def advise(machine: Machine, wish: Wish, law: ChinchillaLaw) -> Advice:
    """Find a run for a wish, in the way that costs the least time of those that fit.

    Computing activations again takes a third more time per token, so a run of given length gets a smaller model.

    Raises:
        ValueError: The wish is for a model so small or large that no plan is made for it, or the GPUs fill no machines.
    """
    from llmfast.train.estimate import NODE, ways

    expect(
        machine.gpus <= NODE or machine.gpus % NODE == 0,
        f"--gpus must be at most {NODE}, the number in a machine, or a multiple of {NODE}; got {machine.gpus}",
    )
    shapes = {again: _shape(machine, wish, law, again=again) for again in (False, True)}
    tried: list[Tried] = []
    for way in ways(machine.gpus, small=True):
        tried.append(_try(shapes[way.again], machine, way))
        if tried[-1].fits:
            break
    last = tried[-1]
    shape = shapes[last.way.again]
    return Advice(shape, tried, _settings(shape) | last.way.settings | {"train.micro_batch_size": last.rows})


def decoder_for(params: float, vocab_size: int) -> DecoderConfig:
    """Choose the decoder that is nearest to `params` parameters and to `ASPECT`."""

    def decoders() -> Iterator[DecoderConfig]:
        for width in (*range(64, 1024, 64), *range(1024, 8192, 128), *range(8192, 2**17, 1024)):
            heads, tied = width // (64 if width < 1024 else 128), params < UNTIED
            one, two = (DecoderConfig(vocab_size, width, n, heads, tie_embeddings=tied) for n in (1, 2))
            layers = round((params - size(one)) / (size(two) - size(one))) + 1
            if 1 <= layers <= 2**12:
                yield DecoderConfig(vocab_size, width, layers, heads, tie_embeddings=tied)

    def distance(model: DecoderConfig) -> float:
        return 20 * abs(math.log(size(model) / params)) + abs(math.log(model.width / model.layers / ASPECT))

    found = min(decoders(), key=distance, default=None)
    if found is None:
        raise ValueError(f"a vocabulary of {vocab_size} is too large for a model of {short(params)} parameters")
    return found


def size(model: DecoderConfig) -> int:
    """Count the parameters of a decoder without further heads, like `cost.count_parameters`, but without modules."""
    D, F = model.width, model.hidden_ffn
    return model.layers * (4 * D * D + 3 * D * F + 2 * D) + D + model.vocab_size * D * (2 - model.tie_embeddings)


def _shape(machine: Machine, wish: Wish, law: ChinchillaLaw, *, again: bool) -> Shape:
    """Choose the model, and its number of steps: as many as its tokens take, or as there is time for."""
    from llmfast.train.config import Config

    again_costs = cost.AGAIN if again else 1
    a, model, seq_len = _sized(machine, wish, law, counted=1.0)
    # Time is for all FLOPs, of which the law counts only 6 N D: a share that the model decides.
    for _ in range(0 if wish.seconds is None else 3):
        counted = 6 * size(model) / (cost.step_flops(model, 1, seq_len).flops * again_costs)
        a, model, seq_len = _sized(machine, wish, law, counted)
    params = size(model)
    token = cost.step_flops(model, 1, seq_len).flops * again_costs
    tokens = (wish.tokens or a.tokens) if wish.seconds is None else wish.seconds * machine.rate / token
    flops = laws.training_flops(params, tokens)
    best = optimal_batch(flops)
    batch = machine.gpus * 2 ** max(0, round(math.log2(best / (seq_len * machine.gpus))))
    step = cost.step_flops(model, batch * seq_len, seq_len)
    return Shape(
        model,
        seq_len,
        params=params,
        batch=batch,
        steps=max(1, round(tokens / (batch * seq_len))),
        best_batch=best,
        lr=float(f"{min(optimal_lr(flops), Config().optimizer.lr):.2g}"),
        seconds=step.seconds(machine.gpu, torch.bfloat16, utilisation=machine.utilisation, again=again) / machine.gpus,
    )


def _sized(machine: Machine, wish: Wish, law: ChinchillaLaw, counted: float) -> tuple[Allocation, DecoderConfig, int]:
    """Choose a model and a row length by the law, which counts only a share `counted` of the FLOPs in a given time."""
    a = wish.allocated(law, wish.flops if wish.seconds is None else wish.seconds * machine.rate * counted)
    expect(
        LEAST <= a.params <= MOST,
        f"this would be a model of {short(a.params)} parameters, and plans are made for {short(LEAST)} to "
        f"{short(MOST)}; ask for another --days, --gpus, --flops, --params or --tokens",
    )
    _, seq_len, vocab_size = next(size for size in SIZES if a.params >= size[0])
    return a, decoder_for(a.params, wish.vocab_size or vocab_size), wish.seq_len or seq_len


def _settings(shape: Shape) -> dict[str, Any]:
    """Return the settings of the run, without those of the way to train it."""
    model = shape.model
    often = max(1, min(shape.steps // 10, int(float(f"{PAUSE / shape.seconds:.2g}"))))
    text: dict[str, Any] = {"data.sources": TEXT, "data.vocab_size": model.vocab_size}
    if shape.mapped:
        text = {"data.sources": TOKENS, "data.tokenizer": TOKENIZER}
    return {
        **text,
        "data.seq_len": shape.seq_len,
        "model.width": model.width,
        "model.layers": model.layers,
        "model.heads": model.heads,
        "model.tie_embeddings": model.tie_embeddings,
        "optimizer.lr": shape.lr,
        "optimizer.warmup_steps": min(WARMUP, shape.steps // 20),
        "train.steps": shape.steps,
        "train.batch_size": shape.batch,
        "train.eval_every": often,
        "train.save_every": often,
    }


def _try(shape: Shape, machine: Machine, way: "Way") -> Tried:
    """Find the most rows at once that fit, or show the least that keep a GPU busy."""
    from llmfast.train.config import load_config
    from llmfast.train.estimate import most_rows
    from llmfast.train.settings import overrides

    gpus, have, rows = machine.gpus, machine.gpu.memory, shape.batch // machine.gpus
    least, most = (min(rows, 2 ** int(math.log2(max(1, n // shape.seq_len)))) for n in (LEAST_TOKENS, MOST_TOKENS))
    config = load_config(None, overrides(_settings(shape) | way.settings))
    config, memory = most_rows(config, shape.model, gpus=gpus, gpu_memory=have, least=least, most=most)
    return Tried(way, config.train.micro_batch_size, memory, fits(memory.peak, have))
