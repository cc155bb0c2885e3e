"""Hugging Face's stock Trainer with llmfast's loss, which needs no logits, and its optimizer.

pip install '.[hf]' && python examples/hf_trainer.py
"""

import argparse  # its source is the text to learn
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from llmfast.integrations.transformers import fuse_loss
from llmfast.optim import FusedAdamW


def train(steps: int) -> list[float]:
    """Train a small Llama on the bytes of one of Python's modules and return the loss of each step."""
    tokens = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    rows = [{"input_ids": row, "labels": row} for row in tokens.unfold(0, 64, 64)]

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
    fuse_loss(model)  # llmfast: compute the loss without logits

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model,
            TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=8,
                logging_steps=1,
                max_grad_norm=0.0,  # off: the optimizer clips
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=rows,
            optimizer_cls_and_kwargs=(
                FusedAdamW,
                {"lr": 3e-3, "max_grad_norm": 1.0},
            ),  # llmfast: clip and update in one
        )
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    losses = train(200)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
