"""Times of every kernel as a share of the measured copy bandwidth, and of whole operations next to other libraries'.

Modelled times stand next to measured ones, with their ratio. A time says nothing about right or wrong, so most findings
here have no verdict; what is slower than `EXPECTED` allows is marked.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmfast._gpus import H100, named
from llmfast.checkup import clock
from llmfast.checkup.implementations import implementations
from llmfast.checkup.record import Case, Figures, Finding, Size
from llmfast.checkup.shapes import MODELS, PARAMETERS
from llmfast.losses import LinearCrossEntropyPlan

# The share of the copy bandwidth below which a kernel is marked as slow. Large sizes only: small ones are latency.
EXPECTED = 0.5
ROUNDS = 5
AT_ONCE = 12  # values per parameter: itself, its gradient, and two states each of five libraries' optimizers


class Kernel(NamedTuple):
    """A launch to time, and the bytes that must move if everything is read and written once."""

    run: Callable[[], object]
    least_bytes: int


def cases(device: torch.device, size: Size) -> list[Case]:
    """Return the cases of this section."""
    full = size == "full"
    made = [Case("row kernel, Llama-3 N=4096", partial(row_kernels, 4096, 128256, full), 8.0, 8 << 30)] if full else []
    linear_models = MODELS if full else {"tiny": (16, 520)}
    N = 8192 if full else 64
    made += [
        Case(f"linear_cross_entropy, {model} N={N}", partial(linear, model, N, D, V), 15.0, 40 << 30)
        for model, (D, V) in linear_models.items()
    ]
    made += [
        Case(
            f"AdamW, {name}, {str(dtype).removeprefix('torch.')}",
            partial(adamw, shapes, dtype),
            8.0,
            AT_ONCE * sum(map(math.prod, shapes)) * dtype.itemsize + (1 << 30),
        )
        for name, shapes in (
            {name: PARAMETERS[name] for name in ("124M", "1B")} if full else {"tiny": [(33, 7), (300,)]}
        ).items()
        for dtype in (torch.bfloat16, torch.float32)
    ]
    made.append(Case("host", partial(host, 300 if full else 3, 50 if full else 2), 5.0))
    made.append(Case("AdamW, formats", partial(formats, PARAMETERS["124M"] if full else [(33, 7)]), 10.0, 8 << 30))
    rows = [(N, V) for V in (32768, 128256, 256000) for N in (256, 4096, 16384)] if full else [(4, 520)]
    made += [Case(f"row kernel, N={N} V={V}", partial(row_kernels, N, V, full), 6.0, 24 << 30) for N, V in rows]
    if full:
        made.append(Case("AdamW, 8B, bfloat16", partial(one_optimizer, PARAMETERS["8B"]), 8.0, 60 << 30))
    return made


@cache
def copy_bandwidth() -> float:
    """Return the copy bandwidth, measured once per process."""
    return clock.copy_bandwidth()


def kernel_finding(what: str, kernel: Kernel, *, judged: bool) -> Finding:
    """Time a kernel."""
    seconds = clock.kernel_seconds(kernel.run)
    share = kernel.least_bytes / seconds / copy_bandwidth()
    return Finding(
        what,
        share >= EXPECTED if judged else None,
        {"seconds": seconds, "least_bytes": kernel.least_bytes, "share_of_copy": share},
    )


def row_kernel(what: str, N: int, V: int) -> Kernel:
    """Return a launch of the row kernel.

    Args:
        what: "loss", "loss and gradient", "gradient later", or either of the first two with softcap before it.
        N, V: of the logits, bfloat16.
    """
    from llmfast_kernels import cross_entropy as kernels
    from llmfast_kernels.terms import Targets, Terms, Upstream

    device, width = clock.device(), -(-V // 64) * 64
    logits = torch.randn(N, width, dtype=torch.float32, device=device).to(torch.bfloat16)
    d_logits = torch.empty_like(logits)
    classes = torch.randint(0, V, (N, 1), dtype=torch.int64, device=device)
    targets, terms = Targets(classes), Terms(V, softcap=30.0 if what.startswith("softcap") else None)
    rows = kernels.cross_entropy(logits, targets, terms, V=V)
    upstream = Upstream(rows.loss)
    if what == "gradient later":
        return Kernel(
            lambda: kernels.cross_entropy_backward(
                logits, targets, terms, rows.softmax, upstream, V=V, d_logits=d_logits
            ),
            4 * N * width,
        )
    if what.endswith("gradient"):
        return Kernel(lambda: kernels.cross_entropy(logits, targets, terms, V=V, d_logits=d_logits), 4 * N * width)
    return Kernel(lambda: kernels.cross_entropy(logits, targets, terms, V=V), 2 * N * width)


ROW_KERNELS = ("loss", "loss and gradient", "gradient later", "softcap, loss", "softcap, loss and gradient")


def row_kernels(N: int, V: int, judged: bool) -> Iterator[Finding]:
    """Time the row kernel's variants."""
    for what in ROW_KERNELS:
        yield kernel_finding(what, row_kernel(what, N, V), judged=judged and N >= 4096)


def adamw_step(numel: int, dtype: torch.dtype) -> Kernel:
    """Return a step of AdamW over one parameter."""
    from llmfast.optim import FusedAdamW

    p = torch.randn(numel, dtype=torch.float32, device=clock.device()).to(dtype).requires_grad_()
    p.grad = torch.randn_like(p)
    optimizer = FusedAdamW([p])
    optimizer.step()
    return Kernel(optimizer.step, 7 * numel * dtype.itemsize)


def scale_and_cast(numel: int) -> Kernel:
    """Return a launch of the kernel that scales a float32 buffer into a bfloat16 one."""
    from llmfast_kernels.scale import scale

    device = clock.device()
    x = torch.randn(numel, dtype=torch.float32, device=device)
    out = torch.empty(numel, dtype=torch.bfloat16, device=device)
    factor = torch.full((), 0.5, dtype=torch.float32, device=device)
    return Kernel(lambda: scale(x, factor, out=out), 6 * numel)


def race(runs: dict[str, Callable[[], object]]) -> dict[str, clock.Timing]:
    """Time ways in turn, a few rounds; each has run before."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            times[name].append(clock.timed(run))
    return clock.compare(times)


def linear(model: str, N: int, D: int, V: int) -> Iterator[Finding]:
    """Time the linear loss next to its matrix products, the model, and every other way there is."""
    device = clock.device()
    hidden = torch.randn(N, D, dtype=torch.float32, device=device).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(V, D, dtype=torch.float32, device=device) * D**-0.5).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, V, (N,), dtype=torch.int64, device=device)
    runs: dict[str, Callable[[], object]] = {}
    for name, way in implementations("linear_cross_entropy", "gpu").items():
        if "compiled" in name:  # half a minute of compiling
            continue

        def run(way: Any = way.run) -> None:
            hidden.grad = weight.grad = None
            way(hidden, weight, targets).backward()

        try:
            run()
            runs[name] = run
        except Exception as e:  # other libraries' ways: a failure of theirs is a result
            yield Finding(name, False if name == "llmfast" else None, {"error": f"{type(e).__name__}: {e}"[:500]})
    products = clock.linear_layer_seconds(hidden.detach(), weight.detach())
    gpu = named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    modelled = LinearCrossEntropyPlan.make(N, D, V, device=device, gpu=gpu or H100).seconds
    for name, timing in race(runs).items():
        figures: Figures = {"seconds": timing.seconds, "ours_to_this": timing.ratio, "spread": timing.spread}
        figures |= {"matrix_products_seconds": products, "times_matrix_products": timing.seconds / products}
        if name == "llmfast":
            figures |= {"modelled_seconds": modelled, "measured_to_modelled": timing.seconds / modelled}
            figures |= {"modelled_on": (gpu or H100).name}
        yield Finding(name, None, figures)


def _parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    made = [torch.zeros(s, dtype=dtype, device=clock.device(), requires_grad=True) for s in shapes]
    for p in made:
        p.grad = torch.full_like(p, 1e-3)
    return made


def adamw(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Iterator[Finding]:
    """Time a step next to every other library's."""
    yield from _optimizers("adamw", shapes, dtype)


def formats(shapes: list[tuple[int, ...]]) -> Iterator[Finding]:
    """Time a step with each way to keep bfloat16 parameters."""
    yield from _optimizers("adamw, bfloat16 with more bits", shapes, torch.bfloat16)


def _optimizers(operation: str, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> Iterator[Finding]:
    params = _parameters(shapes, dtype)
    numel = sum(p.numel() for p in params)
    runs: dict[str, Callable[[], object]] = {}
    for name, way in implementations(operation, "gpu", dtype).items():
        if "one by one" in name:
            continue
        try:
            optimizer = way.run(params)
            optimizer.step()
            runs[name] = optimizer.step
        except Exception as e:
            ours = name.startswith("llmfast")
            yield Finding(name, False if ours else None, {"error": f"{type(e).__name__}: {e}"[:500]})
    floor = 7 * numel * dtype.itemsize / copy_bandwidth()
    for name, timing in race(runs).items():
        figures = {"seconds": timing.seconds, "ours_to_this": timing.ratio, "spread": timing.spread}
        yield Finding(name, None, figures | {"share_of_copy_of_7_values": floor / timing.seconds})


def one_optimizer(shapes: list[tuple[int, ...]]) -> Iterator[Finding]:
    """Time a step of ours at a size that leaves no room for others."""
    from llmfast.optim import FusedAdamW

    params = _parameters(shapes, torch.bfloat16)
    optimizer = FusedAdamW(params)
    optimizer.step()
    least = 7 * 2 * sum(p.numel() for p in params)
    yield kernel_finding("step", Kernel(optimizer.step, least), judged=True)


def host(tensors: int, calls: int) -> Iterator[Finding]:
    """Measure what a call costs the host: the device's work is small."""
    from llmfast.losses import cross_entropy, linear_cross_entropy
    from llmfast.optim import FusedAdamW

    device = clock.device()
    x = torch.zeros(8, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    w = torch.zeros(64, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    y = torch.zeros(8, dtype=torch.int64, device=device)
    params = _parameters([(8, 8)] * tensors, torch.float32)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "cross_entropy": (lambda: cross_entropy(x, y), lambda: torch.nn.functional.cross_entropy(x, y)),
        "linear_cross_entropy": (
            lambda: linear_cross_entropy(x, w, y),
            lambda: torch.nn.functional.cross_entropy(x @ w.T, y),
        ),
        f"AdamW of {tensors} tensors": (FusedAdamW(params).step, torch.optim.AdamW(params, fused=True).step),
    }
    for what, (ours, theirs) in pairs.items():
        for run in (ours, theirs):
            run()
        a, b = clock.host_seconds(ours, calls), clock.host_seconds(theirs, calls)
        yield Finding(what, None, {"seconds": a, "torch_seconds": b, "ours_to_torch": a / b})
