"""TRL's preference and policy trainers (DPO, GRPO, KTO, RLOO) with llmfast's log-probabilities.

These trainers ask their model for the log-probabilities of the labels instead of logits. `use_logprobs` lets
llmfast answer, for any model that `fuse_loss` takes, with its own scales, softcaps and adapters.

pip install '.[hf,trl]' && python examples/trl_logprobs.py
"""

import functools
import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from llmfast.integrations.transformers import fuse_loss, model_logprobs
from llmfast.optim import FusedAdamW


def use_logprobs(trainer: Any, **options: Any) -> None:
    """Let a trainer's model and its reference model answer TRL by `model_logprobs` with these `options`.

    Call this after the trainer is made: TRL replaces the forward of both models.
    """
    for model in (trainer.model, trainer.ref_model):
        if model is not None:
            lm = model.get_base_model() if hasattr(model, "get_base_model") else model
            lm.forward = answering(lm, {"temperature": getattr(trainer, "temperature", 1.0), **options})


def answering(lm: Any, options: dict[str, Any]) -> Any:
    own = type(lm).forward

    @functools.wraps(own)  # generate() reads its signature
    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return own(lm, *args, labels=labels, **kwargs)
        ids = F.pad(labels[:, 1:], (0, 1), value=-100)  # what follows each token
        found, stats = model_logprobs(lm, kwargs, ids, return_stats=True, **options)  # llmfast
        known = ids != -100
        return FusedCausalLMOutput(
            loss=-found.sum() / known.sum().clamp(min=1),
            log_probs=found[:, :-1],
            entropy=stats.entropy[:, :-1],
            mean_logits=torch.full_like(found, torch.nan)[:, :-1],  # TRL only logs it
            is_top1=(known & (stats.argmax == ids))[:, :-1],
            label_mask=known[:, :-1],
        )

    return forward


ALPHABET = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]


def tokenizer() -> Any:
    byte_level = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(ALPHABET)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level, pad_token="<pad>", eos_token="<eos>")


def llama(seed: int) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(ALPHABET), pad_token_id=0, eos_token_id=1, **shape))
    return fuse_loss(model)  # llmfast; before the trainer, which replaces the model's forward


COMMON: dict[str, Any] = {
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "bf16": False,
    "disable_tqdm": True,
    "optim": "adamw_torch",
}


def preferences(steps: int, folder: str) -> DPOTrainer:
    """Return a trainer that prefers digits that go up to digits that go down."""
    rows = [
        {"prompt": f"{i}:", "chosen": "".join(f"{(i + k) % 10}" for k in range(6)), "rejected": "987654"}
        for i in range(64)
    ]
    arguments = DPOConfig(folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=1e-3, **COMMON)
    model = llama(0)
    return DPOTrainer(
        model,
        llama(0),
        arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        optimizers=(FusedAdamW(model.parameters(), lr=1e-3), None),  # llmfast
    )


def policy(steps: int, folder: str) -> GRPOTrainer:
    """Return a trainer that is rewarded for digits, with a bonus for entropy."""

    def digits(completions: Any, **others: Any) -> list[float]:
        return [sum(c.isdigit() for c in text) / 8 for text in completions]

    arguments = GRPOConfig(
        folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        num_generations=8,
        max_completion_length=8,
        learning_rate=1e-2,
        temperature=0.9,
        entropy_coef=0.001,
        **COMMON,
    )
    model = llama(0)
    return GRPOTrainer(
        model,
        digits,
        arguments,
        train_dataset=Dataset.from_list([{"prompt": f"{i}:"} for i in range(64)]),
        processing_class=tokenizer(),
        optimizers=(FusedAdamW(model.parameters(), lr=1e-2), None),  # llmfast
    )


def train(make: Any, steps: int) -> list[dict[str, float]]:
    """Train, and return what TRL logs of each step."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(steps, folder)
        use_logprobs(trainer)  # llmfast
        trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    margins = [entry["rewards/margins"] for entry in train(preferences, 30)]
    print(f"DPO: margin of what is preferred {margins[0]:.2f} -> {margins[-1]:.2f}")
    rewards = [entry["reward"] for entry in train(policy, 60)]
    print(f"GRPO: share of digits {rewards[0]:.2f} -> {rewards[-1]:.2f}")
