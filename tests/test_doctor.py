"""The doctor: says what is there, and notices what is wrong."""

import re
from typing import Any

import pytest
import torch

from llmfast import doctor
from llmfast._dispatch import kernels_on_cpu
from llmfast.cli import main
from support.launched import unrecorded


def test_it_says_what_is_there_and_that_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in output
    assert "float32   plain torch: a CPU" in output
    errors = [float(x) for x in re.findall(r"ok    cpu, [\w, ]+: off by (\S+)", output)]
    assert len(errors) == 9 * 3 and max(errors) < 2e-2
    assert output.endswith("all is well\n")


def test_it_checks_the_kernels_where_they_are_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "KERNEL_DTYPES", (torch.float32,))
    with kernels_on_cpu(), unrecorded():
        assert doctor.report()
    assert "float32   Triton kernels" in capsys.readouterr().out


def test_it_notices_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = doctor.linear_cross_entropy

    def wrong(hidden: Any, weight: Any, targets: Any, **options: Any) -> Any:
        return right(hidden, weight + 1e-3 * (weight - weight.detach()), targets, **options)

    monkeypatch.setattr(doctor, "linear_cross_entropy", wrong)
    monkeypatch.setattr(doctor, "KERNEL_DTYPES", (torch.float32,))
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "WRONG cpu, linear_cross_entropy, float32: off by 1." in output
    assert "ok    cpu, cross_entropy, float32" in output and "please report it" in output


def test_it_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", {"no_such_thing": "hf"})
    monkeypatch.setattr(doctor, "KERNEL_DTYPES", ())
    lines: list[str] = []
    doctor.report(lines.append)
    assert "  no_such_thing not installed: pip install 'llmfast-torch[hf]'" in lines
