"""Vocab-parallel losses over real processes (gloo), against one process that holds everything."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from llmfast._dispatch import kernels_on_cpu
from llmfast.losses import cross_entropy, linear_cross_entropy, linear_logprobs, logprobs, reference
from support.plans import SIZES, forced
from support.ranks import Ranks

N, D = 7, 5
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


def total(result: Any) -> Tensor:
    if not isinstance(result, tuple):
        return (result * torch.linspace(0.5, 1.5, result.numel()).view(result.shape)).sum()
    loss, stats = result
    return loss + stats.lse.sum() + 0.5 * stats.entropy.sum()


def check_rank(rank: int, world: int, V: int) -> None:
    hidden, weight, bias, one = inputs(V)
    share = -(-V // world)
    own = slice(min(rank * share, V), min((rank + 1) * share, V))
    for name, given in OPTIONS.items():
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
        for size in SIZES:
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
    share = -(-V // world)
    own = slice(min(rank * share, V), min((rank + 1) * share, V))
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
    hidden, weight, _, targets = inputs(V)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    want = reference.linear_cross_entropy(h, w, targets)
    assert isinstance(want, Tensor)
    want_h, want_w = torch.autograd.grad(want, (h, w))

    # Tensor parallel: hidden replicated, classes sharded.
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    replicated = distribute_tensor(hidden, mesh, [Replicate()]).requires_grad_()
    loss = linear_cross_entropy(replicated, sharded, targets)
    loss.backward()
    assert isinstance(sharded.grad, DTensor) and isinstance(replicated.grad, DTensor)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sharded.grad.full_tensor(), want_w, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(replicated.grad.to_local(), want_h, rtol=1e-4, atol=1e-6)

    # The same with a plain hidden state, and a group that says what is meant.
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    plain = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(plain, sharded, targets, process_group=mesh.get_group())
    loss.backward()
    assert isinstance(sharded.grad, DTensor)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sharded.grad.full_tensor(), want_w, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(plain.grad, want_h, rtol=1e-4, atol=1e-6)

    # As under FSDP2: every rank has tokens of its own, and gradients are averaged.
    sharded = distribute_tensor(weight, mesh, [Shard(0)]).requires_grad_()
    mine = (hidden * (rank + 1)).requires_grad_()
    loss = linear_cross_entropy(mine, sharded, targets)
    loss.backward()
    w = weight.clone().requires_grad_()
    losses = [reference.linear_cross_entropy(hidden * (r + 1), w, targets) for r in range(world)]
    torch.testing.assert_close(loss, losses[rank].detach(), rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]
    (sum(losses) / world).backward()  # type: ignore[arg-type, operator]
    assert isinstance(sharded.grad, DTensor)
    torch.testing.assert_close(sharded.grad.full_tensor(), w.grad, rtol=1e-4, atol=1e-6)


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
    share = -(-V // world)
    h, w = hidden.requires_grad_(), weight[min(rank * share, V) : min((rank + 1) * share, V)].clone().requires_grad_()
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
    share = -(-V // world)
    own = slice(min(rank * share, V), min((rank + 1) * share, V))
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
    if kernels:
        with kernels_on_cpu():
            check_rank(rank, world, V)
            check_logprobs(rank, world, V)
            check_ignored(rank, world, V)
            check_far_from_zero(rank, world, V)
    else:
        check_rank(rank, world, V)
        check_logprobs(rank, world, V)
        check_ignored(rank, world, V)
        check_far_from_zero(rank, world, V)
        check_dtensors(rank, world, V)
        check_fsdp(rank, world, V)


# 10 classes over 3 ranks: 4, 4, 2; 5 over 4: 2, 2, 1 and none; 300 over 2.
@pytest.mark.parametrize(("world", "V"), [(3, 10), (4, 5), (2, 300)])
@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_ranks_agree_with_one_process(tmp_path: Path, world: int, V: int, kernels: bool) -> None:
    ranks = Ranks(world, tmp_path)
    try:
        ranks.run(check, V, kernels)
    finally:
        ranks.close()
