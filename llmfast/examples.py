"""The command `llmfast examples`: a copy of the example programs that come with the package."""

import argparse
import os
import shutil
from fnmatch import filter as matching
from pathlib import Path

from llmfast._commands import expect_new, fail

_HERE = Path(__file__).parent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the parser of `llmfast examples`; `run` takes the parsed result."""
    parser.description = "Copy the example programs, whose README.md says what each shows and how to run it."
    parser.add_argument("to", type=Path, metavar="DIR", help="a new folder for them")


def run(args: argparse.Namespace) -> int:
    """Copy the examples to where the arguments say; return the exit code, 2 for a user's mistake."""
    try:
        copy_examples(args.to)
    except OSError as e:
        return fail(str(e))
    print(args.to / "README.md")
    return 0


def copy_examples(to: Path) -> None:
    """Copy the examples to a folder that is new or empty.

    Raises:
        OSError: `to` exists and is not empty, or cannot be written.
    """
    expect_new(to)
    installed = _HERE / "_examples"  # as pyproject.toml lays out a wheel; a checkout has them next to the package
    source = installed if installed.is_dir() else _HERE.parent / "examples"
    shutil.copytree(source, os.path.realpath(to), ignore=_left_out, dirs_exist_ok=True)


def _left_out(folder: str, names: list[str]) -> set[str]:
    """Return what is not copied: of the chapter, which needs a checkout, all but its settings."""
    if Path(folder).name == "chapter":
        return set(names) - set(matching(names, "*.toml"))
    return set(matching(names, "__pycache__"))
