"""Settings: their defaults, the values they take, and how they are listed and written."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from llmfast.train.config import SCHEMA, load_config
from llmfast.train.settings import By, ConfigError, Schema, fill, overrides, read_value, setting, write_value

# By name: the default, and the values that there are.
DECLARED: dict[str, tuple[Any, str]] = {
    "name": ("", ""),
    "runs": ("runs", ""),
    "model.width": (192, "in [1, 1048576]"),
    "model.layers": (6, "in [1, 4096]"),
    "model.heads": (6, "at least 1"),
    "model.ffn_width": (0, "in [0, 4194304]"),
    "model.tie_embeddings": (True, ""),
    "model.mtp": ("none", "one of 'none', 'parallel', 'sequential', 'shared'"),
    "model.mtp_heads": (0, "in [0, 4096]"),
    "model.mtp_concat": ("embedding_first", "one of 'embedding_first', 'hidden_first'"),
    "model.mtp_hidden": ("pre_norm", "one of 'pre_norm', 'post_norm'"),
    "model.mtp_repeated_layer": (False, ""),
    "model.mtp_detach": (False, ""),
    "model.pretrained": ("", ""),
    "data.sources": (["code", "prose"], ""),
    "data.weights": ({}, ""),
    "data.tokenizer": ("bpe", ""),
    "data.vocab_size": (8192, "in [1, 16777216]"),
    "data.seq_len": (256, "at least 2"),
    "data.text_column": ("text", ""),
    "data.held_out": (0.05, "in (0, 1)"),
    "data.split": ({}, ""),
    "data.packing": ("concat", "one of 'concat', 'best_fit'"),
    "data.fim_rate": (0.0, "in [0, 1]"),
    "data.fim_spm_rate": (0.5, "in [0, 1]"),
    "data.fim_level": ("char", "one of 'char', 'token'"),
    "data.fim_unit": ("context", "one of 'context', 'document'"),
    "data.fim_spm_variant": (2, "in [1, 2]"),
    "data.fim_loss": ("all", "one of 'all', 'middle'"),
    "optimizer.name": ("adamw", "one of 'adamw', 'adam', 'sgd', 'rmsprop', 'adagrad', 'lion'"),
    "optimizer.lr": (0.0015, "at least 0"),
    "optimizer.beta1": (0.9, "in [0, 1)"),
    "optimizer.beta2": (0.95, "in [0, 1)"),
    "optimizer.eps": (1e-08, "at least 0"),
    "optimizer.amsgrad": (False, ""),
    "optimizer.momentum": (0.9, "in [0, 1)"),
    "optimizer.nesterov": (False, ""),
    "optimizer.dampening": (0.0, "in [0, 1]"),
    "optimizer.alpha": (0.99, "in [0, 1)"),
    "optimizer.centered": (False, ""),
    "optimizer.lr_decay": (0.0, "at least 0"),
    "optimizer.initial_accumulator_value": (0.0, "at least 0"),
    "optimizer.weight_decay": (0.1, "at least 0"),
    "optimizer.decay": ("lr", "one of 'lr', 'independent', 'relative'"),
    "optimizer.max_grad_norm": (1.0, "at least 0"),
    "optimizer.schedule": ("cosine", "one of 'cosine', 'linear', 'wsd', 'constant'"),
    "optimizer.warmup_steps": (50, "at least 0"),
    "optimizer.decay_share": (0.2, "in (0, 1]"),
    "optimizer.final_lr": (0.1, "in [0, 1]"),
    "optimizer.lr_scaling": ("none", "one of 'none', 'linear', 'sqrt'"),
    "optimizer.base_batch_size": (0, "at least 0"),
    "optimizer.master_weights": ("", "one of '', 'fp32', 'split16', 'split8', 'stochastic', 'kahan'"),
    "optimizer.state_dtype": ("", "one of '', 'float32', 'bfloat16', 'float16', '8bit'"),
    "optimizer.in_backward": (False, ""),
    "train.steps": (1000, "at least 1"),
    "train.epochs": (0.0, "in [0, 1048576]"),
    "train.batch_size": (4, "at least 1"),
    "train.micro_batch_size": (0, "at least 0"),
    "train.eval_every": (250, "at least 1"),
    "train.eval_rows": (64, "at least 1"),
    "train.log_every": (10, "at least 1"),
    "train.save_every": (250, "at least 1"),
    "train.keep_last": (2, "at least 1"),
    "train.keep_every": (0, "at least 0"),
    "train.max_skipped": (100, "at least 0"),
    "train.seed": (0, "at least 0"),
    "train.init_from": ("", ""),
    "train.device": ("auto", ""),
    "train.dtype": ("auto", "one of 'auto', 'float32', 'bfloat16'"),
    "train.param_dtype": ("float32", "one of 'float32', 'bfloat16'"),
    "train.parallel": ("ddp", "one of 'ddp', 'fsdp', 'hsdp'"),
    "train.shard_size": (0, "at least 0"),
    "train.vocab_parallel": (False, ""),
    "train.checkpoint_activations": (False, ""),
    "train.compile": (False, ""),
    "train.tensorboard": (False, ""),
    "train.mtp_schedule": ("auto", "one of 'auto', 'constant', 'linear', 'staged'"),
    "train.mtp_weight": (0.0, "at least 0"),
    "train.mtp_final_weight": (0.1, "at least 0"),
    "train.mtp_mean": ("auto", "one of 'auto', 'yes', 'no'"),
    "train.sample_prompt": ("def", ""),
    "train.sample_tokens": (120, "at least 0"),
}
BY_OPTIMIZER: dict[str, dict[str, Any]] = {
    "optimizer.lr": {"adamw": 0.0015, "adam": 0.0015, "sgd": 0.1, "rmsprop": 0.0015, "adagrad": 0.01, "lion": 0.0005},
    "optimizer.beta1": {"adamw": 0.9, "adam": 0.9, "lion": 0.9},
    "optimizer.beta2": {"adamw": 0.95, "adam": 0.95, "lion": 0.99},
    "optimizer.eps": {"adamw": 1e-08, "adam": 1e-08, "rmsprop": 1e-08, "adagrad": 1e-10},
    "optimizer.amsgrad": {"adamw": False, "adam": False},
    "optimizer.momentum": {"sgd": 0.9, "rmsprop": 0.0},
    "optimizer.nesterov": {"sgd": False},
    "optimizer.dampening": {"sgd": 0.0},
    "optimizer.alpha": {"rmsprop": 0.99},
    "optimizer.centered": {"rmsprop": False},
    "optimizer.lr_decay": {"adagrad": 0.0},
    "optimizer.initial_accumulator_value": {"adagrad": 0.0},
    "optimizer.weight_decay": {"adamw": 0.1, "adam": 0.0, "sgd": 0.0, "rmsprop": 0.0, "adagrad": 0.0, "lion": 0.3},
    "optimizer.decay": {"adamw": "lr", "lion": "lr"},
}
# What nanoGPT, LitGPT, torchtitan, Megatron-LM and transformers call some settings.
ELSEWHERE = {
    **{"n_layer": "model.layers", "n_head": "model.heads", "n_embd": "model.width", "block_size": "data.seq_len"},
    **{"max_iters": "train.steps", "lr_decay_iters": "train.steps", "warmup_iters": "optimizer.warmup_steps"},
    **{"learning_rate": "optimizer.lr", "max_lr": "optimizer.lr", "min_lr": "optimizer.final_lr"},
    **{"grad_clip": "optimizer.max_grad_norm", "max_norm": "optimizer.max_grad_norm", "out_dir": "runs"},
    **{"eval_interval": "train.eval_every", "eval_iters": "train.eval_rows", "log_interval": "train.log_every"},
    **{"hidden_size": "model.width", "num_hidden_layers": "model.layers", "num_attention_heads": "model.heads"},
    **{"intermediate_size": "model.ffn_width", "tie_word_embeddings": "model.tie_embeddings"},
    **{"model_name_or_path": "model.pretrained", "dataset_name": "data.sources", "max_length": "data.seq_len"},
    **{"tokenizer_name": "data.tokenizer", "padded_vocab_size": "data.vocab_size", "optim": "optimizer.name"},
    **{"val_split_fraction": "data.held_out", "adam_beta1": "optimizer.beta1", "adam_beta2": "optimizer.beta2"},
    **{"adam_epsilon": "optimizer.eps", "wd": "optimizer.weight_decay", "lr_scheduler_type": "optimizer.schedule"},
    **{"max_grad_norm": "optimizer.max_grad_norm", "warmup_ratio": "optimizer.warmup_steps"},
    **{"decay_ratio": "optimizer.decay_share", "max_steps": "train.steps", "num_train_epochs": "train.epochs"},
    **{"global_batch_size": "train.batch_size", "per_device_train_batch_size": "train.micro_batch_size"},
    **{"gradient_accumulation_steps": "train.micro_batch_size", "eval_steps": "train.eval_every"},
    **{"logging_steps": "train.log_every", "save_steps": "train.save_every", "save_total_limit": "train.keep_last"},
    **{"bf16": "train.dtype", "torch_dtype": "train.dtype", "strategy": "train.parallel", "fsdp": "train.parallel"},
    **{"data_parallel_shard_degree": "train.shard_size", "torch_compile": "train.compile", "run_name": "name"},
    **{"gradient_checkpointing": "train.checkpoint_activations", "report_to": "train.tensorboard"},
}


def test_settings_are_what_they_were_unless_told() -> None:
    """A run without a setting means the same in the next version."""
    assert {name: (s.default, s.values) for name, s in SCHEMA.settings.items()} == DECLARED
    assert all(type(s.default) is type(DECLARED[name][0]) for name, s in SCHEMA.settings.items())
    assert {name: dict(s.by) for name, s in SCHEMA.settings.items() if s.by} == BY_OPTIMIZER


@pytest.mark.parametrize(("theirs", "ours"), ELSEWHERE.items())
def test_names_of_other_trainers_mean_ours(theirs: str, ours: str) -> None:
    assert SCHEMA.near(f"train.{theirs}") == [ours]
    said = "" if theirs == ours.rpartition(".")[2] else f" That is: {SCHEMA.settings[ours].meaning}"
    assert SCHEMA.said(theirs) == SCHEMA.said(theirs.replace("_", "-")) == said


@pytest.mark.parametrize("spelled", ["fp32", "f32", "32", "32-true", "FP32", "float32-full"])
def test_single_precision_as_others_spell_it(spelled: str) -> None:
    with pytest.raises(ConfigError, match=r"; did you mean 'float32'\?$"):
        load_config(None, [f"train.dtype='{spelled}'"])


def test_defaults_that_depend_on_a_name_are_listed_together() -> None:
    by = By(adamw=0.9, sgd=0.0, adam=0.9, lion="x")
    assert str(by) == '0.9 for adamw, adam; 0.0 for sgd; "x" for lion' and by.first == 0.9 and str(By()) == ""


def test_a_list_of_settings_has_values_and_defaults() -> None:
    assert SCHEMA.listing("beta1") == [
        "optimizer.beta1 = 0.9",
        "    decay of the first moment; lion: its share in a step (in [0, 1); 0.9 for adamw, adam, lion)",
    ]
    assert SCHEMA.listing("TENSORBOARD") == ["train.tensorboard = false", "    also write events for TensorBoard"]
    # Find one by what others call it, and by what it means.
    for word in ("Warmup_Ratio", "rises from"):
        assert SCHEMA.listing(word) == [
            "optimizer.warmup_steps = 50",
            "    steps in which the rate rises from 0 (at least 0)",
        ]
    names = [line.partition(" = ")[0] for line in SCHEMA.listing()[::2]]
    assert names == list(SCHEMA.settings) and SCHEMA.listing("no such word") == []


@pytest.mark.parametrize(
    "value",
    [
        *("text", "a b", "", "7", "true", "1e3", "[1]", "{}", "nan", " spaced ", 'a "b" \\', "é", "'x'", "2024-01-01"),
        *("line\nbreak", "#", "a # b", 7, 1.5, True, ["é", "a"], ["\x7f", '"'], []),
    ],
)
def test_what_is_written_is_read_again(value: Any) -> None:
    assert read_value(write_value(value)) == value and type(read_value(write_value(value))) is type(value)
    assert overrides({"a.b": value}) == [f"a.b={write_value(value)}"]


def test_text_is_written_as_it_is_where_that_works() -> None:
    assert [write_value(x) for x in ("a b", "é", "7", ["é"], True, 0.1)] == ["a b", "é", '"7"', '["é"]', "true", "0.1"]


@dataclass
class Part:
    """A section of settings of every kind."""

    name: Literal["one", "two"] = setting("one", "its name")
    low: int = setting(3, "a bound below", ge=1)
    both: float = setting(0.5, "two bounds", gt=0, le=2)
    other: float | None = setting(By(one=1.0), "of one alone", ge=0)
    texts: list[str] = setting(["a"], "some texts", min_length=1)
    table: dict[str, int] = setting({}, "numbers by name", aka=("map",))
    on: bool = setting(True, "whether")

    def __post_init__(self) -> None:
        fill(self)


@dataclass
class Root:
    """Settings with a section."""

    part: Part
    top: str = setting("x", "text at the top")

    def __init__(self, part: Part | None = None, top: str = "x") -> None:
        self.part, self.top = part or Part(), top


def test_a_setting_says_its_type_and_its_bounds() -> None:
    schema = Schema(Root)
    assert {name: (s.type_name, s.choices, s.range) for name, s in schema.settings.items()} == {
        "top": ("str", "", ""),
        "part.name": ("str", "'one', 'two'", ""),
        "part.low": ("int", "", "at least 1"),
        "part.both": ("float", "", "in (0, 2]"),
        "part.other": ("float", "", "at least 0"),
        "part.texts": ("list of str", "", ""),
        "part.table": ("a table", "", ""),
        "part.on": ("bool", "", ""),
    }
    assert list(schema.sections) == ["part"] and schema.aliases["map"] == "part.table"


def test_the_place_of_a_wrong_value_is_that_of_its_layer(tmp_path: Path) -> None:
    (file := tmp_path / "c.toml").write_text("[train]\nsteps = 0\nbatch_size = 2\n")
    with pytest.raises(ConfigError, match=rf"^{file}: train\.steps must be at least 1; got 0$"):
        load_config(file, ["train.batch_size=3"])
    file.write_text("[train]\nbatch_size = 2\n")
    with pytest.raises(ConfigError, match=r"^train\.batch_size=0: train\.batch_size must be at least 1; got 0$"):
        load_config(file, ["train.steps=1", "train.batch_size=0"])
