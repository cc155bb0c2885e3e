"""Steps of the pipelines that a run does not tell apart."""

from pathlib import Path

import pytest

pipelines = pytest.importorskip("llmfast.clean.pipelines")


def test_tokens_are_shuffled_in_the_same_way_each_time(tmp_path: Path) -> None:
    """Make the step twice: the generator of both gives one order, which is not that of the documents."""
    orders = [pipelines._tokenizer(tmp_path).rand.permutation(50).tolist() for _ in range(2)]
    assert orders[0] == orders[1] != list(range(50))
