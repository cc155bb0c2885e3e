"""Check a change in 90 seconds: `make check`. `make test` and `make lint` check everything.

ruff reads the files that changed since the branch left `main`, and mypy all of them. Then come the tests of the changed
files, followed by a few of each area, until the time is up. pytest says how many were left out.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The folder below tests/ that has the tests of a folder. The first that fits counts.
FOLDERS = {
    "kernels/llmfast_kernels/optimizer": "optim",
    "kernels/llmfast_kernels": "losses",
    "llmfast": "",
    "benchmarks": "benchmarks",
    "evidence": "evidence",
    "examples": "examples",
    "tools": "",
    "docs": "",
}
# Of a page: its code, figures, names and statements.
OF_PAGES = ("docs", "figures", "readme", "statements", "claims", "counts", "pages", "contributing")
ALWAYS = ("test_house.py", "test_layering.py", "test_prose.py")
# A few tests of each area, those first that find most: see which tests fail when something is broken on purpose.
SAMPLE = (
    *("losses/test_cross_entropy.py", "losses/test_linear_cross_entropy.py", "optim/test_parity.py"),
    *("train/test_config.py", "data/test_dataset.py", "test_cli.py", "optim/test_clipping.py", "train/test_trainer.py"),
    *("losses/test_mtp.py", "data/test_packing.py", "plan/test_command.py", "test_generate.py"),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the checks one after another, up to the first that fails; return its exit status."""
    parser = argparse.ArgumentParser(description="Check a change in 90 seconds.")
    parser.add_argument("--base", default=None, help="commit to compare with; by default where the branch left main")
    parser.add_argument(
        "--seconds", type=float, default=70.0, help="for all checks; tests that do not fit are left out"
    )
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.seconds
    files = changed(options.base or left("main"))
    code = [str(file) for file in files if file.suffix in (".py", ".ipynb")]
    checks = [["ruff", "check", *code], ["ruff", "format", "--check", *code]] if code else []
    for command in [*checks, ["mypy"]]:
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT)
        if done.returncode:
            return done.returncode
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "tests"))
    }
    command = ["-m", "pytest", "-n", "2", "-q", "-rs", "--maxfail", "5", "-p", "support.hurry"]
    command += ["--seconds", f"{end - time.monotonic():.0f}", *tests_of(files)]
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment).returncode


def left(branch: str) -> str:
    """Return the commit where the present branch left another one; the last commit if there is no such branch."""
    for name in (f"origin/{branch}", branch):
        found = subprocess.run(["git", "merge-base", "HEAD", name], cwd=ROOT, capture_output=True, text=True)
        if found.returncode == 0:
            return found.stdout.strip()
    return "HEAD"


def changed(base: str) -> list[Path]:
    """Return the files that differ from a commit, and new ones, relative to the root."""
    commands = (["diff", "--name-only", "--diff-filter=d", base], ["ls-files", "--others", "--exclude-standard"])
    names: list[str] = []
    for command in commands:
        names += subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
    return [Path(name) for name in dict.fromkeys(names) if name]


def tests_of(files: Iterable[Path]) -> list[str]:
    """Return test files: those of the changed files, and of their folders, before the others."""
    own: list[Path] = []
    near: list[Path] = []
    for file in files:
        own += _own(file)
        near += _near(file)
    sample = (Path("tests") / name for name in SAMPLE)
    always = (Path("tests") / name for name in ALWAYS)
    return [str(path) for path in dict.fromkeys([*always, *own, *near, *sample]) if (ROOT / path).is_file()]


def _folder(file: Path) -> Path | None:
    """Return the folder of a file's tests; None if it has none."""
    for source, tests in FOLDERS.items():
        if file.is_relative_to(source):
            return Path("tests", tests, *file.relative_to(source).parent.parts)
    return None


def _own(file: Path) -> Iterator[Path]:
    """Yield the test files that are named after a file."""
    if file.parts[0] == "tests":
        yield from [file] if file.name.startswith("test_") else []
    elif file.suffix == ".md":
        yield from (Path("tests", f"test_{name}.py") for name in OF_PAGES)
    elif (folder := _folder(file)) is not None:
        yield folder / f"test_{file.stem}.py"
        yield Path("tests", f"test_{file.parent.name}.py")


def _near(file: Path) -> Iterator[Path]:
    """Yield the test files of a file's folder."""
    folder = _folder(file) if file.suffix == ".py" else None
    if folder is not None and folder != Path("tests"):
        yield from (path.relative_to(ROOT) for path in sorted((ROOT / folder).glob("test_*.py")))


if __name__ == "__main__":
    sys.exit(main())
