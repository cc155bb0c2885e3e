"""The recipe in FineWeb's order: `STAGES` has the rule of each stage, and every filter is datatrove's.

Differences from FineWeb (datatrove's `examples/fineweb.py`), with reasons:

- Nothing is downloaded at run time. py3langid, which includes its model, identifies languages unless a fastText model
  is given; spaCy's rules, datatrove's own choice for English, split words and sentences.
- Text is repaired and addresses are replaced first rather than last. `removed/` and the report therefore contain no
  addresses, except in text that could not be read, and texts that differ only in addresses count as equal. This is why
  all addresses get the same replacement.
- C4's filter keeps lines of fewer than three words: otherwise it would drop the blank line between paragraphs and, in
  text with hard line breaks, the end of many paragraphs.
- Equal texts are removed before near duplicates are searched.

The thresholds are meant for prose from the web. They remove most technical documentation, mainly because punctuation
counts as words without a letter; check the report before you use the text. The only personal data detected are e-mail
and IPv4 addresses, in the text but not in other columns of JSONL, and a version such as 8.4.2.1 counts as an address.
"""

# mypy: disable-error-code="import-not-found,import-untyped"
# pyright: reportMissingImports=false

import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.dedup import ExactDedupConfig, MinhashConfig
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
    LambdaFilter,
    LanguageFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.utils.word_tokenizers import load_word_tokenizer
from py3langid import classify, rank

from llmfast._checks import expect

DATATROVE = version("datatrove")
EMAIL, IP = "email@example.com", "22.214.171.124"  # the first of datatrove's own
MIN_FASTTEXT_SCORE = 0.65  # FineWeb's

STAGES = {
    "read": "Removes what is not UTF-8, is blank, or is a line of JSONL without an object that has a `text`.",
    "fix_text": "ftfy repairs wrongly decoded text and drops control characters. Removes nothing.",
    "addresses": f"E-mail addresses become {EMAIL}, public IPv4 addresses {IP}. Removes nothing.",
    "language": "Removes documents in another language.",
    "repetition": "Gopher's rules on repeated lines, paragraphs and n-grams (Rae et al. 2021, table A1).",
    "gopher": "Gopher's rules on quality: 50 to 100,000 words, their mean length, symbols, bullets, stop words.",
    "c4": "C4's rules (Raffel et al. 2020): lorem ipsum, curly brackets, fewer than 5 sentences. Lines that mention "
    "JavaScript, cookies or a policy on them are cut out of the documents that stay.",
    "fineweb": "FineWeb's rules: lines that end without punctuation, short lines, repeated lines, lists.",
    "exact_duplicates": "Keeps one of several equal texts.",
    "near_duplicates": "Keeps one of several nearly equal texts: MinHash of 5-grams of words, 14 buckets of 8 hashes, "
    "which finds most pairs that share 0.72 or more of them.",
}
_WORD = re.compile(r"\S+")
# Applies to stages that only accept or reject.
REASONS = {"language": "another language", "exact_duplicates": "equal text", "near_duplicates": "nearly equal text"}


def check_language(language: str, *, py3langid: bool) -> None:
    """Raise ValueError for an unknown language, and ImportError if splitting its words needs a missing package."""
    try:
        words = load_word_tokenizer(language)
    except ValueError as error:
        raise ValueError(f"language must be one that datatrove has a tokenizer for; got {language!r}") from error
    words.word_tokenize("any")
    if py3langid:
        known = sorted(code for code, _ in rank("any"))
        expect(language in known, f"language must be one of py3langid's, {', '.join(known)}; got {language!r}")


def filters(
    language: str, language_model: Path | None, exclusion_writer: Callable[[str], Any]
) -> list[tuple[str, Any]]:
    """Return stages and their steps, from text repair to FineWeb's rules. `exclusion_writer` takes a stage's name."""
    off = exclusion_writer
    return [
        ("fix_text", FTFYFormatter()),
        ("addresses", Addresses(email_replacement=EMAIL, ip_replacement=IP)),
        ("language", _language_filter(language, language_model, off("language"))),
        ("repetition", GopherRepetitionFilter(language=language, exclusion_writer=off("repetition"))),
        (
            "gopher",
            GopherQualityFilter(
                language=language,
                min_stop_words=2 if language == "en" else None,  # the stop words are English
                exclusion_writer=off("gopher"),
            ),
        ),
        (
            "c4",
            C4QualityFilter(
                language=language,
                filter_no_terminal_punct=False,  # as in FineWeb
                min_words_per_line=-1,
                exclusion_writer=off("c4"),
            ),
        ),
        ("fineweb", FineWebQualityFilter(language=language, exclusion_writer=off("fineweb"))),
    ]


class Addresses(PIIFormatter):  # type: ignore[misc]
    """Replacement of e-mail and IP addresses that looks for e-mail only in words with an @, with the same result.

    datatrove's pattern takes time quadratic in the length of a word: minutes for 100 kB of base64.
    """

    def format(self, text: str) -> str:
        replace = self.emails_replacer.replace
        text = _WORD.sub(lambda word: replace(word[0]) if "@" in word[0] else word[0], text)
        replaced: str = self.ip_replacer.replace(text)
        return replaced


def exact_config() -> ExactDedupConfig:
    return ExactDedupConfig(content_getter=_content)


def minhash_config() -> MinhashConfig:
    return MinhashConfig()


def _language_filter(language: str, model: Path | None, exclusion_writer: Any) -> Any:
    if model is None:
        is_in: Any = partial(_is_in, language=language)  # returns a reason too, which LambdaFilter's type hints omit
        return LambdaFilter(is_in, exclusion_writer)
    step = LanguageFilter(language, MIN_FASTTEXT_SCORE, exclusion_writer)
    identifier: Any = step.model
    identifier.MODEL_URL = str(model)  # a path works in place of the URL that datatrove would load from
    return step


def _is_in(document: Document, language: str) -> bool | tuple[bool, str]:
    found, _ = classify(document.text)
    return found == language or (False, str(found))


def _content(document: Document) -> str:
    text: str = document.text
    return text
