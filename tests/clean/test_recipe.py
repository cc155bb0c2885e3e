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
