"""Compare estimated bytes with counted ones: of states, of what autograd keeps, and of whole training steps."""

import collections
import dataclasses
import random
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evidence.traffic import counting
from llmfast._units import parse_bytes
from llmfast.losses import linear_cross_entropy, mtp_cross_entropy
from llmfast.models import Decoder, DecoderConfig
from llmfast.models.memory import unfused_loss_bytes, verdict
from llmfast.optim import (
    Extras,
    FusedAdagrad,
    FusedAdam,
    FusedAdamW,
    FusedLion,
    FusedOptimizer,
    FusedRMSprop,
    FusedSGD,
)
from llmfast.plan import PRECISIONS, MemoryEstimate, Precision, activation_bytes, estimate_memory

SPLIT16 = next(p for p in PRECISIONS if p.name == "bf16, split16")


def extras(p: Precision) -> Extras:
    return {"master_weights": p.master_weights, "state_dtype": p.state_dtype}


KINDS: list[tuple[type[FusedOptimizer], dict[str, Any]]] = [
    *((FusedAdamW, options) for options in ({}, {"amsgrad": True}, {"ema_decay": 0.9})),
    *((FusedSGD, options) for options in ({}, {"momentum": 0.9})),
    *((FusedRMSprop, options) for options in ({}, {"momentum": 0.9}, {"momentum": 0.9, "centered": True})),
    *((FusedAdam, {}), (FusedAdagrad, {}), (FusedLion, {})),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=lambda p: p.name)
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_states_are_as_large_as_the_optimizers(
    kind: type[FusedOptimizer], options: dict[str, Any], precision: Precision
) -> None:
    if options.get("centered") and precision.state_dtype == "8bit":
        pytest.skip("the optimizer refuses these")
    params = [torch.randn(shape).to(precision.parameters).requires_grad_() for shape in ((64, 48), (1000,), (3,))]
    optimizer = kind(params, **extras(precision), **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    kept = [t for p in params for t in optimizer.state[p].values() if isinstance(t, Tensor)]
    planned = kind([torch.empty_like(p, device="meta") for p in params], **extras(precision), **options)
    assert planned.state_bytes() == optimizer.state_bytes() == sum(t.numel() * t.element_size() for t in kept)


@pytest.mark.parametrize(
    "own",
    [
        *({"state_dtype": dtype} for dtype in ("8bit", torch.float32)),
        *({"master_weights": master} for master in ("fp32", "split16", "split8", "kahan", None)),
        *({"ema_decay": decay} for decay in (0.9, None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"master_weights": "split16", "ema_decay": 0.5}], ids=str)
def test_states_of_groups_that_have_their_own_options(options: dict[str, Any], own: dict[str, Any]) -> None:
    params = [torch.ones(numel, dtype=torch.bfloat16, requires_grad=True) for numel in (640, 1300)]
    optimizer = FusedAdamW([{"params": params[:1]}, {"params": params[1:], **own}], **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert optimizer.state_bytes() == sum(t.nbytes for p in params for t in optimizer.state[p].values())


def test_precisions_are_what_their_names_say() -> None:
    """Formats of equally many bytes would not show otherwise."""
    for p in PRECISIONS:
        parts = [{torch.float32: "fp32", torch.bfloat16: "bf16"}[p.parameters]]
        parts += ["fp32 master" if p.master_weights == "fp32" else p.master_weights] if p.master_weights else []
        parts += ["8-bit moments"] if p.state_dtype == "8bit" else []
        assert p.name == ", ".join(parts)
        assert p.state_dtype in ((torch.float32,) if p.master_weights == "fp32" else (None, "8bit"))


def test_bytes_per_parameter_of_each_precision() -> None:
    """Count parameter, gradient and states, as in the table of the optimizers' traffic."""
    numel = 128 * 10_000
    a_parameter = {}
    for p in PRECISIONS:
        weight = torch.empty(numel, dtype=p.parameters, device="meta")
        states = FusedAdamW([weight], **extras(p)).state_bytes()
        a_parameter[p.name] = 2 * p.parameters.itemsize + states / numel
    assert a_parameter == pytest.approx(
        {
            "fp32": 16,
            "fp32, 8-bit moments": 8 + 2 * (1 + 4 / 128),
            "bf16, fp32 master": 16,
            "bf16, split16": 10,
            "bf16, split8": 9,
            "bf16, kahan": 10,
            "bf16, stochastic": 8,
            "bf16, stochastic, 8-bit moments": 4 + 2 * (1 + 4 / 128),
        },
        rel=1e-5,
    )


def saved_bytes(c: DecoderConfig, B: int, T: int, *, autocast: bool, dtype: torch.dtype) -> int:
    """Count the bytes that autograd keeps of a forward pass on this CPU, without parameters, and the hidden states."""
    model = Decoder(c).to(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}  # keep tensors alive, so that no address is reused

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        documents = torch.zeros(B, T, dtype=torch.int32)
        pack(model(torch.zeros(B, T, dtype=torch.int64), document_ids=documents, all_heads=c.mtp != "none"))
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize(("stored", "autocast"), [("float32", False), ("float32", True), ("bfloat16", False)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layers": 1, "ffn_width": 300, "tie_embeddings": False},
        {"mtp": "parallel", "mtp_heads": 3},
        {"mtp": "sequential", "mtp_heads": 2},
        {"mtp": "sequential", "mtp_heads": 2, "mtp_hidden": "post_norm", "mtp_repeated_layer": True},
        {"mtp": "shared", "mtp_heads": 2},
    ],
)
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # bfloat16 gains are not fused on a CPU
def test_activations_are_what_autograd_keeps(options: dict[str, Any], stored: str, autocast: bool) -> None:
    B, T, c = 2, 96, DecoderConfig(300, **{"width": 64, "layers": 3, "heads": 4} | options)
    dtype = getattr(torch, stored)
    precision = next(p for p in PRECISIONS if p.parameters == dtype)
    estimate = estimate_memory(c, batch_size=B, seq_len=T, precision=precision, autocast=autocast, device="cpu")
    kept = saved_bytes(c, B, T, autocast=autocast, dtype=dtype)
    assert estimate.activations + estimate.weight_copies == pytest.approx(kept, rel=0.03)


def test_activations_on_a_gpu_by_hand() -> None:
    """Use width 64, 4 heads, rows of 16 tokens, 192 in the SwiGLU; bfloat16 products on float32 parameters."""
    c = DecoderConfig(300, width=64, layers=2, heads=4)
    norm = 4 * 64 + 4
    block = 2 * norm + 2 * (2 + 3 + 2 + 1) * 64 + 2 * 4 * 192 + 2 * 16 + 2 * 2 * 16 + 4 * 4
    token = 8 + 4 * 16 + 16 + 2 * block + norm + 4 * 64
    found = activation_bytes(c, 3, 16, stored=torch.float32, compute=torch.bfloat16)
    assert found == (3 * 16 * token, 0)
    again = activation_bytes(c, 3, 16, stored=torch.float32, compute=torch.bfloat16, checkpoint=True)
    assert again == (3 * 16 * (token - 2 * block + 2 * 4 * 64), 3 * 16 * (block + 2 * 192))
    # Heads beyond those among the layers, and depths, which are not recomputed.
    head, depth = norm + 4 * 64, 2 * norm + 2 * 2 * 64 + 1 + block + norm + 4 * 64
    for mtp, count, more, more_again in (
        ("parallel", 3, 2 * (block + head), 2 * (4 * 64 + head)),
        ("sequential", 2, 2 * depth, 2 * depth),
        ("shared", 3, 0, 0),
    ):
        other = dataclasses.replace(c, mtp=mtp, mtp_heads=count)
        found = activation_bytes(other, 3, 16, stored=torch.float32, compute=torch.bfloat16)
        assert found == (3 * 16 * (token + more), 0)
        again = activation_bytes(other, 3, 16, stored=torch.float32, compute=torch.bfloat16, checkpoint=True)
        kept = token - 2 * block + 2 * 4 * 64 + more_again
        assert again == (3 * 16 * kept, 3 * 16 * (block + 2 * 192))


def test_activations_in_one_dtype_by_hand() -> None:
    """Float32 has no cast angles; on a CPU a norm keeps more, and attention's result exists twice."""
    c = DecoderConfig(300, width=64, layers=2, heads=4)
    for device, norm, results in (("cuda", 4 * 64 + 4, 8), ("cpu", 8 * 64 + 4, 9)):
        block = 2 * norm + 4 * results * 64 + 4 * 4 * 192 + 4 * 16 + 4 * 4
        token = 8 + 4 * 16 + 16 + 2 * block + norm + 4 * 64
        found = activation_bytes(c, 3, 16, stored=torch.float32, compute=torch.float32, device=cast(Any, device))
        assert found == (3 * 16 * token, 0)


def counted_peak(c: DecoderConfig, B: int, T: int, *, accumulate: int, autocast: bool, again: bool, fused: bool) -> int:
    """Measure the peak of two training steps on this CPU, including everything in them."""
    with counting() as counts:
        model = Decoder(c)
        if again:
            for block in model.blocks:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        optimizer = FusedAdamW(model.parameters(), max_grad_norm=1.0)
        tokens = torch.randint(0, c.vocab_size, (B, T))
        documents = torch.zeros(B, T, dtype=torch.int32)
        for micro in range(2 * accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                hidden = model(tokens, document_ids=documents, all_heads=c.mtp != "none")
                if c.mtp != "none":
                    loss = mtp_cross_entropy(hidden, model.unembedding, tokens)
                elif fused:
                    loss = linear_cross_entropy(hidden, model.unembedding, tokens)
                else:
                    loss = F.cross_entropy(F.linear(hidden, model.unembedding).flatten(0, 1), tokens.flatten())
            del hidden
            loss.backward()
            del loss
            if (micro + 1) % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return counts.peak_bytes


Case = tuple[dict[str, Any], int, int, int, dict[str, Any], float]
# Options of the decoder, rows, tokens per row, vocabulary, kind of step, and the tolerance of the estimate: some
# operators briefly hold memory that is not counted.
CASES: list[Case] = [
    ({}, 4, 128, 4096, {}, 0.03),
    ({}, 4, 128, 4096, {"fused": False}, 0.003),
    ({}, 4, 128, 4096, {"autocast": True, "fused": False}, 0.01),
    ({"width": 64, "layers": 6}, 2, 128, 1000, {"again": True}, 0.03),
    ({"width": 64, "layers": 8}, 2, 128, 300, {"again": True, "autocast": True, "accumulate": 2}, 0.015),
    ({"width": 256}, 1, 32, 4096, {}, 0.001),  # dominated by parameters and gradients
    ({"width": 256}, 1, 32, 4096, {"accumulate": 2}, 0.001),
    ({"width": 256, "tie_embeddings": False}, 1, 32, 4096, {"accumulate": 2}, 0.001),
    ({"mtp": "parallel", "mtp_heads": 3}, 4, 64, 4096, {}, 0.03),
    ({"mtp": "sequential", "mtp_heads": 2}, 2, 128, 500, {"autocast": True}, 0.05),
    ({"width": 64, "layers": 4}, 4, 256, 64, {}, 0.01),  # activations
    ({"width": 64, "layers": 2}, 8, 256, 64, {"again": True}, 0.03),  # those of one block, recomputed
    ({"width": 256, "layers": 8}, 1, 16, 64, {"autocast": True, "accumulate": 2}, 0.01),  # matrices in bfloat16
    ({"width": 64, "layers": 1, "tie_embeddings": False}, 1, 64, 1024, {"again": True, "accumulate": 2}, 0.015),
    ({"width": 128, "layers": 1, "tie_embeddings": False}, 1, 32, 400, {"again": True, "accumulate": 2}, 0.003),
    ({"width": 128, "layers": 1}, 2, 64, 2048, {"fused": False, "accumulate": 2}, 0.001),
]


def estimate_of(case: Case) -> tuple[MemoryEstimate, Callable[[MemoryEstimate], int]]:
    """Return the estimate of a case, and the function for the relevant peak."""
    options, B, T, vocab_size, how, _ = case
    estimate = estimate_memory(
        decoder(options, vocab_size),
        batch_size=B,
        seq_len=T,
        accumulate=how.get("accumulate", 1),
        autocast=how.get("autocast", False),
        device="cpu",
        checkpoint_activations=how.get("again", False),
    )
    return estimate, lambda e: e.peak if how.get("fused", True) else e.peak_unfused


def decoder(options: dict[str, Any], vocab_size: int) -> DecoderConfig:
    return DecoderConfig(vocab_size, **{"width": 128, "layers": 2, "heads": 4} | options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_peak_is_what_a_training_step_takes(case: Case) -> None:
    options, B, T, vocab_size, how, close = case
    how = {"accumulate": 1, "autocast": False, "again": False, "fused": True} | how
    counted = counted_peak(decoder(options, vocab_size), B, T, **how)
    estimate, peak = estimate_of(case)
    assert peak(estimate) == pytest.approx(counted, rel=close)


SHARDING = ("gathered", "buffers", "unreduced", "begin")


@pytest.mark.parametrize("term", [f.name for f in dataclasses.fields(MemoryEstimate) if f.name not in SHARDING])
def test_some_case_tells_if_a_term_of_the_peak_is_missing(term: str) -> None:
    """Detect a missing term by three times the tolerance, so also a term that is halved or doubled."""
    missed = []
    for case in CASES:
        estimate, peak = estimate_of(case)
        without = dataclasses.replace(estimate, **{term: not estimate.accumulate if term == "accumulate" else 0})
        missed.append(abs(peak(without) / peak(estimate) - 1) / case[-1])
    assert max(missed) > 3


def test_states_are_those_of_the_optimizer_that_is_asked_for() -> None:
    c = DecoderConfig(300, width=64, layers=2, heads=4)
    adamw = estimate_memory(c, batch_size=1, seq_len=16)
    for optimizer, states in ((FusedLion, 1), (FusedSGD, 0), (partial(FusedRMSprop, momentum=0.9, centered=True), 3)):
        estimate = estimate_memory(c, batch_size=1, seq_len=16, optimizer=cast(Any, optimizer))
        assert estimate.optimizer == pytest.approx(adamw.optimizer * states / 2, rel=0.01, abs=200)
        assert dataclasses.replace(estimate, optimizer=adamw.optimizer) == adamw


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("mtp", "heads"), [("none", 0), ("parallel", 3), ("sequential", 2), ("shared", 2)])
def test_one_block_at_a_time_is_computed_again_whatever_heads_there_are(
    mtp: Any, heads: int, layers: int, autocast: bool
) -> None:
    """A decoder of one layer whose heads are parallel has no block besides them."""
    c = DecoderConfig(300, width=64, layers=layers, heads=4, mtp=mtp, mtp_heads=heads)
    found = estimate_memory(c, batch_size=2, seq_len=16, autocast=autocast, checkpoint_activations=True)
    compute = torch.bfloat16 if autocast else torch.float32
    _, again = activation_bytes(c, 2, 16, stored=torch.float32, compute=compute, checkpoint=True)
    copies = 2 * (4 * 64 * 64 + 3 * 64 * 192) if autocast else 0  # of its matrices, in bfloat16
    assert again > 0 and found.recomputed == again + copies


def test_the_peak_is_that_of_the_largest_moment() -> None:
    """Draw sizes at random, some of them 0: each of the four moments is the largest in some of the draws."""
    draw, largest = random.Random(0), collections.Counter[int]()
    kinds = [f.name for f in dataclasses.fields(MemoryEstimate) if f.name != "accumulate"]
    for _ in range(400):
        size = {name: draw.choice([0, 1, 10, 30]) * draw.randint(1, 100) for name in kinds}
        size["begin"] *= draw.choice([1, 8])
        e = MemoryEstimate(**size, accumulate=draw.random() < 0.5)
        held = e.parameters + e.optimizer + e.gathered
        earlier = e.unreduced if e.unreduced else e.gradients * e.accumulate
        copies = e.weight_copies * (e.buffers > 0 and e.recomputed == 0)
        backward = held + earlier + e.activations + e.loss_gradients + e.recomputed + e.buffers + copies
        end = held + e.gradients + e.buffers + max(e.recomputed, e.tied_gradients)
        for loss, found in ((e.loss, e.peak), (e.loss_unfused, e.peak_unfused)):
            moments = [e.begin, held + earlier + e.activations + e.weight_copies + loss, backward, end]
            assert found == max(moments)
            largest[moments.index(found)] += 1
    assert min(largest[i] for i in range(4)) > 20


def test_of_one_shard_only_the_largest_gradient_remains_where_backward_steps() -> None:
    c = DecoderConfig(300, width=64, layers=2, heads=4)
    alone, e = (estimate_memory(c, batch_size=2, seq_len=16, in_backward=True, ranks=n, shards=n) for n in (1, 8))
    assert alone.gradients == 4 * 384 * 64 and e.gradients == 4 * 384 * 64 // 8  # gate and up, in one piece


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("precision", "autocast"), [(PRECISIONS[0], True), (PRECISIONS[0], False), (SPLIT16, True)])
@pytest.mark.parametrize(("mtp", "heads", "V"), [("none", 0, 300), ("none", 0, 9000), ("sequential", 2, 300)])
def test_the_loss_is_planned_for_what_is_trained(
    mtp: Any, heads: int, V: int, precision: Precision, autocast: bool, device: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, torch's loss is used for few float32 logits; elsewhere a plan says what the fused one takes."""
    asked: list[Any] = []
    made = SimpleNamespace(make=lambda *shape, **how: asked.append((shape, how)) or SimpleNamespace(peak_bytes=7))
    monkeypatch.setattr("llmfast.models.memory.LinearCrossEntropyPlan", made)
    c = DecoderConfig(V, width=64, layers=1, heads=4, mtp=mtp, mtp_heads=heads)
    how: dict[str, Any] = {"precision": precision, "autocast": autocast, "device": device, "gpu_memory": 5}
    e = estimate_memory(c, batch_size=2, seq_len=16, **how)
    stored = precision.parameters
    compute = torch.bfloat16 if autocast else stored
    N = 2 * 16 * (1 + heads)
    kinds = {"dtype": compute, "weight_dtype": stored, "device": device, "kernels": device == "cuda", "gpu_memory": 5}
    assert asked == [((N, 64, V), kinds)]
    cast_inputs = 2 * (N + V) * 64 if compute != stored else 0
    unfused = unfused_loss_bytes(N, 64, V, stored)
    torchs = device == "cpu" and compute == torch.float32 and mtp == "none" and V == 300
    assert e.loss == (unfused if torchs else 7) + cast_inputs and e.loss_unfused == unfused + cast_inputs
    assert e.loss_gradients == (N + V) * 64 * stored.itemsize


def test_what_makes_it_smaller() -> None:
    c = DecoderConfig(128_256, width=2048, layers=16, heads=16)
    usual = estimate_memory(c, batch_size=4, seq_len=4096)
    assert usual.peak < usual.peak_unfused
    assert usual.loss_unfused > 12 * 4 * 4096 * 128_256
    assert usual.loss < (1 << 30) + 3 * (128_256 + 4 * 4096) * 2048 * 4  # a slab of 1 GiB, and gradients
    again = estimate_memory(c, batch_size=4, seq_len=4096, checkpoint_activations=True)
    assert again.activations < usual.activations / 5 and again.peak < usual.peak
    assert again.recomputed == pytest.approx((usual.activations + usual.weight_copies) / 16, rel=0.1)
    freed = estimate_memory(c, batch_size=4, seq_len=4096, in_backward=True)
    assert freed.gradients == 128_256 * 2048 * 4  # the largest parameter
    small = estimate_memory(c, batch_size=4, seq_len=4096, precision=SPLIT16, autocast=False)
    assert small.parameters * 2 == usual.parameters and small.optimizer * 8 == pytest.approx(
        usual.optimizer * 6, rel=1e-4
    )
    assert small.weight_copies == 0 and usual.weight_copies > 0
    assert estimate_memory(c, batch_size=4, seq_len=4096, gpu_memory=4 << 30).loss < usual.loss


@pytest.mark.parametrize(
    ("N", "D", "V", "how"),
    [
        *((512, 32, 4096, how) for how in ("float32", "autocast", "bfloat16")),
        *((16, 1024, 512, "float32"), (1024, 256, 64, "float32")),
    ],
)
def test_the_unfused_loss_is_what_torch_takes(N: int, D: int, V: int, how: str) -> None:
    """Cover cases dominated by logits, and two dominated by gradients of the weight and of the hidden states."""
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    hidden, weight = (torch.randn(n, D).to(dtype).requires_grad_() for n in (N, V))
    targets = torch.randint(0, V, (N,))
    with counting() as counts:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            loss = F.cross_entropy(F.linear(hidden, weight).float(), targets)
        loss.backward()
    inputs = (N + V) * D * 2 if how == "autocast" else 0  # cast inputs
    assert counts.peak_bytes == pytest.approx(unfused_loss_bytes(N, D, V, dtype) + inputs, abs=64)


def test_amounts() -> None:
    for text, size in (("24GiB", 24 << 30), ("80 GB", 80 * 10**9), ("1.5 MiB", 3 << 19), ("1e9", 10**9), ("7kB", 7000)):
        assert parse_bytes(text) == size
    for text in ("", "GiB", "24 apples", "1.2.3GB", "-4GB", "0GB"):
        with pytest.raises(ValueError, match="amount of memory"):
            parse_bytes(text)
    assert [verdict(need, 100) for need in (90, 91, 100, 101)] == ["fits", "just fits", "just fits", "too large"]


def test_refuses() -> None:
    c = DecoderConfig(10, width=8, layers=1, heads=2)
    for name in ("batch_size", "seq_len", "accumulate", "ranks", "shards"):
        with pytest.raises(ValueError, match=f"{name} must be above 0; got 0"):
            estimate_memory(c, **{"batch_size": 1, "seq_len": 1, name: 0})
    with pytest.raises(ValueError, match="ranks must divide into sets of shards=3; got 4"):
        estimate_memory(c, batch_size=1, seq_len=1, ranks=4, shards=3)


def test_ranks_with_models_of_their_own_keep_the_gradients_that_they_reduce() -> None:
    c = DecoderConfig(300, width=64, layers=2, heads=4)
    alone = estimate_memory(c, batch_size=2, seq_len=16)
    ddp = estimate_memory(c, batch_size=2, seq_len=16, ranks=4)
    assert (alone.tied_gradients, alone.gathered, alone.buffers, alone.unreduced) == (2 * 300 * 64 * 4, 0, 0, 0)
    assert ddp == dataclasses.replace(alone, accumulate=True, tied_gradients=3 * 300 * 64 * 4)
    assert ddp == dataclasses.replace(estimate_memory(c, batch_size=2, seq_len=16, accumulate=2), accumulate=True)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_shards_hold_by_hand(accumulate: int, again: bool) -> None:
    """Use 300 classes of width 64, tied, on 8 ranks: no dimension divides by 8 but those of 64 and 192."""
    c = DecoderConfig(300, width=64, layers=2, heads=4)
    shape: dict[str, Any] = {"batch_size": 2, "seq_len": 16, "accumulate": accumulate, "checkpoint_activations": again}
    alone, e = estimate_memory(c, **shape), estimate_memory(c, **shape, ranks=16, shards=8)
    block = 4 * 64 * 64 + 3 * 64 * 192 + 2 * 64
    outside = 300 * 64 + 64
    own = 4 * (38 * 64 + 8 + 2 * block // 8)
    assert e.parameters == e.gradients == own
    assert e.optimizer == pytest.approx(2 * own, rel=0.01)
    assert e.gathered == 4 * outside and e.buffers == 4 * 5 * block and e.begin == alone.parameters
    assert e.unreduced == (alone.gradients if accumulate > 1 else 0)
    assert e.tied_gradients == 4 * (3 * 300 * 64 if accumulate > 1 else 2 * outside)
    for name in ("activations", "recomputed", "weight_copies", "loss", "loss_unfused", "loss_gradients"):
        assert getattr(e, name) == getattr(alone, name)
    held = e.parameters + e.optimizer + e.gathered
    forward = e.unreduced + e.activations + e.weight_copies + e.loss
    copies = 0 if again else e.weight_copies  # of matrices, which backward needs
    backward = e.unreduced + e.activations + copies + e.loss_gradients + e.recomputed + e.buffers
    end = e.gradients + e.buffers + max(e.recomputed, (3 if accumulate > 1 else 2) * 4 * 300 * 64, 2 * e.gathered)
    assert e.peak == max(e.begin, held + max(forward, backward, end))


def test_a_large_model_is_whole_before_it_is_sharded() -> None:
    c = DecoderConfig(1000, width=1024, layers=24, heads=8)
    e = estimate_memory(c, batch_size=1, seq_len=16, ranks=64, shards=64, checkpoint_activations=True)
    assert e.peak == e.begin > 20 * (e.parameters + e.optimizer)
