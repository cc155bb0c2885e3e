"""The decoder under Hugging Face's names, as a folder that transformers opens as a `LlamaForCausalLM`.

    model.embed_tokens.weight   model.layers.{0 .. N-1}.*   model.norm.weight   lm_head.weight (if it is not tied)
    model.layers.{N + k}.enorm, .hnorm, .eh_proj, .shared_head.norm, and the parameters of its block, for depth k + 1

The second line is DeepSeek-V3's layout for sequential depths, which a Llama does not read. Each depth also has
`embed_tokens` and `shared_head.head`, copies of what it shares with the model.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmfast._checks import expect
from llmfast.models.decoder import Decoder, DecoderConfig
from llmfast.models.depths import SequentialDepths
from llmfast.models.heads import ParallelHeads

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# Our names to theirs; several of theirs are equal parts of the rows of ours.
_BLOCK: dict[str, list[str]] = {
    "attention_norm": ["input_layernorm"],
    "attention.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention.out": ["self_attn.o_proj"],
    "ffn_norm": ["post_attention_layernorm"],
    "ffn.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "ffn.out": ["mlp.down_proj"],
}
_DEPTH = {"enorm": ["enorm"], "hnorm": ["hnorm"], "eh_proj": ["eh_proj"], "norm": ["shared_head.norm"]}
_SHARED = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
_BEYOND = 2**31  # any size or number of the configuration is smaller
_OWN = ("mtp_heads", "mtp_concat", "mtp_hidden", "mtp_repeated_layer", "mtp_detach")  # the layout has no names for them


def save_llama(model: Decoder, folder: Path, *, depths: bool = False, more: Mapping[str, Any] | None = None) -> None:
    """Write model.safetensors and config.json to `folder`, which is created if necessary.

    The result predicts the next token. Of parallel heads, the first becomes the last layer; the others are left out.

    Args:
        model: Any decoder.
        folder: Files of these names are replaced.
        depths: Also write sequential depths, in DeepSeek-V3's layout. `eh_proj` is written in the order of the released
            weights, embedding first, regardless of the model's own order. With a repeated layer, there is one depth.
        more: Further entries of config.json, for example `max_position_embeddings` and `eos_token_id`.
    """
    from safetensors.torch import save_file

    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _names(model, depths).items():
        tensors |= dict(zip(theirs, state[ours].chunk(len(theirs))))
    for name in [name for name in tensors if name.endswith(".eh_proj.weight")]:
        if model.config.mtp_concat == "hidden_first":
            tensors[name] = _swapped(tensors[name])
        prefix = name.removesuffix("eh_proj.weight")
        tensors[f"{prefix}embed_tokens.weight"] = model.embedding.weight.detach()
        tensors[f"{prefix}shared_head.head.weight"] = model.unembedding.detach()

    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because the format does not allow tensors that share memory.
    owned = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(owned, str(folder / WEIGHTS), metadata={"format": "pt"})
    values = _config(model, depths) | dict(more or {})
    (folder / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)  # safetensors lets only the owner read its files


def load_llama(folder: Path) -> Decoder:
    """Load a decoder written by `save_llama`, with its depths if they were, on the CPU and in its saved dtype.

    Raises:
        ValueError: The files are not of such a decoder: tensors are missing, unexpected or of another shape, or a copy
            of what the depths share with the model differs from the model's own.
        OSError: A file is missing.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    c = decoder_config_of(read_config(folder), folder / CONFIG)
    try:
        tensors = load_file(str(folder / WEIGHTS))
    except SafetensorError as e:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {e}") from e
    most = max(c.layers, 0 if c.mtp_repeated_layer else c.mtp_heads)
    expect(
        most <= len(tensors),
        f"{folder / WEIGHTS} must hold the tensors of its config.json's {most} layers or depths; it has {len(tensors)}",
    )
    with torch.device("meta"):  # sizes are only known to be right when the tensors fit
        model = Decoder(c)
    embedding = tensors.get("model.embed_tokens.weight")
    unembedding = embedding if c.tie_embeddings else tensors.get("lm_head.weight")
    for name in [name for name in tensors if _SHARED.fullmatch(name)]:
        copy, own = tensors.pop(name), embedding if "embed_tokens" in name else unembedding
        expect(own is not None and torch.equal(copy, own), f"{name} must equal the model's own, which it shares")
    names = _names(model, True)
    wanted = {t for theirs in names.values() for t in theirs}
    expect(
        tensors.keys() == wanted,
        f"{folder / WEIGHTS} must hold the tensors of its config.json; missing "
        f"{sorted(wanted - tensors.keys())}, left over {sorted(tensors.keys() - wanted)}",
    )
    try:
        state = {name: torch.cat([tensors[t] for t in theirs]) for name, theirs in names.items()}
        if c.mtp_concat == "hidden_first":
            state |= {name: _swapped(t) for name, t in state.items() if name.endswith(".eh_proj.weight")}
        model.load_state_dict(state, assign=True)
    except RuntimeError as e:
        raise ValueError(f"{folder / WEIGHTS} does not fit its config.json: {e}") from e
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json; ValueError if it is not a table in JSON."""
    file = folder / CONFIG
    try:
        values = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{file} is not JSON: {e}") from e
    expect(isinstance(values, dict), f"{file} must hold a table; got {type(values).__name__}")
    return dict(values)


def _names(model: Decoder, depths: bool) -> dict[str, list[str]]:
    """Map our parameters' names to theirs."""
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if model.head is not None:
        names["head.weight"] = ["lm_head.weight"]
    blocks = [f"blocks.{i}" for i in range(len(model.blocks))]
    if isinstance(model.mtp, ParallelHeads):
        blocks.append("mtp.blocks.0")
    for layer, block in enumerate(blocks):
        names |= _under(block, layer, _BLOCK)
    if depths and isinstance(model.mtp, SequentialDepths):
        for k in range(len(model.mtp.layers)):
            layer = len(blocks) + k
            names |= _under(f"mtp.layers.{k}.block", layer, _BLOCK) | _under(f"mtp.layers.{k}", layer, _DEPTH)
    return names


def _under(ours: str, layer: int, names: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        f"{ours}.{name}.weight": [f"model.layers.{layer}.{part}.weight" for part in theirs]
        for name, theirs in names.items()
    }


def _config(model: Decoder, depths: bool) -> dict[str, Any]:
    c = model.config
    values = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.heads,
        "head_dim": c.width // c.heads,
        "intermediate_size": c.hidden_ffn,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": c.rope_base,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
    }
    if depths and isinstance(model.mtp, SequentialDepths):
        own = {name: getattr(c, name) for name in _OWN}
        values |= {"num_nextn_predict_layers": len(model.mtp.layers), "llmfast": own}
    return values


def decoder_config_of(values: dict[str, Any], file: Path) -> DecoderConfig:
    """Return the configuration of the decoder that a config.json describes; ValueError if it describes none."""
    ours, depths = values.get("llmfast", {}), values.get("num_nextn_predict_layers", 0)
    wrote = f"{file} must be of a model that llmfast wrote"
    other = f"another one can be trained further: `llmfast train --model.pretrained {file.parent}`"
    try:
        c = DecoderConfig(
            vocab_size=values["vocab_size"],
            width=values["hidden_size"],
            layers=values["num_hidden_layers"],
            heads=values["num_attention_heads"],
            ffn_width=values["intermediate_size"],
            rope_base=values["rope_theta"],
            norm_eps=values["rms_norm_eps"],
            tie_embeddings=values["tie_word_embeddings"],
            mtp="sequential" if depths else "none",
            **{"mtp_heads": depths} | {name: ours[name] for name in _OWN if name in ours and depths},
        )
    except KeyError as e:
        raise ValueError(f"{wrote}; it is of a {values.get('model_type')!r} model and has no {e}; {other}") from e
    except (TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"{wrote}; {e}") from e
    must = {"model_type": "llama", "num_key_value_heads": c.heads, "hidden_act": "silu", "rope_scaling": None}
    for field in fields(c):
        got, kind = getattr(c, field.name), int if field.default is MISSING else type(field.default)
        right = type(got) is kind or (kind is float and type(got) is int)
        right = right and (kind not in (int, float) or 0 <= got < _BEYOND)
        expect(right, f"{wrote}; its value for {field.name} is {got!r:.50}")
    for name, value in must.items():
        got = values.get(name, value)
        expect(got == value, f"{wrote}, with {name}={value!r}; got {got!r}; {other}")
    return c


def _swapped(eh_proj: Tensor) -> Tensor:
    """Swap the two halves of the columns of a (D, 2 D) matrix."""
    return torch.cat(eh_proj.chunk(2, dim=1)[::-1], dim=1)
