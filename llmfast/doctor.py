"""`llmfast doctor`: what is installed, which path each operation takes here and why, and whether results are right.

Bug reports should begin with its output.
"""

import platform
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

import llmfast
from llmfast._checks import worst
from llmfast._dispatch import KERNEL_DTYPES, use_kernels
from llmfast.losses import cross_entropy, linear_cross_entropy, mtp_cross_entropy, reference
from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedRMSprop, FusedSGD
from llmfast.optim import reference as optim_reference

# Libraries that llmfast uses, and the extra that installs each.
LIBRARIES = {
    "torch": "",
    "triton": "",
    "numpy": "",
    "tokenizers": "data",
    "safetensors": "train",
    "rich": "train",
    "matplotlib": "train",
    "datatrove": "clean",
    "transformers": "hf",
    "accelerate": "hf",
    "lightning": "lightning",
}
# Largest relative error of a result: a few roundings, and those of their sum.
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def report(say: Callable[[str], None] = print) -> bool:
    """Print the report; return True if every check has passed."""
    say(f"llmfast {llmfast.__version__}, Python {platform.python_version()}, {platform.platform()}\n")
    for name, extra in LIBRARIES.items():
        say(f"  {name:13} {_version(name, extra)}")
    say("")
    devices = _devices()
    for device in devices:
        say(f"{device}: {_describe(device)}")
        for dtype in (*KERNEL_DTYPES, torch.float64):
            say(f"  {str(dtype).removeprefix('torch.'):9} {_path(torch.empty(1, dtype=dtype, device=device))}")
    say("\nagainst the reference, in float64:")
    good = True
    for device in devices:
        for dtype in KERNEL_DTYPES:
            for what, error in _checks(device, dtype):
                right = error <= ALLOWED[dtype]  # a NaN is not
                good &= right
                say(f"  {'ok   ' if right else 'WRONG'} {device}, {what}: off by {error:.1e}")
    say("\nall is well" if good else "\nsomething is wrong here: please report it, with all of the above")
    return good


def _version(name: str, extra: str) -> str:
    if find_spec(name) is None:
        return f"not installed: pip install 'llmfast-torch[{extra}]'" if extra else "not installed"
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "installed, of unknown version"


def _devices() -> list[torch.device]:
    found = [torch.device("cpu")]
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        if module.is_available():
            found += [torch.device(kind, i) for i in range(module.device_count())]
    return found


def _describe(device: torch.device) -> str:
    if device.type == "cpu":
        return f"{torch.get_num_threads()} threads"
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    properties = torch.cuda.get_device_properties(device)
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}, {runtime}"


def _path(t: Tensor) -> str:
    if use_kernels(t):
        return "Triton kernels"
    if t.device.type == "cpu":
        return "plain torch: this is a CPU"
    if t.dtype not in KERNEL_DTYPES:
        return "plain torch: the kernels compute in float32"
    return "plain torch: Triton is not installed"


def _checks(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """Yield name and error of each operation's results: loss and gradients, or the parameter after a few steps."""
    name = str(dtype).removeprefix("torch.")
    generator = torch.Generator("cpu").manual_seed(0)
    N, D, V = 64, 32, 1000

    def random(*shape: int) -> Tensor:
        drawn: Tensor = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return drawn.to(device, dtype).requires_grad_()

    logits, hidden, weight, heads = random(N, V), random(N, D), random(V, D), random(2, N, D)
    targets = torch.randint(0, V, (N,), generator=generator, dtype=torch.int64, device="cpu").to(device)
    targets[3] = -100
    options: dict[str, Any] = {"label_smoothing": 0.1, "softcap": 20.0}

    def of_heads(h: Tensor, w: Tensor) -> Tensor:
        further = torch.cat([targets[1:], targets.new_full((1,), -100)])
        first, second = (reference.linear_cross_entropy(h[k], w, y) for k, y in enumerate((targets, further)))
        assert isinstance(first, Tensor) and isinstance(second, Tensor)
        return first + second

    yield (
        f"cross_entropy, {name}",
        _loss_error(
            lambda x: cross_entropy(x, targets, **options),
            lambda x: reference.cross_entropy(x, targets, **options),
            logits,
        ),
    )
    yield (
        f"linear_cross_entropy, {name}",
        _loss_error(
            lambda h, w: linear_cross_entropy(h, w, targets, **options),
            lambda h, w: reference.linear_cross_entropy(h, w, targets, **options),
            hidden,
            weight,
        ),
    )
    yield (
        f"mtp_cross_entropy, {name}",
        _loss_error(lambda h, w: mtp_cross_entropy(h, w, targets), of_heads, heads, weight),
    )
    pairs: list[tuple[Any, Any, dict[str, Any]]] = [
        (FusedAdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
        (FusedAdam, torch.optim.Adam, {"weight_decay": 0.1}),
        (FusedSGD, torch.optim.SGD, {"momentum": 0.9}),
        (FusedRMSprop, torch.optim.RMSprop, {"momentum": 0.9}),
        (FusedAdagrad, torch.optim.Adagrad, {}),
    ]
    for ours, theirs, settings in pairs:
        p = random(33, 7).detach()
        truth = p.double()
        optimizers = ours([p], lr=1e-2, **settings), theirs([truth], lr=1e-2, **settings)
        for _ in range(3):
            p.grad = random(33, 7).detach()
            truth.grad = p.grad.double()
            for optimizer in optimizers:
                optimizer.step()
        yield f"{ours.__name__}, {name}", _relative(p, truth)
    p = random(33, 7).detach()
    truth, average = p.double(), torch.zeros_like(p, dtype=torch.float64)
    lion = FusedLion([p], lr=1e-2)
    for step in range(3):
        p.grad = random(33, 7).detach()
        lion.step()
        optim_reference.lion(truth, p.grad.double(), average, step=step + 1, lr=1e-2, beta1=0.9, beta2=0.99)
    yield f"FusedLion, {name}", _relative(p, truth)


def _loss_error(ours: Callable[..., Any], truth: Callable[..., Any], *inputs: Tensor) -> float:
    wide = [t.detach().double().requires_grad_() for t in inputs]
    results = []
    for loss, tensors in ((ours, inputs), (truth, wide)):
        value = loss(*tensors)
        results.append([value.detach(), *torch.autograd.grad(value, tensors)])
    return worst(_relative(a, b) for a, b in zip(*results))


def _relative(ours: Tensor, truth: Tensor) -> float:
    return float((ours.double() - truth).norm() / truth.norm())
