"""The default device and the default dtype are the program's: nothing here follows them."""

import ast
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llmfast import doctor
from llmfast.data import pack
from llmfast.losses import (
    CrossEntropyLoss,
    LinearCrossEntropyLoss,
    cross_entropy,
    linear_cross_entropy,
    mtp_cross_entropy,
    mtp_valid_counts,
    reference,
)
from llmfast.models import Decoder, DecoderConfig
from llmfast.mtp import speculative_generate
from llmfast.optim import FusedAdagrad, FusedAdam, FusedAdamW, FusedLion, FusedRMSprop, FusedSGD, optimizer_in_backward
from llmfast.train import Config, Trainer
from llmfast.train.objective import FurtherTokens, NextToken
from support.defaults import DEFAULTS, assert_same, defaults
from support.launched import unrecorded
from support.sources import tree_of

ROOT = Path(__file__).parent.parent
# Functions of torch that make a tensor of no other tensor. `from_numpy` has the array's memory and dtype.
FACTORIES = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full", "linspace"),
    *("logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range", "scalar_tensor"),
    *("sparse_coo_tensor", "tensor", "tril_indices", "triu_indices", "zeros"),
}
CPU = {"device": "cpu", "dtype": torch.float32}
N, D, V = 12, 8, 50


def calls(names: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """Return the calls of torch functions with these names, and their positions."""
    for path in sorted([*(ROOT / "llmfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
                owner = node.func.value
                if isinstance(owner, ast.Name) and owner.id == "torch":
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}", node


def test_whatever_makes_a_tensor_says_its_device_and_dtype() -> None:
    found = list(calls(FACTORIES))
    assert len(found) > 20
    assert not [where for where, call in found if not {"device", "dtype"} <= {keyword.arg for keyword in call.keywords}]
    assert not [where for where, call in calls({"Generator"}) if not call.args and not call.keywords]


def test_factories_have_no_other_name() -> None:
    """Forbid `from torch import zeros`, which would hide a call from the test above."""
    for path in sorted([*(ROOT / "llmfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                assert not FACTORIES & {alias.name for alias in node.names}, path


# Each makes what it needs, and returns the rest as a function, to be called under other defaults.
Later = Callable[[], Any]


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    hidden, weight = (torch.randn(n, D, generator=generator, **CPU).requires_grad_() for n in (N, V))
    targets = torch.randint(0, V, (N,), generator=generator, device="cpu", dtype=torch.int64)
    targets[::4] = -100
    return hidden, weight, targets


def with_gradients(loss: Any, *inputs: Tensor) -> Any:
    first = loss[0] if isinstance(loss, tuple) else loss
    return loss, torch.autograd.grad(first, inputs)


def loss_of_logits(**options: Any) -> Later:
    hidden, weight, targets = tensors()
    logits = (hidden @ weight.T).detach().requires_grad_()
    return lambda: with_gradients(cross_entropy(logits, targets, **options), logits)


def linear_loss(**options: Any) -> Later:
    hidden, weight, targets = tensors()
    return lambda: with_gradients(linear_cross_entropy(hidden, weight, targets, **options), hidden, weight)


def reference_loss() -> Later:
    hidden, weight, targets = tensors()
    return lambda: with_gradients(
        reference.linear_cross_entropy(hidden, weight, targets, return_stats=True), hidden, weight
    )


def modules() -> Later:
    hidden, _, targets = tensors()
    torch.manual_seed(0)
    logits_loss = CrossEntropyLoss(label_smoothing=0.1)
    linear = LinearCrossEntropyLoss(D, V, device="cpu", dtype=torch.float32)
    return lambda: (
        logits_loss(hidden, targets.clamp(max=D - 1)),
        with_gradients(linear(hidden, targets), hidden, *linear.parameters()),
    )


def further_tokens(**options: Any) -> Later:
    hidden, weight, targets = tensors()
    hiddens, labels = torch.stack([hidden, hidden * 2]), targets
    return lambda: (
        mtp_valid_counts(labels, 2),
        with_gradients(mtp_cross_entropy(hiddens, weight, labels, return_stats=True, **options), hidden, weight),
    )


def steps(make: Callable[..., Any], dtype: torch.dtype = torch.float32, **options: Any) -> Later:
    """Create the optimizer under the other defaults too, and step."""
    generator = torch.Generator("cpu").manual_seed(0)
    start, *gradients = (torch.randn(20, 9, generator=generator, **CPU).to(dtype) for _ in range(4))

    def run() -> Any:
        params = [nn.Parameter(start.clone()), nn.Parameter(start.T.clone())]
        optimizer = make(params, **options)
        for g in gradients:
            params[0].grad, params[1].grad = g.clone(), g.T.clone()
            optimizer.grad_scale = torch.full((), 4.0, **CPU)
            optimizer.found_inf = torch.zeros((), **CPU)
            optimizer.step()
        return [p.detach() for p in params], list(optimizer.state_dict()["state"].values())

    return run


def steps_under_both() -> Later:
    """Create states and tables first; then change the defaults and the learning rate."""
    p = nn.Parameter(torch.ones(9, 9, **CPU))
    optimizer = FusedAdamW([p], lr=1e-2)
    p.grad = torch.ones_like(p)
    optimizer.step()

    def run() -> Tensor:
        optimizer.param_groups[0]["lr"] = 2e-2
        optimizer.step()
        return p.detach()

    return run


def steps_in_backward() -> Later:
    hidden, weight, targets = tensors()
    model = nn.Module()
    model.weight = nn.Parameter(weight.detach().clone())

    def run() -> Tensor:
        optimizer_in_backward(model, FusedAdamW(model.parameters(), lr=1e-2))
        linear_cross_entropy(hidden, model.weight, targets).backward()
        return model.weight.detach()

    return run


def decoder(mtp: str, heads: int) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(V, width=16, layers=1, heads=2, mtp=mtp, mtp_heads=heads))  # type: ignore[arg-type]


def decoding(mtp: str, heads: int) -> Later:
    model = decoder(mtp, heads)
    prompt = torch.tensor([1, 2, 3], dtype=torch.int64, device="cpu")

    def run() -> Any:
        generator = torch.Generator("cpu").manual_seed(0)
        text = model.generate(prompt, 5, context=8, generator=generator)
        found = speculative_generate(model, prompt, 5) if model.mtp is not None else None
        return text, model(prompt[None], all_heads=True).detach(), None if found is None else found.tokens

    return run


def training(mtp: str, heads: int) -> Later:
    model = decoder(mtp, heads)
    rows = pack([np.arange(1, 20)] * 4, seq_len=8, eot_id=0)
    further = FurtherTokens(heads, lambda step: [1.0, 0.3], shared=False, detached=False)
    objective = NextToken() if mtp == "none" else further
    config = Config()
    config.train.steps, config.train.batch_size, config.train.log_every = 1, 1, 1

    def run() -> Any:
        optimizer = FusedAdamW(model.parameters(), lr=1e-2, max_grad_norm=math.inf)
        held_out = {"same": lambda: [rows.batch([0])]}
        trainer = Trainer(model, objective, optimizer, [rows.batch([1])], config, validation=held_out)
        assert trainer.fit()
        return [p.detach().clone() for p in model.parameters()], trainer.sums

    return run


PROGRAMS: dict[str, Callable[[], Later]] = {
    "cross_entropy": loss_of_logits,
    "cross_entropy with statistics": lambda: loss_of_logits(return_stats=True, label_smoothing=0.1, z_loss=1e-3),
    "linear_cross_entropy": linear_loss,
    "linear_cross_entropy in chunks": lambda: linear_loss(memory_budget=3000),
    "linear_cross_entropy of few tokens": lambda: linear_loss(num_valid=9),
    "linear_cross_entropy, filtered": lambda: linear_loss(grad_filter=1e-4),
    "reference": reference_loss,
    "modules": modules,
    "mtp_cross_entropy": lambda: further_tokens(head_weights=[1.0, 0.3], num_valid=[9, 8]),
    "mtp_cross_entropy by its own count": further_tokens,
    "AdamW": lambda: steps(FusedAdamW, max_grad_norm=1.0, ema_decay=0.9),
    "AdamW, 8 bits": lambda: steps(FusedAdamW, torch.bfloat16, state_dtype="8bit", master_weights="split16"),
    "AdamW, independent decay": lambda: steps(
        FusedAdamW, torch.float16, lr=torch.full((), 0.1, **CPU), decay="independent", weight_decay=0.1
    ),
    "Adam, stochastic": lambda: steps(FusedAdam, torch.bfloat16, master_weights="stochastic"),
    "Adam, complex": lambda: steps(FusedAdam, torch.complex64),
    "SGD": lambda: steps(FusedSGD, torch.bfloat16, momentum=0.9, dampening=0.1, max_grad_norm=0.5),
    "RMSprop": lambda: steps(FusedRMSprop, centered=True, momentum=0.9),
    "Adagrad": lambda: steps(FusedAdagrad, lr_decay=0.1),
    "Adagrad, complex": lambda: steps(FusedAdagrad, torch.complex64),
    "Lion": lambda: steps(FusedLion, torch.float64),
    "AdamW, begun under others": steps_under_both,
    "AdamW in backward": steps_in_backward,
    "decoder": lambda: decoding("none", 0),
    "decoder with parallel heads": lambda: decoding("parallel", 2),
    "decoder with sequential depths": lambda: decoding("sequential", 1),
    "trainer": lambda: training("none", 0),
    "trainer of further tokens": lambda: training("parallel", 2),
}


@functools.cache
def computed_as_usual(path: str, program: str) -> Any:
    return PROGRAMS[program]()()


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("program", PROGRAMS)
@unrecorded()
def test_other_defaults_change_nothing(path: str, program: str, kind: str) -> None:
    wanted = computed_as_usual(path, program)
    later = PROGRAMS[program]()
    with defaults(**DEFAULTS[kind]):
        found = later()
    assert_same(found, wanted)


@pytest.mark.parametrize("kind", ["bfloat16", "float64"])  # torch's own Adagrad stumbles over another device
def test_the_doctor_finds_what_it_finds_otherwise(kind: str) -> None:
    wanted = list(doctor._checks(torch.device("cpu"), torch.float32))
    with defaults(**DEFAULTS[kind]):
        assert list(doctor._checks(torch.device("cpu"), torch.float32)) == wanted
