"""The command line: `llmfast train`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import llmfast


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake is one line on stderr and code 2."""
    parser = argparse.ArgumentParser(
        prog="llmfast", description="Fused losses, optimizers and a thin trainer for LLMs."
    )
    parser.add_argument("--version", action="version", version=f"llmfast {llmfast.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a small model on text",
        description="Train a small decoder. With no settings at all: a demo on this Python's own sources.",
    )
    train.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML")
    train.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one setting; may be repeated"
    )
    train.add_argument("--name", help="of the run's folder (default: the first free one of demo, demo-2, ...)")
    existing = train.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with the named run from its last checkpoint")
    existing.add_argument("--overwrite", action="store_true", help="remove the named run first")
    return _train(parser.parse_args(arguments))


def _train(args: argparse.Namespace) -> int:
    try:
        from llmfast.train.config import Config, ConfigError, load_config
        from llmfast.train.run import resumed_config, train
    except ImportError as e:
        return _fail(f"{e}\ntraining needs the extra: pip install 'llmfast-torch[train]'")
    try:
        overrides = list(args.set)
        if args.name is not None:
            # Quoted, so that a run can be called 7.
            overrides.append(f"name={json.dumps(args.name, ensure_ascii=False)}")
        if args.resume:
            if not args.name:
                return _fail("--resume needs --name, the run to go on with")
            if args.config is not None:
                return _fail("--resume takes its settings from the run; change some with --set")
            # Where runs are kept is the only setting that is needed to find the others.
            where = [o for o in overrides if o.partition("=")[0].strip() == "runs"]
            runs = load_config(None, where, base=Config()).runs
            config = resumed_config(Path(runs) / args.name, overrides)
        else:
            config = load_config(args.config, overrides)
        train(config, resume=args.resume, overwrite=args.overwrite)
    except (ConfigError, OSError) as e:
        return _fail(str(e))
    except KeyboardInterrupt:  # while training it is a signal to stop after the step; see Trainer.fit
        print("llmfast: interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"llmfast: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
