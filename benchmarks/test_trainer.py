"""Time one step of the trainer on the demo's model, compared with an equivalent loop in plain torch."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.conftest import Add, Race
from llmfast.checkup.clock import device
from llmfast.data import ByteTokenizer, Dataset, Mixed, Mixture, pack
from llmfast.models import Decoder, DecoderConfig
from llmfast.optim import FusedAdamW
from llmfast.train.config import Config
from llmfast.train.objective import NextToken
from llmfast.train.trainer import Trainer

VOCABULARY = 8192


@contextmanager
def trainer(config: Config) -> Iterator[Trainer]:
    random = np.random.default_rng(0)
    rows = pack([random.integers(1, VOCABULARY, size=300) for _ in range(500)], config.data.seq_len, eot_id=0)
    model = model_of(config)
    optimizer = FusedAdamW(model.parameters(), lr=1e-3, max_grad_norm=config.optimizer.max_grad_norm)
    data = Mixed(Dataset({"random": rows}, {}, ByteTokenizer()), Mixture({"random": len(rows)}, {}, total=1000))
    yield Trainer(model, NextToken(), optimizer, data, config, dtype=dtype())


def model_of(config: Config) -> Decoder:
    m = config.model
    return Decoder(DecoderConfig(VOCABULARY, width=m.width, layers=m.layers, heads=m.heads)).to(device())


def dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def test_step(race: Race, add: Add) -> None:
    config = Config()
    model = model_of(config)
    plain = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    step = 0
    with trainer(config) as ours:
        B = config.train.batch_size

        def torchs() -> None:
            nonlocal step
            batch = ours.data.batch(step * B, B)
            step += 1
            tokens, labels, positions, documents = (
                x.to(device()) for x in (batch.tokens, batch.labels, batch.positions, batch.document_ids)
            )
            with torch.autocast(device().type, dtype(), enabled=dtype() != torch.float32):
                hidden = model(tokens, positions=positions, document_ids=documents)
                logits = F.linear(hidden, model.unembedding)
                loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm)
            plain.step()
            plain.zero_grad(set_to_none=True)

        for name, timing in race({"llmfast": ours._train_step, "torch": torchs}, rounds=10).items():
            add(
                "clock",
                operation="training step",
                shape="demo, 1024 tokens",
                dtype=str(dtype()),
                way=name,
                seconds=timing.seconds,
                ratio=timing.ratio,
                spread=timing.spread,
            )
