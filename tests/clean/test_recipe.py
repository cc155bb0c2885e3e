"""Filters of the recipe, as they are made for a language."""

import inspect
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from llmfast.clean import folder

for needed in folder.NEEDED:
    pytest.importorskip(needed)
pipelines = pytest.importorskip("llmfast.clean.pipelines")
recipe = pytest.importorskip("llmfast.clean.recipe")


@pytest.mark.parametrize("language", ["en", "de"])
def test_every_filter_is_of_the_language(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Words and sentences are split by its rules in each stage; English stop words are for English alone."""
    asked: list[str] = []
    steps: dict[str, Any] = dict(recipe.filters(language, None, lambda stage: asked.append(stage)))
    by_words = ["repetition", "gopher", "c4", "fineweb"]
    assert asked == ["language", *by_words] and [*steps, "exact_duplicates", "near_duplicates"] == [*recipe.STAGES][1:]
    assert [steps[stage].language for stage in by_words] == [language] * 4
    assert steps["gopher"].min_stop_words == (2 if language == "en" else None)
    assert (steps["c4"].filter_no_terminal_punct, steps["c4"].min_words_per_line) == (False, -1)

    taken: list[Any] = []
    monkeypatch.setattr(pipelines.Pipelines, "_execute", lambda self, name, steps, tasks=None: taken.extend(steps))
    pipelines.Pipelines(Path("new"), 1, "text", print)._remove_nearly_equal(language)
    assert [step.language for step in taken if hasattr(step, "language")] == [language]


def test_a_language_model_is_asked_instead_with_the_threshold_of_fineweb(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mock.Mock()
    monkeypatch.setattr(recipe, "LanguageFilter", made)
    steps = dict(recipe.filters("fr", Path("/models/lid.176.bin"), lambda stage: f"off {stage}"))
    assert steps["language"] is made.return_value and made.return_value.model.MODEL_URL == "/models/lid.176.bin"
    given = inspect.signature(lambda languages, language_threshold, exclusion_writer: None).bind(
        *made.call_args.args, **made.call_args.kwargs
    )
    assert given.arguments == {"languages": "fr", "language_threshold": 0.65, "exclusion_writer": "off language"}


def test_rules_say_what_the_filters_do() -> None:
    """The report has them; what they count is what datatrove's filters and the search for duplicates are made with."""
    rules, steps = recipe.STAGES, dict(recipe.filters("en", None, lambda stage: None))
    gopher, minhash, c4 = steps["gopher"], recipe.minhash_config(), steps["c4"]
    assert f": {gopher.min_doc_words} to {gopher.max_doc_words:,} words, their mean length," in rules["gopher"]
    assert f", fewer than {c4.min_num_sentences} sentences. Lines that mention JavaScript, cookies or a" in rules["c4"]
    assert c4.filter_lorem_ipsum and c4.filter_curly_bracket and c4.filter_javascript and c4.filter_policy
    buckets, hashes = minhash.num_buckets, minhash.hashes_per_bucket
    counts = f"MinHash of {minhash.n_grams}-grams of words, {buckets} buckets of {hashes} hashes, "
    share = (1 / buckets) ** (1 / hashes)  # which is found more often than not
    assert rules["near_duplicates"].endswith(f"{counts}which finds most pairs that share {share:.2f} or more of them.")
    assert 1 - (1 - share**hashes) ** buckets > 0.5
    assert rules["addresses"] == (
        "E-mail addresses become email@example.com, public IPv4 addresses 22.214.171.124. Removes nothing."
    )
    assert rules["fix_text"].endswith(" Removes nothing.")
    text = "Write to a@b.org or c@d.org, or to 8.8.8.8 and 1.1.1.1."
    assert steps["addresses"].format(text) == (
        "Write to email@example.com or email@example.com, or to 22.214.171.124 and 22.214.171.124."
    )


@pytest.mark.parametrize(
    ("language", "message"),
    [
        ("tongue", "language must be one that datatrove has a tokenizer for; got 'tongue'$"),
        ("frr", "language must be one of py3langid's, [a-z, ]+, de, .*; got 'frr'$"),
    ],
)
def test_languages_that_are_not_known(language: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        recipe.check_language(language, py3langid=True)
