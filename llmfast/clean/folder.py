"""Check the arguments, run the recipe in a temporary folder, and move it to the output once it is complete."""

import os
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llmfast._checks import expect
from llmfast.clean.report import Report
from llmfast.data.reader import (
    NO_TEXT,
    SUFFIXES,
    TEXT_COLUMN,
    Found,
    LeftOut,
    expect_packages,
    find,
    others_left_out,
    read,
)

NEEDED = ("datatrove", "ftfy", "orjson", "py3langid", "regex", "spacy", "tokenizers", "xxhash")


def clean(
    inputs: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    language: str = "en",
    language_model: str | os.PathLike[str] | None = None,
    workers: int = 1,
    text_column: str = TEXT_COLUMN,
    overwrite: bool = False,
    say: Callable[[str], None] | None = None,
) -> Report:
    """Clean a folder of text with the recipe of `llmfast.clean.recipe` and report what was removed.

    The output folder holds `text/*.jsonl` (kept documents: `text`, `id`, `metadata`), `tokens/*.ds` with their index
    and `tokenizer.json` if a tokenizer was given, `removed/<stage>/*.jsonl`, `report.md`, `report.json`, and
    datatrove's `logs/`. It appears only when it is complete; a run that fails leaves nothing behind. `workers`
    determines the number of files and which of several duplicates is kept.

    Args:
        inputs: A folder, searched recursively for .txt, .md, .rst and .py (a file is a document), .jsonl, .jsonl.gz
            and .jsonl.zst (each line is one: an object with the text and optionally an `id`; the rest goes to
            `metadata.input`), and .parquet (each row is one); or one such file. Names that start with a dot are
            skipped. In a folder that this function wrote, only `text/` is read.
        output: A folder that does not exist yet or is empty.
        tokenizer: A `tokenizer.json` that has "<|endoftext|>", which then ends each document. Documents are shuffled
            within a file.
        language: ISO 639-1 code. Gopher's English stop words are required only for "en". Languages that spaCy cannot
            split into words need packages that datatrove's error names.
        language_model: A fastText model with labels such as "__label__en", used instead of py3langid with a threshold
            of 0.65. Needs `pip install fasteners fasttext-numpy2-wheel`; datatrove caches a copy under its path.
        workers: Number of processes. Each handles every `workers`-th file. They import the calling script, which needs
            `if __name__ == "__main__":` if there is more than one.
        text_column: The column of tables that holds the text.
        overwrite: Replace an output that this function wrote.
        say: Receives a message about files that are not read, and then one when each step starts.

    Raises:
        FileNotFoundError: An input, tokenizer or language model does not exist.
        FileExistsError: The output is not empty, and `overwrite` is False or this function did not write the output.
        ValueError: An argument is out of range, one folder contains the other, or there is no file to read.
        ImportError: The extra `clean` or a package that a file needs is not installed.
    """
    # Before Python 3.13, Path.resolve raises a RuntimeError for cyclic links.
    inputs, output = Path(os.path.realpath(inputs)), Path(os.path.realpath(output))
    expect(workers >= 1, f"workers must be at least 1; got {workers}")
    expect(bool(text_column), "text_column must name a column; got ''")
    _check_folders(inputs, output, overwrite)
    root, found = _find(inputs)
    names, ignored = [name for name, _ in found.files], dict(found.others)
    if language_model is not None and not Path(language_model).is_file():
        raise FileNotFoundError(f"no such file: language_model {os.fspath(language_model)}")
    _check_packages()
    # These modules import packages of the extra.
    from llmfast.clean.pipelines import TOKENIZER_FILE, Pipelines
    from llmfast.clean.recipe import DATATROVE, check_language

    check_language(language, py3langid=language_model is None)
    encoder = None if tokenizer is None else _encoder(tokenizer)
    say = say or (lambda text: None)
    if ignored:
        say(others_left_out(ignored))
    model = None if language_model is None else Path(os.path.realpath(language_model))

    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        new = Path(temporary, "new")
        (new / "text").mkdir(parents=True)
        if encoder is not None:
            (new / "tokens").mkdir()
            encoder.save(new / "tokens" / TOKENIZER_FILE)  # never truncates or pads, unlike the original
        pipelines = Pipelines(new, min(workers, len(names)), text_column, say)
        stages = pipelines.run(root, names, language, model)
        if stages[0].documents_out == 0 and NO_TEXT in stages[0].reasons:
            raise ValueError(_no_text(inputs, found, text_column))
        settings = {"inputs": str(inputs), "language": language, "language_model": str(model or "py3langid")}
        settings |= {"tokenizer": os.fspath(tokenizer or "none"), "workers": str(workers), "datatrove": DATATROVE}
        report = Report(settings, ignored, stages, None if encoder is None else pipelines.tokens)
        report.write(new)
        if output.exists():
            output.rename(Path(temporary, "old"))
        new.rename(output)
    return report


def _encoder(tokenizer: str | os.PathLike[str]) -> Any:
    """Load a tokenizer for files of tokens; ValueError if datatrove cannot use it."""
    from llmfast.data.tokenizer import END_OF_TEXT, BPETokenizer, load_tokenizer

    encoder = load_tokenizer(tokenizer)
    expect(
        isinstance(encoder, BPETokenizer),
        f"tokenizer must be a tokenizer.json that `tokenizers` reads; {tokenizer} is llmfast's byte tokenizer",
    )
    expect(
        END_OF_TEXT in encoder.special_ids,
        f"tokenizer must have {END_OF_TEXT}, which ends documents in token files; {tokenizer} has none",
    )
    return encoder


def _check_packages() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(f"cleaning needs {', '.join(missing)}: pip install 'llmfast-torch[clean]'")


def _check_folders(inputs: Path, output: Path, overwrite: bool) -> None:
    if not inputs.exists():
        raise FileNotFoundError(f"no such file or folder: {inputs}")
    apart = inputs != output and inputs not in output.parents and output not in inputs.parents
    expect(apart, f"output and inputs must not contain each other; got {output} and {inputs}")
    # A mount point cannot be replaced, which would only be noticed at the end.
    expect(not os.path.ismount(output), f"output must be a folder that is not a mount point; got {output}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        ours = (output / "report.json").is_file() and (output / "logs").is_dir()
        if not (overwrite and ours):
            advice = "use overwrite to replace it" if ours else "llmfast clean did not write it and will not replace it"
            raise FileExistsError(f"output exists: {output}; {advice}")


def _no_text(inputs: Path, found: Found, text_column: str) -> str:
    left = LeftOut(text_column)
    for name, path in found.files:
        for record in read(path, name, text_column, whole=True):
            left.add(record)
    return "; ".join(
        [f"no text in a column {text_column!r} (text_column names another) in {inputs}", *left.sentences(found)]
    )


def _find(inputs: Path) -> tuple[Path, Found]:
    """Return the folder to start from, and the files in it."""
    if inputs.is_file():
        expect(inputs.name.lower().endswith(SUFFIXES), f"inputs must be one of {', '.join(SUFFIXES)}; got {inputs}")
        expect_packages([inputs.name])
        return inputs.parent, Found([(inputs.name, inputs)], Counter(), [])
    found = find(inputs, SUFFIXES)
    others = f"; {others_left_out(found.others)}" if found.others else ""
    expect(bool(found.files), f"no {', '.join(SUFFIXES)} in {inputs}{others}")
    return inputs, found
