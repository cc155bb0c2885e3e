"""The README's Python runs as it stands, and its commands exist."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_blocks_run() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_make_verbs_exist() -> None:
    verbs = set(re.findall(r"\bmake ([a-z]+)", README))
    assert {"train", "test", "bench"} <= verbs
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert verbs <= targets


def test_named_files_exist() -> None:
    for path in re.findall(r"`((?:llmfast|kernels|tests|examples)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
