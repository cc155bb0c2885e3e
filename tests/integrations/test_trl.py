"""TRL's SFTTrainer makes its losses itself, or leaves that to the model; the optimizer is free in any case."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.optim import FusedAdamW

for name in ("transformers", "datasets", "trl"):
    pytest.importorskip(name, reason=f"{name} is missing: make test-integrations")
import datasets  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402

from llmfast.integrations.mtp import add_mtp  # noqa: E402
from llmfast.integrations.transformers import fuse_loss  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),  # label smoothing and logits, with TRL's loss
    pytest.mark.filterwarnings("ignore:.*bfloat16.* model weights loaded in"),
]
Make = Callable[..., Any]
AdamW = torch.optim.AdamW
STEPS = 20
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    path = Path(__file__).parents[2] / "examples" / "sft_trainer.py"
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(path.read_text(), path.name, "exec"), namespace)
    return namespace


def rows(count: int = 80) -> Any:
    """Return sequences of 4 to 16 ascending tokens; the first two have no labels."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(3, 40, (count,), generator=generator).tolist()
    lengths = torch.randint(4, 17, (count,), generator=generator).tolist()
    ids = [[*range(start, start + length)] for start, length in zip(starts, lengths)]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def tokenizer() -> Any:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(320)}, unk_token="w3"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2")


def trainer(kind: Any, model: Any, folder: Path, optimizer: Any = AdamW, **given: Any) -> Any:
    """Create an SFTTrainer; `given` holds its arguments and those of SFTConfig."""
    names = ("peft_config", "compute_metrics", "optimizers")
    to_trainer = {name: given.pop(name) for name in names if name in given}
    if "optimizers" not in to_trainer:
        to_trainer["optimizer_cls_and_kwargs"] = (optimizer, dict(HYPER))
    args = trl.SFTConfig(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "logging_steps": 1,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": HYPER["lr"],
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "max_length": 24,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }
        | given
    )
    made = kind(model, args, train_dataset=rows(), eval_dataset=rows(8), processing_class=tokenizer(), **to_trainer)
    made.remove_callback(transformers.PrinterCallback)
    return made


def losses(made: Any) -> Tensor:
    return torch.tensor([row["loss"] for row in made.state.log_history if "loss" in row])


def curve(*args: Any, **given: Any) -> Tensor:
    made = trainer(*args, **given)
    made.train()
    return losses(made)


def assert_follows(ours: Tensor, theirs: Tensor) -> None:
    assert len(theirs) == STEPS
    assert theirs[-3:].mean() < 0.8 * theirs[0], "it learns"
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@pytest.mark.parametrize("given", ["class", "instance"])
def test_the_optimizer_follows_torchs(make: Make, tmp_path: Path, given: str) -> None:
    def tuned(optimizer: Any) -> Tensor:
        model = make("llama")
        how = {"optimizers": (optimizer(model.parameters(), **HYPER), None)} if given == "instance" else {}
        return curve(trl.SFTTrainer, model, tmp_path, optimizer, **how)

    assert_follows(tuned(FusedAdamW), tuned(AdamW))


def test_a_fused_model_takes_trls_loss_and_gives_it_logits(make: Make, tmp_path: Path) -> None:
    """TRL goes past the model's forward, so that nothing of `fuse_loss` is seen; the logits of metrics are there."""
    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"highest": float(prediction.predictions.max())}

    def evaluated(model: Any) -> tuple[Tensor, dict[str, float]]:
        made = trainer(trl.SFTTrainer, model, tmp_path, compute_metrics=metrics)
        made.train()
        return losses(made), made.evaluate()

    theirs = evaluated(make("gemma2"))
    ours = evaluated(fuse_loss(make("gemma2"), label_smoothing=0.5))
    assert_follows(ours[0], theirs[0])
    assert seen[0] == seen[1] and seen[0][-1] == 320
    for key in ("eval_loss", "eval_highest", "eval_mean_token_accuracy"):
        assert ours[1][key] == pytest.approx(theirs[1][key], rel=1e-4)


# Without accumulation: the Trainer's smoothing weighs micro-batches by their tokens only since transformers 5.15.
SMOOTHED = {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 1}


@pytest.mark.parametrize("given", [{}, {"packing": True}, SMOOTHED], ids=["padded", "packed", "smoothed"])
def test_the_models_own_loss(make: Make, tmp_path: Path, example: dict[str, Any], given: dict[str, Any]) -> None:
    """Match TRL's curve and evaluation as the example does, with padding, packed documents and smoothing."""

    def evaluated(kind: Any, model: Any, optimizer: Any, **given: Any) -> tuple[Tensor, float]:
        made = trainer(kind, model, tmp_path, optimizer, eval_packing=False, **given)
        made.train()
        return losses(made), made.evaluate()["eval_loss"]

    theirs = evaluated(trl.SFTTrainer, make("llama"), AdamW, **given)
    given = dict(given)
    smoothing = given.pop("label_smoothing_factor", 0.0)
    ours = evaluated(example["ModelsLoss"], fuse_loss(make("llama"), label_smoothing=smoothing), FusedAdamW, **given)
    assert_follows(ours[0], theirs[0])
    assert ours[1] == pytest.approx(theirs[1], rel=1e-4)


def test_the_models_own_loss_makes_no_logits(make: Make, tmp_path: Path, example: dict[str, Any]) -> None:
    made = trainer(example["ModelsLoss"], fuse_loss(make("llama")), tmp_path)
    batch = next(iter(made.get_train_dataloader()))
    loss, outputs = made.compute_loss(made.model, batch, return_outputs=True)
    assert loss.requires_grad
    assert outputs.logits is None


def test_adapters(make: Make, tmp_path: Path, example: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft", reason="peft is missing: make test-integrations")

    def tuned(kind: Any, model: Any, optimizer: Any) -> Tensor:
        modules = ["q_proj", "v_proj", "down_proj"]
        adapters = peft.LoraConfig(r=8, lora_alpha=128, task_type="CAUSAL_LM", target_modules=modules)
        return curve(kind, model, tmp_path, optimizer, peft_config=adapters)

    theirs = tuned(trl.SFTTrainer, make("llama"), AdamW)
    assert_follows(tuned(example["ModelsLoss"], fuse_loss(make("llama")), FusedAdamW), theirs)


def test_further_heads(make: Make, tmp_path: Path, example: dict[str, Any]) -> None:
    """They learn where the model's own loss is asked for, as under the stock Trainer, and not with TRL's."""

    def trained(kind: Any, heads_learn: bool) -> list[float]:
        model = add_mtp(make("llama"), 1)
        before = [p.clone() for p in model.mtp.parameters()]
        seen = curve(kind, model, tmp_path, FusedAdamW, max_steps=10)
        assert heads_learn == any(not torch.equal(p, old) for p, old in zip(model.mtp.parameters(), before))
        return seen.tolist()

    ours, theirs = trained(example["ModelsLoss"], True), trained(trl.SFTTrainer, False)
    assert ours[0] == pytest.approx(2 * theirs[0], rel=0.3)
    assert ours[-1] < 0.8 * ours[0]


def test_resumes_from_a_checkpoint_saved_without_llmfast(make: Make, tmp_path: Path, example: dict[str, Any]) -> None:
    whole = trainer(trl.SFTTrainer, make("llama"), tmp_path, AdamW, save_strategy="steps", save_steps=12)
    whole.train()
    resumed = trainer(example["ModelsLoss"], fuse_loss(make("llama")), tmp_path, FusedAdamW)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert_follows(losses(resumed), losses(whole))


def test_the_example_learns(example: dict[str, Any]) -> None:
    learnt = example["train"](20)
    assert len(learnt) == 20
    assert learnt[-1] < 0.75 * learnt[0]
