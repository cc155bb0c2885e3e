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


def test_a_gradient_that_is_not_a_number_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the loss and the first gradient be right, and the last one NaN."""
    right = doctor.linear_cross_entropy

    def wrong(hidden: Any, weight: Any, targets: Any, **options: Any) -> Any:
        odd = torch.nan_to_num(torch.sqrt((weight - weight.detach()).sum()), nan=0.0)  # a slope of infinity times 0
        return right(hidden, weight, targets, **options) + 0 * odd

    monkeypatch.setattr(doctor, "linear_cross_entropy", wrong)
    monkeypatch.setattr(doctor, "KERNEL_DTYPES", (torch.float32,))
    lines: list[str] = []
    assert doctor.report(lines.append) is False
    assert [line for line in lines if "WRONG" in line] == ["  WRONG cpu, linear_cross_entropy, float32: off by nan"]


def test_it_names_the_extra_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", {"no_such_thing": "hf"})
    monkeypatch.setattr(doctor, "KERNEL_DTYPES", ())
    lines: list[str] = []
    doctor.report(lines.append)
    assert "  no_such_thing not installed: pip install 'llmfast-torch[hf]'" in lines


OPERATIONS = ["cross_entropy", "linear_cross_entropy", "mtp_cross_entropy"]
OPERATIONS += [f"Fused{name}" for name in ("AdamW", "Adam", "SGD", "RMSprop", "Adagrad", "Lion")]


@pytest.mark.parametrize("name", OPERATIONS)
def test_it_notices_each_operation_that_is_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right: Any = getattr(doctor, name)

    class Wrong(right if name.startswith("Fused") else object):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1.0001)

    Wrong.__name__ = name
    loss = lambda x, *args, **options: right(x * 1.0001, *args, **options)  # noqa: E731
    monkeypatch.setattr(doctor, name, Wrong if name.startswith("Fused") else loss)
    monkeypatch.setattr(doctor, "KERNEL_DTYPES", (torch.float32,))
    lines: list[str] = []
    assert doctor.report(lines.append) is False
    assert [line for line in lines if "WRONG" in line] == [line for line in lines if f" {name}, float32" in line]


def test_errors_are_those_of_the_dtype() -> None:
    """A check in float32 of what is said to be bfloat16 would find the kernels right whatever they do."""
    for dtype, least, most in (
        (torch.float32, 0.0, 2e-6),
        (torch.float16, 2e-5, 2e-3),
        (torch.bfloat16, 2e-4, 2e-2),
    ):
        found = dict(doctor._checks(torch.device("cpu"), dtype))
        assert len(found) == 9
        for what, error in found.items():
            assert least <= error <= most and what.endswith(str(dtype).removeprefix("torch.")), (what, error)
