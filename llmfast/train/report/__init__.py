"""`llmfast report`: one HTML page about one or several runs, which needs nothing but a browser.

Nothing is loaded, and the page's own Content-Security-Policy forbids it. A short script shows the values under the
pointer; without it everything else works.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from llmfast._checks import expect
from llmfast._commands import expect_replaceable, fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `llmfast report` to its parser; `run` takes what it parses."""
    parser.description = (
        "One HTML page of one or several runs, finished or not: their curves side by side, how their settings differ, "
        "and what the models write. It opens from the disk and loads nothing from anywhere."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="the page; replaces only a file that this command made (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the page that the arguments ask for; return the exit code, 2 for a user's mistake."""
    try:
        expect_replaceable(args.out)
        write_report(args.runs, args.out)
    except ImportError as e:
        return fail(f"{e}; reports need the extra: pip install 'llmfast-torch[train]'")
    except (ValueError, OSError) as e:
        return fail(str(e))
    print(args.out)
    return 0


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one page about `runs`, folders as `llmfast train` leaves them; a folder that is given twice counts once.

    Raises:
        ValueError: `runs` is empty, one of them is not the folder of a run, or what it holds cannot be read as such.
            Then nothing is written.
        OSError: a file cannot be read, or `out` not be written.
    """
    from llmfast.train.report.logs import read_log
    from llmfast.train.report.page import page

    expect(len(runs) > 0, "runs must name at least one folder; got none")
    folders: dict[Path, Path] = {}
    for folder in runs:
        folders.setdefault(Path(os.path.realpath(folder)), folder)
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders.values()]
    text = page([read_log(folder, name) for folder, name in zip(folders.values(), names)])
    out.write_bytes(text.encode("utf-8", "replace"))  # names of files may hold what is not Unicode
