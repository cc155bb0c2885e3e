"""`llmfast compile`: a folder of binaries that can be carried, and holds what losses and optimizers launch."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence.compiler import _run_worker
from evidence.launches import Recorder
from evidence.observers import observing
from evidence.pretend_cuda import pretending_cuda
from llmfast import _gpus, ahead, optim
from llmfast.cli import main
from llmfast.losses import cross_entropy, linear_cross_entropy
from llmfast.optim import FusedAdamW
from llmfast_kernels.ahead import CompileOnlyDriver
from support.launched import unrecorded
from support.plans import forced

V = 1000
BF16 = torch.bfloat16


def compiled(folder: Path, *arguments: str) -> str:
    """Run the command in `folder`, in a process that does not interpret kernels; return what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "llmfast", "compile", "--gpu", "H100", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def binaries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if list(path.glob("*.cubin"))}


def launched() -> Recorder:
    """Record what losses and a clipping optimizer launch on a GPU."""
    recorder = Recorder()
    with pretending_cuda(), unrecorded(), observing(recorder):
        targets = torch.randint(0, V, (64,))
        ways: list[tuple[str, dict[str, Any]]] = [("materialise", {}), ("chunk", {"rows": 16})]
        for mode, changes in ways:
            hidden, weight = (torch.randn(n, 16).to(BF16).requires_grad_() for n in (64, V))
            with forced(mode, **changes):
                linear_cross_entropy(hidden, weight, targets).backward()
        for inplace in (False, True):
            logits = torch.randn(64, V).to(BF16).requires_grad_()
            cross_entropy(logits * 1.0 if inplace else logits, targets, inplace=inplace).backward()
        for options in ({}, {"max_grad_norm": 1.0}):
            p = torch.randn(40, 5).to(BF16).requires_grad_()
            p.grad = torch.randn_like(p)
            FusedAdamW([p], **options).step()
    return recorder


def test_what_was_compiled_is_found_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, there = tmp_path / "made", tmp_path / "there"
    said = compiled(tmp_path, "--out", str(made), "--at", "there", "--vocab", str(V))
    before = binaries(made)
    assert said.splitlines() == [
        f"{len(before)} binaries for H100 (sm_90) in {made}",
        f"use them with TRITON_CACHE_DIR={there}",
    ]
    made.rename(there)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(there))
    kinds = list(launched().kinds.values())
    assert {kind.name for kind in kinds} >= {"cross_entropy_kernel", "scale_kernel", "update_kernel", "norm_kernel"}
    # In one process, in the order of the launches: Triton's name for a binary depends on what was compiled before it.
    _run_worker([(kind, "sm_90") for kind in kinds])
    assert binaries(there) == before, "some were compiled again"


def test_formats_of_optimizers_and_softcap(tmp_path: Path) -> None:
    formats = ["--master-weights", "split8", "--state-dtype", "8bit", "--optimizers", "lion"]
    said = compiled(tmp_path, "--out", ".", "--vocab", str(V), "--softcap", *formats)
    assert said.splitlines()[-1] == f"use them with TRITON_CACHE_DIR={tmp_path}"
    noted = [json.loads(path.read_text())["child_paths"].values() for path in tmp_path.glob("*/__grp__*.json")]
    assert noted and all(Path(path).is_file() and path.startswith(f"{tmp_path}/") for paths in noted for path in paths)
    kernels = [json.loads(path.read_text()) for path in tmp_path.glob("*/*_kernel.json") if "__grp__" not in path.name]
    assert {tuple(kernel["target"].values()) for kernel in kernels} == {("cuda", 90, 32)}
    rows = [kernel["num_warps"] for kernel in kernels if kernel["name"] == "cross_entropy_kernel"]
    assert len(rows) == 8 and set(rows) == {2, 4}, "softcap has tiles of its own"


def test_every_known_gpu_has_an_architecture() -> None:
    assert _gpus.ARCHITECTURES.keys() == _gpus.KNOWN.keys()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--vocab", "0"], "--vocab must be at least 1; got 0"),
        ([], "a process with TRITON_INTERPRET=1 cannot compile"),
    ],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compile", "--gpu", "H100", "--out", str(tmp_path), *arguments]) == 2
    assert says in capsys.readouterr().err


OPTIMIZERS = {
    **{"adamw": optim.FusedAdamW, "adam": optim.FusedAdam, "sgd": optim.FusedSGD},
    **{"rmsprop": optim.FusedRMSprop, "adagrad": optim.FusedAdagrad, "lion": optim.FusedLion},
}


@pytest.mark.parametrize(
    ("arguments", "losses", "steps"),
    [
        ([], [(BF16, 128256, None)], [(optim.FusedAdamW, BF16, {})]),
        (["--optimizers"], [(BF16, 128256, None)], []),
        (
            ["--dtypes", "float32", "float16", "--softcap", "--vocab", "9"],
            [(dtype, 9, cap) for dtype in (torch.float32, torch.float16) for cap in (None, 30.0)],
            [(optim.FusedAdamW, dtype, {}) for dtype in (torch.float32, torch.float16)],
        ),
        (
            ["--optimizers", *OPTIMIZERS, "--state-dtype", "float32", "--master-weights", "kahan"],
            [(BF16, 128256, None)],
            [(cls, BF16, {"state_dtype": torch.float32, "master_weights": "kahan"}) for cls in OPTIMIZERS.values()],
        ),
        (
            ["--state-dtype", "8bit", "--dtypes", "float32"],
            [(torch.float32, 128256, None)],
            [(optim.FusedAdamW, torch.float32, {"state_dtype": "8bit"})],
        ),
    ],
)
def test_every_flag_reaches_what_is_compiled(
    arguments: list[str], losses: list[Any], steps: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, list[Any]] = {"losses": [], "steps": [], "for": []}

    @contextmanager
    def compiled_ahead(architecture: str, folder: Path) -> Iterator[list[str]]:
        found["for"].append((architecture, folder))
        yield ["a"]

    def compile_losses(dtype: torch.dtype, V: int, *, softcap: float | None) -> None:
        found["losses"].append((dtype, V, softcap))

    def compile_optimizers(cls: Any, dtype: torch.dtype, **options: Any) -> None:
        found["steps"].append((cls, dtype, {name: value for name, value in options.items() if value is not None}))

    monkeypatch.setattr("llmfast_kernels.ahead.compiled_ahead", compiled_ahead)
    monkeypatch.setattr(ahead, "compile_losses", compile_losses)
    monkeypatch.setattr(ahead, "compile_optimizers", compile_optimizers)
    for gpu, architecture in (("H100", "sm_90"), ("MI300X", "gfx942")):
        assert main(["compile", "--gpu", gpu, "--out", str(tmp_path / "a" / "b"), *arguments]) == 0
        assert found == {"losses": losses, "steps": steps, "for": [(architecture, tmp_path / "a" / "b")]}
        for listed in found.values():
            listed.clear()


def test_triton_remembers_no_kernel_of_another_target_or_folder() -> None:
    """Triton keeps the kernels that it has compiled by device."""
    drivers = [CompileOnlyDriver(*given) for given in (("sm_90",), ("sm_90", "a"), ("sm_90", "b"), ("gfx942", "a"))]
    assert len({driver.get_current_device() for driver in drivers}) == 4
