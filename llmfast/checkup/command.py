"""The command line of a check-up: `llmfast doctor --full`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from llmfast._commands import INTERRUPTED, fail
from llmfast.checkup.page import check, comparison, page, verdict
from llmfast.checkup.runner import MINUTES, CheckUp, write_json
from llmfast.checkup.sections import SECTIONS, TUNING, named

_NEED_FULL = ("minutes", "sections", "tune", "json", "markdown")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a check-up to `doctor`."""
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument("--full", action="store_true", help="check everything on a GPU, within a few minutes")
    parser.add_argument("--minutes", type=float, help=f"time limit of --full (default: {MINUTES:g})")
    parser.add_argument("--sections", nargs="+", metavar="SECTION", help=f"only these parts of --full: {names}")
    parser.add_argument("--tune", action="store_true", help="with --full: also time every kernel with every tile size")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the results of --full here, after each section"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the results of --full here, as a page")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="JSON", help="print a page that compares the results of two machines"
    )


def asked(args: argparse.Namespace) -> bool:
    """Return whether the command line has any option of a check-up; `run` refuses those that need --full."""
    return bool(args.full or args.compare or _given(args))


def _given(args: argparse.Namespace) -> list[str]:
    """Return the options that need --full and are given; `--minutes 0` counts as given."""
    values = {name: getattr(args, name) for name in _NEED_FULL}
    return [f"--{name}" for name, value in values.items() if value is not None and value is not False]


def _results(path: Path) -> Any:
    try:
        return check(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as e:
        raise ValueError(f"--compare: {path}: {e}") from e


def run(args: argparse.Namespace) -> int:
    """Run a check-up, or compare two; return the exit code: 1 if something is wrong, 2 for invalid options."""
    if args.compare and args.full:
        return fail("--compare and --full cannot be combined")
    if not args.full and (given := _given(args)):
        return fail(f"{given[0]} has no meaning without --full")
    if args.compare:
        try:
            first, second = map(_results, args.compare)
        except ValueError as e:
            return fail(str(e))
        print(comparison(first, second), end="")
        return 0
    minutes = MINUTES if args.minutes is None else args.minutes
    if not minutes > 0:
        return fail(f"--minutes must be above 0; got {minutes}")
    try:
        sections = SECTIONS if args.sections is None else tuple(named(name) for name in args.sections)
    except ValueError as e:
        return fail(f"--sections: {e}")
    if args.tune:
        sections = (*sections, TUNING)
    sections = tuple(dict.fromkeys(sections))  # each once
    if not torch.cuda.is_available():
        return fail("doctor --full needs a GPU that torch can use, but there is none; `llmfast doctor` checks the CPU")
    files = {option: path for option in ("json", "markdown") if (path := getattr(args, option)) is not None}
    for option, path in files.items():
        if not path.parent.is_dir() or path.is_dir():
            return fail(f"--{option}: {path} must be a file in a folder that exists")

    def write(results: dict[str, Any]) -> None:
        if args.json is not None:
            write_json(args.json, results)
        if args.markdown is not None:
            args.markdown.write_text(page(results), encoding="utf-8")

    try:
        results = CheckUp(minutes, sections=sections).run(write)
    except KeyboardInterrupt:
        written = "".join(f"; finished sections are in {path}" for path in files.values())
        print(f"llmfast: interrupted{written}", file=sys.stderr)
        return INTERRUPTED
    right, wrong, left = verdict(results)
    print(f"{right} right, {wrong} wrong, {left} not reached")
    for path in files.values():
        print(f"written to {path}")
    return 1 if wrong else 0
