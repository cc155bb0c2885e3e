"""Time that `import llmfast` adds to `import torch`, in a new process each time."""

import subprocess
import sys
from collections.abc import Callable

from benchmarks.conftest import Add, Race

IMPORTS = {
    "llmfast.losses, llmfast.optim": "import torch, llmfast.losses, llmfast.optim",
    "torch": "import torch",
}


def starting(code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True)


def test_import(race: Race, add: Add) -> None:
    for name, timing in race({name: starting(code) for name, code in IMPORTS.items()}, rounds=5).items():
        add(
            "clock",
            operation="import",
            shape="",
            way=name,
            seconds=timing.seconds,
            ratio=timing.ratio,
            spread=timing.spread,
        )
