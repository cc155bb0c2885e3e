"""The stock Trainer, and accelerate's loop, with and without llmfast: the same curve."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdamW

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")
accelerate = pytest.importorskip("accelerate", reason="accelerate is missing: make test-integrations")

from llmfast.integrations.mtp import add_mtp  # noqa: E402
from llmfast.integrations.transformers import fuse_loss  # noqa: E402

Make = Callable[..., Any]
AdamW = torch.optim.AdamW
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Texts(torch.utils.data.Dataset[dict[str, list[int]]]):
    """Sequences of 4 to 16 tokens that count up, so that there is something to learn."""

    def __init__(self, count: int = 96) -> None:
        generator = torch.Generator().manual_seed(0)
        self.starts = torch.randint(3, 40, (count,), generator=generator).tolist()
        self.lengths = torch.randint(4, 17, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, i: int) -> dict[str, list[int]]:
        ids = list(range(self.starts[i], self.starts[i] + self.lengths[i]))
        return {"input_ids": ids, "labels": [-100, -100, *ids[2:]]}


def padded(rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    longest = max(len(row["input_ids"]) for row in rows)

    def stacked(key: str, fill: int) -> Tensor:
        return torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in rows])

    ids = stacked("input_ids", 0)
    return {"input_ids": ids, "labels": stacked("labels", -100), "attention_mask": (ids != 0).long()}


def trainer(model: Any, folder: Path, optimizer: Any = AdamW, given: str = "class", **arguments: Any) -> Any:
    """Create a Trainer; `given` says how it receives the optimizer, a class or one with its keywords."""
    cls, hyper = optimizer if isinstance(optimizer, tuple) else (optimizer, HYPER)
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 30,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": hyper["lr"],
            "lr_scheduler_type": "cosine",
            "use_cpu": True,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_grad_norm": 1.0,
            "dataloader_pin_memory": False,
        }
        | arguments
    )
    how: dict[str, Any] = {"optimizer_cls_and_kwargs": (cls, dict(hyper))}
    if given == "instance":
        how = {"optimizers": (cls(model.parameters(), **hyper), None)}
    data = {"train_dataset": Texts(), "eval_dataset": Texts(12), "data_collator": padded}
    made = transformers.Trainer(model, args, **data, **how)
    made.remove_callback(transformers.PrinterCallback)
    return made


def losses(trained: Any) -> Tensor:
    return torch.tensor([row["loss"] for row in trained.state.log_history if "loss" in row])


def curve(*args: Any, resume: str | None = None, **kwargs: Any) -> Tensor:
    made = trainer(*args, **kwargs)
    made.train(resume_from_checkpoint=resume)
    return losses(made)


def assert_follows(ours: Tensor, theirs: Tensor, rtol: float = 1e-4) -> None:
    assert len(theirs) == 30
    assert theirs[-3:].mean() < 0.7 * theirs[0], "it learns"
    rounding = 1e-4 if transformers.__version__ < "5" else 0.0  # it logs four decimals
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rounding)


@pytest.mark.parametrize(("name", "given"), [("llama", "class"), ("llama", "instance"), ("gemma2", "class")])
def test_same_curve_over_30_steps(make: Make, tmp_path: Path, name: str, given: str) -> None:
    theirs = curve(make(name), tmp_path, given=given)
    ours = curve(fuse_loss(make(name)), tmp_path, FusedAdamW, given)
    assert_follows(ours, theirs)


@pytest.mark.parametrize("saved_by", ["llmfast", "without"])
@pytest.mark.parametrize("resumed_by", ["llmfast", "without"])
def test_resumes_from_a_checkpoint_of_either(make: Make, tmp_path: Path, saved_by: str, resumed_by: str) -> None:
    def with_or_without(which: str, **arguments: Any) -> Tensor:
        model = make("llama")
        if which == "llmfast":
            return curve(fuse_loss(model), tmp_path, FusedAdamW, **arguments)
        return curve(model, tmp_path, **arguments)

    whole = with_or_without(saved_by, save_strategy="steps", save_steps=20)
    checkpoint = tmp_path / "checkpoint-20"
    assert checkpoint.is_dir()
    resumed = with_or_without(resumed_by, resume=str(checkpoint))
    exact = saved_by == resumed_by
    torch.testing.assert_close(resumed[20:], whole[20:], rtol=0 if exact else 1e-4, atol=0)
    assert len(whole) == 30


def test_accumulation_weighs_tokens_and_not_micro_batches(make: Make, tmp_path: Path) -> None:
    """Rows differ in length, so a mean of means would give a different curve."""
    whole = curve(
        fuse_loss(make("llama")), tmp_path, FusedAdamW, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    for size in (1, 2):
        cut = curve(
            fuse_loss(make("llama")),
            tmp_path,
            FusedAdamW,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )
        assert_follows(cut, whole)


def test_clipping_by_the_trainer_or_by_the_optimizer(make: Make, tmp_path: Path) -> None:
    """Clip in one of the two: with the Trainer's `max_grad_norm=0`, FusedAdamW clips and saves a pass.

    With both, a gradient that was clipped is not clipped again.
    """
    norm = 0.5
    by_trainer = trainer(fuse_loss(make("llama")), tmp_path, FusedAdamW, max_grad_norm=norm)
    by_optimizer = trainer(
        fuse_loss(make("llama")), tmp_path, (FusedAdamW, HYPER | {"max_grad_norm": norm}), max_grad_norm=0.0
    )
    by_both = trainer(
        fuse_loss(make("llama")), tmp_path, (FusedAdamW, HYPER | {"max_grad_norm": norm}), max_grad_norm=norm
    )
    for made in (by_trainer, by_optimizer, by_both):
        made.train()
    assert_follows(losses(by_optimizer), losses(by_trainer))
    assert_follows(losses(by_both), losses(by_trainer))
    norms = [row["grad_norm"] for row in by_trainer.state.log_history if "grad_norm" in row]
    assert min(norms) > norm, "it clips"
    assert float(by_optimizer.optimizer.optimizer.grad_norm) == pytest.approx(norms[-1], rel=1e-3)


def test_bfloat16(make: Make, tmp_path: Path) -> None:
    """Under autocast, rounding differs; the curves must agree up to that."""
    theirs = curve(make("llama"), tmp_path, bf16=True)
    ours = curve(fuse_loss(make("llama")), tmp_path, FusedAdamW, bf16=True)
    assert_follows(ours, theirs, rtol=5e-2)


def with_fp16(accelerator: Any, scaler: torch.amp.GradScaler) -> None:
    """Turn it on where accelerate asks for a GPU, though all that it then does works on a CPU."""
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp, accelerator.scaler = True, scaler


def test_float16(make: Make, tmp_path: Path) -> None:
    """The Trainer scales the loss, unscales to clip, and skips steps that overflow."""

    def scaled(model: Any, optimizer: Any) -> tuple[Tensor, float, float]:
        made = trainer(model, tmp_path, optimizer, lr_scheduler_type="constant")
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
        with_fp16(made.accelerator, scaler)
        made.train()
        states = made.optimizer.optimizer.state.values()
        return losses(made), scaler.get_scale(), max(float(state["step"]) for state in states)

    theirs, scale, steps = scaled(make("llama"), AdamW)
    ours = scaled(fuse_loss(make("llama")), FusedAdamW)
    assert scale < 2.0**24
    assert steps < 30
    assert ours[1:] == (scale, steps)
    assert_follows(ours[0], theirs, rtol=2e-2)


def test_gradient_checkpointing(make: Make, tmp_path: Path) -> None:
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    wanted = curve(make("llama"), tmp_path)
    assert_follows(curve(fuse_loss(make("llama")), tmp_path, FusedAdamW, **checkpointing), wanted)


def test_evaluates_and_smooths_as_the_trainer(make: Make, tmp_path: Path) -> None:
    def evaluated(model: Any, **arguments: Any) -> tuple[Tensor, float]:
        made = trainer(model, tmp_path, max_steps=5, **arguments)
        made.train()
        return losses(made), made.evaluate(Texts(10))["eval_loss"]

    theirs = evaluated(make("llama"), label_smoothing_factor=0.1, gradient_accumulation_steps=1)
    ours = evaluated(fuse_loss(make("llama"), label_smoothing=0.1), gradient_accumulation_steps=1)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=0)
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)


@pytest.mark.parametrize("heads", [0, 1])
@pytest.mark.parametrize("arguments", [{}, {"bf16": True, "bf16_full_eval": True}], ids=["float32", "bfloat16"])
def test_metrics_of_logits(make: Make, tmp_path: Path, heads: int, arguments: dict[str, Any]) -> None:
    """Evaluate during training, with `compute_metrics` of what `preprocess_logits_for_metrics` keeps of the logits."""

    def evaluated(model: Any, **how: Any) -> list[dict[str, float]]:
        def measured(seen: Any) -> dict[str, float]:
            hits = seen.predictions[:, :-1] == seen.label_ids[:, 1:]
            return {"accuracy": float(hits[seen.label_ids[:, 1:] != -100].mean())}

        made = trainer(model, tmp_path, max_steps=4, eval_strategy="steps", eval_steps=2, **arguments)
        made.compute_metrics = measured
        made.preprocess_logits_for_metrics = lambda logits, labels: logits.argmax(-1)
        made.train()
        return [row for row in made.state.log_history if "eval_loss" in row]

    def fused() -> Any:
        return add_mtp(make("llama"), heads, head_weights=[1.0, 0.0]) if heads else fuse_loss(make("llama"))

    theirs, ours = evaluated(make("llama")), evaluated(fused())
    assert len(ours) == len(theirs) == 2
    rounding = 0.05 if arguments else 1e-4
    for row, wanted in zip(ours, theirs):
        assert row["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=rounding)
        assert row["eval_accuracy"] == pytest.approx(wanted["eval_accuracy"], abs=rounding)


def test_columns_are_chosen_by_the_models_signature(make: Make, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is missing: make test-integrations")
    rows = datasets.Dataset.from_list([row | {"source": "web"} for row in Texts(12)])  # type: ignore[attr-defined]
    made = trainer(fuse_loss(make("llama")), tmp_path, max_steps=2)
    made.train_dataset = rows
    assert set(next(iter(made.get_train_dataloader()))) == {"input_ids", "labels", "attention_mask"}
    assert made.model_accepts_loss_kwargs
    assert made.label_names == ["labels"]


def test_lora(make: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: make test-integrations")

    def adapted(fused: bool) -> Any:
        model = make("llama")
        config = peft.LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "lm_head"])
        return peft.get_peft_model(fuse_loss(model) if fused else model, config)

    hyper = HYPER | {"lr": 3e-2}
    theirs = curve(adapted(fused=False), tmp_path, (AdamW, hyper))
    assert_follows(curve(adapted(fused=True), tmp_path, (FusedAdamW, hyper)), theirs, rtol=1e-3)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_accelerates_own_loop(make: Make, precision: str) -> None:
    """Curves in 16 bits are as close to the one in 32 bits as torch's own."""

    def loop(precision: str, fused: bool) -> Tensor:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        half = precision == "fp16"
        accelerator = accelerate.Accelerator(
            gradient_accumulation_steps=2, cpu=True, mixed_precision="no" if half else precision
        )
        if half:
            with_fp16(accelerator, torch.amp.GradScaler("cpu", init_scale=2.0**10))
        model = fuse_loss(make("llama")) if fused else make("llama")
        optimizer = (FusedAdamW if fused else AdamW)(model.parameters(), **HYPER)
        loader = torch.utils.data.DataLoader(Texts(120), batch_size=2, collate_fn=padded)  # type: ignore[arg-type]
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        seen = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            seen.append(loss.item())
        return torch.tensor(seen)

    truth = loop("no", fused=False)
    assert truth[-3:].mean() < 0.8 * truth[:3].mean(), "it learns"

    def far(losses: Tensor) -> float:
        return float((losses / truth - 1).abs().mean())

    theirs = far(loop(precision, fused=False))
    assert theirs < 0.05
    assert far(loop(precision, fused=True)) <= 1.2 * theirs + 1e-4


def test_the_example_learns() -> None:
    path = Path(__file__).parents[2] / "examples" / "hf_trainer.py"
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(path.read_text(), path.name, "exec"), namespace)
    learnt = namespace["train"](20)
    assert len(learnt) == 20
    assert learnt[-1] < 0.7 * learnt[0]
