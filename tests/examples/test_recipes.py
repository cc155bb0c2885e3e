"""The recipes of examples/: each learns what plain torch learns, and README.md has them all.

Those of other libraries (`hf_trainer.py`, `sft_trainer.py`, `trl_logprobs.py`, `lightning_module.py`) run in
tests/integrations, and `plain_pytorch.py` in tests/test_drop_in.py.
"""

import ast
import difflib
import functools
import importlib
import json
import math
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from evidence.pretend_cuda import pretending_cuda
from evidence.traffic import counting
from llmfast.losses import targets
from llmfast.optim import FusedAdamW
from llmfast.train.config import Config, dump_config
from support import gpus
from support.ranks import Ranks
from support.waiting import NoWaiting

# Dynamo looks torch's functions up in a table that it makes once: before tests put others in their places.
torch._dynamo.trace_rules.get_torch_obj_rule_map()

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
README = EXAMPLES / "README.md"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))

Batches = Iterator[tuple[Tensor, Tensor]]


def recipe(name: str) -> ModuleType:
    """Import a module of examples/, disabling the fallback to torch's loss for few logits."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))  # they import each other as scripts do
    targets.SMALL.update(dict.fromkeys(targets.SMALL, -1))
    return importlib.import_module(name)


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo the changes of `recipe`, which must also work in processes without pytest."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name, value in targets.SMALL.items():
        monkeypatch.setitem(targets.SMALL, name, value)


def ordinary(
    data: Batches,
    steps: int,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    eps: float = 1e-8,
    **shape: int,
) -> list[float]:
    """Train with torch's AdamW and torch's loss only, and return the losses."""
    torch.manual_seed(0)
    model = recipe("tiny_gpt").TinyGPT(**shape)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, eps=eps)
    lr = None if schedule is None else schedule(optimizer)
    losses = []
    for _ in range(steps):
        tokens, labels = next(data)
        loss = F.cross_entropy(model.head(model(tokens)).flatten(0, 1), labels.flatten())
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        if lr is not None:
            lr.step()
        losses.append(loss.item())
    return losses


def assert_same(ours: list[float], torchs: list[float], rtol: float = 2e-5) -> None:
    assert torchs[-1] < 0.97 * torchs[0], "there is something to follow"
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(torchs), rtol=rtol, atol=0)


def of_all_ranks(streams: list[Batches], each: int = 1) -> Batches:
    """Join the next `each` batches of every rank into one."""
    while True:
        parts = [next(stream) for stream in streams for _ in range(each)]
        yield torch.cat([tokens for tokens, _ in parts]), torch.cat([labels for _, labels in parts])


# In one process.


def test_before_and_after_train_alike() -> None:
    before, after = (recipe(f"nanogpt_{when}").train(steps=6, rows=4) for when in ("before", "after"))
    assert_same(after, before)


def test_before_and_after_differ_in_imports_and_two_lines() -> None:
    before, after = ((EXAMPLES / f"nanogpt_{when}.py").read_text().splitlines() for when in ("before", "after"))
    changes = [line for line in difflib.ndiff(before, after) if line[0] in "+-" and line[1:].strip()]
    no_imports = [line for line in changes if not re.match(r"[+-] (import|from) ", line)]
    assert [line[0] for line in no_imports] == ["-", "+", "-", "+"]
    assert all(line.endswith("# llmfast") for line in no_imports if line[0] == "+")


def test_optimizer_in_backward() -> None:
    losses, most = recipe("optimizer_in_backward").train(steps=5, rows=4)
    tiny = recipe("tiny_gpt")
    assert_same(losses, ordinary(tiny.batches(4), 5, lambda optimizer: LinearLR(optimizer, 1.0, 0.1, 5)))
    assert 0 < most < 0.2 * sum(p.nbytes for p in tiny.TinyGPT().parameters())


def test_resuming_from_torch() -> None:
    losses = recipe("resume_from_torch").train(steps=6, rows=4)
    uninterrupted = ordinary(recipe("tiny_gpt").batches(4), 6, lambda optimizer: CosineAnnealingLR(optimizer, 6))
    assert_same(losses, uninterrupted)


# Log-probabilities.


def plain_statistics(model: Any, packed: Any, temperatures: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-probability and entropy of each token, from the logits of each sequence by itself."""
    values, entropies = [], []
    for i in range(packed.count):
        own = packed.sequence == i
        tokens, ids = packed.tokens[:, own], packed.ids[:, own]
        log_p = (model.head(model(tokens)) / temperatures[i]).log_softmax(-1)
        known = ids != -100
        values.append(log_p.gather(-1, ids.masked_fill(~known, 0)[..., None])[..., 0].where(known, 0.0))
        entropies.append(-(log_p.exp() * log_p).sum(-1).where(known, 0.0))
    return torch.cat(values, 1), torch.cat(entropies, 1)


def test_dpo_of_packed_sequences_is_that_of_each_alone() -> None:
    module, tiny = recipe("dpo"), recipe("tiny_gpt")

    def alone(model: Any, sequences: list[Tensor], prompts: list[int]) -> Tensor:
        packed = tiny.Packing(sequences, prompts)
        return packed.sums(plain_statistics(model, packed, torch.ones(len(sequences)))[0])

    ours, theirs = module.train(5, rows=3), module.train(5, rows=3, logprobs=alone)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=2e-4, atol=2e-4)
    assert ours[0][0] == pytest.approx(math.log(2)) and ours[1][0] == 0


def test_dpo_learns_what_is_preferred() -> None:
    losses, margins = recipe("dpo").train(12)
    assert sum(losses[-4:]) / 4 < 0.69 and sum(margins[-4:]) / 4 > 0.03


def test_grpo_of_packed_sequences_is_that_of_each_alone() -> None:
    module = recipe("grpo")
    ours, theirs = module.train(3, group=3), module.train(3, group=3, statistics=plain_statistics)
    torch.testing.assert_close(torch.tensor(ours[0]), torch.tensor(theirs[0]), rtol=1e-3, atol=1e-5)
    assert ours[1] == theirs[1], "the same samples"
    assert len({*ours[0]}) == 6


def test_the_gain_of_grpo_ends_where_the_policy_has_moved_far() -> None:
    module = recipe("grpo")
    ratio, advantage = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.1]), torch.tensor([1.0, 1.0, -1.0, -1.0, 3.0])
    bounded = torch.tensor([1 + module.CLIP, 0.5, -2.0, -(1 - module.CLIP), 3.3])
    torch.testing.assert_close(module.clipped(ratio, advantage), bounded)


def test_grpo_learns_what_is_rewarded() -> None:
    _, rewards = recipe("grpo").train(8)
    assert rewards[-1] > rewards[0] + 0.1


def test_packed_sequences_do_not_see_each_other() -> None:
    tiny = recipe("tiny_gpt")
    sequences = [torch.arange(5, 5 + n) for n in (4, 1, 6)]
    packed = tiny.Packing(sequences, [2, 1, 6])
    assert packed.ids.tolist() == [[-100, 7, 8, -100, -100, -100, -100, -100, -100, -100, -100]]
    model = tiny.TinyGPT(width=16, layers=2)
    hidden = model(packed.tokens, packed)[0].split([4, 1, 6])
    for alone, found in zip(sequences, hidden):
        torch.testing.assert_close(found, model(alone[None])[0])


def test_a_student_learns_from_files_what_torch_says_they_mean(tmp_path: Path) -> None:
    module = recipe("top_k_distillation")
    K, T, hard = module.K, module.TEMPERATURE, module.HARD
    module.write(module.trained(2), tmp_path, files=3, rows=4)

    def plain(hidden: Tensor, weight: Tensor, top: Any, targets: Tensor) -> Tensor:
        """Take the K classes and all others as one, from all logits."""
        counts = targets[0] != -100
        ids, t, y = top.ids[0][counts].long(), top.logprobs[0][counts], targets[0][counts]
        logits = (hidden @ weight.T)[0][counts]
        s = (logits / T).log_softmax(-1).gather(-1, ids)
        left_t, left_s = (torch.log1p(-x.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-6)) for x in (t, s))
        t, s = torch.cat([t, left_t], -1), torch.cat([s, left_s], -1)
        soft = (t.exp() * (t - s)).sum(-1).mean()
        return (1 - hard) * T**2 * soft + hard * F.cross_entropy(logits, y)

    ours, theirs = module.train(tmp_path, 5), module.train(tmp_path, 5, loss=plain)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-3, atol=1e-4)
    said, top = module.read(tmp_path / "00002.safetensors", "cpu")
    assert top.ids.shape == (1, said.tokens.shape[1], K) and said.count == 4
    assert (top.logprobs.exp().sum(-1) <= 1.001).all()


def test_a_student_of_files_learns(tmp_path: Path) -> None:
    module = recipe("top_k_distillation")
    module.write(module.trained(12), tmp_path, files=4)
    losses = module.train(tmp_path, 16)
    assert losses[-1] < 0.8 * losses[0]


def test_perplexity_is_that_of_all_windows() -> None:
    """Count each byte once, after at least half of a window."""
    module = recipe("perplexity")
    model, text = module.trained(2), torch.randint(0, 256, (205,), dtype=torch.uint8)
    for length in (2, 9, 33, 48, 49, 205):
        total, first, five = 0.0, 0, 0
        for at in range(1, length):
            start = max(0, (at - 1) // 16 - 1) * 16  # of the window of 32 that counts this byte
            with torch.no_grad():
                logits = model.head(model(text[None, start:at].long()))[0, -1]
            total -= logits.log_softmax(0)[text[at].long()].item()
            rank = int((logits > logits[text[at].long()]).sum())
            first, five = first + (rank == 0), five + (rank < 5)
        found = module.measured(model, text[:length], rows=2, context=32, budget=100_000)
        assert found["perplexity"] == pytest.approx(math.exp(total / (length - 1)), rel=1e-4)
        assert found["first"] == pytest.approx(first / (length - 1))
        assert found["first five"] == pytest.approx(five / (length - 1))


def test_perplexity_takes_the_same_memory_for_any_length() -> None:
    module = recipe("perplexity")
    model, peaks = module.trained(0), []
    for text in torch.zeros(1000, dtype=torch.uint8), torch.zeros(4000, dtype=torch.uint8):
        with counting() as counts:
            module.measured(model, text, rows=4, context=64)
        peaks.append(counts.peak_bytes)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("--steps=3", 2)])
def test_a_flag_is_not_taken_for_a_folder(
    argument: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["continued_pretraining.py", argument])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "continued_pretraining.py"), run_name="__main__")
    assert ended.value.code == status and list(tmp_path.iterdir()) == []


def test_prose_then_code_with_and_without_a_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run only writes its settings here, and losses that stand for those of training."""
    module, weights = recipe("continued_pretraining"), {}

    def train(config: Config, **_: Any) -> Path:
        run, forgets = Path(config.runs) / config.name, config.name == "without-replay"
        weights[config.name] = config.data.weights
        run.mkdir()
        (run / "config.toml").write_text(dump_config(config))
        losses = [{"prose": 3.0, "code": 4.0}, {"prose": 3.0 + forgets, "code": 3.0}]
        lines = [{"step": step, "tokens": 9 * step, "validation": each} for step, each in enumerate(losses)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "draw", lambda *_: None)
    found = module.main(tmp_path)
    assert weights.pop("prose") == {"prose": 1, "code": 0}
    replayed, not_replayed = {"code": "0.1->0.7", "prose": "rest"}, {"code": 1.0, "prose": 0.0}
    assert weights == {"with-replay": replayed, "without-replay": not_replayed}
    assert found == {"with replay": {"prose": 0.0, "code": -1.0}, "without replay": {"prose": 1.0, "code": -1.0}}


# torch.compile.


@pytest.mark.parametrize("whole", [False, True])
def test_compiled_steps(whole: bool) -> None:
    torch._dynamo.reset()
    compiled = functools.partial(torch.compile, backend="aot_eager")
    losses = recipe("torch_compile").train(steps=4, rows=4, compiled=compiled, whole=whole)
    assert_same(losses, ordinary(recipe("tiny_gpt").batches(4), 4))


def test_forward_and_loss_are_one_graph_and_a_whole_step_is_not() -> None:
    module, tiny = recipe("torch_compile"), recipe("tiny_gpt")
    model, batch = tiny.TinyGPT(width=16, layers=1, context=16), next(tiny.batches(2, context=16))
    graphs = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    step = module.make_step(model, functools.partial(torch.compile, backend=count))
    step(*batch)
    step(*batch)
    assert len(graphs) == 1
    whole = module.make_step(model, lambda f: torch.compile(f, backend=count, fullgraph=True), whole=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="backward"):
        whole(*batch)


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    """Few kernels: each is half a second of g++, and the first of all is twenty."""
    module, tiny, shape = recipe("torch_compile"), recipe("tiny_gpt"), {"width": 16, "layers": 0, "context": 16}
    torch._dynamo.reset()
    torch.manual_seed(0)
    step, data = module.make_step(tiny.TinyGPT(**shape)), tiny.batches(8, context=16)
    losses = [step(*next(data)).item() for _ in range(8)]
    assert_same(losses, ordinary(tiny.batches(8, context=16), 8, **shape))


# GradScaler.


def test_grad_scaler_skips_and_learns() -> None:
    losses, skipped = recipe("grad_scaler").train(steps=14, rows=4, init_scale=2.0**20)
    first = skipped.index(False)
    assert 0 < first < 10
    assert not any(skipped[first:])
    assert losses[-1] < 0.8 * losses[0]


def test_what_is_skipped_changes_nothing() -> None:
    losses, skipped = recipe("grad_scaler").train(steps=3, rows=2, init_scale=2.0**60)
    assert skipped == [True] * 3
    tiny = recipe("tiny_gpt")
    torch.manual_seed(0)
    model, data = tiny.TinyGPT(), tiny.batches(2)
    for loss in losses:
        tokens, labels = next(data)
        with torch.autocast("cpu", torch.float16), torch.no_grad():
            untrained = F.cross_entropy(model.head(model(tokens)).flatten(0, 1).float(), labels.flatten())
        assert loss == pytest.approx(untrained.item(), rel=1e-4)


# A CUDA graph.


def test_cuda_graph_says_that_it_needs_a_gpu() -> None:
    done = subprocess.run([sys.executable, EXAMPLES / "cuda_graph.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "examples/cuda_graph.py captures a CUDA graph, and there is no GPU here\n"


def test_the_step_to_capture_is_an_ordinary_step() -> None:
    losses = recipe("cuda_graph").train(steps=5, rows=4, context=32, ordinary=None)
    torchs = ordinary(recipe("tiny_gpt").batches(4, context=32), 5, lambda o: LinearLR(o, 1.0, 0.1, 5), context=32)
    assert_same(losses, torchs)


def test_the_step_to_capture_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels in the interpreter; the second step sees the state it would see during capture."""
    module, tiny = recipe("cuda_graph"), recipe("tiny_gpt")
    data, losses = tiny.batches(2, context=8), []
    with pretending_cuda():
        step = module.Step(2, 8, "cpu")
        for capturing in (False, True, False):
            step.take(next(data))
            with monkeypatch.context() as patch, NoWaiting() if capturing else nullcontext():
                if capturing:
                    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                    patch.setattr(Tensor, "item", None)
                step()
            losses.append(step.loss.clone())
    torchs = ordinary(tiny.batches(2, context=8), 3, context=8)
    torch.testing.assert_close(torch.stack(losses), torch.tensor(torchs), rtol=2e-5, atol=0)


def test_a_captured_step_trains_as_an_ordinary_one() -> None:
    """Run in a separate process, because this one interprets kernels."""
    code = """if True:
        import torch
        if torch.cuda.is_available():
            import cuda_graph as g
            print([g.train(20, ordinary=None), g.train(20)])"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=EXAMPLES,
        capture_output=True,
        text=True,
        check=True,
        env=gpus.as_found() | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
    )
    if not done.stdout:
        pytest.skip("needs a GPU")
    eager, replayed = ast.literal_eval(done.stdout)
    assert_same(replayed, eager, rtol=1e-3)  # sums on a GPU come in any order


# torchtitan's losses.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchtitans_loss_on_logits(dtype: torch.dtype) -> None:
    pred = torch.randn(2, 9, 300, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 300, (2, 9))
    labels[0, :4] = -100
    theirs = F.cross_entropy(pred.flatten(0, 1).float(), labels.flatten(0, 1), reduction="sum", ignore_index=-100)
    ours = recipe("torchtitan_loss").cross_entropy_loss(pred, labels, global_vocab_size=300)
    torch.testing.assert_close(ours.float(), theirs)
    torch.testing.assert_close(torch.autograd.grad(ours, pred), torch.autograd.grad(theirs, pred))


@pytest.mark.parametrize("name", ["CrossEntropyLoss", "HeadlessLoss"])
def test_torchtitans_losses_train_as_torchs(name: str) -> None:
    module = recipe("torchtitan_loss")
    losses = module.train(getattr(module, name)(), steps=5, rows=4, context=32)
    assert_same(losses, ordinary(recipe("tiny_gpt").batches(4, context=32), 5, context=32))


# On two ranks.


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    started = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


EPS = 1e-3  # with next to none, Adam would not tell a sum of gradients from their mean


def trained(rank: int, world: int, name: str, arguments: dict[str, Any]) -> list[float]:
    module: Any = recipe(name)
    module.FusedAdamW = functools.partial(FusedAdamW, eps=EPS)
    return module.train(**arguments)


def test_ddp_with_micro_batches_is_one_process_with_all_rows(ranks: Ranks) -> None:
    first, second = ranks.run(trained, "ddp", {"steps": 5, "rows": 2, "accumulate": 2, "context": 32})
    assert first == second
    streams = [recipe("ddp").padded_batches(rank, 2, 32, "cpu") for rank in range(2)]
    assert_same(first, ordinary(of_all_ranks(streams, each=2), 5, eps=EPS, context=32))


def test_fsdp2_in_float32_is_plain_training(ranks: Ranks) -> None:
    first, second = ranks.run(trained, "fsdp2", {"steps": 5, "rows": 2, "context": 32, "dtype": torch.float32})
    assert first == second
    streams = [recipe("tiny_gpt").batches(2, context=32, seed=rank) for rank in range(2)]
    assert_same(first, ordinary(of_all_ranks(streams), 5, clip=1.0, eps=EPS, context=32))


def sharded_gradients(rank: int, world: int) -> dict[str, Tensor]:
    """Return gradients of torchtitan's loss without logits, under FSDP2 that sums gradients as in torchtitan."""
    module = recipe("torchtitan_loss")
    torch.manual_seed(0)
    model = module.Model(context=16, layers=1)
    for part in (model.lm_head, model):
        fully_shard(part)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # for gloo
    loss_fn = module.HeadlessLoss()
    loss_fn.set_lm_head(model.lm_head)
    model._skip_lm_head = True
    tokens, labels = next(recipe("ddp").padded_batches(rank, 2, 16, "cpu"))
    valid = (labels != -100).sum()
    dist.all_reduce(valid)
    loss, _ = loss_fn(model(tokens), labels, valid)
    loss.backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters()}


def test_torchtitans_loss_without_logits_under_fsdp2(ranks: Ranks) -> None:
    found, _ = ranks.run(sharded_gradients)
    torch.manual_seed(0)
    model = recipe("torchtitan_loss").Model(context=16, layers=1)
    tokens, labels = next(of_all_ranks([recipe("ddp").padded_batches(rank, 2, 16, "cpu") for rank in range(2)]))
    F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten()).backward()
    torch.testing.assert_close(found, {name: p.grad for name, p in model.named_parameters()})


# What is written about them.


def rows_of_the_table() -> dict[str, str]:
    return dict(re.findall(r"^\| \[`(\w+\.\w+)`\]\(\1\) (\|.*\|)$", README.read_text(encoding="utf-8"), re.MULTILINE))


def test_every_file_is_in_the_readme() -> None:
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(rows_of_the_table()) == files
    for name, row in rows_of_the_table().items():
        assert row.count(" | ") == 2, f"{name}: what it shows, how it starts, llmfast's lines"


def test_commands_name_what_there_is() -> None:
    texts = {script.name: ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or "" for script in SCRIPTS}
    for name, text in [*texts.items(), *rows_of_the_table().items()]:
        if name != "tiny_gpt.py":
            assert re.search(rf"(python|torchrun .*|jupyter lab) examples/{name}\b", text), f"{name}: how to start it?"
    for text in (*texts.values(), README.read_text(encoding="utf-8")):
        for path in re.findall(r"examples/[\w.]*\w", text):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_llmfasts_lines_are_in_the_readme(script: Path) -> None:
    """Expect exactly the functions and classes of llmfast that a script imports in its row."""
    imports = (node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.ImportFrom))
    names = {alias.name for node in imports if (node.module or "").startswith("llmfast") for alias in node.names}
    row = rows_of_the_table()[script.name]
    missing = {name for name in names if f"`{name}" not in row}
    assert not missing, f"{script.name}: {missing}"
