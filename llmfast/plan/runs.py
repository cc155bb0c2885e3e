"""Finished runs of `llmfast train` as points to fit a scaling law to."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmfast._checks import expect
from llmfast.data import ByteTokenizer, load_tokenizer
from llmfast.models import DecoderConfig
from llmfast.models.cost import count_parameters

if TYPE_CHECKING:
    from llmfast.train.config import Config


@dataclass(frozen=True)
class Run:
    """A finished run as a point of a scaling law.

    Both counts cover what predicts the next token, as the loss does, and no heads that predict further tokens. Fit
    Chinchilla's form to `params`, as Hoffmann did, and Kaplan's and Henighan's to `non_embedding`.
    """

    name: str
    params: int  # N with embeddings
    non_embedding: int  # N without embedding and unembedding
    tokens: int  # D: labels that were trained on; text that was read twice counts twice
    loss: float  # on held-out text at the last step, in nats per token

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6.0 * self.params * self.tokens


def read_run(folder: Path) -> Run:
    """Read a run from its config.toml, metrics.jsonl and tokenizer.json.

    Raises:
        ValueError: the run did not reach its last step, where its learning rate is lowest: its loss is higher than that
            of a run which was meant to end there. Or it began with another run's weights, and so with that run's
            tokens; or it has no validation loss, or settings that cannot be read.
        OSError: a file cannot be read.
        ImportError: the extra `train` is not installed.
    """
    from llmfast.train.config import load_config
    from llmfast.train.metrics import read_metrics

    config = load_config(folder / "config.toml")
    expect(
        not config.train.init_from,
        f"{folder} began with the weights of {config.train.init_from}: its loss is not due to its own tokens alone",
    )
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "validation_mean" in line]
    expect(len(lines) > 0, f"{folder} has no validation loss in its metrics.jsonl")
    last = lines[-1]
    expect(
        last["step"] == config.train.steps,
        f"{folder} stopped at step {last['step']} of {config.train.steps}: its loss is not that of a whole run",
    )
    count = count_parameters(model_config(config, folder / "tokenizer.json"))
    return Run(folder.name, count.next_token, count.non_embedding, int(last["tokens"]), float(last["validation_mean"]))


def model_config(config: "Config", tokenizer: Path | None = None) -> DecoderConfig:
    """Describe the decoder that a run with these settings trains.

    Its vocabulary is that of the file `tokenizer` if that exists, else of the tokenizer in the settings. A "bpe" that
    is not trained yet counts as `data.vocab_size` ids; with little text there will be fewer.

    Raises:
        ValueError: the settings make no model, or the file is no tokenizer.
        OSError: the settings name a tokenizer that cannot be read.
    """
    from llmfast.train.config import decoder_config

    if tokenizer is not None and tokenizer.exists():
        vocab_size = load_tokenizer(tokenizer).vocab_size
    elif config.data.tokenizer == "bytes":
        vocab_size = ByteTokenizer.vocab_size
    elif config.data.tokenizer == "bpe":
        vocab_size = config.data.vocab_size
    else:
        vocab_size = load_tokenizer(config.data.tokenizer).vocab_size
    return decoder_config(config, vocab_size)
