"""Checks of what only a GPU has: graphs, streams, a compiler for it, memory that moves, several devices.

Each case does something twice, once in the plainest way and once in the way that is checked. The results must have
equal bits unless the case allows a tolerance.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmfast._checks import worst
from llmfast.checkup import several
from llmfast.checkup.comparing import Inputs
from llmfast.checkup.record import Case, Finding, Size
from llmfast.losses import cross_entropy, linear_cross_entropy, mtp_cross_entropy
from llmfast.optim import (
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedLion,
    FusedRMSprop,
    FusedSGD,
    optimizer_in_backward,
)

OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (FusedAdamW, {}),
    (FusedAdamW, {"max_grad_norm": 0.5}),
    (FusedAdamW, {"master_weights": "split8", "state_dtype": "8bit"}),
    (FusedAdam, {"amsgrad": True}),
    (FusedSGD, {"momentum": 0.9}),
    (FusedRMSprop, {}),
    (FusedAdagrad, {}),
    (FusedLion, {}),
]


def cases(device: torch.device, size: Size) -> list[Case]:
    """Return the cases of this section."""
    shapes = (256, 64, 5003) if size == "full" else (6, 16, 259)
    losses = ("cross_entropy", "linear_cross_entropy", "mtp_cross_entropy")
    compiled = losses[:2] if size == "full" else ()  # the compiler makes code for real devices only
    return [
        Case("no step waits for the device", partial(no_waits, device, shapes), 10.0),
        *(Case(f"graph of {_named(cls, o)}", partial(step_in_graph, cls, o, device), 6.0) for cls, o in OPTIMIZERS),
        *(Case(f"graph of {name}", partial(loss_in_graph, name, device, shapes), 6.0) for name in losses),
        *(Case(f"torch.compile of {name}", partial(compiled_loss, name, device, shapes), 30.0) for name in compiled),
        Case("GradScaler", partial(scaled, device), 6.0),
        Case("CPU and GPU parameters in one optimizer, clipped", partial(mixed_devices, device), 6.0),
        Case("step in backward", partial(in_backward, device), 6.0),
        Case("gradients freed and made again", partial(moving_gradients, device), 4.0),
        Case("a learning rate on the device", partial(lr_on_device, device), 4.0),
        Case("another default device", partial(default_device, device, shapes), 6.0),
        Case("two streams", partial(two_streams, device, shapes), 6.0),
        Case("several GPUs", partial(several.findings, device), 60.0),
    ]


def _named(cls: Any, options: dict[str, Any]) -> str:
    return f"{cls.__name__}({', '.join(f'{name}={value}' for name, value in options.items())})"


def equal(what: str, ours: list[Tensor], wanted: list[Tensor]) -> Finding:
    """Say how many elements of ours are not what is wanted."""
    pairs = [(a.detach().cpu(), b.detach().cpu()) for a, b in zip(ours, wanted, strict=True)]
    wrong = sum(int((a != b).sum()) for a, b in pairs)
    largest = worst(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    return Finding(what, wrong == 0, {"elements_that_differ": wrong, "largest_difference": largest})


def close(what: str, ours: list[Tensor], wanted: list[Tensor], tolerance: float) -> Finding:
    """Say how far ours is from what is wanted, as a share of its size."""
    error = worst(
        float((a.detach().cpu().double() - b.detach().cpu().double()).norm() / b.detach().cpu().double().norm())
        for a, b in zip(ours, wanted, strict=True)
    )
    return Finding(what, error <= tolerance, {"relative_error": error, "allowed": tolerance})


# Parameters and gradients.


def parameters(device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Make a few parameters of odd sizes."""
    inputs = Inputs(device, seed)
    return [inputs.normal(*shape, dtype=dtype).requires_grad_() for shape in ((33, 7), (300,), (64, 65))]


def set_gradients(params: list[Tensor], step: int) -> None:
    """Give the parameters the gradients of a step, in the memory of those they have, if any."""
    for i, p in enumerate(params):
        g = Inputs(torch.device("cpu"), 100 * step + i).normal(*p.shape, dtype=p.dtype).to(p.device)
        if p.grad is None:
            p.grad = g
        else:
            p.grad.copy_(g)


def stepped(cls: Any, options: dict[str, Any], device: torch.device, steps: int, **more: Any) -> list[Tensor]:
    """Return parameters after a few plain steps."""
    params = parameters(device, **more)
    optimizer = cls(params, lr=1e-2, **options)
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return params


def loss_of(
    name: str, device: torch.device, shapes: tuple[int, int, int]
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a loss as a function of tensors, and the tensors."""
    N, D, V = shapes
    inputs = Inputs(device)
    targets = inputs.classes(V, N)
    weight = inputs.normal(V, D, dtype=torch.bfloat16, scale=0.3)
    if name == "cross_entropy":
        return lambda x: cross_entropy(x, targets), [inputs.normal(N, V, dtype=torch.bfloat16)]
    if name == "linear_cross_entropy":
        hidden = inputs.normal(N, D, dtype=torch.bfloat16)
        return lambda h, w: linear_cross_entropy(h, w, targets, memory_budget=N * V), [hidden, weight]
    hidden = inputs.normal(2, N, D, dtype=torch.bfloat16)
    return lambda h, w: mtp_cross_entropy(h, w, targets), [hidden, weight]


def with_gradients(run: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """Return a loss and its gradients."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = run(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


# Cases.


class Graph:
    """Work that was captured once and can be replayed."""

    def __init__(self, work: Callable[[], Any], warm_up: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            warm_up()
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.made = work()

    def replay(self) -> None:
        """Do the work again, on what is now in the memory that it reads."""
        self._graph.replay()


def step_in_graph(cls: Any, options: dict[str, Any], device: torch.device) -> Iterator[Finding]:
    """Capture a step; its replays, and a step outside of the graph after them, must equal plain steps."""
    dtype = torch.bfloat16 if "master_weights" in options else torch.float32
    wanted = stepped(cls, options, device, 4, dtype=dtype)
    params = parameters(device, dtype)
    optimizer = cls(params, lr=1e-2, **options)
    set_gradients(params, 0)
    graph = Graph(optimizer.step, optimizer.step)  # the warm-up is step 0; a capture does not step
    for step in (1, 2):
        set_gradients(params, step)
        graph.replay()
    set_gradients(params, 3)
    optimizer.step()
    yield equal("parameters", params, wanted)


def loss_in_graph(name: str, device: torch.device, shapes: tuple[int, int, int]) -> Iterator[Finding]:
    """Capture a loss with its backward; replay it on other numbers."""
    run, tensors = loss_of(name, device, shapes)
    others = [t * 0.5 for t in tensors]
    wanted = with_gradients(run, others)
    static = [t.clone() for t in tensors]
    graph = Graph(lambda: with_gradients(run, static), lambda: with_gradients(run, static))
    for t, other in zip(static, others):
        t.copy_(other)
    graph.replay()
    yield equal("loss and gradients", graph.made, wanted)


def compiled_loss(name: str, device: torch.device, shapes: tuple[int, int, int]) -> Iterator[Finding]:
    """Compile a loss into one graph."""
    run, tensors = loss_of(name, device, shapes)
    compiled = torch.compile(run, fullgraph=True)
    yield close("loss and gradients", with_gradients(compiled, tensors), with_gradients(run, tensors), 1e-3)


@contextmanager
def _errors_where_the_host_waits() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def no_waits(device: torch.device, shapes: tuple[int, int, int]) -> Iterator[Finding]:
    """Run losses and steps where torch raises if the host waits for the device."""
    for name in ("cross_entropy", "linear_cross_entropy", "mtp_cross_entropy"):
        run, tensors = loss_of(name, device, shapes)
        with_gradients(run, tensors)  # compiles
        yield _does_not_raise(name, partial(with_gradients, run, tensors))
    for cls, options in OPTIMIZERS:
        params = parameters(device, torch.bfloat16 if "master_weights" in options else torch.float32)
        optimizer = cls(params, lr=1e-2, **options)
        for step in range(2):
            set_gradients(params, step)
            optimizer.step()
        yield _does_not_raise(_named(cls, options), optimizer.step)


def _does_not_raise(what: str, run: Callable[[], Any]) -> Finding:
    try:
        with _errors_where_the_host_waits():
            run()
    except RuntimeError as e:
        return Finding(what, False, {"error": str(e)[:500]})
    return Finding(what, True, {})


def scaled(device: torch.device) -> Iterator[Finding]:
    """Step with scaled gradients, of which one step has an infinite one and must change nothing."""
    params, wanted = parameters(device), parameters(device)
    optimizer, plain = FusedAdamW(params, lr=1e-2), FusedAdamW(wanted, lr=1e-2)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    for step in range(4):
        broken = step == 2
        set_gradients(params, step)
        for p in params:
            assert p.grad is not None
            p.grad.mul_(float("inf") if broken else scaler.get_scale())
        scaler.scale(torch.ones((), dtype=torch.float32, device=device))  # as a loss that was scaled
        scaler.step(optimizer)
        scaler.update()
        if not broken:
            set_gradients(wanted, step)
            plain.step()
    yield close("parameters", params, wanted, 1e-6)
    yield Finding("scale after an overflow", scaler.get_scale() == 512.0, {"scale": scaler.get_scale()})


def mixed_devices(device: torch.device) -> Iterator[Finding]:
    """Clip gradients on two devices by their common norm, whose size SGD's steps show and Adam's do not."""
    options: dict[str, Any] = {"momentum": 0.9, "max_grad_norm": 0.5}
    wanted = stepped(FusedSGD, options, torch.device("cpu"), 3)
    params = parameters(torch.device("cpu"))
    params[1:] = [p.detach().to(device).requires_grad_() for p in params[1:]]
    optimizer = FusedSGD(params, lr=1e-2, **options)
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    yield close("parameters", params, wanted, 1e-5)


def in_backward(device: torch.device) -> Iterator[Finding]:
    """Step inside of backward."""

    def trained(ours: bool) -> list[Tensor]:
        inputs = Inputs(device)
        model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8)).to(device)
        for p in model.parameters():
            p.data = inputs.normal(*p.shape, scale=0.2)
        optimizer = FusedAdamW(model.parameters(), lr=1e-2)
        if ours:
            optimizer_in_backward(model, optimizer)
        for _ in range(3):
            model(inputs.normal(4, 16)).square().mean().backward()
            if not ours:
                optimizer.step()
                optimizer.zero_grad()
        return list(model.parameters())

    yield equal("parameters", trained(True), trained(False))


def moving_gradients(device: torch.device) -> Iterator[Finding]:
    """Free gradients between steps, so that the next ones lie elsewhere."""
    wanted = stepped(FusedAdamW, {}, device, 4)
    params = parameters(device)
    optimizer = FusedAdamW(params, lr=1e-2)
    taken = []
    for step in range(4):
        optimizer.zero_grad(set_to_none=True)
        taken.append(torch.full((1000 * step + 1,), float("nan"), dtype=torch.float32, device=device))
        set_gradients(params, step)
        optimizer.step()
    yield equal("parameters", params, wanted)


def lr_on_device(device: torch.device) -> Iterator[Finding]:
    """Read the learning rate from the device."""
    wanted = stepped(FusedAdamW, {}, device, 3)
    params = parameters(device)
    optimizer = FusedAdamW(params, lr=torch.tensor(1e-2, dtype=torch.float64, device=device))
    for step in range(3):
        set_gradients(params, step)
        optimizer.step()
    yield equal("parameters", params, wanted)


def default_device(device: torch.device, shapes: tuple[int, int, int]) -> Iterator[Finding]:
    """Run a loss and steps under another default device; results must stay the same."""
    run, tensors = loss_of("linear_cross_entropy", device, shapes)
    wanted, steps = with_gradients(run, tensors), stepped(FusedAdamW, {"max_grad_norm": 0.5}, device, 3)
    torch.set_default_device(device)
    try:
        ours, own_steps = with_gradients(run, tensors), stepped(FusedAdamW, {"max_grad_norm": 0.5}, device, 3)
    finally:
        torch.set_default_device(None)
    yield equal("loss and gradients", ours, wanted)
    yield equal("parameters", own_steps, steps)


def two_streams(device: torch.device, shapes: tuple[int, int, int]) -> Iterator[Finding]:
    """Run a loss and an optimizer on two streams at once, again and again."""
    run, tensors = loss_of("linear_cross_entropy", device, shapes)
    wanted, steps = with_gradients(run, tensors), stepped(FusedAdamW, {}, device, 3)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    main = torch.cuda.current_stream()
    wrong: list[Finding] = []
    for _ in range(10):
        for stream in streams:
            stream.wait_stream(main)
        with torch.cuda.stream(streams[0]):
            ours = with_gradients(run, tensors)
        with torch.cuda.stream(streams[1]):
            own_steps = stepped(FusedAdamW, {}, device, 3)
        for stream in streams:
            main.wait_stream(stream)
        found = [equal("loss and gradients", ours, wanted), equal("parameters", own_steps, steps)]
        wrong += [finding for finding in found if not finding.ok]
    yield wrong[0] if wrong else Finding("ten times", True, {})
