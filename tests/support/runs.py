"""Folders of finished runs with random weights, made without training."""

from pathlib import Path

import torch
from safetensors.torch import save_model

from llmfast.data import BPETokenizer, ByteTokenizer, Tokenizer
from llmfast.models import Decoder
from llmfast.train.config import decoder_config, dump_config, load_config

SETTINGS = ["model.width=32", "model.layers=2", "model.heads=2", "data.seq_len=64", "data.tokenizer=bytes"]
TEXTS = [f"def f{i}(x):\n    return '{i} naïve 中文 😀' + x * {i}\n" for i in range(40)]


def tokenizer_of(kind: str) -> Tokenizer:
    return ByteTokenizer() if kind == "bytes" else BPETokenizer.train(TEXTS, 300)


def write_run(folder: Path, *settings: str, tokenizer: str = "bytes") -> Decoder:
    """Write config.toml, tokenizer.json and model.safetensors as a run leaves them; return its model."""
    config = load_config(None, [*SETTINGS, *settings])
    made = tokenizer_of(tokenizer)
    torch.manual_seed(0)
    model = Decoder(decoder_config(config, made.vocab_size)).to(getattr(torch, config.train.param_dtype))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3) if p.dim() > 1 else p.uniform_(0.5, 1.5)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(dump_config(config), encoding="utf-8")
    made.save(folder / "tokenizer.json")
    save_model(model, str(folder / "model.safetensors"))
    return model.eval()
