"""Test statements of textbooks by small experiments, and write docs/chapter.md about them.

python -m examples.chapter [PART...]     # or: make chapter ARGS="decay"

Finished runs are kept in runs/chapter/ and not repeated.
"""

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from examples.chapter.page import PAGE, RESULTS, publish
from examples.chapter.parts import Part, parts
from examples.chapter.runs import SEEDS, Row, Run, Task, rows_of, write_rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are named, or all, and write the page."""
    known = parts()
    parser = argparse.ArgumentParser(prog="python -m examples.chapter", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(known)}; default: all")
    parser.add_argument("--runs", type=Path, default=Path("runs/chapter"), help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; its pictures go into a folder next to it")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps of some runs: whether everything works")
    args = parser.parse_args(arguments)
    if unknown := [name for name in args.parts if name not in known]:
        parser.error(f"PART must be one of {', '.join(known)}; got {unknown[0]!r}")
    if args.quick and args.results == RESULTS:
        parser.error("--quick needs --results and --page elsewhere: its numbers mean nothing")
    for part in [known[name] for name in args.parts or known]:
        if part.prepare is not None:
            part.prepare(args.runs / part.name / "texts", args.quick)
        rows = made(part, [(run, SEEDS[0]) for run in part.few()] if args.quick else part.first(), args)
        if not args.quick:
            rows += made(part, part.further(rows), args)
        write_rows(args.results / f"{part.name}.json", rows)
        if not args.quick:
            publish(args.page, args.results)


def made(part: Part, wanted: Sequence[tuple[Run, int]], args: argparse.Namespace) -> list[Row]:
    """Make runs with their seeds, and say how far it is."""
    started, rows = time.monotonic(), []
    tasks = [Task(part.name, run, seed, args.runs, quick=args.quick, measure=part.measure) for run, seed in wanted]
    for row in rows_of(tasks, args.jobs):
        rows.append(row)
        print(f"{part.name}: {len(rows)} of {len(tasks)} runs, {time.monotonic() - started:.0f} s", flush=True)
    return rows


if __name__ == "__main__":
    main()
