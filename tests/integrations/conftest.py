"""Tiny models of Hugging Face's real classes, with random weights and logits that are large enough to tell."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from llmfast.losses import targets

V = 320
SHAPE = dict(
    vocab_size=V,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.2,
)
GPT2 = dict(
    vocab_size=V,
    n_embd=32,
    n_layer=2,
    n_head=4,
    n_positions=64,
    bos_token_id=1,
    eos_token_id=2,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    initializer_range=0.2,
)
LATENT = dict(
    num_key_value_heads=4,
    moe_intermediate_size=16,
    n_routed_experts=4,
    n_group=2,
    topk_group=1,
    num_experts_per_tok=2,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=8,
    first_k_dense_replace=1,
)
ROUTED = dict(moe_intermediate_size=16, moe_num_experts=4, moe_k=2)
MIXED = dict(
    mamba_d_ssm=64,
    mamba_n_heads=8,
    mamba_d_head=8,
    mamba_n_groups=1,
    mamba_d_state=8,
    mamba_chunk_size=8,
)
CAPPED = dict(head_dim=8, final_logit_softcapping=3.0)

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SHAPE),
    "tied": ("LlamaConfig", "LlamaForCausalLM", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", SHAPE | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", SHAPE | CAPPED),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", SHAPE | CAPPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", SHAPE),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", SHAPE),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", SHAPE),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2),
    "gpt": ("OpenAIGPTConfig", "OpenAIGPTLMHeadModel", GPT2),  # whose layers return lists
    "deepseek": ("DeepseekV3Config", "DeepseekV3ForCausalLM", SHAPE | LATENT),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", SHAPE | {"num_local_experts": 4, "output_router_logits": True}),
    "diffllama": ("DiffLlamaConfig", "DiffLlamaForCausalLM", SHAPE),  # which is in part made where no context says
    "falcon": ("FalconH1Config", "FalconH1ForCausalLM", SHAPE | MIXED),  # whose layers have buffers that are not saved
    "ernie": ("Ernie4_5_MoeConfig", "Ernie4_5_MoeForCausalLM", SHAPE | ROUTED),
    "granite": ("GraniteConfig", "GraniteForCausalLM", SHAPE | {"logits_scaling": 3.0}),
    "cohere": ("CohereConfig", "CohereForCausalLM", SHAPE | {"logit_scale": 0.3}),
    "phi": ("PhiConfig", "PhiForCausalLM", SHAPE),  # whose output embedding has a bias
}


@pytest.fixture
def make() -> Callable[..., Any]:
    """Create a model of that class in training mode; further arguments go to its config."""

    def build(name: str, **changes: Any) -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        config, model, values = MODELS[name]
        torch.manual_seed(0)
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**values | changes))
        return made.train()

    return build


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Logits as small as these would be torch's own loss, and there would be nothing to compare.
    for kind in targets.SMALL:
        monkeypatch.setitem(targets.SMALL, kind, -1)
    # Where TrainingArguments and Accelerator leave their precision to the next one.
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)
