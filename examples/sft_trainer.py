"""TRL's SFTTrainer with llmfast: the optimizer as in any Trainer, and the model's own loss.

The SFTTrainer computes its own losses, also without logits, and ignores the loss that the model would compute from
`labels`. This is fine for plain losses. Options that only the model knows (those of `fuse_loss`, and the heads of
`add_mtp`) have no effect there; the subclass below uses the model's loss instead.

pip install '.[hf,trl]' && python examples/sft_trainer.py
"""

import argparse  # the model learns its source
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from llmfast.integrations.transformers import fuse_loss
from llmfast.optim import FusedAdamW


class ModelsLoss(SFTTrainer):
    """SFTTrainer that uses the model's loss; TRL's entropy, accuracy and token count are not logged."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = {**inputs, "use_cache": False}  # with a cache, a model does not notice that rows are packed
        return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def train(steps: int) -> list[float]:
    """Train a small Llama byte by byte on the lines of one of Python's modules; return the loss of each step."""
    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    byte_level = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, pad_token="<pad>", eos_token="<eos>")
    lines = Path(argparse.__file__).read_text().splitlines()

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(alphabet), **shape))
    fuse_loss(model, z_loss=1e-4)  # llmfast; call it before the SFTTrainer, which replaces the model's forward

    with tempfile.TemporaryDirectory() as folder:
        trainer = ModelsLoss(
            model,
            SFTConfig(
                folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                logging_steps=1,
                max_grad_norm=0.0,
                save_strategy="no",
                report_to=[],
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"text": [line for line in lines if line]}),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=(FusedAdamW, {"lr": 3e-3, "max_grad_norm": 1.0}),  # llmfast
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = train(100)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
