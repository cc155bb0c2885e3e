"""Compilation for a GPU that is not here: Triton is told of one, and launches only compile."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast
from unittest import mock

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class CompileOnlyDriver:
    """Driver that answers Triton's queries during compilation.

    Args:
        target: A GPU, such as "sm_90" or "gfx942".
        folder: Where Triton keeps its binaries, None for its own folder.
    """

    def __init__(self, target: str, folder: str | None = None) -> None:
        nvidia = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
        # Triton remembers the kernels of a device: those of another target or folder must be compiled again.
        self.device = f"compile only: {target} {folder}"

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return self.device

    def get_current_stream(self, device: object = None) -> int:
        return 0


_driver = cache(CompileOnlyDriver)


@contextmanager
def compiling_for(target: str, folder: str | None = None) -> Iterator[None]:
    """Let Triton believe that the current GPU is a `target`.

    Raises:
        RuntimeError: This process interprets kernels.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("a process with TRITON_INTERPRET=1 cannot compile")
    before = driver._active
    driver.set_active(cast(Any, _driver(target, folder)))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def compiled_ahead(target: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Compile what is launched inside the context into `folder`, and launch nothing.

    Yields a dict that fills with the binaries, by their hash.
    """
    made: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary: Any = run(self, *args, grid=grid, warmup=True, **options)
        made[binary.hash] = binary
        return binary

    with compiling_for(target, str(folder)), knobs.cache.scope(), mock.patch.object(JITFunction, "run", compile_only):
        knobs.cache.dir = str(folder)
        yield made
