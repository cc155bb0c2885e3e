"""The command `llmfast clean`: arguments, one-line messages for user errors, and a final table."""

import argparse
import sys
from pathlib import Path

from llmfast._commands import INTERRUPTED, fail
from llmfast.clean.folder import clean
from llmfast.data.reader import SUFFIXES, TEXT_COLUMN

NOTHING = "nothing was kept"
EMPTY = 1
"""Exit code if nothing was kept, so that a script does not go on to train on nothing."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the parser of `llmfast clean`; `run` takes the parsed result."""
    kinds = ", ".join(SUFFIXES)
    parser.add_argument("input", type=Path, metavar="INPUT", help=f"a folder (or file) of {kinds}")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="a new folder for text/, removed/ and report.md")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json: also write tokens/*.ds")
    parser.add_argument("--language", default="en", metavar="CODE", help="the only language to keep (default: en)")
    parser.add_argument(
        "--language-model", type=Path, metavar="FILE", help="a fastText model such as lid.176.bin instead of py3langid"
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes that share the files (default: 1)"
    )
    parser.add_argument(
        "--text-column",
        default=TEXT_COLUMN,
        metavar="NAME",
        help="the column of .jsonl and .parquet files that holds the text (default: text)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT, once the new one is complete")


def run(args: argparse.Namespace) -> int:
    """Clean what the arguments say; return the exit code, 1 if nothing was kept and 2 for a user's mistake."""
    try:
        report = clean(
            args.input,
            args.output,
            tokenizer=args.tokenizer,
            language=args.language,
            language_model=args.language_model,
            workers=args.workers,
            text_column=args.text_column,
            overwrite=args.overwrite,
            say=_say,
        )
    except (ValueError, OSError, ImportError) as error:
        return fail(str(error))
    except KeyboardInterrupt:
        _say("interrupted; nothing was written")
        return INTERRUPTED
    print(report.table())
    print(f"removed documents and reasons: {args.output / 'report.md'}")
    if not report.documents:
        _say(NOTHING)
        return EMPTY
    return 0


def _say(text: str) -> None:
    print(f"llmfast: {text}", file=sys.stderr)
