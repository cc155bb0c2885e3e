"""Settings: where they come from, and what is said about wrong ones."""

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llmfast.train.config import (
    SCHEMA,
    Config,
    dump_config,
    expect_resumable,
    expect_same_weights,
    load_config,
    tomllib,
)
from llmfast.train.metrics import read_metrics
from llmfast.train.optimizers import OPTIMIZERS
from llmfast.train.settings import ConfigError


def test_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('name = "x"\n[train]\nsteps = 7\n[optimizer]\nlr = 1\n[data]\nsources = ["prose"]\n')
    config = load_config(file, ["train.steps=9", "name=my run", "model.tie_embeddings=false", 'train.device="cpu"'])
    assert (config.train.steps, config.name, config.model.tie_embeddings) == (9, "my run", False)
    assert config.optimizer.lr == 1.0 and isinstance(config.optimizer.lr, float)
    assert config.data.sources == ["prose"]
    assert config.train.seed == Config().train.seed


def test_resolved_settings_read_back_the_same(tmp_path: Path) -> None:
    config = load_config(None, ["optimizer.lr=0.5", "train.sample_prompt='a \"b\"\\n'", "name=x"])
    file = tmp_path / "c.toml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[train]\nbatch_size = 2.0\n")
    config = load_config(file, ["train.steps=1e3", "optimizer.lr=1"])
    assert (config.train.steps, config.train.batch_size) == (1000, 2) and type(config.train.steps) is int
    with pytest.raises(ConfigError, match=r"train.steps must be at most \d+; got 1000"):
        load_config(None, ["train.steps=1e300"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=7", "unknown key train.stpes; did you mean train.steps?"),
        ("steps=7", "unknown key steps; did you mean train.steps?"),
        ("train.lr=7", "unknown key train.lr; did you mean optimizer.lr?"),
        ("zzz=7", "unknown key zzz; valid keys are name, runs, model.width, "),
        ("optimiser.lr=7", "unknown key optimiser; did you mean optimizer?"),
        ("train.steps.x=7", "train.steps must be int; got {'x': 7} (dict)"),
        ("train.steps=many", "train.steps must be int; got 'many' (str)"),
        ("train.steps=1.5", "train.steps must be int; got 1.5 (float)"),
        ("train.steps=true", "train.steps must be int; got True (bool)"),
        ("optimizer.lr=fast", "optimizer.lr must be float; got 'fast' (str)"),
        ("data.sources=3", "data.sources must be list of str; got 3 (int)"),
        ("data.sources=[1]", "data.sources must be list of str; got [1] (list)"),
        ("train=7", "train = 7 is a section; its keys are train.steps, "),
        ("train.steps", "a setting must be section.key=value; got 'train.steps'"),
        ("=3", "a setting must be section.key=value; got '=3'"),
        ("train.steps=0", "train.steps must be at least 1; got 0"),
        ("optimizer.lr=-1.0", "optimizer.lr must be at least 0; got -1.0"),
        ("optimizer.lr=nan", "optimizer.lr must be finite and at least 0; got nan"),
        ("optimizer.beta2=1.0", "optimizer.beta2 must be in [0, 1); got 1.0"),
        (
            "optimizer.schedule=cosin",
            "optimizer.schedule must be one of 'cosine', 'linear', 'wsd', 'constant'; got 'cosin'",
        ),
        ("train.dtype=int8", "train.dtype must be one of 'auto', 'float32', 'bfloat16'; got 'int8'"),
        ("data.sources=[]", "data.sources must have at least 1 item(s); got []"),
        ("data.held_out=0.0", "data.held_out must be in (0, 1); got 0.0"),
        ("data.split={a='ends'}", "data.split.a must be one of 'documents', 'end'; got 'ends'"),
        ("train.vocab_parallel=true", "train.vocab_parallel needs model.tie_embeddings=false"),
        ("name=../x", "name must be a folder name; got '../x'"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    assert message in str(caught.value)


def test_names_of_other_trainers_lead_to_settings() -> None:
    ours = {name.rpartition(".")[2] for name in SCHEMA.settings}
    theirs = [(other, s.name) for s in SCHEMA.settings.values() for other in s.declared["aka"]]
    assert len(theirs) == len(dict(theirs)) > 15
    for other, name in theirs:
        assert other not in ours
        meaning = SCHEMA.settings[name].meaning
        for spelled in (f"train.{other}", other.replace("_", "-")):
            with pytest.raises(ConfigError, match=re.escape(f"did you mean {name}? That is: {meaning}")):
                load_config(None, [f"{spelled}=1"])


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("train.dtype=bf16", "bfloat16"),
        ("train.dtype=bf16-mixed", "bfloat16"),
        ("train.dtype=32-true", "float32"),
        ("train.dtype=fp32", "float32"),
        ("train.param_dtype=BFloat16", "bfloat16"),
        ("optimizer.name=AdamW", "adamw"),
        ("optimizer.name=adamw_torch_fused", "adamw"),
        ("optimizer.schedule=cosine_with_min_lr", "cosine"),
        ("train.parallel=fsdp2", "fsdp"),
        ("train.dtype=int8", None),
        ("train.dtype=3", None),
    ],
)
def test_values_as_others_spell_them_lead_to_ours(override: str, meant: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    got, _, hint = str(caught.value).partition("; got ")[2].partition("; ")
    assert got and hint == (f"did you mean {meant!r}?" if meant else "")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_has_its_own_settings_and_no_others(name: str, tmp_path: Path) -> None:
    chosen = load_config(None, [f"optimizer.name={name}"])
    own = {n: s for n, s in SCHEMA.settings.items() if name in s.by}
    assert {"optimizer.lr", "optimizer.weight_decay"} <= own.keys()
    for n, s in own.items():
        assert s.of(chosen) == s.by[name] and load_config(None, [f"{n}={json.dumps(s.by[name])}"], chosen) == chosen
    (file := tmp_path / "c.toml").write_text(dump_config(chosen))
    assert load_config(file) == chosen
    for n, s in SCHEMA.settings.items():
        if s.by and name not in s.by:
            assert s.of(chosen) is None and n.rpartition(".")[2] not in tomllib.loads(file.read_text())["optimizer"]
            value = json.dumps(s.default)
            message = f"{n} is a setting of {', '.join(s.by)}, and optimizer.name is '{name}', which has lr, "
            with pytest.raises(ConfigError, match=f"^{re.escape(message)}.*; got {re.escape(repr(s.default))}$"):
                load_config(None, [f"{n}={value}", f"optimizer.name={name}"])
            other = load_config(None, [f"optimizer.name={next(iter(s.by))}"])
            assert load_config(None, [f"optimizer.name={name}"], base=other) == chosen


def test_another_optimizer_than_that_of_the_base_has_its_own_defaults() -> None:
    base = load_config(None, ["optimizer.lr=3", "optimizer.beta2=0.5", "optimizer.warmup_steps=7"])
    config = load_config(None, ["optimizer.weight_decay=0.5", "optimizer.name=lion"], base)
    o = config.optimizer
    assert (o.lr, o.beta2, o.weight_decay, o.warmup_steps) == (0.0005, 0.99, 0.5, 7)
    assert load_config(None, ["optimizer.name=adamw"], base) == base


def test_flags_may_name_another_optimizer_than_the_file(tmp_path: Path) -> None:
    (file := tmp_path / "c.toml").write_text("[optimizer]\nlr = 3.0\neps = 0.5\nwarmup_steps = 7\n")
    assert load_config(file, ["optimizer.name=adamw"]).optimizer.eps == 0.5
    for overrides in (
        ["optimizer.name=sgd", "optimizer.momentum=0.5"],
        ["optimizer.momentum=0.5", "optimizer.name=sgd"],
    ):
        o = load_config(file, overrides).optimizer
        assert (o.lr, o.eps, o.momentum, o.warmup_steps) == (0.1, None, 0.5, 7)
    file.write_text("[optimizer]\neps = 0.5\nname = 'lion'\n")
    with pytest.raises(ConfigError, match=r"^optimizer\.eps is a setting of adamw, .*, and optimizer\.name is 'lion'"):
        load_config(file)


def test_an_optimizer_that_was_renamed_later_is_checked_when_it_is_made() -> None:
    config = Config()
    config.optimizer.name = "sgd"
    with pytest.raises(
        ConfigError, match=r"^optimizer\.beta1 is a setting of adamw, adam, lion, and optimizer\.name is"
    ):
        config.optimizer.make([nn.Parameter(torch.zeros(2))])
    for override in ("optimizer.momentum=0", "optimizer.dampening=0.5"):
        config = load_config(None, ["optimizer.name=sgd", "optimizer.nesterov=true", override])
        with pytest.raises(ConfigError, match=r"^optimizer: Nesterov momentum requires"):
            config.optimizer.make([nn.Parameter(torch.zeros(2))])


def test_a_table_is_filled_key_by_key_and_emptied_as_a_whole(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('[data.weights]\na = 0.5\nb = "rest"\n[data.split]\na = "end"\n[model]\nwidth = 48\n')
    config = load_config(file, ["data.weights.a=0.25", "data.split={}", "model={}"])
    assert config.data.weights == {"a": 0.25, "b": "rest"} and config.data.split == {} and config.model.width == 48
    assert load_config(None, ["data.weights={}", "data.weights.c=1"], base=config).data.weights == {"c": 1}
    assert config.data.weights == {"a": 0.25, "b": "rest"}, "the base has changed"


def test_every_setting_says_what_it_means_and_what_it_takes() -> None:
    for name, s in SCHEMA.settings.items():
        assert len(s.meaning) > 10 and (s.meaning.endswith("...") or not s.meaning.endswith(".")), name
        assert type(s.default) in (bool, int, float, str, list, dict), name
        assert s.range or type(s.default) not in (int, float), f"{name} has no bounds"
        chosen = [f"optimizer.name={next(iter(s.by))}"] if s.by else []
        assert load_config(None, [f"{name}={json.dumps(s.default)}", *chosen]) == load_config(None, chosen), name


@pytest.mark.parametrize("name", SCHEMA.settings)
@pytest.mark.parametrize("deep", ["table", "list"])
def test_a_value_of_any_depth_has_a_short_message(name: str, deep: str, tmp_path: Path) -> None:
    """Nest as deep as a damaged file may: as many dotted keys as there are, or as many brackets as TOML reads."""
    file = tmp_path / "c.toml"
    file.write_text(f"{name}.{'b.' * 1500}c = 1\n" if deep == "table" else f"{name} = {'[' * 150}{']' * 150}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert name.partition(".")[2] in str(error.value) and len(str(error.value)) < 1000


def test_a_wrong_line_in_a_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("[optimizer]\nlearning_rate = 0.1\n")
    with pytest.raises(
        ConfigError, match=r"c\.toml: unknown key optimizer\.learning_rate; did you mean optimizer\.lr\?"
    ):
        load_config(file)
    file.write_text("[optimizer\n")
    with pytest.raises(ConfigError, match=r"c\.toml is not TOML"):
        load_config(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"c\.toml is not TOML"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.toml: No such file"):
        load_config(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="/dev/zero is more than 1 MiB"):
        load_config(Path("/dev/zero"))
    file.write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigError, match=r"c\.toml is not TOML"):
        load_config(file)


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 7\r\n")
    assert load_config(tmp_path / "settings.toml").train.steps == 7
    (tmp_path / "metrics.jsonl").write_bytes(b'\xef\xbb\xbf{"step": 1, "tokens": 2}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "tokens": 2}]


def test_messages_stay_short_whatever_a_file_holds(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    for text in ("a" + ".b" * 3000 + " = 1", f'model.width = "{"y" * 5000}"', f"data.sources = {list(range(5000))}"):
        file.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_config(file)
        assert len(str(caught.value)) < 2500


def test_one_source_needs_no_list(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[data]\nsources = "mine=texts/a.txt"')
    for config in (load_config(file), load_config(None, ["data.sources=mine=texts/a.txt"])):
        assert config.data.sources == ["mine=texts/a.txt"]
    assert load_config(None, ['data.sources=["code", "prose"]']).data.sources == ["code", "prose"]


def test_keys_of_tables_may_hold_dots() -> None:
    """Sources without a name of their own have that of their path."""
    given = ["data.weights.texts/a.b.txt=0.5", 'data.weights."c.txt"=rest', "data.weights.code=0.1->0.7"]
    config = load_config(None, [*given, "data.split.texts/a.b.txt=end"])
    assert config.data.weights == {"texts/a.b.txt": 0.5, "c.txt": "rest", "code": "0.1->0.7"}
    assert config.data.split == {"texts/a.b.txt": "end"}


def test_a_value_that_no_file_or_flag_has_set_is_named_alone() -> None:
    base = Config()
    base.train.steps = 0
    with pytest.raises(ConfigError, match=r"^train\.steps must be .*; got 0"):
        load_config(None, base=base)
    with pytest.raises(ConfigError, match=r"^train\.steps=-1: train\.steps must be .*; got -1"):
        load_config(None, ["train.steps=-1"])


def test_every_text_must_be_valid_unicode() -> None:
    texts = [name for name, s in SCHEMA.settings.items() if isinstance(s.default, str | list | dict)]
    assert {"name", "runs", "data.sources", "data.weights", "train.sample_prompt", "optimizer.name"} <= {*texts}
    for name in texts:
        kind = type(SCHEMA.settings[name].default)
        value = {str: "n\udce9", list: ["n\udce9"], dict: {"n\udce9": 1.0}}[kind]
        table: Any = value
        for key in reversed(name.split(".")):
            table = {key: table}
        with pytest.raises(ConfigError, match=rf"^here: {name}\S* must be valid Unicode, to be saved; got "):
            SCHEMA.read([(table, "here")])
    with pytest.raises(ConfigError, match="name must be valid Unicode"):
        load_config(None, ["name=n\udce9"])
    assert load_config(None, ["name=n\u00e9\U0001f600"]).name == "n\u00e9\U0001f600"


@pytest.mark.parametrize("name", [name for name, s in SCHEMA.settings.items() if type(s.default) in (int, float)])
def test_no_number_is_more_than_an_int64_holds(name: str) -> None:
    """Refuse the next integer, and any larger number; the largest one may be too large for another reason."""
    setting = SCHEMA.settings[name]
    chosen = [f"optimizer.name={next(iter(setting.by))}"] if setting.by else []
    for value in ("1e19", f"{2**63}") if type(setting.default) is int else ("1e19", "1e300"):
        with pytest.raises(ConfigError, match=rf"{name} must be (at most {2**63 - 1}|in .*); got "):
            load_config(None, [f"{name}={value}", *chosen])


HEADS = {
    "none": [],
    "shared": ["model.mtp=shared", "model.mtp_heads=3"],
    "parallel": ["model.mtp=parallel", "model.mtp_heads=2"],
    "three": ["model.mtp=parallel", "model.mtp_heads=3"],
    "sequential": ["model.mtp=sequential", "model.mtp_heads=2"],
}


@pytest.mark.parametrize("before", HEADS)
@pytest.mark.parametrize("after", HEADS)
def test_weights_begin_a_run_whose_heads_have_the_same(before: str, after: str) -> None:
    """Heads that share the model's hidden states have no weights of their own, however many targets they predict."""
    then, now = (load_config(None, [*HEADS[kind], "train.epochs=0"]) for kind in (before, after))
    alike = {before, after} <= {"none", "shared"} or before == after
    with nullcontext() if alike else pytest.raises(ConfigError, match=r"model\.mtp\w* must be that of the weights"):
        expect_same_weights(then, now, Path("there"))


def test_what_a_resumed_run_keeps_is_told_with_the_way_out() -> None:
    """Another run may begin with these weights, unless they would mean something else in it."""
    before = Config()
    for name, value, way_out in (("data.seq_len", 99, True), ("train.seed", 7, True), ("model.width", 8, False)):
        after = load_config(None, [f"{name}={value}"])
        with pytest.raises(
            ConfigError, match=rf"^{name} cannot change on --resume: it has \S+; got {value}\. "
        ) as error:
            expect_resumable(before, after, Path("there"), "it")
        assert str(error.value).endswith("; train.init_from=there begins it with these weights") == way_out
    expect_resumable(before, load_config(None, ["train.steps=7", "optimizer.lr=0.5"]), Path("there"), "it")


@pytest.mark.parametrize("name", [".", "..", "/", "a/b", "/a", "a/", "../a", "a\0"])
def test_a_name_is_that_of_one_folder_below_runs(name: str) -> None:
    """A run that were called like the folder of all runs, or the one around it, could be replaced by --overwrite."""
    kind = "must not hold a null character" if "\0" in name else "must be a folder name"
    with pytest.raises(ConfigError, match=rf"^.*: name {kind}; got "):
        load_config(None, [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("name", ["name", "runs", "model.pretrained", "train.init_from"])
def test_no_path_holds_a_null_character(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^.*: {name} must not hold a null character; got 'a\\x00'$"):
        load_config(None, [f'{name}="a\\u0000"'])


@pytest.mark.parametrize("name", ["", "...", ".x", "x..", "a b", "-", "é", "x.y-2_3", "~"])
def test_any_other_name_is_one(name: str) -> None:
    assert load_config(None, [f"name={json.dumps(name)}"]).name == name


@pytest.mark.parametrize(
    ("weight", "refused"),
    [
        *((good, "") for good in (0, 1, 0.5, "0.5", "rest", "0->1", "0:0.9, 0.5:0.9, 1:0.3")),
        *((bad, "must be a number or a string; got ") for bad in (True, False, [1], {"a": 1})),
        *((bad, ": a weight must be written like 0.3, ") for bad in ("many", "Rest", "", "0.5,", "0.1 0.2", "1:")),
        *((bad, "weights must be finite and not negative; got ") for bad in (-1, -0.5, "-1", "0.5->-1", float("nan"))),
        *((bad, "points must ascend; got ") for bad in ("0:1, 0:2", "1:0, 0:1")),
        ("0:1, 1.5:1", "points must be shares of the run, 0 to 1; got "),
    ],
)
def test_weights_are_checked_before_any_text_is_read(weight: Any, refused: str) -> None:
    with pytest.raises(ConfigError, match=rf"^data\.weights\.a.*{refused}") if refused else nullcontext():
        assert SCHEMA.read([({"data": {"weights": {"a": weight}}}, "")]).data.weights == {"a": weight}


@pytest.mark.parametrize("override", ["train.steps=7", " train.steps = 7 ", "train.steps =7", "train.steps= 7e0"])
def test_space_around_a_key_and_its_value_means_nothing(override: str) -> None:
    assert load_config(None, [override]).train.steps == 7
    assert load_config(None, [" name =  my run "]).name == "my run"
    assert load_config(None, [" data.weights.my texts = 0.5"]).data.weights == {"my texts": 0.5}


@pytest.mark.parametrize("override", ["", "=", "=3", " =3", "\t = ", "train.steps", "train.steps:7"])
def test_an_override_is_a_key_and_a_value(override: str) -> None:
    with pytest.raises(ConfigError, match=rf"^a setting must be section\.key=value; got {re.escape(repr(override))}$"):
        load_config(None, [override])


def test_of_several_values_the_last_counts_and_is_named() -> None:
    assert load_config(None, ["train.steps=7", "train.steps=8", "train.seed=1"]).train.steps == 8
    with pytest.raises(ConfigError, match=r"^train\.steps=-1: train\.steps must be at least 1; got -1$"):
        load_config(None, ["train.steps=0", "train.seed=1", "train.steps=-1"])
    with pytest.raises(ConfigError, match=r"^two: train\.steps must be at least 1; got 0$"):
        SCHEMA.read([({"train": {"steps": 5}}, "one"), ({"train": {"steps": 0}}, "two"), ({"name": "x"}, "three")])


@pytest.mark.parametrize("more", [0, 1])
def test_a_file_of_settings_may_have_a_mebibyte(more: int, tmp_path: Path) -> None:
    text = "train.steps = 7\n"
    (file := tmp_path / "c.toml").write_text(text + "#" * (2**20 - len(text) + more))
    with pytest.raises(ConfigError, match=r"is more than 1 MiB, too much") if more else nullcontext():
        assert load_config(file).train.steps == 7


def test_settings_of_one_run_are_not_those_of_the_next() -> None:
    """Change lists and tables in place, of new settings and of settings that others were made from."""
    base = load_config(None, ["data.weights.a=1"])
    for made in (Config(), load_config(None), load_config(None, base=base)):
        before = {name: json.dumps(s.of(Config())) for name, s in SCHEMA.settings.items()}
        made.data.sources.append("mine")
        made.data.weights["mine"], made.data.split["mine"] = 0.5, "end"
        assert {name: json.dumps(s.of(Config())) for name, s in SCHEMA.settings.items()} == before
        assert {name: json.dumps(s.default) for name, s in SCHEMA.settings.items() if not s.by} == {
            name: value for name, value in before.items() if not SCHEMA.settings[name].by
        }
        assert base.data.weights == {"a": 1} and "mine" not in base.data.sources and base.data.split == {}
