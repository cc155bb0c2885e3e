"""Tests of which launches are of the same kind: those for which Triton would use one binary."""

from dataclasses import replace
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import triton.language as tl

from evidence.launches import Recorder, Specialization, _encode, _encode_constant, specialization
from support.sample_kernels import add_kernel


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


def test_a_tensor_of_two_gib_is_told_by_its_memory():
    """AMD GPUs have short instructions below, whatever part of the memory a view has."""
    for size, below in ((2**31 - 1, True), (2**31, False)):
        t = torch.empty(size, dtype=torch.uint8, device="meta")
        assert _encode(t)["below_2_gib"] == _encode(t[:16])["below_2_gib"] == below
    assert _encode(torch.empty(2**29, device="meta"))["below_2_gib"] is False


class Constant:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (1024, 1024),
        (Constant(0.25), 0.25),
        ("adam", "adam"),
        (None, None),
        (tl.float32, {"triton_type": "fp32"}),
        ((1, Constant(tl.bfloat16), True), {"tuple": [1, {"triton_type": "bf16"}, True]}),
        (add_kernel, {"function": "support.sample_kernels:add_kernel"}),
    ],
)
def test_constants_are_kept_as_they_are(value, code):
    assert _encode_constant(value) == code


def test_a_launch_is_told_by_kernel_arguments_and_options(monkeypatch):
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "tests/x.py::test_y (call)")
    given = {"x": torch.zeros(16)[1:], "n": 16, "m": 16, "p": torch.zeros(16), "BLOCK": 16}
    launch = mock.Mock(
        kernel="module:kernel",
        arguments=given,
        constexprs={"BLOCK"},
        unspecialized={"m"},
        unaligned={"p"},
        options={"num_warps": 4, "absent": None},
    )
    kind = specialization(launch)
    assert str(kind) == "kernel(x=*float32, n=16, m=3, p=*float32, BLOCK=16, num_warps=4)"
    assert (kind.first_test, kind.count, kind.name) == ("tests/x.py::test_y", 1, "kernel")
    recorder = Recorder()
    programs = []
    for _ in range(3):
        recorder.launch(launch, [0, 1], programs.append)
    recorder.add(replace(kind, options={"num_warps": 8}, count=5))
    assert [each.count for each in recorder.kinds.values()] == [3, 5] and programs == [[0, 1]] * 3


def test_what_no_kernel_takes_is_refused():
    with pytest.raises(TypeError, match="argument of type str cannot be recorded"):
        _encode("x")
