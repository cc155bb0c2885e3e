"""Numbers and names in docstrings are those of the code next to them."""

import inspect
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llmfast.data import ByteTokenizer, prepare, sources, text_files, token_files
from llmfast.data.reader import TABLE_SUFFIXES, TEXT_SUFFIXES
from llmfast.data.split import LEAST_SHARE, LEAST_TOKENS
from llmfast.data.tokenizer import MIN_BPE_VOCAB_SIZE, SPECIAL_TOKENS, BPETokenizer
from llmfast.models import Decoder, DecoderConfig
from llmfast.models.cost import step_flops
from llmfast.mtp.schedules import staged_weights
from llmfast.train import Trainer
from llmfast.train.metrics import ProgressDisplay


def said(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").split())


def flops(**change: int) -> float:
    return step_flops(DecoderConfig(64, width=32, layers=1, heads=2), 1, **{"seq_len": 8} | change).flops


def sentences() -> Iterator[tuple[Any, str]]:
    unused = {3: "three"}[ByteTokenizer.vocab_size - 256 - len(SPECIAL_TOKENS)]
    widest = 2**16
    assert [token_files._ds_dtype(n).itemsize for n in (widest, widest + 1)] == [2, 4]
    per_token = (flops(seq_len=9) - flops()) / 32  # of attention, for each place of the row and each number of a state
    assert LEAST_SHARE == 1 / 5
    yield sources.python_prose, f"fewer than {sources._MIN_DOCSTRING_CHARACTERS} characters of docstrings are skipped"
    yield ByteTokenizer, f"{ByteTokenizer.vocab_size} ids, a multiple of 8, {unused} unused."
    yield ByteTokenizer, f"ids 0..{min(ByteTokenizer.special_ids.values()) - 1}, followed by special tokens"
    yield BPETokenizer.train, f"no room for {MIN_BPE_VOCAB_SIZE - len(SPECIAL_TOKENS)} bytes and the special tokens"
    yield token_files.TokenFile.split, f"but at least {LEAST_TOKENS} or a fifth, whichever is less."
    yield token_files.TokenFile.verify, f"Read every token, 2**{math.log2(token_files.CHUNK):.0f} at a time;"
    yield token_files.read_ds, f"it is 2 for a `vocab_size` of up to {widest}, else 4."
    yield token_files.write_ds, f"vocab_size: Up to {widest} ids take 2 bytes each, more take 4."
    yield prepare, f"Token files ({', '.join(token_files.SUFFIXES)}) are memory-mapped."
    *first, last = TEXT_SUFFIXES
    yield text_files, f"A {', '.join(first)} or {last} file is a document,"
    *first, last = TABLE_SUFFIXES
    yield text_files, f"so is a line of {', '.join(first[:-1])} or {first[-1]} and a row of {last}."
    yield Trainer, "a function of model and batch that returns the sum of its valid tokens' losses."
    yield step_flops, f"Attention takes {per_token:g} * seq_len * width FLOPs per token and block"


@pytest.mark.parametrize(("thing", "sentence"), [*sentences()])
def test_a_docstring_says_what_the_code_does(thing: Any, sentence: str) -> None:
    assert sentence in said(thing)


def test_the_stages_in_the_docstring_are_those_of_the_weights() -> None:
    K, weight = (float(x) for x in re.findall(r"For K = (\d) and weight = ([\d.]+),", said(staged_weights))[0])
    stages = re.findall(r"\[1, ([^]]*)\]", said(staged_weights))
    assert len(stages) == K
    for stage, text in enumerate(stages):
        for part, fraction in enumerate((stage / K, (stage + 1 - 1e-9) / K)):
            wanted = [float(cell.split(" -> ")[min(part, cell.count("->"))]) for cell in text.split(", ")]
            assert staged_weights(fraction, int(K), weight) == pytest.approx([1, *wanted], abs=1e-6)


def test_the_passes_in_the_docstring_are_those_of_prompts_of_such_lengths() -> None:
    short, long, passes = map(
        int,
        re.findall(
            r"prompts of (\d+) and of (\d+) tokens take (\d+) passes before both are "
            r"read",
            said(Decoder.generate_batch),
        )[0],
    )
    model, read = Decoder(DecoderConfig(50, width=32, layers=1, heads=2)), []
    model.register_forward_hook(lambda *_: read.append(1))
    model.generate_batch([torch.ones(n, dtype=torch.int64) for n in (short, 20)], 1, context=99)
    assert len(read) - 1 == 20 - short  # the last of them reads the end of the long one
    assert passes == long - short


def test_the_spaces_between_lines_in_the_docstring_are_those_of_the_display() -> None:
    from rich.console import Console

    spaces = [n for n in ProgressDisplay(Console(quiet=True), 100, 0)._spaces if n <= 100]
    assert f": {', '.join(map(str, spaces))}, ... times `log_every`." in said(ProgressDisplay)


def test_the_threshold_of_a_language_model() -> None:
    recipe = pytest.importorskip("llmfast.clean.recipe")
    from llmfast.clean import clean

    assert f"instead of py3langid with a threshold of {recipe.MIN_FASTTEXT_SCORE}." in said(clean)
