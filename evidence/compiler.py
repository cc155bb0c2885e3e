"""Compile recorded launches for GPUs that this machine does not have.

The tests' process interprets kernels and therefore cannot compile them, so worker processes do. A worker repeats each
kind of launch with stand-ins for its arguments, and Triton specialises and compiles as it would for a GPU.
"""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections import namedtuple
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from evidence.launches import Fields, Specialization
from evidence.machine_code import KernelFacts
from llmfast_kernels.ahead import compiling_for

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")

_ROOT = Path(__file__).resolve().parents[1]


class Compiled(NamedTuple):
    """Kind of launch compiled for one target."""

    kind: Specialization
    target: str
    facts: KernelFacts

    @property
    def warp_size(self) -> int:
        return 64 if self.target.startswith("gfx") else 32

    def __str__(self) -> str:
        return f"{self.kind} for {self.target}"


def compile_launches(kinds: Sequence[Specialization], targets: Sequence[str] = TARGETS) -> list[Compiled]:
    """Compile every kind of launch for every target; see `compile_jobs`."""
    return compile_jobs([(kind, target) for target in targets for kind in kinds])


def compile_jobs(jobs: Sequence[tuple[Specialization, str]]) -> list[Compiled]:
    """Compile each kind of launch for its target, in two worker processes.

    Raises:
        RuntimeError: A launch did not compile; the message has the end of the compiler's output.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        halves = pool.map(_run_worker, [jobs[0::2], jobs[1::2]])
    found = {(kind.key, target): facts for half in halves for kind, target, facts in half}
    return [Compiled(kind, target, found[kind.key, target]) for kind, target in jobs]


def _run_worker(jobs: Sequence[tuple[Specialization, str]]) -> list[Compiled]:
    if not jobs:
        return []
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), *sys.path]))
    with tempfile.TemporaryDirectory() as folder:
        given, answer = Path(folder, "jobs.json"), Path(folder, "answer.json")
        given.write_text(json.dumps([(dataclasses.asdict(kind), target) for kind, target in jobs]))
        command = [sys.executable, "-m", "evidence.compiler", str(given), str(answer)]
        done = subprocess.run(command, env=environment, text=True, capture_output=True)
        if done.returncode:
            raise RuntimeError(f"compiling launches failed:\n{done.stderr[-8000:]}")
        facts = map(KernelFacts.from_json, json.loads(answer.read_text()))
        return [Compiled(kind, target, fact) for (kind, target), fact in zip(jobs, facts)]


# What follows runs in the worker process.


BATCH = 64  # kernels that a worker compiles before it reads their code


def _work(given: str, answer: str) -> None:
    jobs = [(Specialization(**fields), target) for fields, target in json.loads(Path(given).read_text())]
    facts: list[Fields] = []
    for start in range(0, len(jobs), BATCH):
        facts += _facts([_compile_or_explain(kind, target) for kind, target in jobs[start : start + BATCH]])
    Path(answer).write_text(json.dumps(facts))


def _compile_or_explain(kind: Specialization, target: str) -> Any:
    """Compile, and name the launch in any error."""
    try:
        return _compile(kind, target)
    except Exception as error:
        raise RuntimeError(f"{kind} for {target}, launched by {kind.first_test}") from error


def _facts(kernels: Sequence[Any]) -> list[Fields]:
    """Return facts as JSON values; they are cached inside Triton's cache to avoid repeated disassembly."""
    from triton import knobs

    from evidence import machine_code

    version = sha256(Path(machine_code.__file__).read_bytes()).hexdigest()[:16]  # another reader reads again
    folder = Path(knobs.cache.dir) / "llmfast-facts" / version
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{kernel.hash}.json" for kernel in kernels]
    missing = [i for i, file in enumerate(files) if not file.exists()]
    for i, found in zip(missing, machine_code.facts([kernels[i] for i in missing])):
        with tempfile.NamedTemporaryFile("w", dir=folder, delete=False) as file:
            json.dump(dataclasses.asdict(found), file)
        os.replace(file.name, files[i])
    return [json.loads(file.read_text()) for file in files]


def _compile(kind: Specialization, target: str) -> Any:
    """Return the binary that Triton builds for this launch, without launching it."""
    kernel = _resolve(kind.kernel)
    with compiling_for(target):
        arguments = {name: _decode(value) for name, value in kind.arguments.items()}
        options = dict(kind.options)
        if kind.kernel.startswith("llmfast_kernels."):  # our launchers ask for threads, those of others for warps
            from llmfast_kernels.launch import warps

            # Launches are recorded where a warp has 32 threads.
            options["num_warps"] = warps(32 * options["num_warps"])
        return kernel.run(grid=(1,), warmup=True, **arguments, **options)


def _resolve(name: str) -> Any:
    """Find the @triton.jit function "package.module:name" below its heuristics and autotuners."""
    module, attribute = name.split(":")
    function = getattr(importlib.import_module(module), attribute)
    while hasattr(function.fn, "fn"):
        function = function.fn
    return function


class _Pointer:
    """Stand-in for a tensor."""

    def __init__(self, dtype: str, aligned: bool, below_2_gib: bool) -> None:
        import torch

        self.dtype = getattr(torch, dtype)
        # Any values on the right side of 16-byte alignment and of 2 GiB do.
        self._address = 0 if aligned else self.dtype.itemsize
        self._bytes = 2**30 if below_2_gib else 2**40

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:  # used by Triton's AMD backend
        return self._bytes


def _decode(value: Any) -> Any:
    """Return an argument that Triton treats like the recorded one."""
    import triton.language as tl

    if isinstance(value, list):
        return tuple(map(_decode, value))
    if not isinstance(value, dict):
        return value
    if "dtype" in value:
        return _Pointer(**value)
    if "record" in value:
        return namedtuple(value["name"], value["record"])(*map(_decode, value["record"].values()))
    if "triton_type" in value:
        return tl.dtype(value["triton_type"])
    if "function" in value:
        return _resolve(value["function"])
    if "tuple" in value:
        return tuple(map(_decode, value["tuple"]))
    return _decode(value["constant"])


if __name__ == "__main__":
    _work(*sys.argv[1:])
