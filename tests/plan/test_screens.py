"""Whole screens of `llmfast plan`, word by word; other tests compare single figures of them with what they should be.

screens.txt has them. Another figure is either a mistake, or a change of what users are told: then run
`python tests/plan/test_screens.py > tests/plan/screens.txt`, read the difference and add a line to CHANGELOG.md.
"""

import contextlib
import difflib
import io
import shlex
from pathlib import Path

from llmfast.cli import main

FILE = Path(__file__).parent / "screens.txt"
MODEL = "--set model.width=2048 --set model.layers=24 --set model.heads=16 --set data.seq_len=2048"
COMMANDS = (
    "--flops 1e21",
    "--params 2.8B --law hoffmann",
    "--params 1B --tokens 300B",
    "--gpu H100 --gpus 8 --days 3",
    "--gpu A100 --gpus 64 --days 20 --params 30B --utilisation 0.45",
    "--gpu RTX4090 --tokens 100M --seq-len 512 --vocab-size 5000",
    "--gpu H100 --gpus 16 --tokens 2T --law hoffmann",
    f"memory --gpu RTX4090 {MODEL} --set train.batch_size=32 --set train.micro_batch_size=8",
    f"memory --gpu H100 --gpus 8 {MODEL} --set train.batch_size=64 --set train.micro_batch_size=4"
    " --set train.parallel=fsdp --set train.param_dtype=bfloat16 --set optimizer.master_weights=split16"
    " --set optimizer.state_dtype=8bit --set train.checkpoint_activations=true --utilisation 0.3",
    f"memory --gpu-memory 24GiB {MODEL} --set optimizer.name=sgd --set train.dtype=float32"
    " --set model.mtp=parallel --set model.mtp_heads=2 --set model.tie_embeddings=false",
    "memory --set model.mtp=sequential --set model.mtp_heads=1 --set optimizer.in_backward=true",
    "lr --lr 3e-4 --base-batch 256 --batch 1024",
)


def screens() -> list[str]:
    lines: list[str] = []
    for command in COMMANDS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            code = main(["plan", *shlex.split(command)])
        lines += ["", f"$ llmfast plan {command}", *out.getvalue().splitlines(), f"({code})"]
    return lines[1:]


def test_every_figure_is_the_one_that_was_read() -> None:
    wanted, found = FILE.read_text(encoding="utf-8").splitlines(), screens()
    assert "\n".join(difflib.unified_diff(wanted, found, lineterm="", n=1)) == ""


if __name__ == "__main__":
    print("\n".join(screens()))
