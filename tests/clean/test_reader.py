"""Names, metadata and values of documents, as they are written."""

import json
import math
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from llmfast.data.reader import read

orjson = pytest.importorskip("orjson")
reader = pytest.importorskip("llmfast.clean.reader")

LOST = object()
VALUES: list[tuple[Any, Any]] = [
    *((value, value) for value in (None, True, False, 0, -(2**63), 2**64 - 1, 1.5, -0.0, "", "é", [], {})),
    *((value, LOST) for value in (-(2**63) - 1, 2**64, math.nan, math.inf, -math.inf, "\ud800", b"x", {1}, object())),
    (date(2024, 5, 6), "2024-05-06"),
    (datetime(2024, 5, 6, 7, 8), "2024-05-06T07:08:00"),
    (time(7, 8), "07:08:00"),
    (Decimal("1.10"), "1.10"),
    (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    ((1, [2, (3,)]), [1, [2, [3]]]),
    ({"a": {1: (2,)}, "\udcff": 3}, {"a": {"1": [2]}, "?": 3}),
]


@pytest.mark.parametrize(("value", "stored"), VALUES, ids=map(str, range(len(VALUES))))
def test_a_value_of_another_column_is_what_json_can_hold(value: Any, stored: Any) -> None:
    """Alone, in a list and in an object: of what cannot be held, only that is lost."""
    gone, held = (1, None) if stored is LOST else (0, stored)
    for whole, wanted in ((value, held), ([1, value, 2], [1, held, 2]), ({"x": value, "y": 1}, {"x": held, "y": 1})):
        lost: list[Any] = []
        found = reader._storable(whole, lost)
        assert found == wanted and type(found) is type(wanted) and len(lost) == gone
        assert json.loads(orjson.dumps(found)) == wanted


def test_values_are_kept_to_a_depth_that_can_be_written() -> None:
    for kind in (list, dict):
        for depth in (reader._DEEPEST, reader._DEEPEST + 1):
            value: Any = 7
            for _ in range(depth):
                value = [value] if kind is list else {"x": value}
            lost: list[Any] = []
            orjson.dumps({"metadata": {"input": {"column": reader._storable(value, lost)}}})
            assert len(lost) == (depth > reader._DEEPEST)


@pytest.mark.parametrize(
    ("row", "name", "metadata"),
    [
        ({"text": "x"}, "a.jsonl/0", {}),
        ({"text": "x", "id": None, "b": 1}, "a.jsonl/0", {"input": {"b": 1}}),
        ({"text": "x", "id": 0}, "0", {}),
        ({"text": "x", "id": ""}, "", {}),
        ({"text": "x", "id": 7, "a": [1]}, "7", {"input": {"a": [1]}}),
        ({"text": " ", "id": "mine", "a": 1}, "mine", {"input": {"a": 1}}),
        ({"id": "mine", "a": 1}, "a.jsonl/0", {}),
    ],
)
def test_a_row_has_its_own_name_if_it_says_one(
    row: dict[str, Any], name: str, metadata: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (record,) = read(tmp_path / "a.jsonl", "a.jsonl", whole=True)
    document = reader.Reader(tmp_path, ["a.jsonl"], "text", None)._document(record)
    assert (document.id, document.metadata, document.text) == (name, metadata, row.get("text", json.dumps(row)))
