"""An ordinary LightningModule, with and without llmfast: the same curve under Lightning's Trainer."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast.losses import linear_cross_entropy
from llmfast.optim import FusedAdamW

lightning = pytest.importorskip("lightning", reason="lightning is missing: make test-integrations")
from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402
from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint need to be provided"),
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning"),  # the first step overflowed
]
STEPS, V = 20, 320
HYPER = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """Predicts the next of numbers that count up. With llmfast two lines are others."""

    def __init__(self, ours: bool, **hyper: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ours, self.hyper = ours, HYPER | hyper
        self.embedding = nn.Embedding(V, 32)
        self.rnn = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, V, bias=False)
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        hidden, _ = self.rnn(self.embedding(batch[:, :-1]))
        if self.ours:
            loss = linear_cross_entropy(hidden, self.head.weight, batch[:, 1:])
        else:
            loss = F.cross_entropy(self.head(hidden).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = (FusedAdamW if self.ours else torch.optim.AdamW)(self.parameters(), **self.hyper)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2 * STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches:
    """Loader of one epoch. Lightning resumes within an epoch if its loader saves its position, and else repeats it."""

    def __init__(self) -> None:
        self.given = 0

    def __len__(self) -> int:
        return 4 * STEPS

    def __iter__(self) -> Iterator[Tensor]:
        while self.given < len(self):
            starts = torch.randint(3, V - 20, (4, 1), generator=torch.Generator().manual_seed(self.given % 8))
            self.given += 1
            yield starts + torch.arange(17)

    def state_dict(self) -> dict[str, int]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.given = state["given"]


def trained(module: Any, folder: Path, resume: Path | None = None, **arguments: Any) -> Any:
    trainer = lightning.Trainer(
        **{
            "max_steps": STEPS,
            "accelerator": "cpu",
            "default_root_dir": folder,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | arguments
    )
    trainer.fit(module, Batches(), ckpt_path=resume)
    return trainer


def curve(module: Any, folder: Path, **arguments: Any) -> Tensor:
    trained(module, folder, **arguments)
    return torch.tensor(module.losses)


def assert_follows(ours: Tensor, theirs: Tensor, rtol: float = 1e-4) -> None:
    assert len(theirs) >= STEPS
    assert theirs[-3:].mean() < 0.9 * theirs[0], "it learns"
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.1},
    ],
)
def test_same_curve(tmp_path: Path, arguments: dict[str, Any]) -> None:
    theirs = curve(Module(ours=False), tmp_path, **arguments)
    assert len(theirs) == STEPS * arguments.get("accumulate_grad_batches", 1)
    assert_follows(curve(Module(ours=True), tmp_path, **arguments), theirs)


@pytest.mark.parametrize("saved_by_ours", [True, False])
@pytest.mark.parametrize("resumed_by_ours", [True, False])
def test_resumes_from_a_checkpoint_of_either(tmp_path: Path, saved_by_ours: bool, resumed_by_ours: bool) -> None:
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=12, save_top_k=-1)
    whole = Module(saved_by_ours)
    trained(whole, tmp_path, callbacks=[saving], enable_checkpointing=True)
    resumed = Module(resumed_by_ours)
    trained(resumed, tmp_path, resume=tmp_path / "step=12.ckpt")
    assert len(whole.losses) == STEPS and len(resumed.losses) == STEPS - 12
    exact = saved_by_ours == resumed_by_ours
    torch.testing.assert_close(resumed.losses, whole.losses[12:], rtol=0 if exact else 1e-4, atol=0)


def fp16() -> Any:
    """Choose float16, which Lightning does not use on a CPU, with a scale so large that the first steps overflow."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**22))


MIXED: list[Callable[[], dict[str, Any]]] = [lambda: {"precision": "bf16-mixed"}, lambda: {"plugins": fp16()}]


@pytest.mark.parametrize("mixed", MIXED, ids=["bf16", "fp16"])
def test_mixed_precision(tmp_path: Path, mixed: Callable[[], dict[str, Any]]) -> None:
    """Rounding differs; the curves must agree up to that."""
    theirs = curve(Module(ours=False), tmp_path, **mixed())
    assert_follows(curve(Module(ours=True), tmp_path, **mixed()), theirs, rtol=2e-2)


def test_fp16_leaves_out_steps_that_overflow(tmp_path: Path) -> None:
    plugin = fp16()
    trainer = trained(Module(ours=True), tmp_path, plugins=plugin)
    steps = {float(state["step"]) for state in trainer.optimizers[0].state.values()}
    skipped = -torch.tensor(plugin.scaler.get_scale() / 2.0**22).log2()
    assert skipped > 0
    assert steps == {STEPS - float(skipped)}


def test_clipped_once_by_lightning_or_by_the_optimizer(tmp_path: Path) -> None:
    """Clipping by `max_grad_norm` saves a pass. With both, a gradient that was clipped is not clipped again."""
    by_lightning = curve(Module(ours=True), tmp_path, gradient_clip_val=0.1)
    assert_follows(curve(Module(ours=True, max_grad_norm=0.1), tmp_path), by_lightning)
    both = Module(ours=True, max_grad_norm=0.1)
    trainer = trained(both, tmp_path, gradient_clip_val=0.1)
    assert_follows(torch.tensor(both.losses), by_lightning)
    assert float(trainer.optimizers[0].grad_norm) == pytest.approx(0.1, rel=1e-3), "what Lightning left"


@pytest.mark.parametrize("mixed", MIXED, ids=["bf16", "fp16"])
def test_clipped_by_the_optimizer_in_mixed_precision(tmp_path: Path, mixed: Callable[[], dict[str, Any]]) -> None:
    """Lightning refuses to clip there for an optimizer that undoes GradScaler's scale, torch's own fused ones too."""
    with pytest.raises(RuntimeError, match="FusedAdamW, does not allow for gradient clipping"):
        trained(Module(ours=True), tmp_path, gradient_clip_val=0.1, **mixed())
    theirs = curve(Module(ours=False), tmp_path, gradient_clip_val=0.1, **mixed())
    assert_follows(curve(Module(ours=True, max_grad_norm=0.1), tmp_path, **mixed()), theirs, rtol=2e-2)


def test_a_fused_model_of_transformers(tmp_path: Path, make: Callable[..., Any]) -> None:
    pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")
    from llmfast.integrations.transformers import fuse_loss

    class Tuned(Module):
        def __init__(self, ours: bool) -> None:
            super().__init__(ours)
            self.lm = fuse_loss(make("tied")) if ours else make("tied")

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss: Tensor = self.lm(input_ids=batch, labels=batch).loss
            self.losses.append(loss.item())
            return loss

    assert_follows(curve(Tuned(ours=True), tmp_path), curve(Tuned(ours=False), tmp_path))


def test_the_example_learns() -> None:
    path = Path(__file__).parents[2] / "examples" / "lightning_module.py"
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(path.read_text(), path.name, "exec"), namespace)
    learnt = namespace["train"](40)
    assert len(learnt) == 40
    assert learnt[-1] < 0.7 * learnt[0]
