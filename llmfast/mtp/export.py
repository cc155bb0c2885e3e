"""Export a decoder with sequential depths to DeepSeek-V3's layout: model.safetensors and config.json.

    model.embed_tokens.weight   model.layers.{0 .. N-1}.*   model.norm.weight   lm_head.weight (if it is not tied)
    model.layers.{N + k}.enorm, .hnorm, .eh_proj, .shared_head.norm, and the parameters of its block, for depth k + 1

Each depth also has `embed_tokens` and `shared_head.head`, copies of what it shares with the model. Blocks use Hugging
Face's names for a Llama, whose attention they have; they do not use DeepSeek's latent attention.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmfast._checks import expect
from llmfast.models.depths import SequentialDepths

if TYPE_CHECKING:
    from llmfast.models import Decoder

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


def save_deepseek(model: "Decoder", folder: Path) -> None:
    """Write `model`, whose mtp is "sequential" or "none", to `folder`, which is created if necessary.

    `eh_proj` is written in the order of the released weights, embedding first, regardless of the model's own order.
    With a repeated layer, the file contains one depth.
    """
    from safetensors.torch import save_file

    c = model.config
    expect(c.mtp in ("sequential", "none"), f"model must have mtp='sequential' or 'none'; got {c.mtp!r}")
    state = model.state_dict()
    tensors: dict[str, Tensor] = {}
    for ours, theirs in _names(model).items():
        tensors |= dict(zip(theirs, state[ours].chunk(len(theirs))))
    for name in list(tensors):
        if name.endswith(".eh_proj.weight"):
            if c.mtp_concat == "hidden_first":
                tensors[name] = _swapped(tensors[name])
            prefix = name.removesuffix("eh_proj.weight")
            tensors[f"{prefix}embed_tokens.weight"] = model.embedding.weight.detach()
            tensors[f"{prefix}shared_head.head.weight"] = model.unembedding.detach()

    folder.mkdir(parents=True, exist_ok=True)
    # Cloned, because the format does not allow tensors that share memory.
    owned = {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(owned, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(_config(model), indent=2) + "\n")


def load_deepseek(folder: Path) -> "Decoder":
    """Load a decoder written by `save_deepseek`, on the CPU and in its saved dtype.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape, or a copy of what the depths share with the
            model differs from the model's own, which this model cannot represent.
    """
    from safetensors.torch import load_file

    from llmfast.models import Decoder, DecoderConfig

    values = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    ours = values.get("llmfast", {})
    depths = values["num_nextn_predict_layers"]
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
        mtp_heads=ours.get("mtp_heads", depths),
        **{key: ours[key] for key in ("mtp_concat", "mtp_hidden", "mtp_repeated_layer", "mtp_detach") if key in ours},
    )
    model = Decoder(c)
    tensors = load_file(str(folder / "model.safetensors"))
    embedding = tensors.get("model.embed_tokens.weight")
    unembedding = embedding if c.tie_embeddings else tensors.get("lm_head.weight")
    for name in [name for name in tensors if _SHARED.fullmatch(name)]:
        copy, own = tensors.pop(name), embedding if "embed_tokens" in name else unembedding
        expect(own is not None and torch.equal(copy, own), f"{name} must equal the model's own, which it shares")
    names = _names(model)
    wanted = {t for theirs in names.values() for t in theirs}
    expect(
        tensors.keys() == wanted,
        f"{folder / 'model.safetensors'} must hold the tensors of its config.json; missing "
        f"{sorted(wanted - tensors.keys())}, left over {sorted(tensors.keys() - wanted)}",
    )
    state = {name: torch.cat([tensors[t] for t in theirs]) for name, theirs in names.items()}
    if c.mtp_concat == "hidden_first":
        state |= {name: _swapped(t) for name, t in state.items() if name.endswith(".eh_proj.weight")}
    try:
        model.to(state["embedding.weight"].dtype).load_state_dict(state)
    except RuntimeError as e:
        raise ValueError(f"{folder / 'model.safetensors'} does not fit its config.json: {e}") from e
    return model


def _names(model: "Decoder") -> dict[str, list[str]]:
    """Map our parameters' names to theirs."""
    names = {"embedding.weight": ["model.embed_tokens.weight"], "norm.weight": ["model.norm.weight"]}
    if model.head is not None:
        names["head.weight"] = ["lm_head.weight"]
    for layer in range(len(model.blocks)):
        names |= _under(f"blocks.{layer}", layer, _BLOCK)
    if isinstance(model.mtp, SequentialDepths):
        for k in range(len(model.mtp.layers)):
            layer = len(model.blocks) + k
            names |= _under(f"mtp.layers.{k}.block", layer, _BLOCK) | _under(f"mtp.layers.{k}", layer, _DEPTH)
    return names


def _under(ours: str, layer: int, names: dict[str, list[str]]) -> dict[str, list[str]]:
    return {
        f"{ours}.{name}.weight": [f"model.layers.{layer}.{part}.weight" for part in theirs]
        for name, theirs in names.items()
    }


def _config(model: "Decoder") -> dict[str, Any]:
    c = model.config
    depths = model.mtp if isinstance(model.mtp, SequentialDepths) else None
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.heads,
        "intermediate_size": c.hidden_ffn,
        "hidden_act": "silu",
        "rope_theta": c.rope_base,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "torch_dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "num_nextn_predict_layers": len(depths.layers) if depths else 0,
        "llmfast": {  # settings that the layout has no names for
            "mtp_heads": c.mtp_heads,
            "mtp_concat": c.mtp_concat,
            "mtp_hidden": c.mtp_hidden,
            "mtp_repeated_layer": c.mtp_repeated_layer,
            "mtp_detach": c.mtp_detach,
        },
    }


def _swapped(eh_proj: Tensor) -> Tensor:
    """Swap the two halves of the columns of a (D, 2 D) matrix."""
    return torch.cat(eh_proj.chunk(2, dim=1)[::-1], dim=1)
