"""Implementations of each operation that is benchmarked: ours, torch's and other libraries'.

A loss is a function of tensors, and an optimizer a function of parameters. Libraries that are not installed are
skipped. `make bench` installs those that run in the interpreter; a GPU machine may have more.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast import losses, optim
from llmfast.checkup.shapes import MODELS
from llmfast.losses import from_hidden
from llmfast.losses.ways import Call

EVERYWHERE = frozenset({"cpu", "counted", "gpu"})
NOT_ON_CPU = frozenset({"counted", "gpu"})
GPU_ONLY = frozenset({"gpu"})


@dataclass(frozen=True)
class Library:
    """A library, which may be installed."""

    module: str  # must be importable
    distribution: str  # for looking up the version

    def installed(self) -> bool:
        try:
            return find_spec(self.module) is not None
        except (ImportError, ValueError):  # the parent package is missing, or is another one of that name
            return False


LLMFAST = Library("llmfast", "llmfast-torch")
TORCH = Library("torch", "torch")
LIGER = Library("liger_kernel", "liger-kernel")
CCE = Library("cut_cross_entropy", "cut-cross-entropy")
QUACK = Library("quack", "quack-kernels")
OPTIMI = Library("optimi", "torch-optimi")
FLASHOPTIM = Library("flashoptim", "flashoptim")
APEX = Library("apex.optimizers", "apex")
BITSANDBYTES = Library("bitsandbytes", "bitsandbytes")
TRL = Library("trl", "trl")


@dataclass(frozen=True)
class Implementation:
    """An operation as one library computes it, or one mode of that library."""

    name: str
    run: Callable[..., Any]
    library: Library
    tiers: frozenset[str]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


def implementations(operation: str, tier: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Implementation]:
    """Return the installed implementations of an operation in a tier ("cpu", "counted" or "gpu"), ours first."""
    found = (i for i in _IMPLEMENTATIONS[operation] if tier in i.tiers and dtype in i.dtypes and i.library.installed())
    return {one.name: one for one in found}


def versions() -> dict[str, str]:
    """Return the versions of Triton and of the libraries that are installed."""
    libraries = {one.library for several in _IMPLEMENTATIONS.values() for one in several if one.library.installed()}
    return {name: metadata.version(name) for name in sorted({"triton", *(one.distribution for one in libraries)})}


def _load(module: str, name: str) -> Any:
    """Return an attribute of a module, imported only now: it may be missing, or may have to be patched first."""
    return getattr(import_module(module), name)


# Cross-entropy from logits: (logits (N, V), targets (N,)) -> loss.


def _liger_cross_entropy(logits: Tensor, targets: Tensor) -> Any:
    return _load("liger_kernel.transformers.functional", "liger_cross_entropy")(logits, targets)


def _quack_cross_entropy(logits: Tensor, targets: Tensor) -> Any:
    return _load("quack", "cross_entropy")(logits, targets, reduction="mean")


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile a function at the first call, separately for each set of shapes."""
    made: list[Callable[..., Tensor]] = []

    def run(*tensors: Tensor) -> Tensor:
        if not made:
            made.append(torch.compile(function, dynamic=False))
        return made[0](*tensors)

    return run


# Linear cross-entropy: (hidden (N, D), weight (V, D), targets (N,)) -> loss.


def _unfused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def _unfused_float32(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Convert logits to float32 first, as most training loops do."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def _torch_chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    # Available since torch 2.13.
    options = _load("torch.nn", "LinearCrossEntropyOptions")()
    return _load("torch.nn.functional", "linear_cross_entropy")(hidden, weight, targets, options=options)


def _at_most(budget: int, hidden: Tensor, weight: Tensor) -> int:
    """Return the budget, or an eighth of the bytes of bfloat16 logits, so that small inputs are split as well."""
    return min(budget, len(hidden) * len(weight) // 4)


def _within(budget: int, **options: Any) -> Callable[..., Any]:
    """Return our loss with a memory budget."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        most = _at_most(budget, hidden, weight)
        return losses.linear_cross_entropy(hidden, weight, targets, memory_budget=most, **options)

    return run


def _rounded_sums(budget: int) -> Callable[..., Any]:
    """Return our loss with a memory budget and sums in bfloat16.

    Small inputs are split into as many chunks as large ones (Llama-3's) would be. Their own plan would have a single
    chunk, which rounds once, and that error would say nothing about large inputs.
    """
    within = _within(budget, accumulate_dtype=torch.bfloat16)

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        if weight.numel() >= 1 << 24:  # not small
            return within(hidden, weight, targets)
        N, (D, V) = 16384, MODELS["Llama-3"]
        large = losses.LinearCrossEntropyPlan.make(N, D, V, memory_budget=budget, accumulate_dtype=torch.bfloat16)
        rows = len(hidden) * large.way.rows // N

        def chunks(call: Call, *_: Any) -> losses.LinearCrossEntropyPlan:
            return replace(large, call=call, way=large.way._replace(rows=rows, finished=call.N, summed=call.V))

        with mock.patch.object(from_hidden, "planned", chunks):
            return losses.linear_cross_entropy(hidden, weight, targets, accumulate_dtype=torch.bfloat16)

    return run


def _liger(accumulate: torch.dtype | None, chunk: int = 1) -> Callable[..., Any]:
    """Return Liger's loss with sums of this dtype, and chunks this many times the usual size."""

    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        loss = _load("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        return loss(hidden, weight, targets, accum_dtype=accumulate, chunk_mem_const=chunk)

    return run


def _cut_cross_entropy(**options: Any) -> Callable[..., Any]:
    def run(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
        return _load("cut_cross_entropy", "linear_cross_entropy")(hidden, weight, targets, **options)

    return run


def _quack(hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    return _load("quack.linear_cross_entropy", "chunked_linear_cross_entropy")(hidden, weight, targets)


# Log-probabilities: (hidden (N, D), weight (V, D), ids (N,)) -> (N,).


def _gathered(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return F.linear(hidden, weight).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _gathered_float32(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return F.linear(hidden, weight).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _logprobs_within(budget: int) -> Callable[..., Any]:
    def run(hidden: Tensor, weight: Tensor, ids: Tensor) -> Any:
        return losses.linear_logprobs(hidden, weight, ids, memory_budget=_at_most(budget, hidden, weight))

    return run


def _trl(hidden: Tensor, weight: Tensor, ids: Tensor) -> Any:
    return _load("trl.trainer.utils", "selective_log_softmax")(F.linear(hidden, weight)[None], ids[None])[0]


def _cut_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Any:
    return -_load("cut_cross_entropy", "linear_cross_entropy")(hidden, weight, ids, reduction="none")


# Distillation: (hidden (N, D), weight (V, D), the teacher's (N, D) and (V, D)) -> the mean Jensen-Shannon divergence.


def _distilled(budget: int | None = None, **options: Any) -> Callable[..., Any]:
    def run(hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor) -> Any:
        most = "auto" if budget is None else _at_most(budget, hidden, weight)
        more = {"kind": "jsd", "memory_budget": most, **options}
        teacher = losses.TeacherStates(teacher_hidden, teacher_weight)
        return losses.linear_distillation(hidden, weight, teacher, **more)

    return run


def _divergence(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Tensor:
    with torch.no_grad():
        p = F.linear(*teacher).float().log_softmax(-1)
    q = F.linear(hidden, weight).float().log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    one, other = (F.kl_div(m, x, reduction="batchmean", log_target=True) for x in (p, q))
    return (one + other) / 2


def _trl_divergence(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Any:
    trainer = _load("trl.experimental.gkd.gkd_trainer", "GKDTrainer")
    with torch.no_grad():
        logits = F.linear(*teacher)[:, None]
    return trainer.generalized_jsd_loss(F.linear(hidden, weight)[:, None], logits)  # (batch, tokens, V)


def _liger_divergence(accumulate: torch.dtype | None) -> Callable[..., Any]:
    def run(hidden: Tensor, weight: Tensor, *teacher: Tensor) -> Any:
        loss = _load("liger_kernel.transformers.functional", "liger_fused_linear_jsd")
        return loss(hidden, weight, *teacher, accum_dtype=accumulate)

    return run


# Multi-token prediction: (hiddens (K, N, D), weight (V, D), labels (N,)) -> the sum of the heads' mean losses.


def _shared_logits(heads: int) -> Callable[..., Any]:
    def run(hiddens: Tensor, weight: Tensor, labels: Tensor) -> Any:
        # All heads predict from one hidden state, so this is another loss, of as many logits as one head has.
        return losses.mtp_cross_entropy(hiddens[0], weight, labels, head_weights=[1.0] * heads)

    return run


def _head_by_head(loss: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss that is computed for each head separately, with shifted labels, and summed, as is common."""

    def run(hiddens: Tensor, weight: Tensor, labels: Tensor) -> Any:
        moved = [F.pad(labels[k:], (0, k), value=-100) for k in range(len(hiddens))]
        return sum(loss(hidden, weight, targets) for hidden, targets in zip(hiddens.unbind(), moved))

    return run


# Optimizers: parameters -> an object with a `step` method.

Parameters = Iterable[Tensor]
_ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}


def _adamw(module: str, name: str, **options: Any) -> Callable[[Parameters], Any]:
    return lambda params: _load(module, name)(params, **_ADAMW, **options)


class _Clipped:
    """Optimizer preceded by torch's clipping."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._params = [p for group in optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self._params, 1.0)
        self._optimizer.step()


def _clipped(make: Callable[[Parameters], Any]) -> Callable[[Parameters], Any]:
    return lambda params: _Clipped(make(params))


def _ours(optimizer: Callable[..., Any], **options: Any) -> Callable[[Parameters], Any]:
    return lambda params: optimizer(params, lr=1e-3, **options)


def _torchs(name: str, **options: Any) -> Callable[[Parameters], Any]:
    return lambda params: getattr(torch.optim, name)(params, lr=1e-3, **options)


FLOAT32, BFLOAT16 = (torch.float32,), (torch.bfloat16,)
_MODES: dict[str, dict[str, Any]] = {
    "fp32 master": {"master_weights": "fp32", "state_dtype": torch.float32},
    "split16, fp32 states": {"master_weights": "split16", "state_dtype": torch.float32},
    "split16": {"master_weights": "split16"},
    "split8": {"master_weights": "split8"},
    "kahan": {"master_weights": "kahan"},
    "stochastic": {"master_weights": "stochastic"},
    "stochastic, 8-bit states": {"master_weights": "stochastic", "state_dtype": "8bit"},
    "split8, 8-bit states": {"master_weights": "split8", "state_dtype": "8bit"},
}
# All except plain AdamW, which is counted at more sizes.
OPTIMIZERS = ("adamw, clipped", "sgd, momentum", "rmsprop", "adagrad", "adamw, bfloat16 with more bits")
_IMPLEMENTATIONS: dict[str, list[Implementation]] = {
    "cross_entropy": [
        Implementation("llmfast", losses.cross_entropy, LLMFAST, EVERYWHERE),
        Implementation(
            "llmfast in place", lambda x, y: losses.cross_entropy(x, y, inplace=True), LLMFAST, frozenset({"counted"})
        ),
        Implementation("torch", F.cross_entropy, TORCH, EVERYWHERE),
        Implementation("torch compiled", _compiled(F.cross_entropy), TORCH, GPU_ONLY),
        Implementation("Liger", _liger_cross_entropy, LIGER, NOT_ON_CPU),  # overwrites the logits, also of a leaf
        Implementation("Quack", _quack_cross_entropy, QUACK, GPU_ONLY),
    ],
    "linear_cross_entropy": [
        Implementation("llmfast", losses.linear_cross_entropy, LLMFAST, EVERYWHERE),
        Implementation("llmfast, 16 MiB", _within(16 << 20), LLMFAST, NOT_ON_CPU),
        Implementation("llmfast, 200 MiB", _within(200 << 20), LLMFAST, NOT_ON_CPU),
        Implementation("llmfast, 200 MiB, bf16 sums", _rounded_sums(200 << 20), LLMFAST, NOT_ON_CPU),
        Implementation("torch", _unfused, TORCH, EVERYWHERE),
        Implementation("torch, float32 logits", _unfused_float32, TORCH, NOT_ON_CPU),
        Implementation("torch compiled", _compiled(_unfused_float32), TORCH, GPU_ONLY),
        *(
            [Implementation("torch linear_cross_entropy", _torch_chunks, TORCH, EVERYWHERE)]
            if hasattr(torch.nn, "LinearCrossEntropyOptions")
            else []
        ),
        Implementation("Liger", _liger(None), LIGER, NOT_ON_CPU),
        Implementation("Liger, C = 8", _liger(None, 8), LIGER, NOT_ON_CPU),
        Implementation("Liger, C = 16", _liger(None, 16), LIGER, NOT_ON_CPU),
        Implementation("Liger, float32 sums", _liger(torch.float32), LIGER, NOT_ON_CPU),
        Implementation("cut-cross-entropy", _cut_cross_entropy(), CCE, NOT_ON_CPU),
        # Not counted: of random inputs the filter drops nothing, so the counts are those of the row above.
        Implementation("cut-cross-entropy, unfiltered", _cut_cross_entropy(filter_eps=None), CCE, GPU_ONLY),
        Implementation("Quack", _quack, QUACK, GPU_ONLY),
    ],
    "linear_logprobs": [
        Implementation("llmfast", losses.linear_logprobs, LLMFAST, NOT_ON_CPU),
        Implementation("llmfast, 200 MiB", _logprobs_within(200 << 20), LLMFAST, NOT_ON_CPU),
        Implementation("torch", _gathered, TORCH, NOT_ON_CPU),
        Implementation("torch, float32 logits", _gathered_float32, TORCH, NOT_ON_CPU),
        Implementation("TRL", _trl, TRL, NOT_ON_CPU),
        Implementation("cut-cross-entropy", _cut_logprobs, CCE, NOT_ON_CPU),
    ],
    "linear_distillation": [
        Implementation("llmfast", _distilled(), LLMFAST, NOT_ON_CPU),
        Implementation("llmfast, 200 MiB", _distilled(200 << 20), LLMFAST, NOT_ON_CPU),
        Implementation("llmfast, float32 logits", _distilled(slab_dtype=torch.float32), LLMFAST, NOT_ON_CPU),
        Implementation("torch, float32 logits", _divergence, TORCH, NOT_ON_CPU),
        Implementation("TRL", _trl_divergence, TRL, NOT_ON_CPU),
        Implementation("Liger", _liger_divergence(None), LIGER, NOT_ON_CPU),
        Implementation("Liger, float32 sums", _liger_divergence(torch.float32), LIGER, NOT_ON_CPU),
    ],
    "mtp_cross_entropy": [
        Implementation("llmfast", losses.mtp_cross_entropy, LLMFAST, NOT_ON_CPU),
        Implementation("llmfast, shared logits", _shared_logits(4), LLMFAST, NOT_ON_CPU),
        Implementation("llmfast, head by head", _head_by_head(losses.linear_cross_entropy), LLMFAST, NOT_ON_CPU),
        Implementation("torch, head by head", _head_by_head(_unfused), TORCH, NOT_ON_CPU),
        Implementation("Liger, head by head", _head_by_head(_liger(None)), LIGER, NOT_ON_CPU),
        Implementation("Liger, head by head, float32 sums", _head_by_head(_liger(torch.float32)), LIGER, NOT_ON_CPU),
        Implementation("cut-cross-entropy, head by head", _head_by_head(_cut_cross_entropy()), CCE, NOT_ON_CPU),
    ],
    "adamw": [
        Implementation("llmfast", lambda params: optim.FusedAdamW(params, **_ADAMW), LLMFAST, EVERYWHERE),
        Implementation("torch fused", _adamw("torch.optim", "AdamW", fused=True), TORCH, EVERYWHERE),
        Implementation("torch foreach", _adamw("torch.optim", "AdamW", foreach=True), TORCH, EVERYWHERE),
        Implementation("torch, one by one", _adamw("torch.optim", "AdamW", foreach=False), TORCH, EVERYWHERE),
        Implementation("optimi", _adamw("optimi", "AdamW", triton=True), OPTIMI, NOT_ON_CPU),
        Implementation(
            "FlashOptim, 8-bit states", _adamw("flashoptim", "FlashAdamW"), FLASHOPTIM, NOT_ON_CPU, BFLOAT16
        ),
        Implementation("apex", _adamw("apex.optimizers", "FusedAdam", adam_w_mode=True), APEX, GPU_ONLY),
        Implementation("bitsandbytes, 8-bit states", _adamw("bitsandbytes.optim", "AdamW8bit"), BITSANDBYTES, GPU_ONLY),
    ],
    "adamw, clipped": [
        Implementation("llmfast", _ours(optim.FusedAdamW, max_grad_norm=1.0), LLMFAST, NOT_ON_CPU, FLOAT32),
        Implementation("torch fused", _clipped(_torchs("AdamW", fused=True)), TORCH, NOT_ON_CPU, FLOAT32),
        Implementation("torch foreach", _clipped(_torchs("AdamW", foreach=True)), TORCH, NOT_ON_CPU, FLOAT32),
    ],
    "sgd, momentum": [
        Implementation("llmfast", _ours(optim.FusedSGD, momentum=0.9), LLMFAST, NOT_ON_CPU, FLOAT32),
        Implementation("torch fused", _torchs("SGD", momentum=0.9, fused=True), TORCH, NOT_ON_CPU, FLOAT32),
        Implementation("torch foreach", _torchs("SGD", momentum=0.9, foreach=True), TORCH, NOT_ON_CPU, FLOAT32),
    ],
    "rmsprop": [
        Implementation("llmfast", _ours(optim.FusedRMSprop), LLMFAST, NOT_ON_CPU, FLOAT32),
        Implementation("torch foreach", _torchs("RMSprop", foreach=True), TORCH, NOT_ON_CPU, FLOAT32),
    ],
    "adagrad": [
        Implementation("llmfast", _ours(optim.FusedAdagrad), LLMFAST, NOT_ON_CPU, FLOAT32),
        Implementation("torch fused", _torchs("Adagrad", fused=True), TORCH, NOT_ON_CPU, FLOAT32),
        Implementation("torch foreach", _torchs("Adagrad", foreach=True), TORCH, NOT_ON_CPU, FLOAT32),
    ],
    "adamw, bfloat16 with more bits": [
        *(
            Implementation(f"llmfast, {what}", _ours(optim.FusedAdamW, **options), LLMFAST, NOT_ON_CPU, BFLOAT16)
            for what, options in _MODES.items()
        ),
        Implementation(
            "optimi, kahan", _adamw("optimi", "AdamW", triton=True, kahan_sum=True), OPTIMI, NOT_ON_CPU, BFLOAT16
        ),
        Implementation(
            "FlashOptim, 8-bit states", _adamw("flashoptim", "FlashAdamW"), FLASHOPTIM, NOT_ON_CPU, BFLOAT16
        ),
    ],
}
