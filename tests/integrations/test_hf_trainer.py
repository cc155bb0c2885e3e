"""The stock Trainer, TRL's and accelerate's loop, with and without llmfast: the same curve."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdamW

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

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
    """`given` says how the optimizer reaches the Trainer; `optimizer` is a class, or one with its keywords."""
    cls, hyper = optimizer if isinstance(optimizer, tuple) else (optimizer, HYPER)
    args = transformers.TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 30, "logging_steps": 1, "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2, "learning_rate": hyper["lr"], "lr_scheduler_type": "cosine",
            "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "max_grad_norm": 1.0,
            "dataloader_pin_memory": False,
        } | arguments
    )  # fmt: skip
    how: dict[str, Any] = {"optimizer_cls_and_kwargs": (cls, dict(hyper))}
    if given == "instance":
        how = {"optimizers": (cls(model.parameters(), **hyper), None)}
    made = transformers.Trainer(model, args, train_dataset=Texts(), data_collator=padded, **how)
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
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


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
    """Rows of different length: a mean of means would be another curve."""
    whole = curve(
        fuse_loss(make("llama")), tmp_path, FusedAdamW, per_device_train_batch_size=4, gradient_accumulation_steps=1
    )
    for size in (1, 2):
        cut = curve(
            fuse_loss(make("llama")), tmp_path, FusedAdamW, per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
        )  # fmt: skip
        assert_follows(cut, whole)


def test_clipping_by_the_trainer_or_by_the_optimizer(make: Make, tmp_path: Path) -> None:
    """One of the two: the Trainer's `max_grad_norm=0` leaves it to FusedAdamW, which gets rid of a pass."""
    norm = 0.5
    by_trainer = trainer(fuse_loss(make("llama")), tmp_path, FusedAdamW, max_grad_norm=norm)
    by_optimizer = trainer(
        fuse_loss(make("llama")), tmp_path, (FusedAdamW, HYPER | {"max_grad_norm": norm}), max_grad_norm=0.0
    )
    for made in (by_trainer, by_optimizer):
        made.train()
    assert_follows(losses(by_optimizer), losses(by_trainer))
    norms = [row["grad_norm"] for row in by_trainer.state.log_history if "grad_norm" in row]
    assert min(norms) > norm, "it clips"
    assert float(by_optimizer.optimizer.optimizer.grad_norm) == pytest.approx(norms[-1], rel=1e-3)


def test_bfloat16(make: Make, tmp_path: Path) -> None:
    """Under autocast rounding differs, and the curves stay as close as that."""
    theirs = curve(make("llama"), tmp_path, bf16=True)
    ours = curve(fuse_loss(make("llama")), tmp_path, FusedAdamW, bf16=True)
    assert_follows(ours, theirs, rtol=5e-2)


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


def test_columns_are_chosen_by_the_models_signature(make: Make, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([row | {"source": "web"} for row in Texts(12)])  # type: ignore[attr-defined]
    made = trainer(fuse_loss(make("llama")), tmp_path, max_steps=2)
    made.train_dataset = rows
    assert set(next(iter(made.get_train_dataloader()))) == {"input_ids", "labels", "attention_mask"}
    assert made.model_accepts_loss_kwargs
    assert made.label_names == ["labels"]


def test_lora(make: Make, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(fused: bool) -> Any:
        model = make("llama")
        config = peft.LoraConfig(r=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "lm_head"])
        return peft.get_peft_model(fuse_loss(model) if fused else model, config)

    hyper = HYPER | {"lr": 3e-2}
    theirs = curve(adapted(fused=False), tmp_path, (AdamW, hyper))
    assert_follows(curve(adapted(fused=True), tmp_path, (FusedAdamW, hyper)), theirs, rtol=1e-3)


def test_accelerates_own_loop(make: Make) -> None:
    from accelerate import Accelerator

    def loop(fused: bool) -> Tensor:
        accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
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

    theirs = loop(fused=False)
    assert theirs[-3:].mean() < 0.8 * theirs[:3].mean(), "it learns"
    torch.testing.assert_close(loop(fused=True), theirs, rtol=1e-4, atol=0)


def test_trls_sft_trainer(make: Make, tmp_path: Path) -> None:
    """It computes losses itself, unless told to leave that to the model; the optimizer is free in any case."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    class LossOfTheModel(trl.SFTTrainer):  # type: ignore[misc, name-defined]
        compute_loss = transformers.Trainer.compute_loss

    def tuned(kind: Any, model: Any, optimizer: Any) -> Tensor:
        args = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=30, logging_steps=1, per_device_train_batch_size=2, use_cpu=True,
            gradient_accumulation_steps=2, report_to=[], save_strategy="no", disable_tqdm=True, bf16=False,
            gradient_checkpointing=False, learning_rate=HYPER["lr"], max_length=None, dataloader_pin_memory=False,
        )  # fmt: skip
        rows = datasets.Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["labels"]} for row in Texts()])  # type: ignore[attr-defined]
        made = kind(
            model, args, train_dataset=rows, processing_class=tokenizer(), data_collator=padded,
            optimizer_cls_and_kwargs=(optimizer, dict(HYPER)),
        )  # fmt: skip
        made.remove_callback(transformers.PrinterCallback)
        made.train()
        return losses(made)

    theirs = tuned(trl.SFTTrainer, make("llama"), AdamW)
    assert_follows(tuned(trl.SFTTrainer, make("llama"), FusedAdamW), theirs)
    assert_follows(tuned(LossOfTheModel, fuse_loss(make("llama")), FusedAdamW), theirs)


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    words = {f"w{i}": i for i in range(320)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token="w0", eos_token="w2"
    )


def test_the_example_learns() -> None:
    path = Path(__file__).parents[2] / "examples" / "hf_trainer.py"
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(path.read_text(), path.name, "exec"), namespace)
    learnt = namespace["train"](20)
    assert len(learnt) == 20
    assert learnt[-1] < 0.7 * learnt[0]
