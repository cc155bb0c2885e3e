"""Malformed input for the command line: no traceback, no hang, nothing overwritten, a message that says what is wrong.

    python -m tools.fuzz --minutes 10 --seed 1     as many cases as fit
    python -m tools.fuzz --seed 1 --case 42        repeat one case and keep everything it wrote

A case is a copy of a small workspace (texts, token files, a tokenizer, trained runs) with a few damaged files, and a
call of `llmfast.cli.main` in its own process, with limits on time and memory. A case is determined by the seed and its
number. `fuzz_process.judge` defines the acceptable outcomes.
"""

import argparse
import contextlib
import importlib
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tools.fuzz_cases import KINDS, make
from tools.fuzz_process import Main, judge, run
from tools.fuzz_workspace import build


@contextlib.contextmanager
def workspaces(main: Main) -> Iterator[Callable[[Path], None]]:
    """Yield a function that copies the workspace to a new folder."""
    with TemporaryDirectory(prefix="fuzz-") as temporary:
        template = Path(temporary, "template")
        template.mkdir()
        build(template, main)

        def copy(to: Path) -> None:
            shutil.copytree(template, to, symlinks=True)

        yield copy


def fuzz(
    seed: int,
    numbers: Iterator[int] | range,
    minutes: float,
    main: Main,
    *,
    only: str = "",
    say: Callable[[str], None] = print,
    keep: Path | None = None,
) -> tuple[Counter[str], int]:
    """Run cases until numbers or minutes are used up.

    Returns the number of cases by kind and status, and the number of failed cases.
    """
    end, counts, failed = time.monotonic() + 60 * minutes, Counter[str](), 0
    with workspaces(main) as copy, TemporaryDirectory(prefix="fuzz-") as temporary:
        for number in numbers:
            if time.monotonic() > end:
                break
            folder = (keep or Path(temporary)) / f"case-{number}"
            copy(folder)
            kind, case = make(seed, number, folder, only)
            begun = time.monotonic()
            outcome = run(case, folder, main)
            counts[f"{kind} {outcome.status}"] += 1
            faults = judge(case, outcome)
            if faults or keep:
                failed += bool(faults)
                took = time.monotonic() - begun
                say(f"--seed {seed} --case {number} ({kind}, {took:.1f} s): {'; '.join(faults) or 'fine'}")
                say(f"  llmfast {' '.join(map(repr, case.arguments))}")
                for line in case.damage[:6]:
                    say(f"  damaged {line!r}")
                for line in outcome.err.splitlines()[-6:]:
                    say(f"  | {line[:300]}")
            if keep is None:
                _remove(folder)
    return counts, failed


def _remove(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)
    shutil.rmtree(folder.with_name(folder.name + ".logs"))


def prepare_process() -> Main:
    """Import what cases need once, before forking, and return the command line's `main`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from llmfast.cli import main

    # Modules that the command line imports lazily.
    for name in (
        "llmfast.train.run",
        "llmfast.clean.pipelines",
        "spacy",
        "torch._dynamo",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "safetensors.torch",
        "tomli_w",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)

    torch.set_num_threads(1)
    return main


def command() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run only this case and keep its folder")
    parser.add_argument("--kind", choices=KINDS, default="", help="run only cases of this kind")
    args = parser.parse_args()
    main = prepare_process()
    begun = time.monotonic()
    if args.case is None:
        numbers: Iterator[int] | range = range(10**9)
        keep = None
    else:
        numbers = range(args.case, args.case + 1)
        keep = Path(f"fuzz-{args.seed}-{args.case}").resolve()
        keep.mkdir()
    say = lambda line: print(line.encode("utf-8", "replace").decode(), flush=True)  # noqa: E731
    counts, failed = fuzz(args.seed, numbers, args.minutes, main, only=args.kind, say=say, keep=keep)
    for kind in sorted(counts):
        print(f"{kind:20} {counts[kind]:6}")
    took = (time.monotonic() - begun) / 60
    print(f"{sum(counts.values())} cases in {took:.1f} minutes: {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(command())
