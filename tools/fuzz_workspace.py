"""Build the workspace that every case starts from."""

import gzip
import json
import random
import shlex
from pathlib import Path
from typing import Any

from tools.fuzz_process import Case, Main, run

SETTINGS = {
    "runs": "runs",
    "data.sources": ["corpus"],
    "data.tokenizer": "bytes",
    "data.seq_len": 32,
    "data.held_out": 0.3,
    "model.width": 32,
    "model.layers": 1,
    "model.heads": 2,
    "optimizer.warmup_steps": 2,
    "train.steps": 4,
    "train.batch_size": 2,
    "train.eval_every": 4,
    "train.eval_rows": 4,
    "train.log_every": 2,
    "train.save_every": 2,
    "train.sample_tokens": 4,
    "train.device": "cpu",
}


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]


def _toml(settings: dict[str, Any]) -> str:
    from llmfast.train.config import dump_config, load_config

    return dump_config(load_config(None, [argument.removeprefix("--set=") for argument in flags(settings)]))


def build(folder: Path, main: Main) -> None:
    """Build the workspace: train one run in its own process, and generate the runs used for fitting a law."""
    import numpy as np

    from llmfast.data import ByteTokenizer, write_ds
    from llmfast.data.tokenizer import BPETokenizer

    draw = random.Random(0)
    words = shlex.split("the a of harbour bread clock bees paper and then goes comes makes old new very")

    def text() -> str:
        return "\n".join(" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(12)) + "\n"

    texts = [text() for _ in range(12)]
    for name in ("corpus", "other", "dirty"):
        (folder / name).mkdir(parents=True)
        for i, content in enumerate(texts):
            (folder / name / f"{i}.txt").write_text(content)
    lines = "".join(json.dumps({"text": t, "id": str(i)}) + "\n" for i, t in enumerate(texts))
    (folder / "dirty" / "lines.jsonl").write_text(lines)
    with gzip.open(folder / "dirty" / "more.jsonl.gz", "wt") as file:
        file.write(lines)
    (folder / "config.toml").write_text(_toml(SETTINGS))
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + draw.randbytes(10_000))
    ByteTokenizer().save(folder / "bytes.json")
    BPETokenizer.train(texts, 300).save(folder / "tokenizer.json")
    ids = [np.frombuffer(t.encode(), np.uint8).astype(np.int64) for t in texts]
    write_ds(folder / "tokens.ds", ids, vocab_size=264, eot_id=256)
    _write_megatron(folder / "tokens.bin", ids)
    outcome = run(Case(["train", *flags(SETTINGS), "--name=base"]), folder, main)
    if outcome.status != 0:
        raise RuntimeError(f"training the initial run failed:\n{outcome.err}")
    outcome = run(Case(["export", "runs/base", "exported"]), folder, main)
    config = folder / "exported" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))  # in one line, for what changes lines of JSON
    for i, (width, steps) in enumerate([(16, 10), (16, 40), (32, 20), (32, 80), (48, 10), (48, 60), (64, 40)]):
        made = folder / "fits" / f"run{i}"
        made.mkdir(parents=True)
        these = {**SETTINGS, "model.width": width, "train.steps": steps}
        (made / "config.toml").write_text(_toml(these))
        ByteTokenizer().save(made / "tokenizer.json")
        last = {"step": steps, "tokens": 64 * steps}
        loss = 1 + 30 / (width * width) ** 0.3 + 20 / steps**0.3
        (made / "metrics.jsonl").write_text(
            json.dumps({**last, "loss": loss})
            + "\n"
            + json.dumps({**last, "validation": {"x": loss}, "validation_mean": loss})
        )


def _write_megatron(path: Path, documents: list[Any]) -> None:
    import numpy as np

    lengths = np.array([len(d) for d in documents], "<i4")
    starts = np.concatenate([[0], np.cumsum(lengths, dtype="<i8")[:-1]]) * 2
    bounds = np.arange(len(documents) + 1, dtype="<i8")
    path.write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    head = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08"
    counts = len(lengths).to_bytes(8, "little") + len(bounds).to_bytes(8, "little")
    tables = lengths.tobytes() + starts.astype("<i8").tobytes() + bounds.tobytes()
    path.with_suffix(".idx").write_bytes(head + counts + tables)
