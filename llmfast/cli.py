"""The command line: `llmfast train`, `continue`, `generate`, `export`, `clean`, `plan`, `report` and others."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llmfast
from llmfast._commands import INTERRUPTED, MISTAKE, CommandParser, fail
from llmfast._output import Lasting, OutputLost, going_on, standard_streams
from llmfast.ahead import add_arguments as add_compile_arguments
from llmfast.ahead import run as run_compile
from llmfast.checkup.command import add_arguments as add_checkup_arguments
from llmfast.checkup.command import asked as checkup_asked
from llmfast.checkup.command import run as run_checkup
from llmfast.clean import add_arguments as add_clean_arguments
from llmfast.clean import run as run_clean
from llmfast.examples import add_arguments as add_examples_arguments
from llmfast.examples import run as run_examples
from llmfast.export import add_arguments as add_export_arguments
from llmfast.export import run as run_export
from llmfast.generate import add_arguments as add_generate_arguments
from llmfast.generate import run as run_generate
from llmfast.plan.command import add_arguments as add_plan_arguments
from llmfast.plan.command import run as run_plan
from llmfast.train.report import add_arguments as add_report_arguments
from llmfast.train.report import run as run_report

_WRITERS = ("train", "continue", "export", "clean", "report", "compile", "examples")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code. A user's mistake is one line on stderr and code 2.

    A command that writes files goes on without its output if that cannot be written; others end.
    """
    with standard_streams() as out:
        try:
            return _run(arguments, out)
        except OutputLost as e:
            return 1 if isinstance(e.__cause__, BrokenPipeError) else fail(str(e))  # a reader may stop, as `head` does
        except KeyboardInterrupt:  # before a run has begun, which would say more
            print("llmfast: interrupted", file=sys.stderr)
            return INTERRUPTED


def _run(arguments: Sequence[str] | None, out: Lasting) -> int:
    parser = _parser()
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help(sys.stderr)
        return MISTAKE
    try:
        args = parser.parse_args(arguments)
    except SystemExit:  # after --help, or a mistake
        out.flush()
        raise
    if _writes_files(args):
        out.lost = going_on
    run: Callable[[argparse.Namespace], int] = args.run
    status = run(args)
    out.flush()
    return status


def _writes_files(args: argparse.Namespace) -> bool:
    """Return whether a command's output only tells of its work."""
    if args.command == "doctor":
        return args.json is not None or args.markdown is not None
    return args.command in _WRITERS and not getattr(args, "dry_run", False)


def _parser() -> CommandParser:
    parser = CommandParser(prog="llmfast", description="Fused losses, optimizers and a thin trainer for LLMs.")
    parser.add_argument("--version", action="version", version=f"llmfast {llmfast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a small model on text",
        description="Train a small decoder. With no settings at all: a demo on this Python's own sources.",
    )
    train.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML")
    existing = _add_settings(train)
    existing.add_argument("--resume", action="store_true", help="go on with the named run from its last checkpoint")
    _add_dry_run(train)
    train.add_argument("--profile", action="store_true", help="also trace a few steps, into the run's trace.json")
    train.set_defaults(run=_train)

    further = commands.add_parser(
        "continue",
        help="train a run's model further, on new text",
        description="Continued pretraining: from a run's last weights, on a growing share of new text and a replay of "
        "old text. At the end it says what was learned and what was forgotten.",
    )
    further.add_argument("from_run", type=Path, metavar="RUN", help="the folder of a run, or of a Hugging Face model")
    further.add_argument(
        "--target", nargs="+", required=True, metavar="SOURCE", help="the new text, as in data.sources"
    )
    further.add_argument(
        "--general", nargs="+", default=[], metavar="SOURCE", help="the text to replay (default: the run's)"
    )
    for name, value, text in (
        ("start", 0.1, "share of new text at the beginning"),
        ("end", 0.7, "share of new text at the end"),
        ("floor", 0.1, "share that is always left to old text"),
    ):
        further.add_argument(f"--{name}", type=float, default=value, help=f"{text} (default: %(default)s)")
    further.add_argument("--no-replay", action="store_true", help="train on new text only; old text is only validated")
    _add_settings(further)
    _add_dry_run(further)
    further.set_defaults(run=_continue)

    generate = commands.add_parser("generate", help="let a run's model continue a text, or fill a gap in one")
    add_generate_arguments(generate)
    generate.set_defaults(run=run_generate)

    export = commands.add_parser("export", help="write a run's model as a folder for Hugging Face's transformers")
    add_export_arguments(export)
    export.set_defaults(run=run_export)

    clean = commands.add_parser(
        "clean",
        help="clean a folder of text, by datatrove",
        description="Clean text for training: repair, language, quality, repetition, addresses, duplicates, and if "
        "asked for tokens. Reports what was removed and why, with samples.",
    )
    add_clean_arguments(clean)
    clean.set_defaults(run=run_clean)

    for name, text, add_arguments, command in (
        ("plan", "scaling laws; memory, time and learning rates of a configuration", add_plan_arguments, run_plan),
        ("report", "one page of a run's curves, or of several runs'", add_report_arguments, run_report),
        ("compile", "compile kernels for a GPU that need not be here", add_compile_arguments, run_compile),
        ("examples", "copy the example programs into a folder", add_examples_arguments, run_examples),
    ):
        add_arguments(added := commands.add_parser(name, help=text))
        added.set_defaults(run=command)

    settings = commands.add_parser("settings", help="list the trainer's settings, with meaning and default")
    settings.add_argument("word", nargs="?", default="", help="only settings with this in their name or meaning")
    settings.set_defaults(run=_settings)

    doctor = commands.add_parser(
        "doctor",
        help="say what is installed, what runs how here, and whether results are right",
        description="Versions, paths, and a small check of each operation on each device: begin bug reports with this. "
        "With --full: numbers, behaviour, memory and speed on a GPU; see docs/gpu.md.",
    )
    add_checkup_arguments(doctor)
    doctor.set_defaults(run=_doctor)

    return parser


def _schema() -> Any:
    from llmfast.train.config import SCHEMA

    return SCHEMA


def _add_settings(parser: CommandParser) -> "argparse._MutuallyExclusiveGroup":
    parser.take_settings(_schema)
    parser.add_argument("--name", help="name of the run's folder (default: the first free one of demo, demo-2, ...)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="remove the named run first")
    return existing


def _add_dry_run(parser: CommandParser) -> None:
    parser.add_argument("--dry-run", action="store_true", help="print the plan and stop")


def _overrides(args: argparse.Namespace) -> list[str]:
    if args.name is None:
        return list(args.set)
    # Quoted, so that a run can be called 7.
    return [*args.set, f"name={json.dumps(args.name, ensure_ascii=False)}"]


def _train(args: argparse.Namespace) -> int:
    def run() -> None:
        from llmfast.train.config import Config, load_config
        from llmfast.train.earlier import resumed_config
        from llmfast.train.run import train
        from llmfast.train.settings import ConfigError

        overrides = _overrides(args)
        if args.resume:
            if not args.name:
                raise ConfigError("--resume needs --name, the run to go on with")
            if args.config is not None:
                raise ConfigError("--resume takes its settings from the run; change some with --set")
            # Where runs are kept is the only setting that is needed to find the others.
            where = [o for o in overrides if o.partition("=")[0].strip() == "runs"]
            runs = load_config(None, where, base=Config()).runs
            config = resumed_config(Path(runs) / args.name, overrides)
        else:
            config = load_config(args.config, overrides)
        train(config, resume=args.resume, overwrite=args.overwrite, dry_run=args.dry_run, profile=args.profile)

    return _trained(run)


def _continue(args: argparse.Namespace) -> int:
    def run() -> None:
        from llmfast.train.continued import continued_config
        from llmfast.train.run import train

        config = continued_config(
            args.from_run,
            args.target,
            general=args.general,
            start=args.start,
            end=args.end,
            floor=args.floor,
            replay=not args.no_replay,
            overrides=_overrides(args),
        )
        train(config, overwrite=args.overwrite, dry_run=args.dry_run)

    return _trained(run)


def _settings(args: argparse.Namespace) -> int:
    def run() -> None:
        from llmfast.train.settings import ConfigError

        lines = _schema().listing(args.word)
        if not lines:
            raise ConfigError(f"WORD must be part of a setting's name or meaning; got {args.word!r}")
        print("\n".join(lines))

    return _trained(run)


def _doctor(args: argparse.Namespace) -> int:
    if checkup_asked(args):
        return run_checkup(args)
    from llmfast.doctor import report

    return 0 if report() else 1


def _trained(run: Callable[[], None]) -> int:
    try:
        from llmfast.train.settings import ConfigError
        from llmfast.train.trainer import NonFinite
    except ImportError as e:
        return _missing(e)
    try:
        run()
    except ImportError as e:
        return _missing(e)
    except (ConfigError, NonFinite, OSError) as e:
        return fail(str(e))
    except (MemoryError, RuntimeError) as e:
        if not _out_of_memory(e):
            raise
        return fail(f"out of memory; try a smaller train.micro_batch_size, data.seq_len or model: {e}")
    except KeyboardInterrupt as e:  # also after a checkpoint: what follows `&&` must not take the run for finished
        print("; ".join(filter(None, ("llmfast: interrupted", str(e)))), file=sys.stderr)
        return INTERRUPTED
    return 0


def _out_of_memory(e: MemoryError | RuntimeError) -> bool:
    """Return True for a lack of memory, for which torch raises a bare RuntimeError on a CPU."""
    from torch import OutOfMemoryError

    return isinstance(e, MemoryError | OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(e)


def _missing(e: ImportError) -> int:
    advice = "" if "pip install" in str(e) else "; training needs the extra: pip install 'llmfast-torch[train]'"
    return fail(f"{e}{advice}")


if __name__ == "__main__":
    sys.exit(main())
