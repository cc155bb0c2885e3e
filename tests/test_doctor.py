"""The doctor: says what is there, and notices what is wrong."""

import re
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmfast import doctor
from llmfast._dispatch import kernels_on_cpu
from llmfast.cli import main
from support.code_blocks import ROOT
from support.launched import unrecorded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_it_says_what_is_there_and_that_all_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    assert f"torch         {torch.__version__}" in output
    assert "float32   plain torch: this is a CPU" in output
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


def test_each_library_is_named_with_the_extra_that_installs_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {"": project["dependencies"]} | project["optional-dependencies"]
    for library, extra in doctor.LIBRARIES.items():
        assert library in [re.split(r"[\[<>=; ]", package)[0] for package in extras[extra]], library


def test_libraries_are_told_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, extra in doctor.LIBRARIES.items():
        if (told := doctor._version(name, extra)).startswith("not installed"):
            assert told == f"not installed: pip install 'llmfast-torch[{extra}]'"
        else:
            assert told == metadata.version(name)
    assert doctor._version("no_such_thing", "") == "not installed"

    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", unknown)
    assert doctor._version("torch", "") == "installed, of unknown version"


def test_every_device_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, count in ((torch.cuda, 2), (torch.xpu, 1)):
        monkeypatch.setattr(module, "is_available", lambda: True)
        monkeypatch.setattr(module, "device_count", lambda count=count: count)
    assert [str(device) for device in doctor._devices()] == ["cpu", "cuda:0", "cuda:1", "xpu:0"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [str(device) for device in doctor._devices()] == ["cpu", "xpu:0"]


def test_a_device_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    properties = SimpleNamespace(name="H100", total_memory=(79 << 30) + (3 << 28), major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: asked.append(device) or properties)
    monkeypatch.setattr(torch.xpu, "get_device_name", lambda device: f"an Intel {device}")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    device = torch.device("cuda", 1)
    assert doctor._describe(device) == "H100, 80 GiB, compute capability 9.0, CUDA 12.8" and asked == [device]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert doctor._describe(device) == "H100, 80 GiB, compute capability 9.0, ROCm 6.4"
    assert doctor._describe(torch.device("xpu", 0)) == "an Intel xpu:0"
    assert doctor._describe(torch.device("cpu")) == f"{torch.get_num_threads()} threads"


@pytest.mark.parametrize(
    ("device", "dtype", "kernels", "says"),
    [
        ("cpu", torch.float32, False, "plain torch: this is a CPU"),
        ("cpu", torch.float64, False, "plain torch: this is a CPU"),
        ("meta", torch.bfloat16, True, "Triton kernels"),
        ("meta", torch.float64, False, "plain torch: the kernels compute in float32"),
        ("meta", torch.float32, False, "plain torch: Triton is not installed"),
    ],
)
def test_a_path_is_told_with_its_reason(
    device: str, dtype: torch.dtype, kernels: bool, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "use_kernels", lambda t: kernels)
    assert doctor._path(torch.empty(1, dtype=dtype, device=device)) == says


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3), (torch.float64, 1e-12)]
)
def test_an_error_is_wrong_above_what_its_dtype_allows(
    dtype: torch.dtype, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "KERNEL_DTYPES", (dtype,))
    for error, right in ((most, True), (most * 1.01, False), (float("nan"), False)):
        monkeypatch.setattr(doctor, "_checks", lambda device, dtype, error=error: [("step", error), ("loss", 0.0)])
        lines: list[str] = []
        assert doctor.report(lines.append) is right
        assert f"  {'ok   ' if right else 'WRONG'} cpu, step: off by {error:.1e}" in lines
        assert "  ok    cpu, loss: off by 0.0e+00" in lines
        assert lines[-1] == ("\nall is well" if right else lines[-1])
        assert ("something is wrong here" in lines[-1]) is not right
