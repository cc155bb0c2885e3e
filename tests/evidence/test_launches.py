"""Tests of which launches are of the same kind: those for which Triton would use one binary."""

from typing import NamedTuple

import pytest
import torch

from evidence.launches import Specialization, _encode


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ([1], 1),
        ([16, 0, -32, 1 << 20], 16),
        ([2, 3, 8, 24, 17, -1, 1000], 3),
        ([2**31 + 16, 2**40], 2**40 + 16),
        ([2**31 + 1], 2**40 + 3),
        ([2**63 + 16], 2**63 + 16),
        # The first and the last of 32 bits and of 64, and their neighbours.
        ([-(2**31)], 16),
        ([2**31 - 1], 3),
        ([2**31], 2**40 + 16),
        ([-(2**31) - 1, 2**63 - 1], 2**40 + 3),
        ([2**63], 2**63 + 16),
        ([True], True),
        ([None], None),
        ([1.5, 0.0], 0.5),
        ([(16, 8)], [16, 3]),
    ],
)
def test_numbers(values, code):
    assert [_encode(value) for value in values] == [code] * len(values)


class Inner(NamedTuple):
    factor: float | None
    count: int


class Outer(NamedTuple):
    inner: Inner
    x: torch.Tensor


def test_named_tuples_keep_their_fields():
    code = _encode(Outer(Inner(None, 8), torch.zeros(1)), unspecialized=True, unaligned=True)
    pointer = {"dtype": "float32", "aligned": True, "below_2_gib": True}
    # Triton specialises on members of tuples even where the kernel asks it not to.
    inner = {"record": {"factor": None, "count": 3}, "name": "Inner"}
    assert code == {"record": {"inner": inner, "x": pointer}, "name": "Outer"}
    kind = Specialization("module:kernel", {"outer": code, "absent": None}, {})
    assert kind.argument("outer.inner.count") == 3 and kind.argument("outer.x") == pointer
    assert kind.argument("absent.x") is None
    assert str(kind) == "kernel(outer=(inner=(factor=None, count=3), x=*float32:16), absent=None)"


def test_numbers_that_are_not_looked_at():
    assert [_encode(value, unspecialized=True) for value in (1, 2, 16, 2**40)] == [3, 3, 3, 2**40 + 3]


def test_tensors():
    t = torch.zeros(64, dtype=torch.bfloat16)
    told = {"dtype": "bfloat16", "aligned": True, "below_2_gib": True}
    assert _encode(t) == _encode(t[8:]) == told
    assert _encode(t[1:]) == _encode(t[4:]) == _encode(t, unaligned=True) == told | {"aligned": False}


def test_what_no_kernel_takes_is_refused():
    with pytest.raises(TypeError, match="argument of type str cannot be recorded"):
        _encode("x")
