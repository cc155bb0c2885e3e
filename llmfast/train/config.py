"""The settings of a run: their names, types and meanings, and which of them go together."""

import dataclasses
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, PlainValidator

from llmfast._checks import expect
from llmfast.data.mixture import REST, Curve
from llmfast.data.mixture import Weight as AnyWeight
from llmfast.data.reader import SUFFIXES as TEXTS
from llmfast.data.split import Split
from llmfast.data.token_files import SUFFIXES as TOKENS
from llmfast.models.decoder import MTP, DecoderConfig
from llmfast.models.depths import ConcatOrder, HiddenKind
from llmfast.train.optimizers import OptimizerConfig
from llmfast.train.settings import RUN, WEIGHTS, ConfigError, Schema, Tree, read_value, setting, shown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST_FILE = 1 << 20  # bytes of a file of settings


def _folder_name(text: str) -> str:
    expect("/" not in text and text not in (".", ".."), f"must be a folder name; got {text!r}")
    return text


def _without_null(text: str) -> str:
    expect("\0" not in text, f"must not hold a null character; got {text!r}")
    return text


def _weight(value: Any) -> AnyWeight:
    expect(type(value) in (str, int, float), f"must be a number or a string; got {shown(value)}")
    if value != REST:
        Curve.parse(value)
    found: AnyWeight = value
    return found


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


PathText = Annotated[str, AfterValidator(_without_null)]
Name = Annotated[PathText, AfterValidator(_folder_name)]
Texts = Annotated[list[str], BeforeValidator(_listed)]  # a single one may be given without a list
Weight = Annotated[AnyWeight, PlainValidator(_weight)]


def _own_heads(m: "ModelConfig") -> tuple[str, int]:
    """Describe the heads that have weights: "shared" predicts all its targets from the hidden state that "none" has."""
    return ("none", 0) if m.mtp == "shared" else (m.mtp, m.mtp_heads)


@dataclass
class ModelConfig:
    """The model: a pretrained one, or a decoder, with the defaults and choices of `DecoderConfig`."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    # The upper bounds are far beyond any use. Without them, a typing error would create modules until memory is full.
    width: int = setting(
        DecoderConfig.width,
        "width of the hidden states",
        ge=1,
        le=2**20,
        kept=WEIGHTS,
        aka=("hidden_size", "n_embd", "d_model", "dim", "embed_dim"),
    )
    layers: int = setting(
        DecoderConfig.layers,
        "number of blocks",
        ge=1,
        le=2**12,
        kept=WEIGHTS,
        aka=("n_layer", "n_layers", "num_layers", "num_hidden_layers"),
    )
    heads: int = setting(
        DecoderConfig.heads,
        "attention heads per block",
        ge=1,
        kept=WEIGHTS,
        aka=("n_head", "n_heads", "num_heads", "num_attention_heads"),
    )
    ffn_width: int = setting(
        DecoderConfig.ffn_width,
        "width of the SwiGLU; 0: 8/3 of width",
        ge=0,
        le=2**22,
        kept=WEIGHTS,
        aka=("intermediate_size", "ffn_dim", "hidden_dim"),
    )
    tie_embeddings: bool = setting(
        DecoderConfig.tie_embeddings,
        "use the embedding as the output layer",
        kept=WEIGHTS,
        aka=("tie_word_embeddings", "weight_tying"),
    )
    mtp: MTP = setting(
        DecoderConfig.mtp, "how further tokens are predicted", kept=WEIGHTS, seen=lambda m: _own_heads(m)[0]
    )
    mtp_heads: int = setting(
        DecoderConfig.mtp_heads,
        "parallel: heads, the first of which is the last of layers; sequential: depths; shared: targets",
        ge=0,
        le=2**12,
        kept=WEIGHTS,
        seen=lambda m: _own_heads(m)[1],
    )
    mtp_concat: ConcatOrder = setting(
        DecoderConfig.mtp_concat, "sequential: what comes first in a depth's input", kept=WEIGHTS
    )
    mtp_hidden: HiddenKind = setting(
        DecoderConfig.mtp_hidden, "sequential: the hidden state a depth reads, before or after the norm", kept=WEIGHTS
    )
    mtp_repeated_layer: bool = setting(
        DecoderConfig.mtp_repeated_layer, "sequential: all depths share one block", kept=WEIGHTS
    )
    mtp_detach: bool = setting(
        DecoderConfig.mtp_detach, "sequential: depths train neither the trunk nor the embeddings"
    )
    pretrained: PathText = setting(
        "",
        "folder of a Hugging Face model to train instead of a decoder of the settings above; '': none",
        kept=WEIGHTS,
        seen=lambda m: bool(m.pretrained),
        aka=("model_name_or_path", "initial_checkpoint_dir", "checkpoint_dir"),
    )


@dataclass
class DataConfig:
    """The text, and how it is cut into rows."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sources: Texts = setting(
        ["code", "prose"],
        "built-in sources, paths, or name=path: a file of text or of tokens "
        f"({', '.join(TOKENS)}), or a folder of {', '.join(TEXTS)}",
        min_length=1,
        kept=RUN,
        aka=("dataset", "dataset_name", "dataset_path", "data_dir"),
    )
    weights: dict[str, Weight] = setting(
        {}, "each source's share over the run: 0.3, '0.9->0.3', '0:0.9, 0.5:0.9, 1:0.3' or 'rest'; {}: by size"
    )
    tokenizer: str = setting(  # two tokenizers are compared by their content, when training begins
        "bpe",
        "'bpe' (trained on the text), 'bytes', or the path of a tokenizer.json; model.pretrained has its own",
        kept=WEIGHTS,
        seen=lambda d: None,
        aka=("tokenizer_dir", "tokenizer_path", "tokenizer_name"),
    )
    vocab_size: int = setting(
        8192, "vocabulary of a trained 'bpe'", ge=1, le=2**24, kept=RUN, aka=("padded_vocab_size",)
    )
    seq_len: int = setting(
        256,
        "tokens per row",
        ge=2,
        kept=RUN,
        aka=("block_size", "seq_length", "max_seq_length", "max_seq_len", "max_length", "context_length"),
    )
    text_column: str = setting(
        "text", "the text's column in .jsonl and .parquet; '': leave out files with columns", kept=RUN
    )
    held_out: float = setting(
        0.05,
        "share of each source that is only used for validation",
        gt=0,
        lt=1,
        kept=RUN,
        aka=("val_split_fraction", "validation_split_percentage"),
    )
    split: dict[str, Split] = setting(
        {},
        "by source, which text that is: whole 'documents' or the 'end'; {}: chosen, and noted in config.toml",
        kept=RUN,
    )
    packing: Literal["concat", "best_fit"] = setting(
        "concat", "documents end to end, or as whole as fits: best_fit only cuts those longer than a row", kept=RUN
    )
    fim_rate: float = setting(0.0, "share of documents rearranged for fill-in-the-middle", ge=0, le=1, kept=RUN)
    fim_spm_rate: float = setting(0.5, "share of those with the suffix first", ge=0, le=1, kept=RUN)
    fim_level: Literal["char", "token"] = setting("char", "where documents may be cut", kept=RUN)
    fim_unit: Literal["context", "document"] = setting(
        "context", "what is rearranged: a row's part of a document, or whole documents", kept=RUN
    )
    fim_spm_variant: int = setting(2, "where the prefix sentinel stands with the suffix first", ge=1, le=2, kept=RUN)
    fim_loss: Literal["all", "middle"] = setting("all", "which tokens count in the loss", kept=RUN)


@dataclass
class TrainConfig:
    """The loop, its log and its checkpoints, and the devices it runs on."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    steps: int = setting(
        1000,
        "steps of the run",
        ge=1,
        aka=("max_steps", "max_iters", "train_iters", "train_steps", "num_steps", "total_steps", "lr_decay_iters"),
    )
    epochs: float = setting(
        0.0,
        "length of the run in passes over all training rows, instead of steps; 0: steps",
        ge=0,
        le=2**20,
        aka=("num_train_epochs", "num_epochs", "max_epochs"),
    )
    batch_size: int = setting(
        4, "rows of seq_len tokens per step, on all ranks together", ge=1, aka=("global_batch_size", "train_batch_size")
    )
    micro_batch_size: int = setting(
        0,
        "rows that a rank processes at once; 0: its part of a step",
        ge=0,
        aka=("per_device_train_batch_size", "local_batch_size", "gradient_accumulation_steps"),
    )
    eval_every: int = setting(250, "steps between evaluations", ge=1, aka=("eval_steps", "eval_interval", "eval_freq"))
    eval_rows: int = setting(
        64, "rows of each source per evaluation, at most", ge=1, aka=("eval_iters", "max_eval_samples")
    )
    log_every: int = setting(
        10, "steps between lines of the log", ge=1, aka=("logging_steps", "log_interval", "log_freq")
    )
    save_every: int = setting(
        250, "steps between checkpoints", ge=1, aka=("save_steps", "save_interval", "checkpoint_interval")
    )
    keep_last: int = setting(2, "checkpoints to keep", ge=1, aka=("save_total_limit", "keep_latest_k"))
    keep_every: int = setting(0, "also keep the checkpoints of every so many steps; 0: none", ge=0)
    max_skipped: int = setting(100, "stop after so many steps with a gradient that is not finite; 0: never", ge=0)
    seed: int = setting(
        0, "seed of weights, order and everything else that is random", ge=0, kept=RUN, aka=("random_seed",)
    )
    init_from: PathText = setting("", "folder of a run whose last weights this one begins with", kept=RUN)
    device: str = setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', ...")
    dtype: Literal["auto", "float32", "bfloat16"] = setting(
        "auto",
        "dtype of matrix products; auto: bfloat16 on a GPU, float32 on a CPU",
        aka=("bf16", "fp16", "precision", "mixed_precision", "mixed_precision_param", "torch_dtype"),
    )
    param_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of the parameters; see optimizer.master_weights for bfloat16", kept=RUN
    )
    parallel: Literal["ddp", "fsdp", "hsdp"] = setting(
        "ddp", "how the model is spread over ranks, under torchrun", aka=("strategy", "fsdp")
    )
    shard_size: int = setting(
        0, "hsdp: ranks that share one set of parameters", ge=0, aka=("data_parallel_shard_degree",)
    )
    vocab_parallel: bool = setting(False, "each rank holds some classes of the untied output layer, for all tokens")
    checkpoint_activations: bool = setting(
        False,
        "compute activations again in backward, to save memory",
        aka=("gradient_checkpointing", "activation_checkpointing", "activation_checkpoint"),
    )
    compile: bool = setting(False, "compile the blocks with torch.compile", aka=("torch_compile",))
    tensorboard: bool = setting(False, "also write events for TensorBoard", aka=("enable_tensorboard", "report_to"))
    mtp_schedule: Literal["auto", "constant", "linear", "staged"] = setting(
        "auto", "weights of the further tokens' losses over the run; auto: staged for shared, else constant"
    )
    mtp_weight: float = setting(
        0.0, "weight of each further token's loss; 0: 1 for parallel, 0.3 for sequential, 0.5 for shared", ge=0
    )
    mtp_final_weight: float = setting(0.1, "linear: that weight at the last step", ge=0)
    mtp_mean: Literal["auto", "yes", "no"] = setting(
        "auto", "divide the weight by the number of further tokens; auto: yes for sequential, else no"
    )
    sample_prompt: str = setting("def", "beginning of the sample that a finished run writes")
    sample_tokens: int = setting(120, "tokens of that sample; 0: none", ge=0)


@dataclass
class Config:
    """All settings of a run, with their defaults: what flags and a TOML file change."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: Name = setting(
        "", "name of the run's folder; '': the first free one of demo, demo-2, ...", aka=("run_name", "exp_name")
    )
    runs: PathText = setting("runs", "folder of all runs", aka=("out_dir", "output_dir", "dump_folder"))
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


SCHEMA = Schema(Config)


def load_config(path: Path | None, overrides: Iterable[str] = (), base: Config | None = None) -> Config:
    """Read the defaults (or `base`), then the file, then the overrides, `section.key=value`, and check the result.

    Where one of these layers names another optimizer than the layers below it, that optimizer's defaults replace
    everything that was set for the other.

    Raises:
        ConfigError: naming the key, the value that came and the closest valid key.
    """
    config: Config = SCHEMA.read([] if path is None else [(_read_toml(path), str(path))], base)
    config = SCHEMA.read([(_parse_override(override), override) for override in overrides], config)
    _expect_consistent(config)
    return config


def config_of(values: Tree, where: str) -> Config:
    """Read settings from nested tables; the rest are defaults.

    Raises:
        ConfigError: naming `where`, the key and its value.
    """
    config: Config = SCHEMA.read([(values, where)])
    return config


def dump_config(config: Config) -> str:
    """Write the resolved settings as TOML, without those that the chosen optimizer does not have."""
    import tomli_w

    tree = dataclasses.asdict(config)
    tree["optimizer"] = {key: value for key, value in tree["optimizer"].items() if value is not None}
    return tomli_w.dumps(tree)


def decoder_config(config: Config, vocab_size: int) -> DecoderConfig:
    """Describe the decoder that these settings make.

    Raises:
        ConfigError: they make none.
    """
    shape = dataclasses.asdict(config.model)
    folder = shape.pop("pretrained")
    if folder:
        raise ConfigError(f"model.pretrained must be '' for a decoder of the settings' shape; got {folder!r}")
    try:
        return DecoderConfig(vocab_size, **shape)
    except ValueError as e:
        raise ConfigError(f"model: {e}") from e


def expect_resumable(before: Config, after: Config, run: Path, found: str) -> None:
    """Check that `after` changes nothing that a resumed run keeps; `before` was found where `found` says.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    for s in SCHEMA.settings.values():
        was, now = s.of(before), s.of(after)
        if s.declared["kept"] and was != now:
            raise ConfigError(
                f"{s.name} cannot change on --resume: {found} has {shown(was)}; got {shown(now)}. Only a new run can "
                "have that" + (f"; train.init_from={run} begins it with these weights" * (s.declared["kept"] == RUN))
            )


def expect_same_weights(before: Config, after: Config, run: Path) -> None:
    """Check that the weights of `run`, which was trained as `before` says, mean the same in a model as in `after`.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    for s in SCHEMA.settings.values():
        if s.declared["kept"] == WEIGHTS and s.seen(before) != s.seen(after):
            was = s.of(before)
            raise ConfigError(
                f"{s.name} must be that of the weights in train.init_from={run}, {shown(was)}; got "
                f"{shown(s.of(after))}. Give {s.name}={was}, or begin without train.init_from"
            )


def _read_toml(path: Path) -> Tree:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)  # no more, because a device may be endless
    except OSError as e:
        raise ConfigError(f"cannot read {path}: {e.strerror}") from e
    if len(content) > LARGEST_FILE:
        raise ConfigError(f"{path} is more than {LARGEST_FILE >> 20} MiB, too much for settings")
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{path} is not TOML: {e}") from e


def _parse_override(override: str) -> Tree:
    """Read `a.b=value` as nested tables; the value is TOML, or a string where it is not."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"a setting must be section.key=value; got {override!r}")
    *sections, leaf = _parts(key.strip())
    tree: Tree = {leaf: read_value(text)}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def _parts(key: str) -> list[str]:
    """Split a dotted key; what follows the name of a table is one key of it, such as the path of a source."""
    for name, s in SCHEMA.settings.items():
        if isinstance(s.default, dict) and key.startswith(f"{name}."):
            return [*name.split("."), key.removeprefix(f"{name}.").strip("\"'")]
    return key.split(".")


def _expect_consistent(config: Config) -> None:
    """Check settings that depend on each other. The rest is checked one by one, by what their fields declare."""
    m, o, t = config.model, config.optimizer, config.train
    try:
        expect(
            t.steps * t.batch_size < 2**63,
            f"train.steps * train.batch_size must be below 2^63; got {t.steps * t.batch_size}",
        )
        expect(
            not o.in_backward or t.micro_batch_size in (0, t.batch_size),
            "optimizer.in_backward needs all of a step's rows in one micro-batch",
        )
        expect(
            o.lr_scaling == "none" or o.base_batch_size > 0,
            f"optimizer.lr_scaling={o.lr_scaling!r} needs optimizer.base_batch_size, for which lr is right",
        )
        expect(
            not t.vocab_parallel or not (m.tie_embeddings or m.mtp == "shared"),
            "train.vocab_parallel needs model.tie_embeddings=false, and a model.mtp other than 'shared'",
        )
        expect(
            t.parallel != "hsdp" or t.shard_size > 0, "train.parallel='hsdp' needs train.shard_size, the ranks per set"
        )
    except ValueError as e:
        raise ConfigError(str(e)) from e
