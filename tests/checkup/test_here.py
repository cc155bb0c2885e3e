"""Facts that a check-up notes about a machine: of the right GPU, and as much as there is to know."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmfast._gpus import H100
from llmfast.checkup import clock, here
from support.pretended_gpu import pretending_a_gpu


def smi(states: dict[str, list[str]]) -> Any:
    """Pretend to be nvidia-smi, which is asked for one GPU by its name, not by torch's number."""

    def run(command: list[str], **options: Any) -> Any:
        name, which, what, how = command
        assert (name, how) == ("nvidia-smi", "--format=csv,noheader")
        assert what.removeprefix("--query-gpu=").split(",") == list(here.STATE)
        assert options == {"capture_output": True, "text": True, "timeout": 10, "check": True}
        return SimpleNamespace(stdout=", ".join(states[which.removeprefix("--id=GPU-")]) + "\n")

    return run


@pytest.mark.parametrize("index", [None, 0, 1])
def test_the_state_is_that_of_the_gpu_that_is_looked_at(index: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {f"{gpu}-{gpu}": [f"{gpu}-{what}" for what in here.STATE] for gpu in range(2)}
    monkeypatch.setattr(subprocess, "run", smi(states))
    with pretending_a_gpu():
        of_any = torch.cuda.get_device_properties
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(
                **vars(of_any(device)) | {"uuid": f"{device.index or 0}-{device.index or 0}"}
            ),
        )
        device = torch.device("cuda") if index is None else torch.device("cuda", index)
        found = here.properties(device)
        p = torch.cuda.get_device_properties(device)
    assert found.items() >= dict(zip(here.STATE, states[f"{index or 0}-{index or 0}"])).items()
    assert (found["name"], found["bytes"]) == (p.name, p.total_memory)
    assert found["multiprocessors"] == p.multi_processor_count and found["capability"] == f"{p.major}.{p.minor}"


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), subprocess.CalledProcessError(9, "x"), subprocess.TimeoutExpired("x", 10)]
)
def test_without_nvidias_tool_the_driver_is_asked_alone(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr(subprocess, "run", run)
    with pretending_a_gpu():
        found = here.properties(torch.device("cuda", 0))
    assert found.keys() == {"name", "bytes", "multiprocessors", "capability", "l2_bytes", "devices"}


def test_a_cpu_is_named_with_its_threads() -> None:
    name = platform.processor() or "CPU"
    assert here.properties(torch.device("cpu")) == {"name": name, "threads": torch.get_num_threads()}


def test_versions_are_of_what_is_installed() -> None:
    found = here.versions()
    assert found["python"] == platform.python_version() and found["cuda"] == torch.version.cuda
    for name in here.LIBRARIES:
        try:
            assert found[name] == version(name)
        except PackageNotFoundError:
            assert found[name] is None


def test_rates_are_compared_with_those_of_their_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "copy_bandwidth", lambda size: H100.bandwidth / 2)
    monkeypatch.setattr(clock, "product_rate", lambda n, dtype: H100.tensor_cores / 4)
    with pretending_a_gpu():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
        found = {case.name: next(iter(case.run())).figures for case in here.cases(torch.device("cuda", 0), "small")[2:]}
    shares = {name: figures.get("share_of_data_sheet") for name, figures in found.items()}
    assert shares == {
        "copy bandwidth": 0.5,
        "matrix products, bfloat16": 0.25,
        "matrix products, float16": 0.25,
        "matrix products, float32": H100.tensor_cores / 4 / H100.float32,
    }
    assert found["copy bandwidth"]["bytes_per_s"] == H100.bandwidth / 2
    assert found["matrix products, float32"]["flops_per_s"] == H100.tensor_cores / 4
