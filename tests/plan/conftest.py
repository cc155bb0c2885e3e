"""Fixtures that write the folder of a run as `llmfast train` would, without training."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from llmfast.data import ByteTokenizer
from llmfast.plan import ChinchillaLaw, count_parameters, model_config
from llmfast.train.config import dump_config, load_config

MakeRun = Callable[..., Path]


@pytest.fixture
def law() -> ChinchillaLaw:
    """Return the law that the losses of `make_run` follow."""
    return ChinchillaLaw(E=1.2, A=30.0, B=80.0, alpha=0.3, beta=0.28)


@pytest.fixture
def make_run(tmp_path: Path, law: ChinchillaLaw) -> MakeRun:
    """Return a function that writes a run whose last loss is the law's, times `off`."""

    def make(width: int, steps: int, *settings: str, off: float = 1.0, stopped_at: int | None = None) -> Path:
        config = load_config(
            None,
            [
                f"model.width={width}",
                "model.layers=1",
                "model.heads=2",
                "data.tokenizer=bytes",
                "data.seq_len=256",
                "train.batch_size=4",
                f"train.steps={steps}",
                *settings,
            ],
        )
        folder = tmp_path / f"w{width}-s{steps}"
        folder.mkdir()
        (folder / "config.toml").write_text(dump_config(config))
        ByteTokenizer().save(folder / "tokenizer.json")
        N, D, last = count_parameters(model_config(config)).next_token, steps * 4 * 256, stopped_at or steps
        lines = [
            {"step": 0, "tokens": 0, "validation": {"text": 5.6}, "validation_mean": 5.6},
            {"step": last, "tokens": D, "loss": 0.1},
            {"step": last, "tokens": D, "validation": {}, "validation_mean": off * law.loss(N, D)},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make
