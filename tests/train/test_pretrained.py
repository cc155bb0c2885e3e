"""Tests of `model.pretrained` that need no transformers; tests/integrations/test_pretrained.py has the rest."""

import math
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmfast.cli import main
from llmfast.data import Batch, BPETokenizer, ByteTokenizer
from llmfast.models.sampling import Sampler
from llmfast.train import pretrained
from llmfast.train.config import load_config
from llmfast.train.settings import ConfigError


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "transformers could not be imported; pip install 'llmfast-torch[hf]'"),
        (
            ["model.heads=3"],
            "model.heads must be left out with model.pretrained=there, whose config.json says it; got 3",
        ),
        (["model.mtp_detach=true"], "model.mtp_detach must be left out with model.pretrained=there, whose config.json"),
        (["train.init_from=x"], "train.init_from must be left out with model.pretrained=there, which has weights"),
        (["runs=.", "name=there"], "model.pretrained must be another folder than the run's own; got there"),
    ],
)
def test_refused_before_any_work(
    more: list[str],
    message: str,
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)  # type: ignore[arg-type]
    monkeypatch.setattr("llmfast.train.run.prepare_data", lambda *_: pytest.fail("data was read"))
    rest = [setting for setting in settings if not setting.startswith(("model.", "data.tokenizer"))]
    assert main(["train", *(f"--set={s}" for s in [*rest, "model.pretrained=there", *more])]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"llmfast: error: {message}") and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "runs").exists() and not (tmp_path / "there").exists()


@pytest.mark.parametrize("context", [1, 8])
def test_ids_that_the_tokenizer_does_not_know_are_never_generated(context: int) -> None:
    """Models of other libraries may have rows beyond their tokenizer's ids, for the sake of round sizes."""

    class Model:
        def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...

        def __call__(self, input_ids: Any, **options: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.arange(10.0).expand(1, input_ids.shape[1], 10), past_key_values=None)

    def largest(logits: Any) -> Any:
        return logits.argmax(-1, keepdim=True)

    stream = pretrained._stream(Model(), 7, torch.tensor([1, 2]), context, largest)
    assert [int(next(stream)) for _ in range(3)] == [6, 6, 6]


def test_a_new_token_is_read_alone_until_the_context_is_full() -> None:
    """The last tokens are read again, without a cache, from then on."""
    read: list[tuple[list[int], Any, bool]] = []

    class Model:
        def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...

        def __call__(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> SimpleNamespace:
            read.append((input_ids[0].tolist(), past_key_values, use_cache))
            logits = torch.zeros(1, input_ids.shape[1], 10)
            logits[0, -1, len(read)] = 1.0
            return SimpleNamespace(logits=logits, past_key_values=f"cache {len(read)}")

    stream = pretrained._stream(Model(), 10, torch.tensor([7, 8]), 3, Sampler())
    assert [int(next(stream)) for _ in range(4)] == [1, 2, 3, 4]
    assert read == [
        ([7, 8], None, True),
        ([1], "cache 1", True),
        ([8, 1, 2], None, False),
        ([1, 2, 3], None, False),
    ]


def test_a_run_takes_over_all_but_the_weights_and_its_own_tokenizer(tmp_path: Path) -> None:
    wanted = ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
    wanted += ["added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"]
    folder, run = tmp_path / "there", tmp_path / "run"
    for place in (folder, run):
        place.mkdir()
    for name in (*wanted, "tokenizer.json", "model.safetensors", "README.md"):
        (folder / name).write_text(name)
    pretrained.copy_files(folder, run)
    assert {path.name: path.read_text() for path in run.iterdir()} == {name: name for name in wanted}
    (folder / "merges.txt").unlink()
    pretrained.copy_files(folder, tmp_path)
    assert not (tmp_path / "merges.txt").exists() and (tmp_path / "vocab.json").exists()


def test_weights_are_saved_as_readable_as_all_else(tmp_path: Path) -> None:
    class Model:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("new")
            (folder / "model.safetensors").touch(mode=0o600)

    (left := tmp_path / ".pretrained.partial").mkdir()  # by a run that was killed
    (left / "half.safetensors").touch()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("old")
    pretrained.save_pretrained(Model(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    assert [(tmp_path / name).read_text() for name in ("config.json", "tokenizer.json")] == ["new", "old"]


def test_the_tokenizer_must_be_the_models(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    folder, copy, other = tmp_path, tmp_path / "copy.json", tmp_path / "other.json"
    tokenizer = BPETokenizer.train(["some text"], 270)
    for file in (folder / "tokenizer.json", copy):
        tokenizer.save(file)
    BPETokenizer.train(["text some more, text some more"], 270).save(other)
    for named in ("bpe", str(folder / "tokenizer.json"), str(copy)):
        pretrained._expect_same_tokenizer(load_config(None, [f"data.tokenizer={named}"]), tokenizer, folder)
    for named in ("bytes", str(other)):
        with pytest.raises(ValueError, match=rf"data.tokenizer must be left out, .*tokenizer\.json; got '{named}'$"):
            pretrained._expect_same_tokenizer(load_config(None, [f"data.tokenizer={named}"]), tokenizer, folder)


@pytest.mark.parametrize(
    ("rows", "positions", "fim", "start", "message"),
    [
        (264, 32, 0.0, (), ""),
        (300, None, 0.5, (), ""),
        (264, 33, 0.0, (5,), ""),
        (263, 32, 0.0, (), "its tokenizer must be the model's own, with at most its 263 ids; got one of 264"),
        (264, 31, 0.0, (), "data.seq_len must be at most the 31 positions of this Kind; got 32"),
        (
            264,
            None,
            0.5,
            (5,),
            "data.fim_rate must be 0: this model's texts begin with a token that must stay in front",
        ),
    ],
)
def test_rows_and_ids_must_fit_the_model(
    rows: int, positions: int | None, fim: float, start: tuple[int, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = SimpleNamespace(vocab_size=rows, max_position_embeddings=positions)
    settings = SimpleNamespace(get_text_config=lambda: inner)
    monkeypatch.setattr(ByteTokenizer, "start_ids", start)
    config = load_config(None, ["data.seq_len=32", f"data.fim_rate={fim}"])
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        pretrained._expect_fitting("Kind", settings, config, ByteTokenizer())
    monkeypatch.setattr(pretrained, "_described", lambda folder: (None, settings))
    assert pretrained.positions_of(Path("there")) == positions
    del inner.max_position_embeddings
    assert pretrained.positions_of(Path("there")) is None


@pytest.mark.parametrize(
    ("ours", "step", "weights", "taken"),
    [
        *(
            (False, None, True, "files"),
            (True, None, True, "files"),
            (True, 8, True, "files"),
            (True, 9, True, "files"),
        ),
        *((True, 7, True, "checkpoint"), (True, 8, False, "checkpoint"), (True, 7, False, "checkpoint")),
    ],
)
def test_which_weights_of_a_folder_are_read(
    ours: bool, step: int | None, weights: bool, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read the files of the last step of a run, unless it went on: its checkpoints are newer then."""
    done: list[Any] = []
    model = SimpleNamespace(tie_weights=lambda: done.append("tied"))

    def from_pretrained(folder: Path, **options: Any) -> Any:
        done.append(options)
        return "files", {"missing_keys": []}

    kind = SimpleNamespace(from_pretrained=from_pretrained)
    if ours:
        (tmp_path / "config.toml").touch()
    if weights:
        (tmp_path / "model-1.safetensors").touch()
    monkeypatch.setattr(pretrained, "newest_step", lambda folder: step)
    monkeypatch.setattr(pretrained, "saved_settings", lambda folder: load_config(None, ["train.steps=8"]))
    monkeypatch.setattr(pretrained, "new_model", lambda folder, dtype: done.append(dtype) or model)
    monkeypatch.setattr(pretrained, "load_weights", lambda folder, model, accept: done.append((folder, model)))
    monkeypatch.setattr(pretrained, "_described", lambda folder: (kind, None))
    found = pretrained.read_model(tmp_path, torch.bfloat16)
    if taken == "checkpoint":
        assert found is model and done == [torch.bfloat16, (tmp_path, model), "tied"]
    else:
        options = {"dtype": torch.bfloat16, "use_safetensors": True, "output_loading_info": True}
        assert found == "files" and done == [options | {"local_files_only": True}]


def test_a_model_of_transformers_is_given_labels_positions_and_their_count() -> None:
    given: list[dict[str, Any]] = []

    def model(**options: Any) -> SimpleNamespace:
        given.append(options)
        return SimpleNamespace(loss=torch.tensor(2.5, requires_grad=True))

    tokens, labels, documents, positions = (torch.full((1, 3), i) for i in range(4))
    batch = Batch(tokens, labels, documents, positions, 3)
    count = torch.tensor([7])
    objective = pretrained.OwnLoss(["a", "b"])
    loss, sums = objective(model, batch, count, 0, True)
    assert loss.requires_grad and not sums["loss"].requires_grad and sums.keys() == {"loss"} and sums["loss"] == 2.5
    (options,) = given
    assert options["input_ids"] is tokens and options["position_ids"] is positions and options["use_cache"] is False
    assert options["labels"] is options["shift_labels"] is labels and options["num_items_in_batch"] == 7
    assert len(options) == 6 and objective.num_valid(batch).tolist() == [3]


def test_what_is_kept_apart_from_a_pretrained_model() -> None:
    config = load_config(None, ["runs=there", "name=x"])
    config.model.pretrained, config.train.vocab_parallel = "there", True
    with pytest.raises(
        ConfigError, match=r"train.vocab_parallel must .*=there, whose output layer cannot be split; got"
    ):
        pretrained._expect_alone(config)
    config.train.vocab_parallel, config.model.pretrained = False, "there/../there/x"
    with pytest.raises(ConfigError, match=r"must be another folder than the run's own; got there/../there/x"):
        pretrained._expect_alone(config)
    config.model.pretrained = "there"
    pretrained._expect_alone(config)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("scale", [0.01, 40.0])
def test_a_model_must_compute_the_loss_of_each_document_alone(
    dtype: torch.dtype, close: float, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare with the plain loss of four rows of four tokens, up to rounding: of a large loss, a share of it."""
    V, off = 5, [0.0]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(V, 3, dtype=dtype)

        def get_input_embeddings(self) -> torch.nn.Embedding:
            return self.embedding

        def forward(self, input_ids: torch.Tensor, position_ids: Any = None, use_cache: bool = True) -> SimpleNamespace:
            assert input_ids.shape == (4, 4) and not use_cache
            return SimpleNamespace(logits=scale * torch.nn.functional.one_hot(input_ids, V).to(dtype))

    class Loss:
        def __call__(self, model: Any, batch: Batch, count: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, Any]:
            assert count.item() == batch.num_valid == batch.labels.numel() == 16
            assert batch.positions.tolist() == [[0, 1, 2, 3] * 2] * 2 and batch.labels.shape == (2, 8)
            return torch.tensor(plain + off[0]), {}

    # A label is the next token of its row of eight, the last one's the first: modulo V, some are the token itself.
    ids = (torch.arange(1, 17) % V).view(2, 8)
    logits = (scale * torch.nn.functional.one_hot(ids, V).to(dtype)).float()
    plain = torch.nn.functional.cross_entropy(logits.view(16, V), ids.roll(-1, 1).flatten()).item()
    assert (plain > 10) == (scale > 1)
    parts = SimpleNamespace(fuse_loss=lambda model: model, unchanged=lambda model: nullcontext())
    monkeypatch.setitem(sys.modules, "llmfast.integrations.transformers", parts)  # type: ignore[arg-type]
    monkeypatch.setattr(pretrained, "OwnLoss", Loss)
    model, most = Model(), close * max(1.0, plain)
    for off[0] in (0.0, 0.98 * most, -0.98 * most):
        assert pretrained._with_own_loss(model) is model
    for off[0] in (1.02 * most, -1.02 * most, math.nan):
        with pytest.raises(ValueError, match="Model cannot be trained on rows of several documents: its loss is "):
            pretrained._with_own_loss(model)
