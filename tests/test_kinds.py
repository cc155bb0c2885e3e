"""Kinds of arguments: what annotations allow, and what is said otherwise."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from llmfast._kinds import expect_kind, expect_kinds, kind_of, what

CASES: list[tuple[Any, list[Any], list[Any], str]] = [
    (int, [0, -1, np.int64(3)], [True, 1.0, "1", None, torch.ones(())], "an int"),
    (float | None, [0, 0.5, None, np.float32(1)], [False, "1", [1.0]], "a number or None"),
    (bool, [True, np.bool_(False)], [0, None, "yes"], "a bool"),
    (
        Tensor | Sequence[float],
        [torch.ones(2), [1, 2.0], (1,), []],
        [1.0, "12", None, {1}],
        "a tensor or a sequence of",
    ),
    (Literal["mean", "sum"], ["mean", "other"], [None, 1], "'mean' or 'sum'"),  # words are checked as values
    (int | Literal["auto"], [3, "auto"], ["1GB", None, True], "an int or 'auto'"),
    (torch.dtype | None, [torch.float32, None], ["float32"], "a torch.dtype or None"),
]


@pytest.mark.parametrize(
    ("annotation", "right", "wrong", "wanted"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_an_annotation_says_what_is_allowed(annotation: Any, right: list[Any], wrong: list[Any], wanted: str) -> None:
    kind = kind_of(annotation)
    for value in right:
        assert expect_kind("x", value, kind) is value or not isinstance(value, Tensor)
    for value in wrong:
        with pytest.raises(TypeError, match=rf"^x must be {wanted}.*; got "):
            expect_kind("x", value, kind)


def test_numbers_of_numpy_become_plain() -> None:
    given: dict[str, Any] = {"n": np.int64(3), "other": np.int64(4)}
    found = expect_kinds({"n": kind_of(int)}, given)
    assert (type(found["n"]), found["other"], type(given["n"])) == (int, given["other"], np.int64)
    assert [type(x) for x in expect_kind("x", [np.float32(1), 2], kind_of(Sequence[float]))] == [float, int]


def test_an_item_is_named_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"^x\[1\] must be a number; got None$"):
        expect_kind("x", [1, None], kind_of(Sequence[float]))


def test_what_came_is_told_in_words() -> None:
    cases = {
        "a list": [1],
        "a NumPy array": np.ones(2),
        "a tensor": torch.ones(2),
        "None": None,
        "'x'": "x",
        "True": True,
    }
    assert {told: what(value) for told, value in cases.items()} == {told: told for told in cases}
    assert (what(torch.float32), what(torch.nn.Embedding(1, 1))) == ("torch.float32", "an Embedding")
