"""Times of every kernel with each of its tiles: what is needed to change a default, see `docs/gpu.md`.

Without a GPU, a tile is chosen by reading machine code. Here each alternative is timed, in the same launch of the same
kernel. One whose registers spill is timed too, but is never called the fastest.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple
from unittest import mock

import torch

from llmfast.checkup import clock, speed
from llmfast.checkup.record import Case, Figures, Finding, Size
from llmfast.checkup.speed import Kernel

# Below this gain over the default, the default stays: two runs of the same tile differ by as much.
WORTH = 0.02
SAMPLES = 3


class Choice(NamedTuple):
    """A choice of tiles in the source of the kernels."""

    module: str  # of llmfast_kernels
    name: str
    kernel: str  # that the choice is for

    @property
    def place(self) -> str:
        return f"kernels/llmfast_kernels/{self.module.replace('.', '/')}.py: {self.name}"

    def found(self, name: str) -> Any:
        return getattr(import_module(f"llmfast_kernels.{self.module}"), name)


FEW_TERMS = Choice("cross_entropy", "FEW_TERMS", "cross_entropy_kernel")
MANY_TERMS = Choice("cross_entropy", "MANY_TERMS", "cross_entropy_kernel")
BACKWARD = Choice("cross_entropy", "BACKWARD", "cross_entropy_backward_kernel")
UPDATE = Choice("optimizer.step", "TILE", "update_kernel")
PAIRED = Choice("optimizer.step", "PAIRED_TILE", "update_kernel")
NORM = Choice("optimizer.norm", "TILE", "norm_kernel")
SCALE = Choice("scale", "TILE", "scale_kernel")
CHOICES = (FEW_TERMS, MANY_TERMS, BACKWARD, UPDATE, PAIRED, NORM, SCALE)


def cases(device: torch.device, size: Size) -> list[Case]:
    """Return the cases of this section."""
    full = size == "full"
    rows = {V: 4096 for V in (128256, 32768, 256000)} if full else {2100: 2}
    numel = 1 << 28 if full else 9000
    eight_bit = {"master_weights": "split8", "state_dtype": "8bit"}
    made: list[tuple[str, Choice, Callable[[], Kernel]]] = []
    for V, N in rows.items():
        for what in speed.ROW_KERNELS:
            choice = BACKWARD if what == "gradient later" else MANY_TERMS if "softcap" in what else FEW_TERMS
            made.append((f"{what}, N={N} V={V}", choice, partial(speed.row_kernel, what, N, V)))
    made += [
        ("AdamW, float32", UPDATE, partial(adamw, numel, torch.float32)),
        ("AdamW, bfloat16", UPDATE, partial(adamw, numel, torch.bfloat16)),
        ("AdamW, split8, 8-bit states", PAIRED, partial(adamw, numel, torch.bfloat16, **eight_bit)),
        ("AdamW, 8-bit states", PAIRED, partial(adamw, numel, torch.bfloat16, state_dtype="8bit")),
        ("norm, float32", NORM, partial(norm, numel, torch.float32)),
        ("norm, bfloat16", NORM, partial(norm, numel, torch.bfloat16)),
        ("scale and cast", SCALE, partial(speed.scale_and_cast, numel)),
    ]
    return [Case(f"tiles of {what}", partial(tiles, choice, kernel), 8.0, 12 << 30) for what, choice, kernel in made]


def adamw(numel: int, dtype: torch.dtype, **options: Any) -> Kernel:
    """Return a step of AdamW over one parameter, with the bytes of plain AdamW or of the options."""
    from llmfast.optim import FusedAdamW

    p = torch.zeros(numel, dtype=dtype, device=clock.device(), requires_grad=True)
    p.grad = torch.full_like(p, 1e-3)
    optimizer = FusedAdamW([p], **options)
    optimizer.step()
    states = sum(t.nbytes for t in optimizer.state[p].values() if torch.is_tensor(t) and t.dim() > 0)
    return Kernel(optimizer.step, 3 * p.nbytes + 2 * states)


def norm(numel: int, dtype: torch.dtype) -> Kernel:
    """Return a measurement of one gradient's norm, as it precedes a step that clips."""
    from llmfast.optim import FusedSGD

    p = torch.zeros(numel, dtype=dtype, device=clock.device(), requires_grad=True)
    p.grad = torch.zeros_like(p)
    optimizer = FusedSGD([p], max_grad_norm=1.0)
    with torch.no_grad():
        plan, gradients = optimizer.make_plan()
        optimizer.follow(plan, gradients)  # which gives the table the gradient's address
    (table,) = plan.tables
    return Kernel(lambda: (table.sum_squares(), p), p.nbytes)  # p keeps the gradient


def tiles(choice: Choice, make: Callable[[], Kernel]) -> Iterator[Finding]:
    """Time a launch with each tile, then say which is the fastest."""
    tuned = choice.found(choice.name)
    kernel = make()
    seconds: dict[Any, float] = {}
    for tile in tuned.tiles:
        with tuned.trying(tile), compiled(choice.found(choice.kernel)) as binaries:
            kernel.run()
            taken = sorted(clock.kernel_seconds(kernel.run) for _ in range(SAMPLES))
        figures: Figures = {"choice": choice.place, **tile._asdict(), "default": tile == tuned.tiles[0]}
        figures |= {"seconds": taken[SAMPLES // 2], "least": taken[0], "most": taken[-1]}
        figures["share_of_copy"] = kernel.least_bytes / figures["seconds"] / speed.copy_bandwidth()
        figures |= machine(binaries)
        if not figures.get("spills"):
            seconds[tile] = figures["seconds"]
        yield Finding(f"{tile.elements} elements x {tile.threads} threads", None, figures)
    yield fastest(choice, tuned.tiles[0], seconds)


def fastest(choice: Choice, default: Any, seconds: dict[Any, float]) -> Finding:
    """Say which tile is the fastest; the default is where no other is faster by more than `WORTH`."""
    best = min(seconds, key=lambda tile: seconds[tile], default=default)
    gain = seconds[default] / seconds[best] - 1.0 if default in seconds else None
    if gain is not None and gain < WORTH:
        best = default
    figures: Figures = {"choice": choice.place, "default": list(default), "fastest": list(best), "gain": gain}
    return Finding("fastest", None, figures)


@contextmanager
def compiled(kernel: Any) -> Iterator[list[Any]]:
    """Collect the binaries that a kernel launches inside the context; none in Triton's interpreter."""
    found: list[Any] = []
    run = kernel.run

    def recording(*args: Any, **options: Any) -> Any:
        binary = run(*args, **options)
        found.append(binary)
        return binary

    with mock.patch.object(kernel, "run", recording):
        yield found


def machine(binaries: list[Any]) -> Figures:
    """Return the registers of the last binary, and how many programs they allow on the GPU at a time."""
    registers = getattr(binaries[-1], "n_regs", None) if binaries else None
    if registers is None:
        return {}
    binary = binaries[-1]
    figures: Figures = {"registers": registers, "spills": binary.n_spills}
    gpu = torch.cuda.get_device_properties(clock.device())
    if torch.version.hip is None and hasattr(gpu, "regs_per_multiprocessor"):
        threads = 32 * binary.metadata.num_warps
        by_registers = gpu.regs_per_multiprocessor // (max(1, registers) * threads)
        per_processor = min(gpu.max_threads_per_multi_processor // threads, by_registers)
        figures["programs_in_flight"] = per_processor * gpu.multi_processor_count
        figures["l2_bytes"] = gpu.L2_cache_size
    return figures
