"""The command line of a check-up: `llmfast doctor --full`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from llmfast._commands import fail
from llmfast.checkup.page import check, comparison, page, verdict
from llmfast.checkup.runner import CheckUp, write_json
from llmfast.checkup.sections import SECTIONS, TUNING, named

MINUTES = 8.0
PARTS = ("minutes", "sections", "tune", "json", "markdown")  # the options that mean nothing without --full


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `doctor` takes for a check-up."""
    names = ", ".join(section.name for section in SECTIONS)
    parser.add_argument("--full", action="store_true", help="check everything on a GPU, within a few minutes")
    parser.add_argument("--minutes", type=float, help=f"what --full may take (default: {MINUTES:g})")
    parser.add_argument("--sections", nargs="+", metavar="SECTION", help=f"only these parts of --full: {names}")
    parser.add_argument(
        "--tune", action="store_true", help="with --full: also time every kernel with each of its tiles"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where --full writes its results, after each section")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="where --full writes them as a page")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar="JSON", help="print a page that compares the results of two machines"
    )


def asked(args: argparse.Namespace) -> bool:
    """Return whether the command line asks for a check-up, or for a part of one."""
    return bool(args.full or args.compare or _given(args))


def _given(args: argparse.Namespace) -> list[str]:
    """Return the options of a check-up that the command line gives; `--minutes 0` counts as given."""
    values = {name: getattr(args, name) for name in PARTS}
    return [f"--{name}" for name, value in values.items() if value is not None and value is not False]


def run(args: argparse.Namespace) -> int:
    """Run a check-up, or compare two; return the exit code: 1 if something is wrong."""
    if args.compare and args.full:
        return fail("--compare and --full exclude each other")
    if not args.full and (given := _given(args)):
        return fail(f"{given[0]} has no meaning without --full")
    if args.compare:
        try:
            first, second = (check(json.loads(path.read_text(encoding="utf-8"))) for path in args.compare)
        except (OSError, ValueError) as e:
            return fail(f"--compare: {e}")
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
    if not torch.cuda.is_available():
        return fail("doctor --full needs a GPU that torch can use, and finds none; `llmfast doctor` checks the CPU")
    for path in (args.json, args.markdown):
        if path is not None and not path.parent.is_dir():
            return fail(f"{path}: there is no folder {path.parent}")

    def write(results: dict[str, Any]) -> None:
        if args.json is not None:
            write_json(args.json, results)
        if args.markdown is not None:
            args.markdown.write_text(page(results), encoding="utf-8")

    try:
        results = CheckUp(minutes, sections=sections).run(write)
    except KeyboardInterrupt:
        print("llmfast: interrupted; what was finished is written", file=sys.stderr)
        return 130
    right, wrong, left = verdict(results)
    print(f"{right} right, {wrong} wrong, {left} not reached")
    for path in (args.json, args.markdown):
        if path is not None:
            print(f"written to {path}")
    return 1 if wrong else 0
