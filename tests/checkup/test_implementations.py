"""Implementations that are compared: what each asks of its library, and that torch's compute what they are called."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counted
from benchmarks.counted import Job
from llmfast import losses, optim
from llmfast.checkup import implementations
from llmfast.checkup.implementations import _IMPLEMENTATIONS
from llmfast.losses import TeacherStates, reference

N, D, V = 24, 8, 40
BF16, F32 = torch.bfloat16, torch.float32
EVERYWHERE, NOT_ON_CPU, GPU = {"cpu", "counted", "gpu"}, {"counted", "gpu"}, {"gpu"}
LIGER = "liger_kernel.transformers.functional"
LINEAR, JSD = f"{LIGER}.liger_fused_linear_cross_entropy", f"{LIGER}.liger_fused_linear_jsd"
CCE = "cut_cross_entropy.linear_cross_entropy"
ADAMW = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
MIB = 1 << 20
# Of each operation and name: where it is compared, what is called, and with which keywords.
CALLS: dict[str, dict[str, tuple[set[str], str, dict[str, Any]]]] = {
    "cross_entropy": {
        "llmfast": (EVERYWHERE, "", {}),
        "llmfast in place": ({"counted"}, "losses.cross_entropy", {"inplace": True}),
        "torch": (EVERYWHERE, "", {}),
        "torch compiled": (GPU, "", {}),
        "Liger": (NOT_ON_CPU, f"{LIGER}.liger_cross_entropy", {}),
        "Quack": (GPU, "quack.cross_entropy", {"reduction": "mean"}),
    },
    "linear_cross_entropy": {
        "llmfast": (EVERYWHERE, "", {}),
        "llmfast, 16 MiB": (NOT_ON_CPU, "losses.linear_cross_entropy", {"memory_budget": 16 * MIB}),
        "llmfast, 200 MiB": (NOT_ON_CPU, "losses.linear_cross_entropy", {"memory_budget": 200 * MIB}),
        "llmfast, 200 MiB, bf16 sums": (
            NOT_ON_CPU,
            "losses.linear_cross_entropy",
            {"memory_budget": 200 * MIB, "accumulate_dtype": BF16},
        ),
        "torch": (EVERYWHERE, "", {}),
        "torch, float32 logits": (NOT_ON_CPU, "", {}),
        "torch compiled": (GPU, "", {}),
        "torch linear_cross_entropy": (EVERYWHERE, "", {}),
        "Liger": (NOT_ON_CPU, LINEAR, {"accum_dtype": None, "chunk_mem_const": 1}),
        "Liger, C = 8": (NOT_ON_CPU, LINEAR, {"accum_dtype": None, "chunk_mem_const": 8}),
        "Liger, C = 16": (NOT_ON_CPU, LINEAR, {"accum_dtype": None, "chunk_mem_const": 16}),
        "Liger, float32 sums": (NOT_ON_CPU, LINEAR, {"accum_dtype": F32, "chunk_mem_const": 1}),
        "cut-cross-entropy": (NOT_ON_CPU, CCE, {}),
        "cut-cross-entropy, unfiltered": (GPU, CCE, {"filter_eps": None}),
        "Quack": (GPU, "quack.linear_cross_entropy.chunked_linear_cross_entropy", {}),
    },
    "linear_logprobs": {
        "llmfast": (NOT_ON_CPU, "", {}),
        "llmfast, 200 MiB": (NOT_ON_CPU, "losses.linear_logprobs", {"memory_budget": 200 * MIB}),
        "torch": (NOT_ON_CPU, "", {}),
        "torch, float32 logits": (NOT_ON_CPU, "", {}),
        "TRL": (NOT_ON_CPU, "trl.trainer.utils.selective_log_softmax", {}),
        "cut-cross-entropy": (NOT_ON_CPU, CCE, {"reduction": "none"}),
    },
    "linear_distillation": {
        "llmfast": (NOT_ON_CPU, "losses.linear_distillation", {"kind": "jsd", "memory_budget": "auto"}),
        "llmfast, 200 MiB": (
            NOT_ON_CPU,
            "losses.linear_distillation",
            {"kind": "jsd", "memory_budget": 200 * MIB},
        ),
        "llmfast, float32 logits": (
            NOT_ON_CPU,
            "losses.linear_distillation",
            {"kind": "jsd", "memory_budget": "auto", "slab_dtype": F32},
        ),
        "torch, float32 logits": (NOT_ON_CPU, "", {}),
        "TRL": (NOT_ON_CPU, "", {}),
        "Liger": (NOT_ON_CPU, JSD, {"accum_dtype": None}),
        "Liger, float32 sums": (NOT_ON_CPU, JSD, {"accum_dtype": F32}),
    },
    "mtp_cross_entropy": {
        "llmfast": (NOT_ON_CPU, "", {}),
        "llmfast, shared logits": (NOT_ON_CPU, "losses.mtp_cross_entropy", {"head_weights": [1.0] * 4}),
        "llmfast, head by head": (NOT_ON_CPU, "", {}),
        "torch, head by head": (NOT_ON_CPU, "", {}),
        "Liger, head by head": (NOT_ON_CPU, LINEAR, {"accum_dtype": None, "chunk_mem_const": 1}),
        "Liger, head by head, float32 sums": (NOT_ON_CPU, LINEAR, {"accum_dtype": F32, "chunk_mem_const": 1}),
        "cut-cross-entropy, head by head": (NOT_ON_CPU, CCE, {}),
    },
    "adamw": {
        "llmfast": (EVERYWHERE, "optim.FusedAdamW", ADAMW),
        "torch fused": (EVERYWHERE, "torch.optim.AdamW", {**ADAMW, "fused": True}),
        "torch foreach": (EVERYWHERE, "torch.optim.AdamW", {**ADAMW, "foreach": True}),
        "torch, one by one": (EVERYWHERE, "torch.optim.AdamW", {**ADAMW, "foreach": False}),
        "optimi": (NOT_ON_CPU, "optimi.AdamW", {**ADAMW, "triton": True}),
        "FlashOptim, 8-bit states": (NOT_ON_CPU, "flashoptim.FlashAdamW", ADAMW),
        "apex": (GPU, "apex.optimizers.FusedAdam", {**ADAMW, "adam_w_mode": True}),
        "bitsandbytes, 8-bit states": (GPU, "bitsandbytes.optim.AdamW8bit", ADAMW),
    },
    "adamw, bfloat16 with more bits": {
        "optimi, kahan": (NOT_ON_CPU, "optimi.AdamW", {**ADAMW, "triton": True, "kahan_sum": True}),
        "FlashOptim, 8-bit states": (NOT_ON_CPU, "flashoptim.FlashAdamW", ADAMW),
    },
}
# What an optimizer's name says of its options.
MODES = {
    "fp32 master": ("fp32", F32),
    "split16, fp32 states": ("split16", F32),
    "split16": ("split16", None),
    "split8": ("split8", None),
    "kahan": ("kahan", None),
    "stochastic": ("stochastic", None),
    "stochastic, 8-bit states": ("stochastic", "8bit"),
    "split8, 8-bit states": ("split8", "8bit"),
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Let libraries and our functions only note what they are asked for."""
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def noting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            seen.append((name, args, options))
            return torch.ones(1)

        return call

    monkeypatch.setattr(implementations, "_load", lambda module, name: noting(f"{module}.{name}"))
    for name in (
        "cross_entropy",
        "linear_cross_entropy",
        "linear_logprobs",
        "linear_distillation",
        "mtp_cross_entropy",
    ):
        monkeypatch.setattr(losses, name, noting(f"losses.{name}"))
    monkeypatch.setattr(optim, "FusedAdamW", noting("optim.FusedAdamW"))
    return seen


def inputs(operation: str, like: int = 1) -> list[Tensor]:
    """Return inputs of an operation, `like` times as many of each as are few, and wider if they are not few."""
    width = D if like == 1 else 16 * D
    hidden, weight = (torch.empty(n, width, dtype=BF16, device="meta") for n in (N * like, V * like))
    targets = torch.empty(N * like, dtype=torch.int64, device="meta")
    return {
        "cross_entropy": [torch.empty(N * like, V * like, dtype=BF16, device="meta"), targets],
        "linear_distillation": [hidden, weight, hidden.clone(), weight.clone()],
        "mtp_cross_entropy": [torch.empty(4, N * like, width, dtype=BF16, device="meta"), weight, targets],
    }.get(operation, [hidden, weight, targets])


ASKED = [
    (operation, name) for operation, names in CALLS.items() for name, (_, function, _) in names.items() if function
]


@pytest.mark.parametrize(("operation", "name"), ASKED)
def test_each_asks_its_library_for_what_its_name_says(operation: str, name: str, called: list[Any]) -> None:
    tiers, function, options = CALLS[operation][name]
    (one,) = (one for one in _IMPLEMENTATIONS[operation] if one.name == name)
    assert one.tiers == tiers
    given = [[torch.ones(3)]] if "adamw" in operation else inputs(operation, 4096)
    one.run(*given)
    assert {call[0] for call in called} == {function}
    for _, args, found in called:
        assert found == options
        if "adamw" in operation or operation in ("cross_entropy", "linear_cross_entropy"):
            assert [*args] == given
    if operation.startswith("linear") and "memory_budget" in options and options["memory_budget"] != "auto":
        called.clear()
        one.run(*inputs(operation))
        ((_, _, found),) = called
        if "sums" in name:  # as many chunks as large inputs have, by another plan
            assert found == {"accumulate_dtype": BF16}
        else:  # so that small inputs are split as well
            assert found == options | {"memory_budget": N * V // 4}


def test_every_implementation_is_looked_at() -> None:
    for operation, names in CALLS.items():
        offered = {one.name: one.tiers for one in _IMPLEMENTATIONS[operation]}
        if "more bits" in operation:
            offered = {name: tiers for name, tiers in offered.items() if not name.startswith("llmfast")}
        elif not hasattr(torch.nn, "LinearCrossEntropyOptions"):
            offered.setdefault("torch linear_cross_entropy", frozenset(EVERYWHERE))
        assert offered == {name: tiers for name, (tiers, _, _) in names.items()}, operation
        assert next(iter(offered)) == next(iter(names))
    assert {name: (o["master_weights"], o.get("state_dtype")) for name, o in implementations._MODES.items()} == MODES
    assert tuple(_IMPLEMENTATIONS)[-len(implementations.OPTIMIZERS) :] == implementations.OPTIMIZERS


@pytest.mark.parametrize("tier", ["cpu", "counted", "gpu"])
def test_only_those_of_a_tier_and_dtype_that_are_installed_are_compared(
    tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(implementations.Library, "installed", lambda self: self.module != "optimi")
    found = implementations.implementations("adamw", tier, BF16)
    names = [name for name, (tiers, _, _) in CALLS["adamw"].items() if tier in tiers and name != "optimi"]
    assert [*found] == names and all(name == one.name for name, one in found.items())
    wide = implementations.implementations("adamw", tier, F32)
    assert [*wide] == [name for name in names if not name.startswith("FlashOptim")]
    assert implementations.implementations("sgd, momentum", "gpu", BF16) == {}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_ours_is_what_it_is_called(mode: str) -> None:
    (one,) = (x for x in _IMPLEMENTATIONS["adamw, bfloat16 with more bits"] if x.name == f"llmfast, {mode}")
    p = torch.ones(3, dtype=BF16, requires_grad=True)
    optimizer = one.run([p])
    assert (optimizer.options.master_weights, optimizer.options.state_dtype) == MODES[mode]
    assert optimizer.param_groups[0]["lr"] == 1e-3 and one.dtypes == (BF16,)


@pytest.mark.parametrize(
    ("operation", "options"),
    [
        ("adamw, clipped", {"weight_decay": 0.01}),
        ("sgd, momentum", {"momentum": 0.9}),
        ("rmsprop", {"alpha": 0.99, "momentum": 0}),
        ("adagrad", {"lr_decay": 0}),
    ],
)
def test_optimizers_that_are_compared_do_the_same(operation: str, options: dict[str, Any]) -> None:
    """Take two steps with a gradient whose norm is above 1, which is the clip."""
    results = {}
    for one in _IMPLEMENTATIONS[operation]:
        p = torch.linspace(-1, 1, 6).requires_grad_()
        optimizer = one.run([p])
        inner = getattr(optimizer, "_optimizer", optimizer)
        assert inner.param_groups[0].items() >= {"lr": 1e-3, **options}.items(), one.name
        for step in (1.0, 3.0):
            p.grad = torch.linspace(1, 2, 6) * step
            optimizer.step()
        results[one.name] = p.detach()
        assert one.dtypes == (F32,)
        kind = one.name.partition(" ")[2]
        assert not kind or inner.defaults[kind] is True
    assert len(results) >= 2
    for found in results.values():
        torch.testing.assert_close(found, results["llmfast"], rtol=1e-6, atol=1e-7)
    if "clipped" in operation:
        plain = torch.linspace(-1, 1, 6).requires_grad_()
        optimizer = torch.optim.AdamW([plain], lr=1e-3)
        for step in (1.0, 3.0):
            plain.grad = torch.linspace(1, 2, 6) * step
            optimizer.step()
        assert (plain - results["llmfast"]).abs().max() > 1e-6


# Operations, and how a way's errors are counted.


def ways(operation: str) -> Iterator[Callable[..., Any]]:
    """Yield torch's ways and ours that compute in any dtype."""
    for one in _IMPLEMENTATIONS[operation]:
        if one.library.module in ("torch", "llmfast") and not any(
            w in one.name for w in ("compiled", "MiB", "float32")
        ):
            yield one


SIZES = {"mtp_cross_entropy": {"K": 4, "N": N, "D": D, "V": V}}
OPERATIONS = [(operation, one) for operation in counted._OPERATIONS for one in ways(operation)]


@pytest.mark.parametrize(("operation", "one"), OPERATIONS, ids=lambda x: getattr(x, "name", x))
def test_a_way_that_is_right_has_no_error_and_one_that_is_not_has_each(operation: str, one: Any) -> None:
    """Count in float64, where nothing is rounded; then scale what the way returns."""
    job = Job(operation, one.name, SIZES.get(operation, {"N": N, "D": D, "V": V}), dry=False, dtype="float64")
    if "torch linear" in one.name:
        job = Job(operation, one.name, job.size, dry=False, dtype="float32")
    errors = {}
    for factor in (1.0, 1.01):
        made = counted._OPERATIONS[operation](
            lambda *tensors, factor=factor: one.run(*tensors) * factor, job, getattr(torch, job.dtype)
        )
        made.run()
        errors[factor] = made.errors()
    assert errors[1.0].keys() == {"loss", "logits"} if operation == "cross_entropy" else {"loss", "hidden", "weight"}
    for name in errors[1.0]:
        assert errors[1.0][name] < 1e-5 and errors[1.01][name] == pytest.approx(0.01, rel=1e-2), name


def test_a_divergence_is_half_of_both() -> None:
    """Compare with the definition, and float32 logits with those of the inputs' dtype."""
    torch.manual_seed(0)
    hidden, weight, states, of_teacher = torch.randn(N, D), torch.randn(V, D), torch.randn(N, D), torch.randn(V, D)
    wanted = reference.linear_distillation(hidden, weight, TeacherStates(states, of_teacher), kind="jsd", beta=0.5)
    torch.testing.assert_close(implementations._divergence(hidden, weight, states, of_teacher), wanted)
    ids = torch.arange(N) % V
    low, wide = hidden.bfloat16(), weight.bfloat16()
    for name, dtype in (("_gathered", BF16), ("_gathered_float32", F32)):
        found = getattr(implementations, name)(low, wide, ids)
        assert found.dtype == dtype and found.shape == (N,)
    assert implementations._unfused(low, wide, ids).dtype == BF16
    assert implementations._unfused_float32(low, wide, ids).dtype == F32
    torch.testing.assert_close(
        implementations._unfused_float32(low, wide, ids), F.cross_entropy((low @ wide.T).float(), ids)
    )
