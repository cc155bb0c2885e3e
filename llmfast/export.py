"""The command `llmfast export`: a run's model as a folder that Hugging Face's transformers opens."""

import argparse
import os
import sys
from pathlib import Path

from llmfast._checks import expect
from llmfast._commands import INTERRUPTED, expect_new, fail


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to the parser of `llmfast export`; `run` takes the parsed result."""
    parser.description = "Write a run's model and tokenizer as a folder that transformers opens, as a LlamaForCausalLM."
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("to", type=Path, metavar="DIR", help="a new folder for the model")
    parser.add_argument(
        "--depths",
        action="store_true",
        help="also write sequential depths, under DeepSeek-V3's names; a Llama skips them",
    )


def run(args: argparse.Namespace) -> int:
    """Export what the arguments say; return the exit code, 2 for a user's mistake."""
    try:
        step = export(args.run_folder, args.to, depths=args.depths)
    except ImportError as e:
        return fail(f"{e}; exporting needs the extra: pip install 'llmfast-torch[train]'")
    except (ValueError, OSError) as e:
        return fail(str(e))
    except KeyboardInterrupt:
        print("llmfast: interrupted; nothing was written", file=sys.stderr)
        return INTERRUPTED
    print(args.to)
    if step is not None:
        print(f"llmfast: the run has not finished; this is its model after step {step}", file=sys.stderr)
    return 0


def export(run: Path, to: Path, *, depths: bool = False) -> int | None:
    """Write a run's model as a `LlamaForCausalLM`, with its tokenizer; the folder is either complete or absent.

    Of a model with further heads, only the part that predicts the next token is written. transformers is not needed.

    Args:
        run: The folder of a run.
        to: The folder to write: new, or empty.
        depths: Also write sequential depths, under DeepSeek-V3's names.

    Returns:
        The step of the checkpoint that was written, None if the run has finished.

    Raises:
        ValueError: `run` is not the folder of a run, or has no depths to write.
        OSError: `to` exists and is not empty, or a file cannot be read or written.
    """
    from llmfast.data.for_transformers import ids_for_transformers, save_for_transformers
    from llmfast.models import save_llama
    from llmfast.train.durable import remove
    from llmfast.train.loading import open_run

    expect_new(to)
    to = Path(os.path.realpath(to))
    opened = open_run(run)
    expect(
        opened.shape is not None,
        f"RUN must have trained llmfast's own decoder; {run} trains a Hugging Face model, and transformers opens its "
        "folder as it is once the run has finished",
    )
    tokenizer, context = opened.tokenizer, opened.context
    model = opened.model()
    mtp = model.config.mtp
    expect(
        not depths or mtp == "sequential", f"--depths needs a model with mtp='sequential'; that of {run} has {mtp!r}"
    )
    ids = ids_for_transformers(tokenizer)
    partial = to.with_name(f".{to.name}.partial")
    remove(partial)
    try:
        save_llama(model, partial, depths=depths, more={"max_position_embeddings": context, **ids})
        save_for_transformers(tokenizer, partial, max_length=context)
        if to.exists():
            to.rmdir()
        partial.rename(to)
    finally:
        remove(partial)
    return opened.unfinished_at
