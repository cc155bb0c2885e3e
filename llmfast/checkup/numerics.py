"""Numbers of every kernel family against float64, and against the same call in plain torch.

The rule is that of the tests: ours may be no further from the truth than plain torch in the same dtype, plus a few
roundings. Each result is computed many times over and must come out the same to the bit, and memory on both sides of
what is written must stay what it was.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from llmfast._dispatch import KERNEL_DTYPES
from llmfast.checkup import further_losses
from llmfast.checkup.comparing import Guarded, Inputs, Sizes, compare, excess, excess_in_norm, same_bits, told
from llmfast.checkup.record import Case, Finding, Size
from llmfast.losses import cross_entropy, linear_cross_entropy, mtp_cross_entropy, reference
from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedOptimizer, FusedRMSprop, FusedSGD

FULL = Sizes(512, 50257, 256, 50, 16 << 20, (16400, 131_080), (1, 7, 4096, 4097, 100_003, 1_000_000))
SMALL = Sizes(6, 133, 16, 2, 3 * 512, (6, 1030), (1, 7, 300))


def cases(device: torch.device, size: Size) -> list[Case]:
    """Return the cases of this section: each family once in each dtype, then variants, then sizes."""
    sizes, dtypes = (FULL, KERNEL_DTYPES) if size == "full" else (SMALL, (torch.bfloat16,))
    names = "cross_entropy", "linear_cross_entropy"
    made = []
    for dtype in KERNEL_DTYPES:
        made += [_loss_case(name, "plain", dtype, device, sizes) for name in names]
        made += [_optimizer_case(cls, options, dtype, device, sizes) for cls, options in OPTIMIZERS[:1]]
    for variant in list(VARIANTS)[1:]:
        made += [_loss_case(name, variant, dtype, device, sizes) for name in names for dtype in dtypes]
    for layout in LAYOUTS:
        made.append(Case(f"rows, {layout}", partial(rows_in_layout, layout, device, sizes), 4.0))
    for what in LINEAR:
        made.append(Case(f"linear_cross_entropy, {what}", partial(linear_in_mode, what, device, sizes), 6.0, 4 << 30))
    for heads in ("own hidden states", "shared"):
        made.append(Case(f"mtp_cross_entropy, {heads}", partial(mtp, heads, device, sizes), 6.0))
    made += further_losses.cases(device, sizes)
    for cls, options in OPTIMIZERS[1:]:
        made += [_optimizer_case(cls, options, dtype, device, sizes) for dtype in dtypes[:2]]
    for cls, options in FORMATS:
        made.append(_format_case(cls, options, device, sizes))
    made.append(Case("offsets above 2^31", partial(wide, device, sizes), 15.0, 20 << 30))
    return made


# Losses.


def _weighted(inputs: Inputs, N: int, V: int) -> dict[str, Any]:
    return {"class_weights": inputs.positive(V), "token_weights": inputs.positive(N), "label_smoothing": 0.1}


# Options, and how many targets a row has.
VARIANTS: dict[str, tuple[Callable[[Inputs, int, int], dict[str, Any]], int]] = {
    "plain": (lambda inputs, N, V: {}, 1),
    "softcap and scale": (lambda inputs, N, V: {"softcap": 20.0, "logit_scale": 0.7}, 1),
    "z-loss": (lambda inputs, N, V: {"z_loss": 1e-3, "reduction": "sum"}, 1),
    "smoothing and weights": (_weighted, 1),
    "four weighted targets": (lambda inputs, N, V: {"target_weights": inputs.positive(N, 4)}, 4),
    "losses per token": (lambda inputs, N, V: {"reduction": "none", "label_smoothing": 0.1}, 1),
    "statistics": (lambda inputs, N, V: {"return_stats": True}, 1),
}


def _loss_case(name: str, variant: str, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Case:
    short = str(dtype).removeprefix("torch.")
    return Case(f"{name}, {variant}, {short}", partial(loss, name, variant, dtype, device, sizes), 4.0, 4 << 30)


def loss(name: str, variant: str, dtype: torch.dtype, device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare a loss and its gradients."""
    N, V, D = sizes.N, sizes.V, sizes.D
    inputs = Inputs(device)
    make, K = VARIANTS[variant]
    options = make(inputs, N, V)
    targets = inputs.classes(V, *((N,) if K == 1 else (N, K)))
    if name == "cross_entropy":
        tensors = {"logits": inputs.normal(N, V, dtype=dtype, scale=3.0)}
    else:
        tensors = {"hidden": inputs.normal(N, D, dtype=dtype), "weight": inputs.normal(V, D, dtype=dtype, scale=0.3)}
        options["bias"] = inputs.normal(V)
    ours: Any = {"cross_entropy": cross_entropy, "linear_cross_entropy": linear_cross_entropy}[name]
    plain: Any = getattr(reference, name)
    yield from compare(
        lambda *t: ours(*t, targets, **options),
        lambda *t: plain(*t, targets, **_wide_options(options, t[0])),
        tensors,
        sizes.repeats,
        in_norm=name != "cross_entropy",
    )


def _wide_options(options: dict[str, Any], like: Tensor) -> dict[str, Any]:
    """Return the reference's options: its bias has the dtype of the logits that it is added to."""
    bias = options.get("bias")
    return options if bias is None else options | {"bias": bias.to(like.dtype)}


# How rows can lie in memory: from values (N, V) to a tensor that equals them.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of an odd stride": lambda x: _in_wider(x, 13),
    "rows of an aligned stride": lambda x: _in_wider(x, 64 - x.shape[1] % 64),
    "a misaligned start": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "columns first": lambda x: x.T.contiguous().T,
    "one class": lambda x: x[:, :1],
    "few classes": lambda x: x[:, :5].contiguous(),
}


def _in_wider(x: Tensor, more: int) -> Tensor:
    return torch.cat([x, x.new_full((x.shape[0], more), float("nan"))], dim=1)[:, : x.shape[1]]


def rows_in_layout(layout: str, device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare the loss of logits that lie in memory in another way, and watch what is written in place."""
    inputs = Inputs(device)
    x = LAYOUTS[layout](inputs.normal(sizes.N, sizes.V, dtype=torch.bfloat16, scale=3.0))
    targets = inputs.classes(x.shape[1], sizes.N)
    yield from compare(
        lambda t: cross_entropy(t, targets, softcap=30.0),
        lambda t: reference.cross_entropy(t, targets, softcap=30.0),
        {"logits": x},
        2,
        in_norm=False,
    )
    guarded = Guarded(x.contiguous(), offset=layout == "a misaligned start")
    leaf = torch.zeros_like(x, requires_grad=True)
    logits = guarded.tensor.detach().add_(leaf)  # in place is for results of an operation
    cross_entropy(logits, targets, inplace=True).backward()
    yield guarded.finding()


LINEAR: dict[str, dict[str, Any]] = {
    "in chunks": {"memory_budget": True},
    "in chunks, float32 logits": {"memory_budget": True, "slab_dtype": torch.float32},
    "computed twice": {"memory_budget": True, "reduction": "none"},
    "into a float32 gradient": {"memory_budget": True, "accumulate_into": True},
    "filtered": {"grad_filter": 1e-7},
}


def linear_in_mode(what: str, device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare the linear loss in one of its modes."""
    inputs, options = Inputs(device), dict(LINEAR[what])
    tensors = {
        "hidden": inputs.normal(sizes.N, sizes.D, dtype=torch.bfloat16),
        "weight": inputs.normal(sizes.V, sizes.D, dtype=torch.bfloat16, scale=0.3),
    }
    targets = inputs.classes(sizes.V, sizes.N)
    if "memory_budget" in options:
        options["memory_budget"] = sizes.budget
    plain = {"reduction": options.get("reduction", "mean")}
    if options.pop("accumulate_into", False):
        yield from _into_main_grad(tensors, targets, options, plain)
        return
    yield from compare(
        lambda h, w: linear_cross_entropy(h, w, targets, **options),
        lambda h, w: reference.linear_cross_entropy(h, w, targets, **plain),
        tensors,
        sizes.repeats,
        in_norm=True,
    )


def _into_main_grad(
    tensors: dict[str, Tensor], targets: Tensor, options: dict[str, Any], plain: dict[str, Any]
) -> Iterator[Finding]:
    hidden, weight = (t.detach().requires_grad_() for t in tensors.values())
    main = Guarded(torch.ones(weight.shape, dtype=torch.float32, device=weight.device))
    linear_cross_entropy(hidden, weight, targets, accumulate_into=main.tensor, **options).backward()
    results = []
    for dtype in (weight.dtype, torch.float64):
        h, w = (t.detach().to(dtype).requires_grad_() for t in tensors.values())
        value: Any = reference.linear_cross_entropy(h, w, targets, **plain)
        results.append(torch.autograd.grad(value, w)[0].double() + 1)
    yield told("main gradient", excess_in_norm(main.tensor, *results), main.tensor, results[1])
    yield Finding("weight.grad", weight.grad is None, {})
    yield main.finding()


def mtp(heads: str, device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare the multi-token loss with the sum of its heads' losses."""
    inputs, K = Inputs(device), 3
    shared = heads == "shared"
    hidden = inputs.normal(*(() if shared else (K,)), sizes.N, sizes.D, dtype=torch.bfloat16)
    weight = inputs.normal(sizes.V, sizes.D, dtype=torch.bfloat16, scale=0.3)
    labels = inputs.classes(sizes.V, sizes.N)
    options: dict[str, Any] = {"head_weights": torch.ones(K, dtype=torch.float32, device=device)} if shared else {}

    def plain(h: Tensor, w: Tensor) -> Tensor:
        moved = [torch.cat([labels[k:], labels.new_full((k,), -100)]) for k in range(K)]
        losses: list[Any] = [reference.linear_cross_entropy(h if shared else h[k], w, moved[k]) for k in range(K)]
        total: Any = sum(losses)
        return cast(Tensor, total)

    yield from compare(
        lambda h, w: mtp_cross_entropy(h, w, labels, **options),
        plain,
        {"hidden": hidden, "weight": weight},
        sizes.repeats,
        in_norm=True,
    )


def wide(device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare the last rows of logits whose offsets pass 2^31."""
    N, V = sizes.wide
    last = 4
    logits = torch.zeros(N, V, dtype=torch.bfloat16, device=device)
    logits[-last:] = Inputs(device).normal(last, V, dtype=torch.bfloat16, scale=3.0)
    targets = torch.full((N,), V - 1, dtype=torch.int64, device=device)
    leaf = logits.requires_grad_()
    losses = cross_entropy(leaf, targets, reduction="none")
    losses.sum().backward()
    assert leaf.grad is not None
    tail = logits[-last:].detach()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        own = tail.to(dtype).requires_grad_()
        value: Any = reference.cross_entropy(own, targets[-last:], reduction="none")
        results.append((value.detach(), torch.autograd.grad(value.sum(), own)[0]))
    mine = losses[-last:].detach(), leaf.grad[-last:]
    for what, scale, ours, theirs, truth in zip(("loss", "gradient"), (10.0, 0.0), mine, *results):
        yield told(f"{what} of the last rows", excess(ours, theirs, truth, scale), ours, truth)


# Our optimizers that inherit from one of torch's, which is the reference, and options for both.
OPTIMIZERS: list[tuple[type[FusedOptimizer], dict[str, Any]]] = [
    (FusedAdamW, {"weight_decay": 0.1}),
    (FusedAdam, {"weight_decay": 0.1, "amsgrad": True}),
    (FusedSGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (FusedSGD, {"maximize": True}),
    (FusedRMSprop, {"momentum": 0.9, "centered": True}),
    (FusedAdagrad, {"lr_decay": 0.1, "weight_decay": 0.1}),
]
# Precision formats, and the rule that torch lacks: what is compared with the CPU path.
FORMATS: list[tuple[type[FusedOptimizer], dict[str, Any]]] = [
    (FusedAdamW, {"master_weights": "fp32", "state_dtype": torch.float32}),
    (FusedAdamW, {"master_weights": "split16"}),
    (FusedAdamW, {"master_weights": "split8", "state_dtype": "8bit"}),
    (FusedAdamW, {"master_weights": "kahan"}),
    (FusedAdamW, {"master_weights": "stochastic", "state_dtype": "8bit"}),
    (FusedAdamW, {"max_grad_norm": 0.5, "ema_decay": 0.9, "zero_grads": True}),
    (FusedSGD, {"momentum": 0.9, "max_grad_norm": 0.5}),  # Adam's steps are the same for any clip of them all
    (FusedLion, {"weight_decay": 0.1}),
]
STEPS = 3


def _optimizer_case(
    cls: type[FusedOptimizer], options: dict[str, Any], dtype: torch.dtype, device: torch.device, sizes: Sizes
) -> Case:
    named = ", ".join(f"{name}={value}" for name, value in options.items())
    name = f"{cls.__name__}({named}), {str(dtype).removeprefix('torch.')}"
    return Case(name, partial(optimizer, cls, options, dtype, device, sizes), 4.0)


def _parameters(inputs: Inputs, dtype: torch.dtype, sizes: Sizes) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Make values, and gradients for each step."""
    values = [inputs.normal(n, dtype=dtype) for n in sizes.numels]
    return values, [[inputs.normal(n, dtype=dtype) for n in sizes.numels] for _ in range(STEPS)]


def optimizer(
    cls: type[FusedOptimizer], options: dict[str, Any], dtype: torch.dtype, device: torch.device, sizes: Sizes
) -> Iterator[Finding]:
    """Compare a few steps with torch's optimizer in the same dtype and in float64; one parameter starts misaligned."""
    torchs: Any = cls.__mro__[[base.__module__.startswith("torch.optim") for base in cls.__mro__].index(True)]
    values, grads = _parameters(Inputs(device), dtype, sizes)
    guarded = [Guarded(v, offset=i % 2) for i, v in enumerate(values)]

    def stepped(make: Any, params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        params = [p.requires_grad_() for p in params]
        stepping = make(params, lr=1e-2, **options)
        for now in grads:
            for p, g in zip(params, now):
                p.grad = g.to(dtype, copy=True)
            stepping.step()
        return [p.detach() for p in params]

    ours = stepped(cls, [g.tensor for g in guarded], dtype)
    theirs = stepped(torchs, [v.clone() for v in values], dtype)
    truth = stepped(torchs, [v.double() for v in values], torch.float64)
    worst = max(range(len(ours)), key=lambda i: excess_in_norm(ours[i], theirs[i], truth[i]))
    yield told("parameters", excess_in_norm(ours[worst], theirs[worst], truth[worst]), ours[worst], truth[worst])
    for found in (g.finding() for g in guarded):
        if not found.ok:
            yield found
            break
    else:
        yield Finding("memory around them", True, {})

    def again() -> tuple[Tensor, ...]:
        return tuple(stepped(cls, [v.clone() for v in values], dtype))

    yield same_bits("repeated", again, min(10, sizes.repeats))


def _format_case(cls: type[FusedOptimizer], options: dict[str, Any], device: torch.device, sizes: Sizes) -> Case:
    named = ", ".join(f"{name}={value}" for name, value in options.items())
    return Case(f"{cls.__name__}({named}), bfloat16", partial(formats, cls, options, device, sizes), 5.0)


def formats(cls: Any, options: dict[str, Any], device: torch.device, sizes: Sizes) -> Iterator[Finding]:
    """Compare an optimizer with the same one on the CPU, whose plain torch does the same bit for bit.

    A root or a quotient may be rounded differently there, so a few elements may come out one code or rounding apart,
    or, with Lion, move the other way.
    """
    results: dict[str, list[Tensor]] = {}
    averages: dict[str, list[Tensor]] = {}
    for where in (device, torch.device("cpu")):
        values, grads = _parameters(Inputs(where), torch.bfloat16, sizes)
        params = [v.requires_grad_() for v in values]
        stepping = cls(params, lr=1e-2, **options)
        for now in grads:
            for p, g in zip(params, now):
                p.grad = g
            stepping.step()
        name = "device" if where is device else "cpu"
        results[name] = [p.detach().cpu().float() for p in params]
        averages[name] = [state["ema_param"].cpu().float() for state in stepping.state.values() if "ema_param" in state]
        if where is device and options.get("zero_grads"):
            left = sum(int(p.grad.count_nonzero()) for p in params if p.grad is not None)
            yield Finding("gradients are zero", left == 0, {"elements_that_are_not": left})
    start, _ = _parameters(Inputs(torch.device("cpu")), torch.bfloat16, sizes)
    for what, found in (("parameters", results), ("averages", averages)):
        if found["cpu"]:
            yield _apart(what, found, start)


def _apart(what: str, results: dict[str, list[Tensor]], start: list[Tensor]) -> Finding:
    """Compare how far both have moved from where they started."""
    moved = torch.cat([b - s.float() for b, s in zip(results["cpu"], start, strict=True)])
    missed = torch.cat([a - b for a, b in zip(results["device"], results["cpu"], strict=True)])
    share = float((missed != 0).float().mean())
    error = float(missed.norm() / moved.norm())
    return Finding(what, error < 0.02 and share < 0.02, {"relative_error": error, "share_that_differs": share})
