"""Every declared setting: from a flag, from `--set` and from a file to config.toml and back, and its bounds.

The values come from the declarations, so that a setting that is added later is tested too.
"""

import itertools
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

import llmfast.train.run
from llmfast.cli import main
from llmfast.train.config import SCHEMA, Config, dump_config, load_config
from llmfast.train.settings import LARGEST, ConfigError, Setting

SETTINGS = list(SCHEMA.settings.values())
# What other settings a value needs.
NEEDS: dict[str, list[str]] = {
    "optimizer.lr_scaling": ["optimizer.base_batch_size=2"],
    "train.vocab_parallel": ["model.tie_embeddings=false"],
    "train.parallel": ["train.shard_size=2"],
    "train.steps": ["train.batch_size=1"],
    "train.batch_size": ["train.steps=1"],
}
NEEDS |= {
    s.name: [f"optimizer.name={next(iter(s.by))}"] for s in SETTINGS if s.by and Config().optimizer.name not in s.by
}
# Values of settings whose type does not say what they may be.
TABLES: dict[str, list[Any]] = {
    "data.weights": [{"a b": 0.5, "ü": "rest"}, {"x": "0:0.5, 1:0.25"}],
    "data.split": [{"a": "end", "b.c": "documents"}],
}


def ends(s: Setting) -> tuple[list[Any], list[Any]]:
    """Return the values at a number's bounds that are accepted, and those next to them that are refused."""
    d, whole = s.declared, type(s.default) is int
    step = 1 if whole else 1e-9
    inside, outside = [], []
    for name, sign in (("ge", -1), ("gt", -1), ("le", 1), ("lt", 1)):
        bound = d.get(name)
        if bound is None or (bound == LARGEST and not whole):
            continue
        belongs, beyond = name in ("ge", "le"), sign * step * (1 if whole else max(1.0, abs(bound)))
        inside.append(bound if belongs else bound - beyond)
        outside.append(bound + beyond if belongs else bound)
    kind = type(s.default)
    return [kind(x) for x in inside], [kind(x) for x in outside]


def values(s: Setting) -> list[Any]:
    """Return values other than the default."""
    if get_origin(s.kind) is Literal:
        found = list(get_args(s.kind))
    elif isinstance(s.default, bool):
        found = [not s.default]
    elif isinstance(s.default, int | float):
        middle = s.default + 1 if isinstance(s.default, int) else s.default / 2
        found = [*ends(s)[0], *([middle] if middle <= s.declared.get("le", LARGEST) else [])]
    elif isinstance(s.default, list):
        found = [["a b", 'c "d"\\'], ["é"]]
    elif isinstance(s.default, dict):
        found = TABLES[s.name]
    else:
        found = ["7", 'a "b" \\ ü=1' if s.name != "name" else "a b=1"]
    return [value for value in found if value != s.default]


def toml(value: Any) -> str:
    """Write a value as TOML; JSON is the same but for tables."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {json.dumps(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


def expect_only(config: Config, s: Setting, value: Any) -> None:
    """Assert that a setting has a value, of its own type, and all others that it does not need have their defaults."""
    assert s.of(config) == value and type(s.of(config)) is type(s.default)
    needed = {need.partition("=")[0] for need in NEEDS.get(s.name, [])}
    for other in SETTINGS:
        if other.name not in {s.name, *needed}:
            default = other.by.get(config.optimizer.name) if other.by else other.default
            assert other.of(config) == default, other.name


@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: s.name)
def test_there_and_back(s: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Config] = []
    monkeypatch.setattr(llmfast.train.run, "train", lambda config, **_: found.append(config))
    needs = NEEDS.get(s.name, [])
    for number, value in enumerate(values(s)):
        flag = [f"--{s.name}", str(value) if s.name == "name" else toml(value)]
        sets = [["--set", f"{s.name}={toml(value)}"]] if s.name != "name" else []
        for arguments in (flag, *sets):
            assert main(["train", *arguments, *itertools.chain(*(("--set", need) for need in needs))]) == 0
            expect_only(found.pop(), s, value)
        config = load_config(None, [f"{s.name}={toml(value)}", *needs])
        expect_only(config, s, value)
        file = tmp_path / f"{number}.toml"
        file.write_text(dump_config(config), encoding="utf-8")
        again = load_config(file)
        assert again == config and dump_config(again) == dump_config(config)
        assert main(["train", "--config", str(file)]) == 0
        assert found.pop() == config


@pytest.mark.parametrize("s", [s for s in SETTINGS if type(s.default) in (int, float)], ids=lambda s: s.name)
def test_bounds(s: Setting) -> None:
    inside, outside = ends(s)
    assert len(outside) >= 1 and s.range
    for value in inside:
        assert s.of(load_config(None, [f"{s.name}={value}", *NEEDS.get(s.name, [])])) == value
    for value in outside:
        with pytest.raises(ConfigError, match=rf"{s.name} must be (in|at least|above|at most) .*; got {value}$"):
            load_config(None, [f"{s.name}={value}"])
    if isinstance(s.default, float):
        for value in ("nan", "inf"):
            with pytest.raises(ConfigError, match=rf"{s.name} must be"):
                load_config(None, [f"{s.name}={value}"])


@pytest.mark.parametrize("s", SETTINGS, ids=lambda s: s.name)
def test_other_types_are_refused(s: Setting) -> None:
    wrong: list[Any] = [value for value in ("x", 1.5, 3, True, [1], {"a": [1]}) if type(value) is not type(s.default)]
    for value in wrong:
        if isinstance(s.default, float) and value == 3:  # which TOML writes as an integer
            continue
        if isinstance(s.default, list) and value == "x":  # one of a list
            assert s.of(load_config(None, [f"{s.name}={toml(value)}"])) == ["x"]
            continue
        with pytest.raises(ConfigError) as caught:
            load_config(None, [f"{s.name}={toml(value)}"])
        assert str(caught.value).startswith(f"{s.name}={toml(value)}: {s.name} must")


def test_conditions_between_settings() -> None:
    """Each is refused, and accepted where the other setting differs in just what it has to."""
    pairs = [
        (["train.steps=4611686018427387904", "train.batch_size=2"], "train.batch_size=1"),
        (["optimizer.in_backward=true", "train.batch_size=4", "train.micro_batch_size=2"], "train.micro_batch_size=4"),
        (["optimizer.in_backward=true", "train.batch_size=4", "train.micro_batch_size=2"], "train.micro_batch_size=0"),
        (["optimizer.lr_scaling=sqrt"], "optimizer.base_batch_size=1"),
        (["train.vocab_parallel=true"], "model.tie_embeddings=false"),
        (["train.vocab_parallel=true", "model.tie_embeddings=false", "model.mtp=shared"], "model.mtp=none"),
        (["train.parallel=hsdp"], "train.shard_size=1"),
    ]
    for overrides, other in pairs:
        with pytest.raises(ConfigError, match=overrides[0].partition("=")[0].replace(".", r"\.")):
            load_config(None, overrides)
        load_config(None, [*overrides, other])
