"""Hugging Face models as a run's model: `model.pretrained`, the folder of one that transformers opens.

A run copies its config.json and its tokenizer, so that it resumes without that folder. When it has finished, its own
folder is one that transformers opens.
"""

import inspect
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast._checks import expect
from llmfast.data import Batch, Tokenizer, load_tokenizer
from llmfast.integrations import cache_argument, require
from llmfast.models import Decoder
from llmfast.models.llama import CONFIG
from llmfast.models.sampling import Sampler
from llmfast.train.checkpoint import load_weights, newest_step
from llmfast.train.config import SCHEMA, Config
from llmfast.train.durable import remove
from llmfast.train.earlier import content, saved_settings
from llmfast.train.objective import NextToken, Sums
from llmfast.train.settings import ConfigError, shown

TOKENIZER = "tokenizer.json"
COPIED = (
    *(CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
"""Files that a run takes over, where they exist. It writes tokenizer.json itself."""


def open_pretrained(config: Config, folder: Path, *, weights: bool) -> nn.Module:
    """Read the model of a folder that transformers opens, on the CPU, and let it compute its loss without logits.

    Args:
        config: the settings of the run that trains it.
        folder: that of `model.pretrained`, or of the run that is resumed.
        weights: False leaves them random, for a checkpoint to replace.

    Raises:
        ConfigError: the settings contradict the model, or the folder holds none that can be trained; nothing was read
            of the data.
        ImportError: transformers is not installed.
    """
    _expect_alone(config)
    require("transformers", extra="hf")
    dtype: torch.dtype = getattr(torch, config.train.param_dtype)
    try:
        kind, settings = _described(folder)
        expect(
            (folder / TOKENIZER).exists(),
            f"{folder} must have a {TOKENIZER}; there is none. AutoTokenizer.from_pretrained(...).save_pretrained(...) "
            "writes it",
        )
        tokenizer = load_tokenizer(folder / TOKENIZER)
        _expect_fitting(kind.__name__, settings, config, tokenizer)
        if weights:  # a run that is resumed has its own
            _expect_same_tokenizer(config, tokenizer, folder)
        return _with_own_loss(read_model(folder, dtype) if weights else new_model(folder, dtype))
    except ConfigError:
        raise
    except (ValueError, OSError) as e:
        raise ConfigError(f"model.pretrained={folder}: {e}") from e


def read_model(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """Read a model. A run that has not finished, or not since it was resumed, gives its newest checkpoint's weights.

    Raises:
        ValueError, OSError: the folder holds no causal language model, or it is damaged.
    """
    if (folder / "config.toml").exists():
        step, steps = newest_step(folder), saved_settings(folder).train.steps
        if step is not None and (step < steps or not any(folder.glob("*.safetensors"))):
            model = new_model(folder, dtype)
            load_weights(folder, model, lambda about: None)
            model.tie_weights()
            return model
    kind, _ = _described(folder)
    expect(any(folder.glob("*.safetensors")), f"{folder} must hold the weights, in *.safetensors; there are none")
    model, found = _called(
        folder, kind.from_pretrained, folder, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])
    expect(not missing, f"the weights of {folder} must be all of a {type(model).__name__}; missing {missing[:3]}")
    return model


def new_model(folder: Path, dtype: torch.dtype | str = "auto") -> Any:
    """Make a model like that of the folder, with random weights; errors are those of `read_model`."""
    _, settings = _described(folder)
    transformers: Any = require("transformers", extra="hf")
    return transformers.AutoModelForCausalLM.from_config(settings, **({} if dtype == "auto" else {"dtype": dtype}))


def positions_of(folder: Path) -> int | None:
    """Return how many positions a model can tell apart, None if unlimited; errors are those of `read_model`."""
    return _most_positions(_described(folder)[1])


def copy_files(folder: Path, run: Path) -> None:
    """Copy config.json and all of the tokenizer but tokenizer.json, for a run to be complete without that folder."""
    for name in COPIED:
        if (folder / name).exists():
            shutil.copyfile(folder / name, run / name)


def save_pretrained(model: Any, run: Path) -> None:
    """Write the weights and config.json into the run's folder, each whole, next to the tokenizer."""
    partial = run / ".pretrained.partial"
    remove(partial)
    model.save_pretrained(partial)
    mode = (partial / CONFIG).stat().st_mode
    for file in sorted(partial.iterdir()):
        file.chmod(mode)  # safetensors lets only the owner read its files
        file.replace(run / file.name)
    partial.rmdir()


class OwnLoss(NextToken):
    """The next token's cross-entropy as a model of Hugging Face computes it, without logits.

    Labels are shifted already. Positions count from 0 in each document, from which transformers knows that its masks
    must keep documents apart. To find out, it waits for the device once per forward.
    """

    def __call__(self, model: Any, batch: Batch, num_valid: Tensor, step: int, detail: bool) -> tuple[Tensor, Sums]:
        loss: Tensor = model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            labels=batch.labels,
            shift_labels=batch.labels,
            num_items_in_batch=num_valid[0],
            use_cache=False,
        ).loss
        return loss, {"loss": loss.detach()}


def stream_of(model: Any, tokenizer: Tokenizer, tokens: Tensor, *, context: int, sampler: Sampler) -> Iterator[Tensor]:
    """Yield tokens that continue `tokens`, like `Decoder.stream`, also of transformers' models."""
    if isinstance(model, Decoder):
        return model.stream(tokens, context=context, sampler=sampler)
    return _stream(model, tokenizer.vocab_size, tokens, context, sampler)


@torch.no_grad()
def _stream(model: Any, vocab_size: int, tokens: Tensor, context: int, sampler: Sampler) -> Iterator[Tensor]:
    name, cache, new = cache_argument(model), None, tokens
    while True:
        if len(tokens) <= context:
            outputs = model(input_ids=new[None], use_cache=True, **{name: cache})
            cache = getattr(outputs, name)
        else:
            outputs = model(input_ids=tokens[None, -context:], use_cache=False)
        new = sampler(outputs.logits[0, -1, :vocab_size])  # some models have rows beyond their tokenizer's ids
        yield new
        tokens = torch.cat([tokens, new])


# What can be trained.


def _expect_alone(config: Config) -> None:
    folder, t = config.model.pretrained, config.train
    if Path(folder).resolve() == (Path(config.runs) / config.name).resolve():
        raise ConfigError(f"model.pretrained must be another folder than the run's own; got {folder}")
    for name, s in SCHEMA.settings.items():
        if name.startswith("model.") and name != "model.pretrained" and s.of(config) != s.default:
            raise ConfigError(
                f"{name} must be left out with model.pretrained={folder}, whose config.json says it; got "
                f"{shown(s.of(config))}"
            )
    for name, value in (("init_from", t.init_from), ("vocab_parallel", t.vocab_parallel)):
        if value:
            why = "which has weights already" if name == "init_from" else "whose output layer cannot be split"
            raise ConfigError(
                f"train.{name} must be left out with model.pretrained={folder}, {why}; got {shown(value)}"
            )


def _expect_same_tokenizer(config: Config, tokenizer: Tokenizer, folder: Path) -> None:
    named = config.data.tokenizer
    if named in (SCHEMA.settings["data.tokenizer"].default, str(folder / TOKENIZER)):
        return
    same = named != "bytes" and content(load_tokenizer(named)) == content(tokenizer)
    expect(same, f"data.tokenizer must be left out, or be that of the model, {folder / TOKENIZER}; got {named!r}")


def _expect_fitting(name: str, settings: Any, config: Config, tokenizer: Tokenizer) -> None:
    """Check that the tokenizer, row length and FIM go with the model `name`, which `settings` describe."""
    rows, d = settings.get_text_config().vocab_size, config.data
    expect(
        tokenizer.vocab_size <= rows,
        f"its tokenizer must be the model's own, with at most its {rows} ids; got one of {tokenizer.vocab_size}",
    )
    most = _most_positions(settings)
    expect(
        most is None or d.seq_len <= most,
        f"data.seq_len must be at most the {most} positions of this {name}; got {d.seq_len}",
    )
    expect(
        d.fim_rate == 0 or not tokenizer.start_ids,
        f"data.fim_rate must be 0: this model's texts begin with a token that must stay in front; got {d.fim_rate}",
    )


def _most_positions(settings: Any) -> int | None:
    most: int | None = getattr(settings.get_text_config(), "max_position_embeddings", None)
    return most


def _described(folder: Path) -> tuple[Any, Any]:
    """Return the class of a folder's causal language model and transformers' description of it."""
    expect(
        (folder / CONFIG).exists(),
        f"{folder} must be the folder of a model, with {CONFIG}; there is none, and nothing is downloaded",
    )
    transformers: Any = require("transformers", extra="hf")
    settings = _called(folder, transformers.AutoConfig.from_pretrained, folder)
    known = transformers.AutoModelForCausalLM._model_mapping
    kind = known.get(type(settings), None)
    named = settings.architectures or []
    expect(
        kind is not None and (not named or kind.__name__ in named),
        f"{folder} must hold a causal language model with its head; its {CONFIG} has "
        f"{', '.join(named) or type(settings).__name__}",
    )
    return kind, settings


def _called(folder: Path, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of transformers that reads a folder; whatever is wrong with the files is a ValueError."""
    try:
        return function(*args, local_files_only=True, **kwargs)
    except (MemoryError, ImportError):
        raise
    except Exception as e:  # the libraries have no common one
        raise ValueError(f"transformers cannot read {folder}: {str(e).strip() or type(e).__name__}") from e


def _with_own_loss(model: Any) -> nn.Module:
    """Fuse the loss, and compare it and the documents' masks with plain ones for a few tokens."""
    from llmfast.integrations.transformers import fuse_loss, unchanged

    name = type(model).__name__
    takes = inspect.signature(type(model).forward).parameters
    expect("position_ids" in takes, f"{name} takes no position_ids, which keep the documents of a row apart")
    fused: nn.Module = fuse_loss(model)
    ids = torch.arange(1, 17, dtype=torch.int64, device="cpu").view(2, 8) % model.get_input_embeddings().weight.shape[0]
    positions = torch.arange(4, dtype=torch.int64, device="cpu").repeat(2, 2)
    labels = ids.roll(-1, 1)
    batch = Batch(ids, labels, positions, positions, labels.numel())
    count = torch.tensor([labels.numel()], dtype=torch.int64, device="cpu")
    with unchanged(fused):
        try:
            alone = model(input_ids=ids.view(4, 4), use_cache=False).logits.float()
            wanted = F.cross_entropy(alone.view(16, -1), labels.view(16))
            loss, _ = OwnLoss()(fused, batch, count, 0, False)
        except Exception as e:
            raise ValueError(f"{name} cannot be trained on rows of several documents: {e}") from e
    close = 1e-4 if all(p.dtype == torch.float32 for p in fused.parameters()) else 3e-2
    expect(
        abs(float(loss) - float(wanted)) <= close * max(1.0, float(wanted)),
        f"{name} cannot be trained on rows of several documents: its loss is {float(wanted)} for each alone, and "
        f"{float(loss)} for all",
    )
    return fused
