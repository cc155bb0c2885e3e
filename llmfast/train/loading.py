"""Open what a run has trained: its model and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmfast._checks import expect
from llmfast.data import Tokenizer, load_tokenizer
from llmfast.models import Decoder, DecoderConfig, load_llama
from llmfast.models.llama import CONFIG, WEIGHTS, decoder_config_of, read_config
from llmfast.train.checkpoint import load_weights, newest_step
from llmfast.train.config import Config, decoder_config
from llmfast.train.earlier import runs_in, saved_settings
from llmfast.train.pretrained import positions_of, read_model


class Loaded(NamedTuple):
    """A model, in evaluation mode, and its tokenizer."""

    model: Any  # a `Decoder`, or transformers' own class if the run has `model.pretrained`
    tokenizer: Tokenizer


def load_run(run: str | Path) -> Loaded:
    """Load the model and the tokenizer of a run's folder, or of a folder that `llmfast export` wrote.

    The weights are those that the run finished with, or of its newest checkpoint if it has not finished, or not again
    since it was resumed with more steps. They stay in their saved dtype, on the CPU.

    Raises:
        ValueError: The folder is neither, or its files do not fit together.
        OSError: A file is missing or damaged.
        ImportError: The run has trained a model of transformers, which is not installed.
    """
    opened = open_run(run)
    return Loaded(opened.model(), opened.tokenizer)


@dataclass(frozen=True)
class Opened:
    """Everything known about a trained model before its weights are read."""

    folder: Path
    tokenizer: Tokenizer
    context: int  # tokens that the model was trained to read at once
    settings: Config | None  # None for a folder that was exported
    shape: DecoderConfig | None  # None for a model of transformers

    def model(self) -> Any:
        """Read the weights; see `load_run`."""
        if self.shape is None:
            return read_model(self.folder).eval()
        if self.settings is None:
            return load_llama(self.folder).eval()
        with torch.device("meta"):  # which draws no random numbers
            model = Decoder(self.shape)
        model = model.to(getattr(torch, self.settings.train.param_dtype)).to_empty(device="cpu")
        file = self.folder / WEIGHTS
        if self.unfinished_at is not None:
            load_weights(self.folder, model, lambda about: None)
        elif file.exists():
            _load(model, file)
        else:
            raise FileNotFoundError(f"{self.folder} has no weights yet: neither a checkpoint nor {WEIGHTS}")
        return model.eval()

    @property
    def unfinished_at(self) -> int | None:
        """The step of the newest checkpoint, if that has the weights: the run has not finished."""
        step, steps = newest_step(self.folder), 0 if self.settings is None else self.settings.train.steps
        return None if step is None or ((self.folder / WEIGHTS).exists() and step >= steps) else step


def open_run(run: str | Path) -> Opened:
    """Read everything but the weights, with the errors of `load_run`."""
    folder = Path(run)
    ours, exported = (folder / "config.toml").exists(), (folder / CONFIG).exists()
    expect(
        ours or exported,
        f"RUN must be the folder of a run, with config.toml, or one that `llmfast export` wrote; got {folder}"
        + (runs_in(folder) if folder.exists() else ", which does not exist"),
    )
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    if not ours:
        values = read_config(folder)
        expect(
            "llmfast_mtp" not in values,
            f"{folder} holds a model with heads of add_mtp. In Python, speculative_generate(load_mtp(folder), ...) "
            "decodes it; see llmfast.integrations.decoding",
        )
        context = values.get("max_position_embeddings", 0)
        ok = isinstance(context, int) and context > 0
        expect(ok, f"{folder / CONFIG} must say max_position_embeddings, the context's length; got {context!r}")
        return Opened(folder, tokenizer, context, None, decoder_config_of(values, folder / CONFIG))
    settings = saved_settings(folder)
    if settings.model.pretrained:
        return Opened(folder, tokenizer, positions_of(folder) or settings.data.seq_len, settings, None)
    try:
        shape = decoder_config(settings, tokenizer.vocab_size)
    except ValueError as e:
        raise ValueError(f"{folder / 'config.toml'} describes no model: {e}") from e
    return Opened(folder, tokenizer, settings.data.seq_len, settings, shape)


def _load(model: Decoder, file: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(str(file)))
    except (SafetensorError, RuntimeError) as e:
        reason = " ".join(str(e).split("\n")[:2])  # the first of the tensors that do not fit
        raise ValueError(f"{file} does not go with config.toml and tokenizer.json next to it: {reason}") from e
