"""Tests of how a step and a model are divided, without other ranks; tests/train/test_ranks.py has them."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from llmfast.models import Decoder, DecoderConfig
from llmfast.train import parallel
from llmfast.train.config import load_config
from llmfast.train.parallel import World, clip_grad_norm_, micro_batch_size, plain, prepare_blocks, shard_count, syncing
from llmfast.train.settings import ConfigError

CPU = torch.device("cpu")


def test_one_process_alone_agrees_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("all_reduce", "broadcast_object_list", "destroy_process_group"):
        monkeypatch.setattr(dist, name, lambda *args, **more: pytest.fail("there are no others"))
    world = World(CPU)
    t = torch.ones(2)
    assert world.main and world.size == 1 and world.sum(t) is t and t.tolist() == [1, 1]
    assert world.agreed("x") == "x" and world.any(True) is True and world.any(False) is False
    world.leave()


def test_several_processes_ask_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def broadcast(values: list[Any], src: int, group: Any) -> None:
        asked.append((src, group))
        values[0] = "the first's"

    monkeypatch.setattr(dist, "all_reduce", lambda t: t.mul_(3))
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    world = World(CPU, 1, 3, "background")
    assert not world.main and World(CPU, 0, 3).main
    assert world.agreed("mine") == "the first's" and asked == [(0, "background")]
    assert world.sum(torch.ones(2)).tolist() == [3, 3]
    assert world.any(True) is True and world.any(False) is False
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.add_(1))  # where one of the others has said yes
    assert world.any(False) is True


def test_a_group_ends_when_all_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", lambda group: done.append(("barrier", group)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroy"))
    World(CPU, 1, 3, "background").leave()
    assert done == [("barrier", "background"), "destroy"]


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        *(({}, False), ({"WORLD_SIZE": "1", "RANK": "0"}, False), ({"WORLD_SIZE": "2"}, False)),
        *(({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}, True), ({"WORLD_SIZE": "2", "RANK": "1"}, True)),
    ],
)
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_ranks_that_torchrun_started_are_joined(
    environment: dict[str, str], joins: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend: done.append(backend))
    monkeypatch.setattr(dist, "new_group", lambda backend: f"group of {backend}")
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    found = World.join(torch.device(kind))
    if not joins:
        assert found == World(torch.device(kind)) and done == []
        return
    gpu = torch.device("cuda", int(environment.get("LOCAL_RANK", "0")))
    assert found == World(gpu if kind == "cuda" else CPU, 1, 2, "group of gloo")
    assert done == ([gpu, "cpu:gloo,cuda:nccl"] if kind == "cuda" else ["gloo"])


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_ranks_that_do_not_find_each_other(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(backend: str) -> None:
        raise error("timed out\nand a long trace")

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(dist, "init_process_group", fails)
    with pytest.raises(ConfigError, match=r"^the ranks do not find each other: timed out$"):
        World.join(CPU)


@pytest.mark.parametrize(
    ("batch", "micro", "ranks", "rows"),
    [
        *((12, 0, 1, 12), (12, 0, 3, 4), (12, 4, 1, 4), (12, 2, 3, 2), (12, 12, 1, 12)),
        *((12, 5, 1, 0), (12, 8, 2, 0), (12, 6, 3, 0), (12, 0, 5, 0)),
    ],
)
def test_rows_at_once(batch: int, micro: int, ranks: int, rows: int) -> None:
    config = load_config(None, [f"train.batch_size={batch}", f"train.micro_batch_size={micro}"])
    if rows:
        assert micro_batch_size(config, World(CPU, size=ranks)) == rows
        return
    message = f"micro-batches of {micro} rows on {ranks} ranks" if ranks != 5 else "does not divide by 5 ranks"
    with pytest.raises(ConfigError, match=message):
        micro_batch_size(config, World(CPU, size=ranks))


@pytest.mark.parametrize(
    ("kind", "ranks", "shards"),
    [("ddp", 8, 1), ("fsdp", 8, 8), ("fsdp", 1, 1), ("hsdp", 1, 1), ("hsdp", 8, 4), ("hsdp", 4, 4), ("hsdp", 6, 0)],
)
def test_ranks_that_share_parameters(kind: str, ranks: int, shards: int) -> None:
    config = load_config(None, [f"train.parallel={kind}", "train.shard_size=4"])
    if shards:
        assert shard_count(config, ranks) == shards
        return
    with pytest.raises(ConfigError, match=r"train.shard_size must divide the number of ranks, 6, .*; got 4$"):
        shard_count(config, ranks)


@pytest.mark.parametrize(
    ("kind", "ranks", "shard_size", "mesh"),
    [
        *(("fsdp", 2, 0, (2,)), ("fsdp", 8, 0, (8,)), ("hsdp", 2, 1, (2, 1)), ("hsdp", 2, 2, (1, 2))),
        *(("hsdp", 8, 1, (8, 1)), ("hsdp", 8, 2, (4, 2)), ("hsdp", 8, 4, (2, 4)), ("hsdp", 6, 3, (2, 3))),
    ],
)
def test_the_last_axis_of_a_mesh_shards(
    kind: str, ranks: int, shard_size: int, mesh: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """HSDP shards over `train.shard_size` ranks and replicates over the others; every block is given the same mesh."""
    made: list[Any] = []
    given: list[Any] = []

    def make(device: str, shape: tuple[int, ...], mesh_dim_names: Any = None) -> str:
        made.append((device, shape, mesh_dim_names))
        return "mesh"

    monkeypatch.setattr(parallel, "init_device_mesh", make)
    monkeypatch.setattr(parallel, "fully_shard", lambda module, **options: given.append((module, options)))
    config = load_config(None, [f"train.parallel={kind}", f"train.shard_size={shard_size}"])
    model = Decoder(DecoderConfig(9, width=8, layers=2, heads=2))
    parallel.spread(model, config, World(CPU, size=ranks), own=["norm.weight"])
    assert made == [("cpu", mesh, ("replicate", "shard") if kind == "hsdp" else None)]
    assert given == [
        *((block, {"mesh": "mesh"}) for block in model.blocks),
        (model, {"mesh": "mesh", "ignored_params": {model.norm.weight}}),
    ]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_are_prepared_as_settings_say(again: bool, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Linear):
        def compile(self) -> None:
            done.append("compile")

    done: list[str] = []
    blocks = [Block(2, 2), Block(2, 2)]
    monkeypatch.setattr(parallel, "blocks_of", lambda model: blocks)

    def checkpoint(function: Any, *args: Any, use_reentrant: bool) -> Any:
        assert not use_reentrant
        done.append("again")
        return function(*args)

    monkeypatch.setattr(parallel, "checkpoint", checkpoint)
    config = load_config(None, [f"train.checkpoint_activations={again}".lower(), f"train.compile={compiled}".lower()])
    x = torch.ones(1, 2)
    wanted = [block(x) for block in blocks]
    prepare_blocks(nn.Linear(1, 1), config)
    assert all(torch.equal(block(x), want) for block, want in zip(blocks, wanted))
    assert sorted(done) == ["again"] * 2 * again + ["compile"] * 2 * compiled


def test_gradients_are_reduced_in_the_last_part_alone() -> None:
    calls: list[Any] = []

    class Reducing(DistributedDataParallel):
        def __init__(self) -> None:  # without other ranks
            nn.Module.__init__(self)
            self.module = nn.Linear(1, 1)

        def no_sync(self) -> Any:
            return "no sync"

    reducing: Any = Reducing()
    assert syncing(reducing, last=False) == "no sync" and syncing(reducing, last=True) != "no sync"
    assert plain(reducing) is reducing.module and plain(reducing.module) is reducing.module

    class Sharded(parallel.FSDPModule):
        def __new__(cls) -> Any:
            return object.__new__(cls)

        def set_requires_gradient_sync(self, flag: bool, **more: Any) -> None:
            calls.append(flag)

    for last in (False, True):
        with syncing(Sharded(), last=last):  # type: ignore[arg-type]
            assert calls[-1] is last
    assert len(calls) == 2


@pytest.mark.parametrize("most", [0.5, 5.0, float("inf")])
def test_gradients_are_clipped_as_by_torch(most: float) -> None:
    def parameters() -> list[nn.Parameter]:
        some = [nn.Parameter(torch.zeros(n)) for n in (3, 1, 2)]
        some[0].grad, some[2].grad = torch.tensor([1.0, 2.0, 2.0]), torch.tensor([0.0, 4.0])
        return some

    ours, theirs = parameters(), parameters()
    assert clip_grad_norm_(iter(ours), most).item() == nn.utils.clip_grad_norm_(theirs, most).item() == 5
    for p, q in zip(ours, theirs):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad))
    assert clip_grad_norm_([ours[1]], most) == 0 == clip_grad_norm_([], most)


def test_a_module_of_one_rank_stays_as_it_is() -> None:
    module = nn.Linear(1, 1)
    for kind in ("ddp", "fsdp", "hsdp"):
        config = load_config(None, [f"train.parallel={kind}", "train.shard_size=2"])
        assert parallel.spread(module, config, World(CPU)) is module and plain(module) is module
