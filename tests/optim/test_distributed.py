"""Optimizers over real processes (gloo): sharded parameters, FSDP2, DDP and checkpoints, against one process."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from llmfast._dispatch import kernels_on_cpu
from llmfast.optim import (
    FusedAdagrad,
    FusedAdamW,
    FusedLion,
    FusedOptimizer,
    FusedRMSprop,
    FusedSGD,
    optimizer_in_backward,
)
from support.ranks import Ranks

WORLD = 4
BF16, F32 = torch.bfloat16, torch.float32
Layout = tuple[tuple[int, ...], tuple[Placement, ...]]  # mesh and placements
Put = Callable[[Tensor], Tensor]

ROWS, COLUMNS, COPIES = (Shard(0),), (Shard(1),), (Replicate(),)
BLOCKS: Layout = ((2, 2), (Shard(0), Shard(1)))
COPIES_OF_ROWS: Layout = ((2, 2), (Replicate(), Shard(0)))
SOME_LAYOUTS: list[Layout] = [((3,), ROWS), BLOCKS]
LAYOUTS: list[Layout] = [*SOME_LAYOUTS, ((3,), COLUMNS), ((3,), COPIES), COPIES_OF_ROWS]
# Of 3 ranks, one has nothing of the second by rows, of the third by columns.
SHAPES = [(7, 5), (2, 6), (5, 2), (3, 4, 2)]
OPTIMIZERS: list[Callable[..., FusedOptimizer]] = [
    functools.partial(FusedAdamW, lr=1e-2, weight_decay=0.1, amsgrad=True),
    functools.partial(FusedSGD, lr=1e-2, momentum=0.9, dampening=0.1, weight_decay=0.1),
    functools.partial(FusedRMSprop, momentum=0.9, centered=True),
    functools.partial(FusedAdagrad, lr_decay=0.1, initial_accumulator_value=0.1),
    functools.partial(FusedLion, lr=1e-2, weight_decay=0.1),
]


@pytest.fixture(scope="module")
def started() -> Iterator[list[Ranks]]:
    groups: list[Ranks] = []
    yield groups
    for group in groups:
        group.close()


@pytest.fixture
def ranks(started: list[Ranks], tmp_path: Path) -> Ranks:
    """Start one group of processes for all tests, and a new one after a failure, which ends it."""
    if not started or not started[-1].alive:
        started.append(Ranks(WORLD, tmp_path))
    return started[-1]


# What the processes share.


def taking(path: str) -> AbstractContextManager[None]:
    return kernels_on_cpu() if path == "kernels" else nullcontext()


@functools.cache
def mesh_of(*shape: int) -> DeviceMesh:
    """Return a mesh of the first ranks; the other ranks must also call this."""
    names = ("outer", "inner") if len(shape) == 2 else ("all",)
    return DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape), mesh_dim_names=names)


def putting(layout: Layout) -> Put | None:
    """Return a function that makes a tensor a DTensor; None for a rank outside its mesh."""
    shape, placements = layout
    mesh = mesh_of(*shape)
    return None if mesh.get_coordinate() is None else functools.partial(spread, mesh=mesh, placements=placements)


def spread(t: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    return distribute_tensor(t.clone(), mesh, placements, src_data_rank=None)


def whole(t: Tensor) -> Tensor:
    t = t.detach()
    return t.full_tensor() if isinstance(t, DTensor) else t


def drawn(seed: int, shapes: Sequence[Sequence[int]], dtype: torch.dtype = F32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tuple(s), generator=generator).to(dtype) for s in shapes]


def trained(
    make: Callable[..., FusedOptimizer], put: Put = torch.clone, dtype: torch.dtype = F32
) -> tuple[list[Tensor], FusedOptimizer]:
    """Run some steps that are the same whatever `put` makes of parameters and gradients."""
    params = [put(t).requires_grad_() for t in drawn(0, SHAPES, dtype)]
    optimizer = make(params)
    for step in (1, 2):
        for p, g in zip(params, drawn(step, SHAPES, dtype)):
            p.grad = put(g)
        optimizer.step()
    return params, optimizer


def compare(path: str, ours: Tensor, expected: Tensor) -> None:
    """Compare bits for kernels; torch's vectorized CPU code differs in the last bit at the end of a tensor."""
    rounding = 0.0 if path == "kernels" else 1e-6
    torch.testing.assert_close(whole(ours), whole(expected), rtol=rounding, atol=rounding)


def network(seed: int = 0) -> nn.Sequential:
    """Create a network of which the last of 3 ranks has nothing of the second layer."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 2))


def sharded(model: nn.Sequential, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> nn.Sequential:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=None if dtype is None else F32)
    for module in (model[0], model[2], model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def loss_of(model: nn.Module, step: int, rank: int, dtype: torch.dtype = F32) -> Tensor:
    """Compute the loss of data that differ between ranks."""
    (x,) = drawn(100 * step + rank, [(8, 6)], dtype)
    result: Tensor = (model(x).float() ** 2).mean()
    return result


def average_gradients(model: nn.Module, step: int, replicas: int, dtype: torch.dtype = F32) -> None:
    """Average gradients as data-parallel ranks do, with forward and backward in `dtype`, in one process."""
    grads = [torch.zeros_like(p) for p in model.parameters()]
    for rank in range(replicas):
        twin = copy.deepcopy(model).to(dtype)
        loss_of(twin, step, rank, dtype).backward()
        for g, p in zip(grads, twin.parameters()):
            assert p.grad is not None
            g += p.grad.float() / replicas
    for p, g in zip(model.parameters(), grads):
        p.grad = g


def fed(model: nn.Module, optimizer: FusedOptimizer, step: int) -> None:
    """Step with gradients that are the same wherever the model's parameters are."""
    for p, g in zip(model.parameters(), drawn(step, [p.shape for p in model.parameters()])):
        g = g.to(p.dtype)
        p.grad = spread(g, p.device_mesh, p.placements) if isinstance(p, DTensor) else g
    optimizer.step()
    optimizer.zero_grad()


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 1e-5) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(whole(p), whole(q), rtol=tolerance, atol=tolerance)


# The tests: what the processes do, and its name.


def check_layouts(rank: int, world: int, path: str) -> None:
    with taking(path):
        for make in OPTIMIZERS:
            expected, truth = trained(make)
            for layout in LAYOUTS if make is OPTIMIZERS[0] else SOME_LAYOUTS:
                if (put := putting(layout)) is None:
                    continue
                params, optimizer = trained(make, put)
                for p, q in zip(params, expected):
                    compare(path, p, q)
                    assert optimizer.state[p].keys() == truth.state[q].keys()
                    for name, value in truth.state[q].items():
                        ours = optimizer.state[p][name]
                        assert name == "step" or (isinstance(ours, DTensor) and ours.placements == layout[1])
                        compare(path, ours, value)


def test_pieces_are_updated_like_the_whole(ranks: Ranks, path: str) -> None:
    ranks.run(check_layouts, path)


def check_formats(rank: int, world: int, path: str) -> None:
    with taking(path):
        for options in (
            {"master_weights": "split16", "state_dtype": F32, "ema_decay": 0.9},
            {"master_weights": "kahan", "state_dtype": BF16},
            {"state_dtype": "8bit"},
        ):
            make = functools.partial(FusedAdamW, lr=1e-2, **options)
            dtype = F32 if options["state_dtype"] == "8bit" else BF16
            expected, truth = trained(make, dtype=dtype)
            for layout in SOME_LAYOUTS:
                if (put := putting(layout)) is None:
                    continue
                params, optimizer = trained(make, put, dtype)
                for p, q in zip(params, expected):
                    if options["state_dtype"] != "8bit":
                        compare(path, optimizer.master_value(p), truth.master_value(q))
                    else:  # scales are those of pieces
                        torch.testing.assert_close(whole(p), q.detach(), rtol=0, atol=2e-3)


def test_precision_modes_of_pieces(ranks: Ranks, path: str) -> None:
    ranks.run(check_formats, path)


def check_noise(rank: int, world: int, path: str) -> None:
    make = functools.partial(FusedAdamW, lr=1e-2, master_weights="stochastic", seed=5)
    with taking(path):
        expected, _ = trained(make, dtype=BF16)
        layouts: list[Layout] = [((n,), placements) for n in (1, 2, 3) for placements in (ROWS, COLUMNS)]
        for layout in [*layouts, BLOCKS, COPIES_OF_ROWS]:
            if (put := putting(layout)) is not None:
                params, _ = trained(make, put, BF16)
                for p, q in zip(params, expected):
                    assert torch.equal(whole(p), q), layout

        # FSDP over tensor parallelism cuts rows in another order.
        mesh = mesh_of(2, 2)
        model, alone = network().to(BF16), network().to(BF16)
        parallelize_module(model, mesh["inner"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        sharded(model, mesh["outer"])
        a, b = make(model.parameters()), make(alone.parameters())
        for step in range(1, 4):
            fed(model, a, step)
            fed(alone, b, step)
        assert_same(model, alone, 0)


def test_stochastic_rounding_does_not_depend_on_the_number_of_ranks(ranks: Ranks, path: str) -> None:
    ranks.run(check_noise, path)


def check_fsdp(rank: int, world: int, path: str) -> None:
    for mesh, dtype in ((mesh_of(3), None), (mesh_of(3), BF16), (mesh_of(2, 2), None)):
        if mesh.get_coordinate() is None:
            continue
        ours, alone = sharded(network(), mesh, dtype), network()
        with taking(path):
            a, b = (FusedAdamW(m.parameters(), lr=1e-2, max_grad_norm=0.3, ema_decay=0.9) for m in (ours, alone))
            for step in range(3):
                loss_of(ours, step, rank).backward()
                average_gradients(alone, step, mesh.size(), dtype or F32)
                for optimizer in (a, b):
                    optimizer.step()
                    optimizer.zero_grad()
                torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
        assert_same(ours, alone)
        held = [t.to_local() if isinstance(t, DTensor) else t for state in a.state.values() for t in state.values()]
        assert a.state_bytes() == sum(t.nbytes for t in held) < b.state_bytes()  # of this rank's pieces
        with a.ema_weights(), b.ema_weights():
            assert_same(ours, alone)


def test_fsdp_trains_like_one_process(ranks: Ranks, path: str) -> None:
    ranks.run(check_fsdp, path)


def check_norm(rank: int, world: int, path: str) -> None:
    # Plain parameters, as DDP leaves them, and pieces of all kinds. Ranks 2 and 3 have nothing of (2, 6) by rows.
    found = [putting(layout) for layout in (((4,), ROWS), BLOCKS, ((4,), COLUMNS), COPIES_OF_ROWS, ((4,), COPIES))]
    puts: list[Put] = [torch.clone, *(put for put in found if put is not None)]
    shapes = [(2, 6), (9, 3)] * len(puts)
    params = [puts[i // 2](t).requires_grad_() for i, t in enumerate(drawn(0, shapes))]
    alone = [t.requires_grad_() for t in drawn(0, shapes)]
    with taking(path):
        a, b = FusedAdamW(params, lr=1e-2, max_grad_norm=1.5), torch.optim.AdamW(alone, lr=1e-2)
        for step in range(1, 4):
            for i, (p, q, g) in enumerate(zip(params, alone, drawn(step, shapes))):
                g *= 0.01 if step == 2 else 1.0  # not clipped
                p.grad, q.grad = puts[i // 2](g), g
            a.step()
            norm = torch.nn.utils.clip_grad_norm_(alone, 1.5)
            b.step()
            torch.testing.assert_close(a.grad_norm, norm, rtol=1e-6, atol=0)
        for p, q in zip(params, alone):
            torch.testing.assert_close(whole(p), q.detach(), rtol=1e-6, atol=1e-6)

        # What one rank alone knows to be infinite.
        before = [whole(p) for p in params]
        for i, (p, g) in enumerate(zip(params, drawn(9, shapes))):
            p.grad = puts[i // 2](g)
        grad = params[5].grad
        if rank == 3 and isinstance(grad, DTensor):
            grad.to_local()[0, 0] = torch.inf
        a.step()
        assert a.grad_norm == torch.inf
        for p, value in zip(params, before):
            assert torch.equal(whole(p), value)
            assert a.state[p]["step"] == 3


def test_the_norm_is_of_all_pieces_on_all_ranks(ranks: Ranks, path: str) -> None:
    ranks.run(check_norm, path)


def check_uneven_gradients(rank: int, world: int, path: str) -> None:
    params = []
    for layout in (((4,), ROWS), BLOCKS):
        put = putting(layout)
        assert put is not None
        params.append(put(torch.ones(8, 4)).requires_grad_())
        params[-1].grad = put(torch.ones(8, 4))
    # Columns first: rank 0 goes without kernels there, and its other parameter comes first.
    if rank == 0:
        params[0].grad = DTensor.from_local(torch.ones(4, 2).T, mesh_of(4), ROWS)
    with taking(path):
        optimizer = FusedAdamW(params, max_grad_norm=1.0)
        optimizer.step()
        assert optimizer.grad_norm == 8

        # And no gradient at all.
        params[0].grad = None if rank == 0 else torch.ones_like(params[0])
        optimizer = FusedAdamW([params[0]], max_grad_norm=1.0)
        optimizer.step()
        torch.testing.assert_close(optimizer.grad_norm, torch.tensor(24.0).sqrt())


def test_ranks_with_other_kinds_of_gradients_do_not_wait(ranks: Ranks, path: str) -> None:
    ranks.run(check_uneven_gradients, path)


def check_clips_of_groups(rank: int, world: int, path: str) -> None:
    """Check that all ranks sum the same numbers, even if one has nothing of a group or no gradients for it."""
    found = [putting(layout) for layout in (((4,), ROWS), BLOCKS, COPIES_OF_ROWS)]
    puts: list[Put] = [torch.clone, *(put for put in found if put is not None)]
    assert len(puts) == 4
    shapes = [(2, 6), (9, 3)] * len(puts)  # of the first, ranks 2 and 3 have nothing by rows
    params = [puts[i // 2](t).requires_grad_() for i, t in enumerate(drawn(0, shapes))]
    alone = [t.requires_grad_() for t in drawn(0, shapes)]
    groups = [{"params": params[::3]}, {"params": params[1::3], "max_grad_norm": 0.3}]
    groups.append({"params": params[2::3], "max_grad_norm": None, "state_dtype": "8bit"})
    with taking(path):
        a, b = FusedAdamW(groups, lr=1e-2, max_grad_norm=1.5), torch.optim.AdamW(alone, lr=1e-2)
        for step in range(1, 4):
            for i, (p, q, g) in enumerate(zip(params, alone, drawn(step, shapes))):
                p.grad, q.grad = puts[i // 2](g), g
            a.step()
            norms = [torch.nn.utils.clip_grad_norm_(alone[k::3], most) for k, most in ((0, 1.5), (1, 0.3))]
            b.step()
            torch.testing.assert_close(a.grad_norm, torch.stack(norms).norm(), rtol=1e-6, atol=0)
        for i, (p, q) in enumerate(zip(params, alone)):
            rounding = 5e-3 if i % 3 == 2 else 1e-6
            torch.testing.assert_close(whole(p), q.detach(), rtol=rounding, atol=rounding)

        before = [whole(p) for p in params]
        for i, (p, g) in enumerate(zip(params, drawn(9, shapes))):
            p.grad = puts[i // 2](g)
        grad = params[4].grad
        if rank == 3 and isinstance(grad, DTensor):
            grad.to_local()[0, 0] = torch.inf
        a.step()
        assert a.grad_norm == torch.inf
        assert all(torch.equal(whole(p), value) for p, value in zip(params, before))


def test_groups_are_clipped_over_all_ranks(ranks: Ranks, path: str) -> None:
    ranks.run(check_clips_of_groups, path)


def check_partial(rank: int, world: int, path: str) -> None:
    mesh = mesh_of(4)
    weight, x = drawn(0, [(3, 4), (8, 4)])
    ours, alone = spread(weight, mesh, COPIES).requires_grad_(), weight.clone().requires_grad_()
    with taking(path):
        a, b = (FusedAdamW([p], lr=0.1, max_grad_norm=0.5) for p in (ours, alone))
        for _ in range(3):
            ((spread(x, mesh, ROWS) @ ours.T) ** 2).sum().backward()
            ((x @ alone.T) ** 2).sum().backward()
            assert isinstance(ours.grad, DTensor) and ours.grad.placements[0].is_partial()
            for optimizer in (a, b):
                optimizer.step()
                optimizer.zero_grad()
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(whole(ours), alone.detach(), rtol=1e-6, atol=1e-6)


def test_gradients_that_ranks_have_parts_of_are_added_up(ranks: Ranks, path: str) -> None:
    ranks.run(check_partial, path)


def check_refused_states(rank: int, world: int, path: str) -> None:
    full, other = torch.ones(4, 4, requires_grad=True), spread(torch.ones(4, 4), mesh_of(4), COLUMNS).requires_grad_()
    ours = spread(torch.ones(4, 4), mesh_of(4), ROWS).requires_grad_()
    with taking(path):
        for p in (full, other):
            p.grad, ours.grad = torch.ones_like(p), torch.ones_like(ours)
            source, target = FusedAdamW([p]), FusedAdamW([ours])
            source.step()
            target.load_state_dict(source.state_dict())
            with pytest.raises(ValueError, match=r"state exp_avg .* must be sharded as its parameter"):
                target.step()
    assert torch.equal(whole(ours), torch.ones(4, 4))


def test_states_that_are_spread_otherwise_are_refused(ranks: Ranks, path: str) -> None:
    ranks.run(check_refused_states, path)


def check_scaler(rank: int, world: int, path: str) -> None:
    model = sharded(network(), mesh_of(4))
    with taking(path):
        optimizer = FusedAdamW(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        for overflow in (False, True):
            scaler.scale(loss_of(model, 0, rank)).backward()
            grad = model[0].weight.grad
            assert isinstance(grad, DTensor)
            if overflow and rank == 1:
                grad.to_local().fill_(torch.inf)
            before = [whole(p) for p in model.parameters()]
            scaler.step(optimizer)
            scaler.update()
            for p, value in zip(model.parameters(), before):
                assert torch.equal(whole(p), value) == overflow
            assert scaler.get_scale() == (128 if overflow else 256)


def test_a_grad_scaler_skips_on_all_ranks(ranks: Ranks, path: str) -> None:
    ranks.run(check_scaler, path)


def check_ddp(rank: int, world: int, path: str) -> None:
    # After a bias of 2 at the head of the bucket, gradients lie at addresses that 16 does not divide.
    alone = network()
    model = DistributedDataParallel(network(), gradient_as_bucket_view=True)
    with taking(path):
        a = FusedAdamW(model.parameters(), lr=1e-2, max_grad_norm=0.3, zero_grads=True)
        b = FusedAdamW(alone.parameters(), lr=1e-2, max_grad_norm=0.3)
        for step in range(3):
            loss_of(model, step, rank).backward()
            average_gradients(alone, step, world)
            assert any(p.grad is not None and p.grad.data_ptr() % 16 for p in model.parameters())
            a.step(), b.step()
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
    assert_same(model, alone)


def test_ddp_with_gradients_in_buckets_trains_like_one_process(ranks: Ranks, path: str) -> None:
    ranks.run(check_ddp, path)


def check_in_backward(rank: int, world: int, path: str) -> None:
    mesh = mesh_of(4)
    ours, alone = sharded(network(), mesh), network()
    with taking(path):
        a, b = (FusedAdamW(m.parameters(), lr=1e-2) for m in (ours, alone))
        optimizer_in_backward(ours, a)
        get_optimizer_state_dict(ours, a)  # makes states, by a step with gradients set by hand
        assert all("exp_avg" in a.state[p] for p in ours.parameters())
        assert_same(ours, alone, 0)
        a.state.clear()
        for step in range(3):
            loss_of(ours, step, rank).backward()
            assert all(p.grad is None for p in ours.parameters())
            average_gradients(alone, step, world)
            a.step(), b.step()
    assert all(a.state[p]["step"] == 3 for p in ours.parameters())
    assert_same(ours, alone)
    with pytest.raises(ValueError, match="DistributedDataParallel reduces gradients after"):
        optimizer_in_backward(DistributedDataParallel(alone), b)


def test_fsdp_steps_in_backward(ranks: Ranks, path: str) -> None:
    ranks.run(check_in_backward, path)


CHECKPOINTS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "independent decay": (F32, {"decay": "independent", "weight_decay": 0.1}),
    "split16": (BF16, {"master_weights": "split16", "state_dtype": F32, "ema_decay": 0.9}),
    "fp32": (BF16, {"master_weights": "fp32", "decay": "relative"}),
    "8bit": (BF16, {"master_weights": "stochastic", "state_dtype": "8bit"}),
}


def built(name: str, ranks: int, seed: int) -> tuple[nn.Sequential, FusedAdamW]:
    dtype, options = CHECKPOINTS[name]
    model = network(seed).to(dtype)
    if ranks > 1:
        sharded(model, mesh_of(ranks))
    return model, FusedAdamW(model.parameters(), lr=1e-2, **options)


def values(model: nn.Module, optimizer: FusedOptimizer) -> dict[str, Tensor]:
    """Return the values of parameters and of all their saved states."""
    found = {f"parameter {i}": whole(p) for i, p in enumerate(model.parameters())}
    for i, state in optimizer.state_dict()["state"].items():
        found |= {f"{name} {i}": whole(t).float() for name, t in state.items()}
    return found


def group_of(ranks: int) -> dict[str, Any]:
    return {"no_dist": True} if ranks == 1 else {"process_group": mesh_of(ranks).get_group()}


def check_checkpoints(rank: int, world: int, path: str, name: str, folder: str) -> None:
    source, targets = 2, [2, 3] if name == "8bit" else [2, 3, 1]  # codes in one process, float32 in pieces of 8 bits
    expected: dict[str, Tensor] = {}
    mesh_of(2), mesh_of(3)  # all ranks have to
    with taking(path):
        if rank < source:
            model, optimizer = built(name, source, seed=0)
            fed(model, optimizer, 1)
            weights, states = get_state_dict(model, optimizer)
            save({"model": weights, "optimizer": states}, checkpoint_id=folder, **group_of(source))
            fed(model, optimizer, 2)
            expected = values(model, optimizer)
        for target in targets:
            torch.distributed.barrier()
            if rank >= target:
                continue
            other, resumed = built(name, target, seed=1)
            before = [whole(p).clone() for p in other.parameters()]
            weights, states = get_state_dict(other, resumed)
            for p, value in zip(other.parameters(), before):
                assert torch.equal(whole(p), value)  # though a step has been made, for states to be there
            load({"model": weights, "optimizer": states}, checkpoint_id=folder, **group_of(target))
            set_state_dict(other, resumed, model_state_dict=weights, optim_state_dict=states)
            fed(other, resumed, 2)
            result = values(other, resumed)
            if rank < min(source, target):
                exact = target == source or path == "kernels"
                tolerance = 1e-2 if name == "8bit" and target != source else 0.0 if exact else 1e-6
                torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_goes_on_with_as_many_ranks_or_others(ranks: Ranks, path: str, name: str, tmp_path: Path) -> None:
    ranks.run(check_checkpoints, path, name, str(tmp_path / "checkpoint"))


# Formats before and after that have the same names in a checkpoint of DTensors, or some of them.
CONVERSIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"state_dtype": "8bit"}, {"state_dtype": "8bit"}),
    ({"state_dtype": "8bit", "master_weights": "split16"}, {"state_dtype": F32, "master_weights": "split8"}),
    ({"state_dtype": F32, "master_weights": "split8", "ema_decay": 0.9}, {"master_weights": "split16"}),
    ({"master_weights": "split16"}, {"state_dtype": "8bit", "master_weights": "stochastic"}),
    ({"master_weights": "fp32", "state_dtype": F32}, {"master_weights": "fp32", "state_dtype": "8bit"}),
]


def held(model: nn.Module, optimizer: FusedOptimizer) -> dict[str, Tensor]:
    found = {f"weight {i}": whole(optimizer.master_value(p)).float() for i, p in enumerate(model.parameters())}
    for i, state in optimizer.torch_state_dict()["state"].items():
        found |= {f"{name} {i}": whole(t).float() for name, t in state.items()}
    return {name: t.clone() for name, t in found.items()}


def check_conversions(rank: int, world: int, folder: str, flat: bool) -> None:
    mesh_of(2), mesh_of(3)  # all ranks have to
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    for number, (before, after) in enumerate(CONVERSIONS):
        wanted: dict[str, Tensor] = {}
        if rank < 2:
            model = sharded(network().to(BF16), mesh_of(2))
            optimizer = FusedAdamW(model.parameters(), lr=1e-2, **before)
            for step in (1, 2):
                fed(model, optimizer, step)
            weights, states = get_state_dict(model, optimizer, options=options)
            save({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{number}", **group_of(2))
            wanted = held(model, optimizer)
        torch.distributed.barrier()
        if rank < 3:
            model = sharded(network(1).to(BF16), mesh_of(3))
            optimizer = FusedAdamW(model.parameters(), lr=1e-2, **after)
            weights, states = get_state_dict(model, optimizer, options=options)
            load({"model": weights, "optimizer": states}, checkpoint_id=f"{folder}/{number}", **group_of(3))
            set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=options)
            found = held(model, optimizer)
            fed(model, optimizer, 3)  # brings it into the formats asked for
            kept = ("exp_avg_scale" in state for state in optimizer.state.values())
            assert all(kept) if after.get("state_dtype") == "8bit" else not any(kept)
            # Weights that none keep more bits of are those of the model; states may be read into the parameter's dtype.
            whole_weights = LOW_NAME.get(before.get("master_weights")) == LOW_NAME.get(after.get("master_weights"))
            for name, t in wanted.items():
                exact = name.startswith("step") or (name.startswith("weight") and whole_weights)
                rounding = 0.0 if exact else 2.0**-8
                torch.testing.assert_close(found[name], t, rtol=rounding, atol=0.0)


LOW_NAME = {"fp32": "master_param", "split16": "low_bits", "split8": "low_bits"}


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_a_checkpoint_goes_on_with_other_ranks_and_formats(ranks: Ranks, flat: bool, tmp_path: Path) -> None:
    ranks.run(check_conversions, str(tmp_path), flat)


def check_full_checkpoints(rank: int, world: int, path: str) -> None:
    for name in ("split16", "8bit") if path == "kernels" else CHECKPOINTS:
        with taking(path):
            model, optimizer = built(name, world, seed=0)
            fed(model, optimizer, 1)
            saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
            saved = copy.deepcopy(saved)  # step counters are the optimizer's own
            weights = {key: whole(t) for key, t in model.state_dict().items()}
            fed(model, optimizer, 2)

            other, resumed = built(name, world, seed=0)
            fed(other, resumed, 1)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(other, resumed, copy.deepcopy(saved) if rank == 0 else {}, options=options)
            fed(other, resumed, 2)
            torch.testing.assert_close(values(other, resumed), values(model, optimizer), rtol=0, atol=0)

            alone, single = built(name, 1, seed=0)
            alone.load_state_dict(weights)
            set_optimizer_state_dict(alone, single, copy.deepcopy(saved))
            fed(alone, single, 2)
            assert_same(alone, model, 1e-2 if name == "8bit" else 1e-6)


def test_full_checkpoints_are_broadcast_and_taken_over_by_one_process(ranks: Ranks, path: str) -> None:
    ranks.run(check_full_checkpoints, path)
