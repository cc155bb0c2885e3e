"""DeepSeek's layout, there and back."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmfast.models import Decoder, DecoderConfig
from llmfast.models.decoder import MTP
from llmfast.mtp import load_deepseek, save_deepseek


def decoder(**options: Any) -> Decoder:
    given = {"width": 32, "layers": 2, "heads": 2, "mtp": "sequential", "mtp_heads": 2} | options
    model = Decoder(DecoderConfig(50, **given))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": False, "mtp_concat": "hidden_first", "mtp_hidden": "post_norm", "mtp_detach": True},
        {"mtp_repeated_layer": True, "rope_base": 500.0, "norm_eps": 1e-6, "ffn_width": 48},
        {"mtp": "none", "mtp_heads": 0},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = decoder(**options).to(dtype)
    save_deepseek(model, tmp_path / "out")
    again = load_deepseek(tmp_path / "out")
    assert again.config.hidden_ffn == model.config.hidden_ffn
    state, loaded = model.state_dict(), again.state_dict()
    assert state.keys() == loaded.keys()
    assert all(torch.equal(state[k], loaded[k]) and loaded[k].dtype == dtype for k in state)
    tokens = torch.randint(0, 50, (2, 6))
    assert torch.equal(model(tokens, all_heads=True), again(tokens, all_heads=True))
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    layers = 1 if options.get("mtp_repeated_layer") else 2  # of which the file has the tensors
    assert told.get("num_nextn_predict_layers") == (None if options.get("mtp") == "none" else layers)


def test_the_names_are_deepseeks(tmp_path: Path) -> None:
    model = decoder(tie_embeddings=False, mtp_concat="hidden_first")
    save_deepseek(model, tmp_path)
    tensors = load_file(str(tmp_path / "model.safetensors"))
    block = {
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    }
    depth = {"enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "embed_tokens"}
    assert tensors.keys() == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.{name}.weight" for i in range(4) for name in block),
        *(f"model.layers.{i}.{name}.weight" for i in (2, 3) for name in depth),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (2, 2)
    # The released weights read the embedding first, and ours here did not.
    state = model.state_dict()
    ours, theirs = state["mtp.layers.1.eh_proj.weight"], tensors["model.layers.3.eh_proj.weight"]
    assert torch.equal(theirs, torch.cat([ours[:, 32:], ours[:, :32]], 1))
    assert torch.equal(
        tensors["model.layers.3.self_attn.k_proj.weight"], state["mtp.layers.1.block.attention.qkv.weight"][32:64]
    )
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])


@pytest.mark.parametrize("mtp", sorted({*get_args(MTP)} - {"sequential", "none"}))
def test_other_kinds_of_heads_are_refused_before_anything_is_written(mtp: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"model must have mtp='sequential' or 'none'; got '{mtp}'"):
        save_deepseek(decoder(mtp=mtp), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    save_deepseek(decoder(), tmp_path)
    file = str(tmp_path / "model.safetensors")
    tensors = load_file(file)
    for name in (f"model.layers.{i}.{part}.weight" for i in (2, 3) for part in ("shared_head.head", "embed_tokens")):
        save_file(tensors | {name: tensors[name] + 1}, file)
        with pytest.raises(ValueError, match=rf"^{name} must equal the model's own, which it shares$"):
            load_deepseek(tmp_path)
    save_file({k: t for k, t in tensors.items() if k != "model.embed_tokens.weight"}, file)
    with pytest.raises(
        ValueError, match=r"^model.layers.\d.\w+(.head)?.weight must equal the model's own, which it shares$"
    ):
        load_deepseek(tmp_path)
    save_file({k: t for k, t in tensors.items() if "enorm" not in k} | {"more": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"missing \['model.layers.2.enorm.weight', .*left over \['more'\]"):
        load_deepseek(tmp_path)
    save_file(tensors | {"model.norm.weight": torch.ones(31)}, file)
    with pytest.raises(ValueError, match=r"does not fit its config.json"):
        load_deepseek(tmp_path)


@pytest.mark.parametrize("part", ["shared_head.head", "embed_tokens"])
def test_copies_of_an_untied_model_are_of_what_they_are_called(part: str, tmp_path: Path) -> None:
    save_deepseek(decoder(tie_embeddings=False), tmp_path)
    file = str(tmp_path / "model.safetensors")
    tensors = load_file(file)
    own = {"shared_head.head": "lm_head.weight", "embed_tokens": "model.embed_tokens.weight"}
    other = own["embed_tokens" if part == "shared_head.head" else "shared_head.head"]
    name = f"model.layers.3.{part}.weight"
    assert torch.equal(tensors[name], tensors[own[part]])
    save_file(tensors | {name: tensors[other].clone()}, file)
    with pytest.raises(ValueError, match=rf"^{name} must equal the model's own"):
        load_deepseek(tmp_path)
