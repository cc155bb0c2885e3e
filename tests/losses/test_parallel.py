"""Vocab-parallel losses over real processes (gloo), against one process that holds everything."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmfast._dispatch import kernels_on_cpu
from llmfast.losses import (
    cross_entropy,
    linear_cross_entropy,
    linear_logprobs,
    logprobs,
    mtp_cross_entropy,
    mtp_logprobs,
    reference,
)
from support.plans import SIZES, forced
from support.ranks import Ranks

N, D = 5, 4
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "stats": {"return_stats": True},
    "everything": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0, "logit_scale": 1.3, "shift": 1},
    "weights": {
        "label_smoothing": 0.2,
        "z_loss": 1e-2,
        "class_weights": True,
        "token_weights": torch.linspace(0.1, 1, N),
    },
    "probabilities": {
        "probabilities": True,
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "softcap": 5.0,
        "class_weights": True,
        "token_weights": torch.linspace(0.1, 1, N),
    },
    "several targets": {
        "label_smoothing": 0.1,
        "z_loss": 1e-2,
        "class_weights": True,
        "target_weights": torch.tensor([1.0, 0.5, 0.25]),
        "return_stats": True,
    },
}


def inputs(V: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(V)
    hidden, weight, bias = (torch.randn(shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[2] = -100
    return hidden, weight, bias, targets


def own_classes(rank: int, world: int, V: int) -> slice:
    share = -(-V // world)
    return slice(min(rank * share, V), min((rank + 1) * share, V))


def total(result: Any) -> Tensor:
    if not isinstance(result, tuple):
        return (result * torch.linspace(0.5, 1.5, result.numel()).view(result.shape)).sum()
    loss, stats = result
    return loss + stats.lse.sum() + 0.5 * stats.entropy.sum()


def check_rank(rank: int, world: int, V: int) -> None:
    hidden, weight, bias, one = inputs(V)
    own = own_classes(rank, world, V)
    for place, (name, given) in enumerate(OPTIONS.items()):
        options = dict(given)
        if options.get("class_weights"):
            options["class_weights"] = torch.linspace(0.5, 1.5, V)
        targets = one
        if "target_weights" in options:  # a row may have one twice, and one that is ignored next to others
            targets = torch.stack([one, one.roll(1), torch.full_like(one, 1)], -1)
        if options.pop("probabilities", False):  # each rank has those of all classes
            targets = torch.rand(N, V, generator=torch.Generator().manual_seed(V)).softmax(-1)
        h, w, b = (t.clone().double().requires_grad_() for t in (hidden, weight, bias))
        truth = reference.linear_cross_entropy(h, w, targets, bias=b, **options)
        want = torch.autograd.grad(total(truth), (h, w, b))
        for size in [*SIZES][(place + world) % 2 :: 2]:  # the other two where there is one rank more or less
            h1, w1, b1 = (t.clone().requires_grad_() for t in (hidden, weight[own], bias[own]))
            with forced(None, size):
                found = linear_cross_entropy(
                    h1, w1, targets, bias=b1, process_group=dist.group.WORLD, vocab_size=V, **options
                )
                got = torch.autograd.grad(total(found), (h1, w1, b1))
            for a, c in zip(got, (want[0], want[1][own], want[2][own])):
                torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5, msg=f"{name} {size} {rank}")
            compare_values(found, truth)
        logits = (hidden @ weight.T + bias).double().requires_grad_()
        truth = reference.cross_entropy(logits, targets, **options)
        (want_logits,) = torch.autograd.grad(total(truth), logits)
        x = (hidden @ weight.T + bias)[:, own].clone().requires_grad_()
        found = cross_entropy(x, targets, process_group=dist.group.WORLD, vocab_size=V, **options)
        (got_logits,) = torch.autograd.grad(total(found), x)
        torch.testing.assert_close(got_logits.double(), want_logits[:, own], rtol=1e-5, atol=1e-5)
        compare_values(found, truth)
    with pytest.raises(ValueError, match="must hold"):
        cross_entropy(torch.zeros(N, 1), one, process_group=dist.group.WORLD, vocab_size=V + 3 * world)


def compare_values(found: Any, truth: Any) -> None:
    if isinstance(found, tuple):
        assert torch.equal(found[1].argmax, truth[1].argmax)
        torch.testing.assert_close(found[1].accuracy, truth[1].accuracy)
        found, truth = found[0], truth[0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)


def check_logprobs(rank: int, world: int, V: int) -> None:
    """Check each id of a token, wherever its class is, with statistics and all gradients."""
    hidden, weight, bias, one = inputs(V)
    own = own_classes(rank, world, V)
    ids = torch.stack([one, one.roll(1), one], -1)  # equal ones, and ignored ones next to others
    upstream = torch.linspace(-1, 1, ids.numel()).view(ids.shape)
    temperature = torch.linspace(0.5, 2, one.numel()).view(one.shape)
    options: dict[str, Any] = {"softcap": 5.0, "temperature": temperature, "return_stats": True, "return_rank": True}
    group: dict[str, Any] = {"process_group": dist.group.WORLD, "vocab_size": V}

    def total(result: Any) -> Tensor:
        return (result[0] * upstream).sum() + result[1].lse.sum() + 0.5 * result[1].entropy.sum()

    def compare(found: Any, truth: Any, got: Any, want: Any) -> None:
        assert torch.equal(found[1].argmax, truth[1].argmax) and torch.equal(found[1].rank, truth[1].rank)
        values = zip((found[0], *found[1][:2], *got), (truth[0], *truth[1][:2], *want), strict=True)
        for a, b in values:
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)

    leaves = [t.double().requires_grad_() for t in (hidden, weight, bias)]
    truth = reference.linear_logprobs(leaves[0], leaves[1], ids, bias=leaves[2], **options)
    want = torch.autograd.grad(total(truth), leaves)
    for size in SIZES:
        h, w, b = (t.clone().requires_grad_() for t in (hidden, weight[own], bias[own]))
        with forced(None, size):
            found = linear_logprobs(h, w, ids, bias=b, **group, **options)
            got = torch.autograd.grad(total(found), (h, w, b))
        compare(found, truth, got, (want[0], want[1][own], want[2][own]))
    logits = (hidden @ weight.T + bias).double().requires_grad_()
    truth = reference.logprobs(logits, ids, **options)
    (want_logits,) = torch.autograd.grad(total(truth), logits)
    x = (hidden @ weight.T + bias)[:, own].clone().requires_grad_()
    found = logprobs(x, ids, **group, **options)
    compare(found, truth, torch.autograd.grad(total(found), x), (want_logits[:, own],))
    far = logprobs((x + 1e4).detach(), ids, **group)  # differences alone count
    torch.testing.assert_close(far.double(), reference.logprobs(logits, ids), rtol=0, atol=4e-3)
    torch.testing.assert_close(logprobs(x.detach(), torch.full_like(ids, -100), **group), torch.zeros(ids.shape))


def check_dtensors(rank: int, world: int, V: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, bias, targets = inputs(V)
    h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
    want = reference.linear_cross_entropy(h, w, targets, bias=b)
    assert isinstance(want, Tensor)
    want_h, want_w, want_b = torch.autograd.grad(want, (h, w, b))

    def split(t: Tensor) -> DTensor:
        found: DTensor = distribute_tensor(t, mesh, [Shard(0)]).requires_grad_()
        return found

    def close(found: DTensor, want: Tensor | None) -> None:
        assert isinstance(found.grad, DTensor)
        torch.testing.assert_close(found.grad.full_tensor(), want, rtol=1e-4, atol=1e-6)

    # Tensor parallel: hidden replicated, classes sharded.
    sharded, biases = split(weight), split(bias)
    replicated = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    loss = linear_cross_entropy(replicated, sharded, targets, bias=biases)
    loss.backward()
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    for leaf, gradient in ((sharded, want_w), (biases, want_b), (replicated, want_h)):
        close(leaf, gradient)

    # The same with a plain hidden state, and a group that says what is meant.
    for more in ({}, {"vocab_size": V}):
        sharded, biases = split(weight), split(bias)
        plain = hidden.clone().requires_grad_()
        loss = linear_cross_entropy(plain, sharded, targets, bias=biases, process_group=mesh.get_group(), **more)
        loss.backward()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
        close(sharded, want_w)
        close(biases, want_b)
        torch.testing.assert_close(plain.grad, want_h, rtol=1e-4, atol=1e-6)

    # As under FSDP2: every rank has tokens of its own, and gradients are averaged.
    sharded, biases = split(weight), split(bias)
    mine = (hidden * (rank + 1)).requires_grad_()
    loss = linear_cross_entropy(mine, sharded, targets, bias=biases)
    loss.backward()
    w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    losses = [reference.linear_cross_entropy(hidden * (r + 1), w, targets, bias=b) for r in range(world)]
    torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
    (sum(losses) / world).backward()  # type: ignore[arg-type, operator]
    close(sharded, w.grad)
    close(biases, b.grad)

    for others, message in {
        (replicated, weight): "weight must be a DTensor where hidden or bias is one",
        (hidden, distribute_tensor(weight, mesh, [Shard(1)])): "weight must be sharded on dim 0 or replicated; its pl",
        (distribute_tensor(hidden, mesh, [Shard(0)]), sharded): "hidden must be replicated over the mesh that weight",
    }.items():
        with pytest.raises(ValueError, match=message):
            linear_cross_entropy(*others, targets)


def check_meshes(rank: int, world: int, V: int) -> None:
    """Check a mesh of two dimensions, of which the classes are split over one."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("a", "b"))
    hidden, weight, bias, targets = inputs(V)
    h, w, b = (t.clone().requires_grad_() for t in (hidden, weight, bias))
    want = reference.linear_cross_entropy(h, w, targets, bias=b)
    assert isinstance(want, Tensor)
    gradients = torch.autograd.grad(want, (h, w, b))
    everywhere = distribute_tensor(hidden, mesh, [Replicate()] * 2).requires_grad_()
    for placements in ([Replicate(), Shard(0)], [Shard(0), Replicate()]):
        everywhere.grad = None
        split = [distribute_tensor(t, mesh, placements).requires_grad_() for t in (weight, bias)]
        loss = linear_cross_entropy(everywhere, split[0], targets, bias=split[1])
        loss.backward()
        torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
        for leaf, gradient in zip((everywhere, *split), gradients):
            assert isinstance(leaf.grad, DTensor)
            torch.testing.assert_close(leaf.grad.full_tensor(), gradient, rtol=1e-4, atol=1e-6)

        # Every rank has tokens of its own (HSDP): gradients are averaged over the whole mesh.
        split = [distribute_tensor(t, mesh, placements).requires_grad_() for t in (weight, bias)]
        linear_cross_entropy(hidden * (rank + 1), split[0], targets, bias=split[1]).backward()
        leaves = [t.clone().requires_grad_() for t in (weight, bias)]
        losses = [
            reference.linear_cross_entropy(hidden * (r + 1), leaves[0], targets, bias=leaves[1]) for r in range(world)
        ]
        (sum(losses) / world).backward()  # type: ignore[arg-type, operator]
        for leaf, whole in zip(split, leaves):
            assert isinstance(leaf.grad, DTensor)
            torch.testing.assert_close(leaf.grad.full_tensor(), whole.grad, rtol=1e-4, atol=1e-6)
    both = distribute_tensor(weight, mesh, [Shard(0), Shard(0)])
    with pytest.raises(ValueError, match="weight may be sharded over only one dimension of its mesh"):
        linear_cross_entropy(everywhere, both, targets)


def check_calls(rank: int, world: int, V: int) -> None:
    """Check what rows do not see: counts, dtypes, buffers, and a second backward pass."""
    hidden, weight, bias, targets = inputs(V)
    own, group = own_classes(rank, world, V), {"process_group": dist.group.WORLD, "vocab_size": V}
    calls: list[tuple[dict[str, Any], torch.dtype, float]] = [
        ({"ignore_index": 1}, torch.float32, 1e-5),
        ({"num_valid": N - 1}, torch.float32, 1e-5),  # as many are valid
        ({"num_valid": torch.tensor(3.0)}, torch.float32, 1e-5),
        ({"reduction": "sum", "token_weights": torch.linspace(0.1, 1, N)}, torch.float32, 1e-5),
        ({"return_stats": True, "label_smoothing": 0.1}, torch.float64, 1e-12),
        ({"reduction": "none", "token_weights": torch.linspace(0.1, 1, N)}, torch.float64, 1e-12),
        ({"label_smoothing": 0.1}, torch.bfloat16, 3e-2),
        ({"reduction": "none", "return_stats": False}, torch.float16, 1e-2),
        ({"z_loss": 1e-2, "slab_dtype": torch.float32}, torch.bfloat16, 3e-2),
    ]
    for options, dtype, near in calls:
        y = torch.where(targets == 1, 0, targets).masked_fill(targets == -100, options.get("ignore_index", -100))
        h, w, b = (t.to(dtype).double().requires_grad_() for t in (hidden, weight, bias))
        meant = {name: value for name, value in options.items() if name != "slab_dtype"}
        truth = reference.linear_cross_entropy(h, w, y, bias=b, **meant)
        want = torch.autograd.grad(total(truth), (h, w, b))
        leaves = [t.detach().to(dtype).requires_grad_() for t in (h, w[own], b[own])]
        found = linear_cross_entropy(leaves[0], leaves[1], y.int(), bias=leaves[2], **group, **options)
        for _ in range(2):
            got = torch.autograd.grad(total(found), leaves, retain_graph=True)
            for a, t, c in zip(got, leaves, (want[0], want[1][own], want[2][own])):
                assert a.dtype == t.dtype
                torch.testing.assert_close(a.double(), c, rtol=near, atol=near, msg=f"{options} {rank}")
        value, exact = (t[0] if isinstance(t, tuple) else t for t in (found, truth))
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(value.double(), exact, rtol=near, atol=near)

    h, w, b = (t.double().requires_grad_() for t in (hidden, weight, bias))
    truth = reference.linear_cross_entropy(h, w, targets, bias=b)
    assert isinstance(truth, Tensor)
    want = torch.autograd.grad(truth, (h, w, b))
    for size in SIZES:
        h, w, b = (t.clone().requires_grad_() for t in (hidden, weight[own], bias[own]))
        main = torch.full_like(w, 0.5, requires_grad=False)
        with forced(None, size):
            linear_cross_entropy(h, w, targets, bias=b, accumulate_into=main, **group).backward()
        assert w.grad is None
        for a, c in ((h.grad, want[0]), (main - 0.5, want[1][own]), (b.grad, want[2][own])):
            assert a is not None
            torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)

    even, few = torch.randn(N, 2 * world, generator=torch.Generator().manual_seed(2)), targets.clamp(max=2 * world - 1)
    found = cross_entropy(even[:, 2 * rank : 2 * rank + 2], few, process_group=dist.group.WORLD)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(even, few))
    with pytest.raises(ValueError, match="grad_filter does not work with process_group"):
        linear_cross_entropy(hidden, weight[own], targets, grad_filter=1e-3, **group)


def check_heads(rank: int, world: int, V: int) -> None:
    """Check losses and log-probabilities of several heads, with their hidden states' and all other gradients."""
    _, weight, bias, labels = inputs(V)
    own = own_classes(rank, world, V)
    several = torch.randn(2, N, D, generator=torch.Generator().manual_seed(1))
    group: dict[str, Any] = {"process_group": dist.group.WORLD, "vocab_size": V}
    options: dict[str, Any] = {"head_weights": [1.0, 0.5], "token_weights": torch.linspace(0.1, 1, N), "softcap": 5.0}
    for hiddens in (several, several[0]):
        calls: list[tuple[Any, dict[str, Any]]] = [(mtp_cross_entropy, options | {"z_loss": 1e-2})]
        calls += [(mtp_cross_entropy, options | {"detach_unembedding": [False, True], "return_stats": True})]
        calls = calls if hiddens is several else calls[:1]
        calls += [(mtp_logprobs, {"softcap": 5.0} | ({} if hiddens is several else {"heads": 2}))]
        for function, given in calls:
            leaves = [t.double().requires_grad_() for t in (hiddens, weight, bias)]
            truth = function(leaves[0], leaves[1], labels, bias=leaves[2], **given)
            mine = [t.clone().requires_grad_() for t in (hiddens, weight[own], bias[own])]
            found = function(mine[0], mine[1], labels, bias=mine[2], **group, **given)
            if isinstance(found, tuple):
                for a, c in zip(found[1], truth[1]):
                    torch.testing.assert_close(a.double(), c.double(), rtol=1e-5, atol=1e-5)
                found, truth = found[0], truth[0]
            torch.testing.assert_close(found.double(), truth.detach(), rtol=1e-5, atol=1e-5)
            want = torch.autograd.grad(total(truth), leaves)
            for a, c in zip(torch.autograd.grad(total(found), mine), (want[0], want[1][own], want[2][own])):
                torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)


def check_fsdp(rank: int, world: int, V: int) -> None:
    """Check a head that FSDP2 has sharded, or already gathered, when the loss takes its weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (world,))
    hidden, weight, _, targets = inputs(V)
    x = torch.stack([hidden * (r + 1) for r in range(world)])
    for reshard in (False, True):
        model = torch.nn.Sequential(torch.nn.Linear(D, D, bias=False), torch.nn.Linear(D, V, bias=False))
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(D))
            model[1].weight.copy_(weight)
        trunk, head = model[0].weight.detach().clone(), weight.clone()
        for t in (trunk, head):
            t.requires_grad_()
        losses = [reference.linear_cross_entropy(x[r] @ trunk.T, head, targets) for r in range(world)]
        (sum(losses) / world).backward()  # type: ignore[arg-type, operator]

        fully_shard(model[0], mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model[1], mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        loss = linear_cross_entropy(model[0](x[rank]), model[1].weight, targets)
        loss.backward()
        torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
        for layer, want in ((model[0], trunk.grad), (model[1], head.grad)):
            assert isinstance(layer.weight.grad, DTensor)
            torch.testing.assert_close(layer.weight.grad.full_tensor(), want, rtol=1e-4, atol=1e-6)


def check_ignored(rank: int, world: int, V: int) -> None:
    """Check that a step without a valid label, its sum divided by 0, has gradients of zero."""
    hidden, weight, _, targets = inputs(V)
    ignored = torch.full_like(targets, -100)
    h, w = hidden.requires_grad_(), weight[own_classes(rank, world, V)].clone().requires_grad_()
    z = (hidden @ w.T).detach().requires_grad_()
    given: dict[str, Any] = {"process_group": dist.group.WORLD, "vocab_size": V, "reduction": "sum"}
    for size in SIZES:
        with forced(None, size):
            (linear_cross_entropy(h, w, ignored, **given) / 0).backward()
    (cross_entropy(z, ignored, **given) / 0).backward()
    for leaf in (h, w, z):
        assert leaf.grad is not None and leaf.grad.eq(0).all()


def check_far_from_zero(rank: int, world: int, V: int) -> None:
    """Check that a rank without classes adds nothing to the peak, however far below zero the others' logits are."""
    hidden, weight, _, targets = inputs(V)
    own = own_classes(rank, world, V)
    for offset in (-1000.0, 1000.0):
        z = (hidden @ weight.T + offset).double().requires_grad_()
        truth = reference.cross_entropy(z, targets, return_stats=True)
        (want,) = torch.autograd.grad(truth[0], z)
        x = z.detach()[:, own].float().requires_grad_()
        found = cross_entropy(x, targets, process_group=dist.group.WORLD, vocab_size=V, return_stats=True)
        (got,) = torch.autograd.grad(found[0], x)
        torch.testing.assert_close(got.double(), want[:, own], rtol=0, atol=1e-4)  # what logits so large round to
        assert torch.equal(found[1].argmax, truth[1].argmax)
        torch.testing.assert_close(found[0].double(), truth[0], rtol=0, atol=2e-4)


def check(rank: int, world: int, V: int, kernels: bool) -> None:
    """Check everything on both paths, and the slowest of it where ranks are few, or one has no classes."""
    with kernels_on_cpu() if kernels else nullcontext():
        check_rank(rank, world, V)
        check_logprobs(rank, world, V)
        check_ignored(rank, world, V)
        check_far_from_zero(rank, world, V)
        if world == 2 or (world == 4 and not kernels):
            check_calls(rank, world, V)
            check_heads(rank, world, V)
    if not kernels:
        check_dtensors(rank, world, V)
        if world == 4:
            check_meshes(rank, world, V)
        check_fsdp(rank, world, V)


# 10 classes over 3 ranks: 4, 4, 2; 5 over 4: 2, 2, 1 and none; 300 over 2.
@pytest.mark.parametrize(
    ("world", "V", "kernels"), [(3, 10, False), (4, 5, False), (2, 300, False), (4, 5, True), (2, 300, True)]
)
def test_ranks_agree_with_one_process(tmp_path: Path, world: int, V: int, kernels: bool) -> None:
    ranks = Ranks(world, tmp_path)
    try:
        ranks.run(check, V, kernels)
    finally:
        ranks.close()
