"""The decoder under Hugging Face's names, there and back."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llmfast.models import Decoder, DecoderConfig, load_llama, save_llama
from llmfast.models.llama import decoder_config_of
from support.pairs import Case, covering

OWN = ("model.embed_tokens.weight", "lm_head.weight")  # which depths may have copies of


def decoder(**options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(50, **{"width": 32, "layers": 2, "heads": 2} | options))


@pytest.mark.parametrize(
    "options",
    [
        {"tie_embeddings": False, "rope_base": 500.0, "norm_eps": 1e-6, "ffn_width": 48},
        {"mtp": "parallel", "mtp_heads": 3},
        {"mtp": "sequential", "mtp_heads": 2},
        {"mtp": "shared", "mtp_heads": 2},
    ],
)
def test_what_predicts_the_next_token(options: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = decoder(**options), torch.randint(0, 50, (2, 6))
    save_llama(model, tmp_path, more={"max_position_embeddings": 77})
    again = load_llama(tmp_path)
    assert again.config.mtp == "none" and torch.equal(model(tokens), again(tokens))
    assert torch.equal(model.unembedding, again.unembedding)
    assert json.loads((tmp_path / "config.json").read_text())["max_position_embeddings"] == 77


def test_files_say_all_that_others_ask_for(tmp_path: Path) -> None:
    model = decoder(tie_embeddings=False, rope_base=500.0, norm_eps=1e-6, ffn_width=48).bfloat16()
    folder = tmp_path / "a" / "b"
    save_llama(model, folder, more={"eos_token_id": 3})
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": 500.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 3,
    }
    weights = folder / "model.safetensors"
    with safe_open(str(weights), "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}  # without it, transformers takes it for no file of torch's
    assert weights.stat().st_mode == (folder / "config.json").stat().st_mode


def test_an_editor_may_leave_its_mark_and_write_whole_numbers(tmp_path: Path) -> None:
    save_llama(decoder(), tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text()) | {"rope_theta": 10000}
    file.write_text(json.dumps(values), encoding="utf-8-sig")
    assert load_llama(tmp_path).config.rope_base == 10000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 1}, "with num_key_value_heads=2; got 1"),
        ({"model_type": "qwen3"}, "with model_type='llama'; got 'qwen3'"),
        ({"hidden_act": "gelu"}, "with hidden_act='silu'; got 'gelu'"),
        ({"rope_scaling": {"factor": 2}}, "with rope_scaling=None; got"),
        ({"hidden_size": "x"}, "must be of a model that llmfast wrote"),
        ({"vocab_size": 0}, "vocab_size must be positive"),
        ({"vocab_size": float("inf")}, "wrote; vocab_size must be an int; got inf"),
        ({"rope_theta": float("nan")}, "rope_base must be finite and above 0; got nan"),
        ({"rms_norm_eps": [1]}, "wrote; norm_eps must be a number; got a list"),
        ({"intermediate_size": 2**40}, "its value for ffn_width is 1099511627776"),
        ({"vocab_size": 2**30}, "does not fit its config.json: .*size mismatch"),
        (
            {"num_hidden_layers": 10**6},
            r"must hold the tensors of its config.json's 1000000 layers or depths; it has \d+$",
        ),
        ({"num_nextn_predict_layers": 1000}, "must hold the tensors of its config.json's 1000 layers or depths"),
        (
            {"num_hidden_layers": 3},
            r"must hold the tensors of its config.json; missing \['model.layers.2.*'\], left over \[\]$",
        ),
    ],
)
def test_refuses_other_models(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_llama(decoder(), tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | change))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        load_llama(tmp_path)
    del values["hidden_size"]
    for content, told in (
        (json.dumps(values), "of a 'llama' model and has no 'hidden_size'"),
        ("[1]", "must hold a table; got list"),
        ("{", "not JSON"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=told):
            load_llama(tmp_path)


def test_no_setting_of_depths_is_lost(tmp_path: Path) -> None:
    options: dict[str, Any] = {"mtp": "sequential", "mtp_heads": 2, "mtp_concat": "hidden_first"}
    options |= {"mtp_hidden": "post_norm", "mtp_repeated_layer": True, "mtp_detach": True}
    default = DecoderConfig(50)
    assert options.keys() == {field.name for field in fields(DecoderConfig) if field.name.startswith("mtp")}
    assert all(getattr(default, name) != value for name, value in options.items())
    save_llama(decoder(**options), tmp_path, depths=True)
    again = load_llama(tmp_path).config
    assert {name: getattr(again, name) for name in options} == options


def test_many_depths_of_one_layer_need_few_tensors(tmp_path: Path) -> None:
    model = decoder(layers=1, mtp="sequential", mtp_heads=99, mtp_repeated_layer=True)
    save_llama(model, tmp_path, depths=True)
    assert len(model.state_dict()) < 99 and load_llama(tmp_path).config.mtp_heads == 99


# Values of the settings of a decoder, without its sizes.
SETTINGS: dict[str, list[Any]] = {
    "mtp": list(get_args(get_type_hints(DecoderConfig)["mtp"])),
    "mtp_heads": [0, 2, 3],
    "mtp_concat": list(get_args(get_type_hints(DecoderConfig)["mtp_concat"])),
    "mtp_hidden": list(get_args(get_type_hints(DecoderConfig)["mtp_hidden"])),
    "mtp_repeated_layer": [True, False],
    "mtp_detach": [True, False],
    "tie_embeddings": [True, False],
    "rope_base": [500.0, 10000.0],
    "norm_eps": [1e-6, 1e-5],
    "ffn_width": [0, 48],
}


def test_every_setting_of_a_decoder_is_among_them() -> None:
    sizes = {"vocab_size", "width", "layers", "heads"}
    assert {field.name for field in fields(DecoderConfig)} - sizes == SETTINGS.keys()


def can_be(case: Case) -> bool:
    heads, mtp = case.get("mtp_heads"), case.get("mtp")
    return mtp is None or heads is None or (heads == 0) == (mtp == "none")


@pytest.mark.parametrize("case", covering(SETTINGS, can_be), ids=lambda case: "-".join(map(str, case.values())))
def test_any_two_settings_together_come_back(case: Case, tmp_path: Path) -> None:
    model, tokens = decoder(**case), torch.randint(0, 50, (2, 6))
    for depths in (False, True)[: 1 + (case["mtp"] == "sequential")]:
        save_llama(model, tmp_path / str(depths), depths=depths)
        again = load_llama(tmp_path / str(depths))
        own = [name for name in case if name != "ffn_width" and (depths or not name.startswith("mtp"))]
        assert {name: getattr(again.config, name) for name in own} == {name: case[name] for name in own}
        assert again.config.hidden_ffn == model.config.hidden_ffn
        assert torch.equal(model(tokens), again(tokens))
    if case["mtp"] == "sequential":
        weights, found = model.state_dict(), again.state_dict()
        assert weights.keys() == found.keys() and all(torch.equal(found[name], t) for name, t in weights.items())
        with safe_open(tmp_path / "True" / "model.safetensors", framework="pt") as file:
            heads = [file.get_tensor(name) for name in list(file.keys()) if name.endswith("shared_head.head.weight")]
        assert heads and all(torch.equal(head, model.unembedding) for head in heads)


def test_damaged_weights(tmp_path: Path) -> None:
    save_llama(decoder(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 99)
    with pytest.raises(ValueError, match=r"model.safetensors is damaged"):
        load_llama(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_of_the_config(tied: bool, tmp_path: Path) -> None:
    """Leave out each tensor in turn, cut it, and add one that only another model has."""
    save_llama(decoder(layers=1, mtp="sequential", mtp_heads=1, tie_embeddings=tied), tmp_path, depths=True)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    shared = {name for name in whole if re.search("[.](embed_tokens|shared_head.head)[.]", name)} - {*OWN}
    for name, t in whole.items():
        changed: list[tuple[dict[str, Any], str]] = [({name: t[:-1]}, "does not fit|must equal the model's own")]
        if name not in shared:  # depths need no copies of what they share
            changed.append(({name: None}, f"missing .*{re.escape(name)}|must equal the model's own"))
        changed.append(({f"{name.removesuffix('weight')}bias": t[..., 0].clone()}, "left over .*bias"))
        changed.append(({f"model.layers.7.{name}": t.clone()}, r"left over .*model\.layers\.7"))
        for change, message in changed:
            save_file({n: x for n, x in (whole | change).items() if x is not None}, file)
            with pytest.raises(ValueError, match=message):
                load_llama(tmp_path)


def test_settings_of_depths_that_are_not_there_are_not_read(tmp_path: Path) -> None:
    save_llama(decoder(mtp="sequential", mtp_heads=2, mtp_concat="hidden_first"), tmp_path, depths=True)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["llmfast"]["mtp_heads"] == values["num_nextn_predict_layers"] == 2
    del values["num_nextn_predict_layers"]
    assert decoder_config_of(values, tmp_path) == decoder(ffn_width=128).config


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "\x00"], ids=["cut off", "too deep", "binary"])
def test_a_config_that_is_not_json(text: str, tmp_path: Path) -> None:
    save_llama(decoder(), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is not JSON: "):
        load_llama(tmp_path)


def test_a_model_of_others_is_told_where_it_goes(tmp_path: Path) -> None:
    save_llama(decoder(), tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text()) | {"model_type": "gemma"}
    del values["rope_theta"]
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match="it is of a 'gemma' model and has no 'rope_theta'; another one can be") as e:
        load_llama(tmp_path)
    assert str(e.value).endswith(f"trained further: `llmfast train --model.pretrained {tmp_path}`")


# Names in config.json of what a configuration's fields are, by the type that they must have.
NUMBERS: dict[type, tuple[str, ...]] = {
    int: ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    float: ("rope_theta", "rms_norm_eps"),
    bool: ("tie_word_embeddings",),
}
OURS = {"hidden_size": "width", "num_hidden_layers": "layers", "num_attention_heads": "heads"}
OURS |= {"intermediate_size": "ffn_width", "rope_theta": "rope_base", "rms_norm_eps": "norm_eps"}
OURS |= {"tie_word_embeddings": "tie_embeddings"}


def config_of(tmp_path: Path, **options: Any) -> dict[str, Any]:
    save_llama(decoder(**options), tmp_path, depths=True)
    values: dict[str, Any] = json.loads((tmp_path / "config.json").read_text())
    return values


def test_every_value_of_a_config_has_its_type_and_range(tmp_path: Path) -> None:
    values = config_of(tmp_path)
    for kind, names in NUMBERS.items():
        for name in names:
            field = OURS.get(name, name)
            wrong: list[Any] = [1, "yes", None] if kind is bool else [True, 2.0**31 if kind is float else 2**31]
            wrong += {int: [float(values[name])], float: [-1.0, -1, 2**31], bool: [0, 1.0]}[kind]
            for value in wrong:
                says = rf"(its value for {field} is|{field} must be [a-z0 ]+; got) {re.escape(repr(value))}$"
                told = rf"{says}|; width must be a multiple of"
                with pytest.raises(ValueError, match=told):
                    decoder_config_of(values | {name: value, "num_key_value_heads": value}, tmp_path / "config.json")
    most = decoder_config_of(values | {"vocab_size": 2**31 - 1, "rms_norm_eps": 0, "rope_theta": 3}, tmp_path)
    assert (most.vocab_size, most.norm_eps, most.rope_base) == (2**31 - 1, 0, 3)


@pytest.mark.parametrize("name", ["mtp_heads", "mtp_concat", "mtp_hidden", "mtp_repeated_layer", "mtp_detach"])
def test_every_setting_of_depths_has_its_type(name: str, tmp_path: Path) -> None:
    values = config_of(tmp_path, mtp="sequential", mtp_heads=2)
    kinds = {"mtp_heads": [2.0, True], "mtp_repeated_layer": [0], "mtp_detach": [1.0, None]}
    for value in kinds.get(name, ["first", 1]):
        with pytest.raises(ValueError, match=rf"its value for {name} is|{name} must be .*; got"):
            decoder_config_of(values | {"llmfast": values["llmfast"] | {name: value}}, tmp_path)
    # Without ours there are as many depths as the layout says, with the usual settings.
    del values["llmfast"]
    assert decoder_config_of(values, tmp_path) == decoder(ffn_width=128, mtp="sequential", mtp_heads=2).config


@pytest.mark.parametrize("name", ["model_type", "num_key_value_heads", "hidden_act", "rope_scaling", "architectures"])
def test_what_a_config_does_not_say_is_as_usual(name: str, tmp_path: Path) -> None:
    values = config_of(tmp_path)
    values.pop(name, None)
    assert decoder_config_of(values, tmp_path) == decoder(ffn_width=128).config
