"""One line opens what a run has trained."""

import json
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import llmfast
from llmfast.export import export
from llmfast.train import Hooks, Trainer, load_config, load_run, loading, train
from llmfast.train.earlier import resumed_config, saved_settings
from support.runs import write_run

pytestmark = pytest.mark.usefixtures("unpictured")
KINDS = [
    [],
    ["model.tie_embeddings=false", "train.param_dtype=bfloat16"],
    ["model.mtp=parallel", "model.mtp_heads=2"],
    ["model.mtp=sequential", "model.mtp_heads=2", "model.mtp_repeated_layer=true"],
    ["model.mtp=shared", "model.mtp_heads=2"],
]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype for k in one)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_model_and_the_tokenizer_of_a_run(settings: list[str], kind: str, tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", *settings, tokenizer=kind)
    before = torch.get_rng_state()
    model, tokenizer = llmfast.load_run(str(tmp_path / "run"))
    assert torch.equal(before, torch.get_rng_state())
    assert same(model, written) and model.config == written.config and not model.training
    assert tokenizer.decode(tokenizer.encode("def f(x): naïve")) == "def f(x): naïve"
    hidden = model(torch.as_tensor(tokenizer.encode("def"), dtype=torch.int64)[None])
    assert hidden.requires_grad  # it can be trained further


def test_a_run_of_the_trainer_and_one_that_did_not_finish(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = train(load_config(None, [*settings, "name=x"]), console=Console(quiet=True))
    finished = load_run(run).model
    (run / "model.safetensors").rename(run / "kept")
    assert same(load_run(run).model, finished)

    # Resumed with more steps and not finished: model.safetensors is of an earlier one then.
    class Stop(Hooks):
        def after_step(self, trainer: Trainer) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    (run / "kept").rename(run / "model.safetensors")
    monkeypatch.setattr("llmfast.train.run.Shares", lambda order: Stop())
    with pytest.raises(KeyboardInterrupt):
        train(resumed_config(run, ["train.steps=20"]), resume=True, console=Console(quiet=True))
    newest = load_run(run).model
    assert (run / "checkpoint-00000009").exists() and not same(newest, finished)
    (run / "model.safetensors").unlink()
    assert same(load_run(run).model, newest)


def test_an_exported_folder(tmp_path: Path) -> None:
    written = write_run(tmp_path / "run", "model.mtp=sequential", "model.mtp_heads=2")
    export(tmp_path / "run", tmp_path / "all", depths=True)
    assert same(load_run(tmp_path / "all").model, written)
    export(tmp_path / "run", tmp_path / "next")
    model, tokenizer = load_run(tmp_path / "next")
    assert model.config.mtp == "none" and tokenizer.eot_id == 256
    tokens = torch.randint(0, 256, (2, 9))
    assert torch.equal(model(tokens), written(tokens))


def test_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"RUN must be the folder of a run, .*gone, which does not exist"):
        load_run(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"RUN must be the folder of a run, with config.toml, .*; got \S*$"):
        load_run(tmp_path)
    write_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    weights = tmp_path / "run" / "model.safetensors"
    with pytest.raises(ValueError, match=rf"; got {weights}; did you mean {tmp_path / 'run'}\?"):
        load_run(weights)
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"model.safetensors does not go with config.toml"):
        load_run(tmp_path / "run")
    write_run(tmp_path / "wide", "model.width=48")
    weights.write_bytes((tmp_path / "wide" / "model.safetensors").read_bytes())
    with pytest.raises(
        ValueError, match=r"model.safetensors does not go with config.toml .*size mismatch for embedding"
    ) as e:
        load_run(tmp_path / "run")
    assert "\n" not in str(e.value)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"run has no weights yet: neither a checkpoint nor model.safetensors"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("rich.table", "llmfast.train needs rich: pip install 'llmfast-torch"),
        ("llmfast.x", None),
        ("llmfast_kernels", None),
        (None, None),
    ],
)
def test_only_a_package_that_is_missing_is_said_to_need_the_extra(
    missing: str | None, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(llmfast.train, "import_module", fails)
    kind = ImportError if message else ModuleNotFoundError
    with pytest.raises(kind, match=message or f"No module named {missing!r}") as caught:
        llmfast.train.__getattr__("load_run")
    assert type(caught.value) is kind


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'llmfast' has no attribute 'nothing'"):
        llmfast.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("step", "file", "taken"),
    [
        *((None, True, "file"), (7, True, "checkpoint"), (8, True, "file"), (9, True, "file")),
        *((7, False, "checkpoint"), (8, False, "checkpoint"), (None, False, "nothing")),
    ],
)
def test_which_weights_are_taken(
    step: int | None, file: bool, taken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of eight steps: model.safetensors is of its last one, and older than checkpoints of a run that goes on."""
    write_run(tmp_path / "run", "train.steps=8")
    if not file:
        (tmp_path / "run" / "model.safetensors").unlink()
    read: list[str] = []
    monkeypatch.setattr(loading, "newest_step", lambda run: step)
    monkeypatch.setattr(loading, "load_weights", lambda run, model, accept: read.append("checkpoint"))
    monkeypatch.setattr(loading, "_load", lambda model, file: read.append("file"))
    with pytest.raises(FileNotFoundError) if taken == "nothing" else nullcontext():
        load_run(tmp_path / "run")
    assert read == ([] if taken == "nothing" else [taken])


def test_what_is_known_of_a_model_before_its_weights_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", "data.seq_len=48")
    own = loading.open_run(tmp_path / "run")
    assert own.context == 48 and own.shape == own.model().config and own.settings is not None
    export(tmp_path / "run", tmp_path / "out")
    exported = loading.open_run(tmp_path / "out")
    assert (exported.context, exported.settings, exported.shape) == (
        48,
        None,
        replace(own.shape, ffn_width=own.shape.hidden_ffn),
    )
    assert not exported.model().training
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for wrong in (0, -1, 1.5, "48", None):
        told = config | {"max_position_embeddings": wrong}
        (tmp_path / "out" / "config.json").write_text(json.dumps(told))
        with pytest.raises(ValueError, match=rf"config.json must say max_position_embeddings, .*; got {wrong!r}$"):
            loading.open_run(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | {"llmfast_mtp": {}}))
    with pytest.raises(ValueError, match="heads of add_mtp"):
        loading.open_run(tmp_path / "out")


@pytest.mark.parametrize(("positions", "context"), [(None, 48), (99, 99), (12, 12)])
def test_a_model_of_transformers_reads_what_its_positions_allow(
    positions: int | None, context: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "run", "data.seq_len=48")
    theirs = saved_settings(tmp_path / "run")
    theirs.model.pretrained = "there"
    monkeypatch.setattr(loading, "saved_settings", lambda run: theirs)
    monkeypatch.setattr(loading, "positions_of", lambda folder: positions)
    monkeypatch.setattr(loading, "read_model", lambda folder: torch.nn.Linear(1, 1).train())
    opened = loading.open_run(tmp_path / "run")
    assert opened.context == context and opened.shape is None and opened.settings is theirs
    assert type(opened.model()) is torch.nn.Linear and not opened.model().training


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "run")
    for i in range(11):
        folder = tmp_path / "many" / f"r{i:02}"
        folder.mkdir(parents=True)
        (folder / "config.toml").touch()
    names = ", ".join(f"r{i:02}" for i in range(10))
    for folder, said in (
        (tmp_path, "; it holds runs: run"),
        (tmp_path / "many", f"; it holds runs: {names} and 1 more"),
    ):
        with pytest.raises(ValueError, match=rf"got {folder}{said}$"):
            load_run(folder)
