"""No test sees a GPU, nor does a process that a test starts: shown on a machine that pretends to have some."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import gpus

ROOT = Path(__file__).parents[2]

# Python runs this first in every process that has its folder on the path.
PRETENDING = """
import importlib.util, os, subprocess, sys, traceback

HIDDEN, LOG = {hidden!r}, {log!r}

def note(what):
    with open(LOG, "a") as log:
        log.write(what + "\\n")

def is_available(*names):
    if any(os.environ.get(name) in ("", HIDDEN[name]) for name in names):
        return False
    note("".join(traceback.format_stack(limit=4)))
    return True

class Import:
    def find_spec(self, name, path, target=None):
        if name not in ("torch.cuda", "torch.xpu"):
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        load, names = spec.loader.exec_module, list(HIDDEN)[:2] if name == "torch.cuda" else list(HIDDEN)[2:]
        def exec_module(module):
            load(module)
            module.is_available = lambda: is_available(*names)
            module.device_count = lambda: 2 * is_available(*names)
        spec.loader.exec_module = exec_module
        return spec

start = subprocess.Popen.__init__
def Popen(self, args, *others, env=None, **named):
    if env is not None and not HIDDEN.items() <= env.items():
        note(f"{{args}} is started without what hides GPUs")
    start(self, args, *others, env=env, **named)

sys.meta_path.insert(0, Import())
subprocess.Popen.__init__ = Popen
"""

# Some that ask for GPUs, and some that start processes, with an environment of their own too.
ASKING = [
    "tests/test_doctor.py::test_it_says_what_is_there_and_that_all_is_well",
    "tests/train/test_run.py::test_resuming_changes_nothing",
    "tests/examples/test_recipes.py::test_cuda_graph_says_that_it_needs_a_gpu",
    "tests/test_packaging.py::test_kernels_folder_is_not_a_package",
    "tests/support/test_gpus.py::test_no_gpu_is_here",
]


def asking(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


COUNT = "import torch; print(torch.cuda.device_count(), torch.xpu.device_count())"


def test_no_gpu_is_here() -> None:
    assert not torch.cuda.is_available() and not torch.xpu.is_available()
    assert asking(COUNT, {**os.environ}) == "0 0"


def test_no_test_sees_the_gpus_of_this_machine(tmp_path: Path) -> None:
    log = tmp_path / "log"
    (tmp_path / "sitecustomize.py").write_text(PRETENDING.format(hidden=gpus.HIDDEN, log=str(log)))
    there = {**gpus.as_found(), "PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "0,1"}
    there.pop(gpus._FOUND)
    assert asking(COUNT, there) == "2 2"
    assert log.exists()
    log.unlink()
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *ASKING]
    done = subprocess.run(command, cwd=ROOT, env=there, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert f"{len(ASKING)} passed" in done.stdout, done.stdout
    assert not log.exists(), log.read_text()


def test_a_process_may_see_them_where_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in gpus.HIDDEN:
        monkeypatch.delenv(name)
    monkeypatch.delenv(gpus._FOUND)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    for _ in range(2):  # as in a worker of a process that has hidden them
        os.environ |= gpus.hiding()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "-1" == os.environ["HIP_VISIBLE_DEVICES"]
        environment = gpus.as_found()
        assert environment["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert not {"HIP_VISIBLE_DEVICES", "ONEAPI_DEVICE_SELECTOR", "TRITON_INTERPRET"} & environment.keys()
