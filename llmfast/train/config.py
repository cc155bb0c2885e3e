"""A run's settings: one tree of dataclasses, filled from a TOML file and `section.key=value` overrides."""

import dataclasses
import difflib
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch

from llmfast._checks import expect
from llmfast.data.mixture import REST, Curve
from llmfast.data.split import SPLITS
from llmfast.optim.formats import StateDtype

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


# What optimizer.state_dtype may be, and what it is to the optimizer.
STATE_DTYPES: dict[str, StateDtype | None] = {
    "": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "8bit": "8bit"
}  # fmt: skip
MOST_BYTES = 1 << 20  # of a file of settings
# What Hugging Face, nanoGPT and Megatron call some of the settings.
ELSEWHERE = {
    "learning_rate": "lr", "adam_epsilon": "eps", "adam_beta1": "beta1", "adam_beta2": "beta2", "max_steps": "steps",
    "max_iters": "steps", "train_iters": "steps", "eval_steps": "eval_every", "logging_steps": "log_every",
    "block_size": "seq_len", "seq_length": "seq_len", "hidden_size": "width", "n_embd": "width", "n_layer": "layers",
    "num_layers": "layers", "num_hidden_layers": "layers", "n_head": "heads", "num_attention_heads": "heads",
    "per_device_train_batch_size": "micro_batch_size", "grad_clip": "max_grad_norm",
}  # fmt: skip


RUN, WEIGHTS = "run", "weights"


def kept(default: Any, by: str, seen: Callable[[Any], Any] | None = None) -> Any:
    """Declare a setting that cannot change on `--resume`; all others take effect there.

    Args:
        by: RUN: another run may begin with the weights and have another value. WEIGHTS: these mean something else with
            another value, though their shapes may be the same, so `train.init_from` needs the same one too.
        seen: from the section to what weights see of the value; None: the value.
    """
    return field(default=default, metadata={"kept": by, "seen": seen})


def _own_heads(m: "ModelConfig") -> tuple[str, int]:
    """Describe the heads that have weights: "shared" reads all its targets off the one hidden state of "none"."""
    return ("none", 0) if m.mtp == "shared" else (m.mtp, m.mtp_heads)


@dataclass
class ModelConfig:
    width: int = kept(192, WEIGHTS)
    layers: int = kept(6, WEIGHTS)
    heads: int = kept(6, WEIGHTS)
    ffn_width: int = kept(0, WEIGHTS)  # 0: 8/3 of the width
    tie_embeddings: bool = kept(True, WEIGHTS)
    # prediction of further tokens: "none", "parallel", "sequential" or "shared"
    mtp: str = kept("none", WEIGHTS, lambda m: _own_heads(m)[0])
    # parallel: heads, the last of `layers` is the first; sequential: depths; shared: targets
    mtp_heads: int = kept(0, WEIGHTS, lambda m: _own_heads(m)[1])
    mtp_concat: str = kept("embedding_first", WEIGHTS)  # this and the rest: of sequential depths; or "hidden_first"
    mtp_hidden: str = kept("pre_norm", WEIGHTS)  # or "post_norm"
    mtp_repeated_layer: bool = kept(False, WEIGHTS)
    mtp_detach: bool = False  # depths change neither the trunk nor the embeddings


@dataclass
class DataConfig:
    sources: list[str] = field(
        default_factory=lambda: ["code", "prose"], metadata={"kept": RUN}
    )  # or paths, or name=path
    # Of each source, over the run: 0.3, "0.9->0.3", "0:0.9, 0.5:0.9, 1:0.3", or "rest". None at all: by size.
    weights: dict[str, str | float] = field(default_factory=dict)
    # Two tokenizers are compared by what is in them: see `train`.
    tokenizer: str = kept("bpe", WEIGHTS, lambda d: None)  # "bpe", "bytes", or the path of a tokenizer.json
    vocab_size: int = kept(8192, RUN)  # of a "bpe" that is trained
    seq_len: int = kept(256, RUN)
    text_column: str = kept("text", RUN)  # of .jsonl and .parquet; "": files with columns are left out
    held_out: float = kept(0.05, RUN)  # share of each source that only validates
    # By source, what that is: whole "documents" or the "end" of its text. A run notes what it chose.
    split: dict[str, str] = field(default_factory=dict, metadata={"kept": RUN})
    # documents one after another; or "best_fit", which cuts only what is longer than a row
    packing: str = kept("concat", RUN)
    fim_rate: float = kept(0.0, RUN)  # share of documents that are rearranged for fill-in-the-middle
    fim_spm_rate: float = kept(0.5, RUN)  # share of those with the suffix first
    fim_level: str = kept("char", RUN)  # or "token"
    fim_unit: str = kept("context", RUN)  # a row's part of a document; or "document"
    fim_spm_variant: int = kept(2, RUN)
    fim_loss: str = kept("all", RUN)  # or "middle"


@dataclass
class OptimizerConfig:
    lr: float = 1.5e-3
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1  # of matrices; gains are not decayed
    max_grad_norm: float = 1.0  # 0: no clipping
    schedule: str = "cosine"  # after warm-up: "cosine", "linear", "wsd" (stays, then decays) or "constant"
    warmup_steps: int = 50
    decay_share: float = 0.2  # of the steps after warm-up that "wsd" decays in
    final_lr: float = 0.1  # share of lr at the last step
    lr_scaling: str = "none"  # "sqrt" or "linear": lr is for base_batch_size, and follows train.batch_size
    base_batch_size: int = 0
    master_weights: str = ""  # of 16-bit parameters: "fp32", "split16", "split8", "stochastic" or "kahan"
    state_dtype: str = ""  # of moments: "float32", "bfloat16" or "8bit"
    in_backward: bool = False  # step while gradients come, and free them; without clipping and skipping


@dataclass
class TrainConfig:
    steps: int = 1000
    batch_size: int = 4  # rows of seq_len tokens in a step, of all ranks
    micro_batch_size: int = 0  # rows that a rank takes at once; 0: its part of a step
    eval_every: int = 250
    eval_rows: int = 64  # a source, at most
    log_every: int = 10
    save_every: int = 250
    keep_last: int = 2  # checkpoints
    keep_every: int = 0  # also keep those of every so many steps
    max_skipped: int = 100  # stop after so many steps whose gradient was not finite; 0: never
    seed: int = kept(0, RUN)
    init_from: str = kept("", RUN)  # a run whose last weights are the first ones here
    device: str = "auto"  # "auto", "cpu", "cuda", "cuda:1", ...
    dtype: str = "auto"  # of autocast: "bfloat16", "float32"; auto: bfloat16 on a GPU, float32 on a CPU
    param_dtype: str = kept("float32", RUN)  # or "bfloat16", with optimizer.master_weights
    parallel: str = "ddp"  # under torchrun: "ddp", "fsdp" or "hsdp"
    shard_size: int = 0  # "hsdp": ranks that share one set of parameters
    vocab_parallel: bool = False  # each rank holds some classes of the untied output layer, for all ranks' tokens
    checkpoint_activations: bool = False  # compute them again in backward
    compile: bool = False  # the blocks, with torch.compile
    tensorboard: bool = False  # also write events for it
    mtp_schedule: str = "auto"  # "constant", "linear" or "staged"; auto: staged for shared, else constant
    mtp_weight: float = 0.0  # of each further token's loss; 0: 1 for parallel, 0.3 for sequential, 0.5 for shared
    mtp_final_weight: float = 0.1  # of "linear", at the last step
    mtp_mean: str = "auto"  # "yes": the weight is shared among the heads; auto: yes for sequential, else no
    sample_prompt: str = "def"
    sample_tokens: int = 120


@dataclass
class Config:
    """All settings of a run, with their defaults: what `--set` and a TOML file change."""

    name: str = ""  # of the run's folder; empty: the first of demo, demo-2, ... that is free
    runs: str = "runs"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or makes no sense."""


def expect_resumable(before: Config, after: Config, run: Path, found: str) -> None:
    """Check that `after` changes nothing of a run that a resumed one keeps; `before` was found where `found` says.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    for name, f, there, here in _settings_of_both(before, after):
        if "kept" in f.metadata and getattr(there, f.name) != getattr(here, f.name):
            raise ConfigError(
                f"{name} cannot change on --resume: {found} has {_shown(getattr(there, f.name))}; got "
                f"{_shown(getattr(here, f.name))}. Only a new run can have that"
                + (f"; train.init_from={run} begins it with these weights" if f.metadata["kept"] == RUN else "")
            )


def expect_same_weights(before: Config, after: Config, run: Path) -> None:
    """Check that the weights of `run`, which was trained as `before` says, mean the same in a model as in `after`.

    Raises:
        ConfigError: naming the first setting that differs.
    """
    for name, f, there, here in _settings_of_both(before, after):
        seen = f.metadata.get("seen") or (lambda section, key=f.name: getattr(section, key))
        if f.metadata.get("kept") == WEIGHTS and seen(there) != seen(here):
            was = getattr(there, f.name)
            raise ConfigError(
                f"{name} must be that of the weights in train.init_from={run}, {_shown(was)}; got "
                f"{_shown(getattr(here, f.name))}. Give {name}={was}, or begin without train.init_from"
            )


def load_config(path: Path | None, overrides: Iterable[str] = (), base: Config | None = None) -> Config:
    """Defaults (or `base`), then the file, then the overrides, then a check of the values.

    Raises:
        ConfigError: naming the key, the value that came and the closest valid key.
    """
    config = base or Config()
    if path is not None:
        try:
            with path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)  # a device may have no end
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from e
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{path} is more than {MOST_BYTES >> 20} MiB, too much for settings")
        try:
            values = tomllib.loads(content.decode("utf-8-sig"))
        except (ValueError, RecursionError) as e:
            raise ConfigError(f"{path} is not TOML: {e}") from e
        _fill(config, values, prefix="", where=str(path))
    for override in overrides:
        _fill(config, _parse_override(override), prefix="", where=f"--set {override}")
    _check(config)
    return config


def config_of(values: dict[str, Any], where: str) -> Config:
    """Settings from nested tables of them; the rest are defaults.

    Raises:
        ConfigError: naming `where`, the key and its value.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: settings must be a table; got {_shown(values)}")
    _fill(config := Config(), values, prefix="", where=where)
    return config


def dump_config(config: Config) -> str:
    """The resolved settings as TOML."""
    import tomli_w

    return tomli_w.dumps(dataclasses.asdict(config))


def _parse_override(override: str) -> dict[str, Any]:
    """`a.b=value` as nested tables; the value is TOML, or a string where it is not."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # more digits or brackets than Python takes, too
        value = text.strip()
    *sections, leaf = key.strip().split(".")
    tree: dict[str, Any] = {leaf: value}
    for section in reversed(sections):
        tree = {section: tree}
    return tree


def _fill(node: Any, values: dict[str, Any], prefix: str, where: str) -> None:
    types = get_type_hints(type(node))
    for key, value in values.items():
        name = prefix + key
        if key not in types:
            raise ConfigError(f"{where}: unknown key {name} = {_shown(value)}{_closest(name)}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                keys = ", ".join(_names(getattr(node, key), f"{name}."))
                raise ConfigError(f"{where}: {name} = {_shown(value)} is a section; its keys are {keys}")
            _fill(getattr(node, key), value, prefix=f"{name}.", where=where)
        else:
            value = _typed(value, types[key], name, where)
            # A table is filled key by key, like a section.
            setattr(node, key, {**getattr(node, key), **value} if isinstance(value, dict) else value)


def _typed(value: Any, wanted: Any, name: str, where: str) -> Any:
    if get_origin(wanted) is dict:
        fits = isinstance(value, dict) and all(type(x) in (str, int, float) for x in value.values())
        label = "a table of numbers and strings"
    elif get_origin(wanted) is list:
        (item,) = get_args(wanted)
        fits = isinstance(value, list) and all(isinstance(x, item) for x in value)
        label = f"list of {item.__name__}"
    else:
        if wanted is float and type(value) is int:
            value = float(value)
        fits = type(value) is wanted  # not isinstance: True is no 1
        label = wanted.__name__
    if not fits:
        raise ConfigError(f"{where}: {name} must be {label}; got {_shown(value)} ({type(value).__name__})")
    return value


def _shown(value: Any) -> str:
    """For a message: a file may nest and be as long as it likes."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)


def _closest(name: str) -> str:
    valid = list(_names(Config(), ""))
    sections = sorted({v.partition(".")[0] for v in valid if "." in v})
    leaves = {v.rpartition(".")[2]: v for v in valid}
    leaf = name.rpartition(".")[2]  # `steps` and `data.steps` should find `train.steps`
    leaf = ELSEWHERE.get(leaf, leaf)
    near = [leaves[leaf]] if leaf in leaves else difflib.get_close_matches(name, [*valid, *sections], n=1)
    near = near or [leaves[close] for close in difflib.get_close_matches(leaf, leaves, n=1)]
    return f"; did you mean {near[0]}?" if near else f"; valid keys are {', '.join(valid)}"


def _names(node: Any, prefix: str) -> Iterable[str]:
    return (name for name, *_ in _settings_of_both(node, node, prefix))


def _settings_of_both(one: Any, two: Any, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any, Any]]:
    """Yield each setting's name and field, with the two sections it is in."""
    for f in dataclasses.fields(one):
        if dataclasses.is_dataclass(getattr(one, f.name)):
            yield from _settings_of_both(getattr(one, f.name), getattr(two, f.name), f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, f, one, two


def _check(config: Config) -> None:
    """Values that would fail later, or do something else than meant, fail here."""
    m, d, o, t = config.model, config.data, config.optimizer, config.train
    try:
        for name, value, least in (
            ("data.seq_len", d.seq_len, 2),
            ("train.steps", t.steps, 1),
            ("train.batch_size", t.batch_size, 1),
            ("train.micro_batch_size", t.micro_batch_size, 0),
            ("train.keep_last", t.keep_last, 1),
            ("train.keep_every", t.keep_every, 0),
            ("train.max_skipped", t.max_skipped, 0),
            ("train.shard_size", t.shard_size, 0),
            ("optimizer.base_batch_size", o.base_batch_size, 0),
            ("train.eval_every", t.eval_every, 1),
            ("train.eval_rows", t.eval_rows, 1),
            ("train.log_every", t.log_every, 1),
            ("train.save_every", t.save_every, 1),
            ("train.sample_tokens", t.sample_tokens, 0),
            ("train.seed", t.seed, 0),
            ("train.mtp_weight", t.mtp_weight, 0),
            ("train.mtp_final_weight", t.mtp_final_weight, 0),
            ("optimizer.warmup_steps", o.warmup_steps, 0),
            ("optimizer.lr", o.lr, 0),
            ("optimizer.eps", o.eps, 0),
            ("optimizer.weight_decay", o.weight_decay, 0),
            ("optimizer.max_grad_norm", o.max_grad_norm, 0),
        ):
            expect(value >= least, f"{name} must be at least {least}; got {value}")
            expect(value < 2**63, f"{name} is too large: {value}")
        for name, value, most in (
            ("model.width", m.width, 2**20),
            ("model.ffn_width", m.ffn_width, 2**22),
            ("model.layers", m.layers, 2**12),
            ("model.mtp_heads", m.mtp_heads, 2**12),
            ("data.vocab_size", d.vocab_size, 2**24),
        ):  # far beyond any use; modules and tables would be made without end
            expect(value <= most, f"{name} must be at most {most}; got {value}")
        expect(t.steps * t.batch_size < 2**63, f"train.steps * train.batch_size is too large: {t.steps * t.batch_size}")
        for name, value in (("beta1", o.beta1), ("beta2", o.beta2)):
            expect(0 <= value < 1, f"optimizer.{name} must be in [0, 1); got {value}")
        expect(
            not o.in_backward or t.micro_batch_size in (0, t.batch_size),
            "optimizer.in_backward needs all of a step's rows in one micro-batch",
        )
        expect(0 < o.decay_share <= 1, f"optimizer.decay_share must be in (0, 1]; got {o.decay_share}")
        expect(
            o.lr_scaling == "none" or o.base_batch_size > 0,
            f"optimizer.lr_scaling={o.lr_scaling!r} needs optimizer.base_batch_size, for which lr is right",
        )
        expect(
            not t.vocab_parallel or not (m.tie_embeddings or m.mtp == "shared"),
            "train.vocab_parallel needs model.tie_embeddings=false, and a model.mtp other than 'shared'",
        )
        expect(t.parallel != "hsdp" or t.shard_size > 0, "train.parallel='hsdp' needs train.shard_size, ranks a set")
        expect(0 <= o.final_lr <= 1, f"optimizer.final_lr must be in [0, 1]; got {o.final_lr}")
        expect(0 < d.held_out < 1, f"data.held_out must be between 0 and 1; got {d.held_out}")
        for name, value in (("fim_rate", d.fim_rate), ("fim_spm_rate", d.fim_spm_rate)):
            expect(0 <= value <= 1, f"data.{name} must be in [0, 1]; got {value}")
        expect(len(d.sources) > 0, "data.sources must name at least one source")
        for name, how in d.split.items():
            expect(how in SPLITS, f"data.split.{name} must be one of {str(SPLITS)[1:-1]}; got {how!r}")
        for name, weight in d.weights.items():
            try:
                expect(weight == REST or Curve.parse(weight) is not None, "")
            except ValueError as e:
                raise ValueError(f"data.weights.{name}: {e}") from e
        for name, choice, choices in (
            ("optimizer.schedule", o.schedule, ("cosine", "linear", "wsd", "constant")),
            ("optimizer.lr_scaling", o.lr_scaling, ("none", "sqrt", "linear")),
            ("optimizer.master_weights", o.master_weights, ("", "fp32", "split16", "split8", "stochastic", "kahan")),
            ("optimizer.state_dtype", o.state_dtype, tuple(STATE_DTYPES)),
            ("data.packing", d.packing, ("concat", "best_fit")),
            ("data.fim_level", d.fim_level, ("char", "token")),
            ("data.fim_unit", d.fim_unit, ("context", "document")),
            ("data.fim_loss", d.fim_loss, ("all", "middle")),
            ("data.fim_spm_variant", d.fim_spm_variant, (1, 2)),
            ("train.parallel", t.parallel, ("ddp", "fsdp", "hsdp")),
            ("train.param_dtype", t.param_dtype, ("float32", "bfloat16")),
            ("train.dtype", t.dtype, ("auto", "float32", "bfloat16")),
            ("train.mtp_schedule", t.mtp_schedule, ("auto", "constant", "linear", "staged")),
            ("train.mtp_mean", t.mtp_mean, ("auto", "yes", "no")),
        ):
            expect(choice in choices, f"{name} must be one of {str(choices)[1:-1]}; got {choice!r}")
        expect(
            "/" not in config.name and config.name not in (".", ".."),
            f"name must be a folder name; got {config.name!r}",
        )
        for name, text in (("name", config.name), ("runs", config.runs), ("train.init_from", t.init_from)):
            expect("\0" not in text, f"{name} must not hold a null character; got {text!r}")
    except ValueError as e:
        raise ConfigError(str(e)) from e
