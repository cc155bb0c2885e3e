"""`llmfast export`: a folder that is whole or not there. tests/integrations compares it with transformers."""

import json
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
from safetensors.torch import load_file

from llmfast.cli import main
from llmfast.data import ByteTokenizer
from llmfast.export import export
from llmfast.models.decoder import MTP
from llmfast.train import loading
from llmfast.train.config import Config
from support.runs import write_run


def test_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, to = tmp_path / "run", tmp_path / "hf"
    write_run(run, "model.mtp=parallel", "model.mtp_heads=3", "model.tie_embeddings=false")
    to.mkdir()  # empty, so that it can be written to
    assert main(["export", str(run), str(to)]) == 0
    assert capsys.readouterr() == (f"{to}\n", "")
    assert {p.name for p in to.iterdir()} == {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }
    assert len({p.stat().st_mode for p in to.iterdir()}) == 1  # who can read one file can read all
    names = load_file(str(to / "model.safetensors")).keys()
    assert "model.layers.1.self_attn.q_proj.weight" in names and not any("layers.2" in name for name in names)
    config = json.loads((to / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["max_position_embeddings"]) == ("llama", 2, 64)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (256, 256, 260)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_run_that_has_not_finished_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    model = write_run(run, "train.steps=8")
    (run / "model.safetensors").unlink()
    monkeypatch.setattr(loading, "newest_step", lambda folder: 5)
    monkeypatch.setattr(
        loading, "load_weights", lambda folder, empty, accept: empty.load_state_dict(model.state_dict())
    )
    assert main(["export", str(run), str(tmp_path / "hf")]) == 0
    told = "llmfast: the run has not finished; this is its model after step 5\n"
    assert capsys.readouterr() == (f"{tmp_path / 'hf'}\n", told)
    assert export(run, tmp_path / "again") == 5


def test_depths_are_written_where_they_are_asked_for(tmp_path: Path) -> None:
    write_run(tmp_path / "run", "model.mtp=sequential", "model.mtp_heads=2")
    layers = {}
    for folder, options in (("plain", []), ("whole", ["--depths"])):
        assert main(["export", str(tmp_path / "run"), str(tmp_path / folder), *options]) == 0
        names = load_file(str(tmp_path / folder / "model.safetensors"))
        layers[folder] = {name.split(".")[2] for name in names if name.startswith("model.layers.")}
    assert layers == {"plain": {"0", "1"}, "whole": {"0", "1", "2", "3"}}


def test_bad_input_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, full = tmp_path / "run", tmp_path / "full"
    write_run(run)
    full.mkdir()
    (full / "mine").write_text("kept")
    for arguments, message in (
        ([tmp_path, tmp_path / "to"], "RUN must be the folder of a run, with config.toml"),
        ([tmp_path / "gone", tmp_path / "to"], "gone, which does not exist"),
        ([run, full], "exists and is not an empty folder: remove it first"),
        ([run, run / "config.toml"], "exists and is not an empty folder"),
        ([run, tmp_path / "to", "--depths"], "--depths needs a model with mtp='sequential'"),
    ):
        assert main(["export", *map(str, arguments)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("llmfast: error: ") and message in err
    assert {p.name for p in tmp_path.iterdir()} == {"run", "full"} and (full / "mine").read_text() == "kept"


@pytest.mark.parametrize("mtp", sorted({*get_args(MTP)} - {"sequential"}))
def test_only_sequential_heads_have_depths(mtp: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", f"model.mtp={mtp}", f"model.mtp_heads={0 if mtp == 'none' else 2}")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "to"), "--depths"]) == 2
    message = capsys.readouterr().err
    assert f"--depths needs a model with mtp='sequential'; that of {tmp_path}/run has '{mtp}'" in message
    assert not (tmp_path / "to").exists()


def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    write_run(tmp_path / "run")
    monkeypatch.setattr("llmfast.data.for_transformers.save_for_transformers", interrupted)
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "to")]) == 130
    assert capsys.readouterr().err == "llmfast: interrupted; nothing was written\n"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_link_to_a_new_folder_is_kept(tmp_path: Path) -> None:
    """Write where it points to; neither it nor what an interrupted export left is in the way."""
    write_run(tmp_path / "run")
    for name in ("empty", "missing"):
        to, target = tmp_path / name, tmp_path / "disk" / name
        to.symlink_to(target)
        target.parent.mkdir(exist_ok=True)
        (target.parent / f".{name}.partial").symlink_to(tmp_path / "run")
        if name == "empty":
            target.mkdir()
        assert main(["export", str(tmp_path / "run"), str(to)]) == 0
        assert to.is_symlink() and (target / "config.json").exists()
    assert {p.name for p in (tmp_path / "disk").iterdir()} == {"empty", "missing"}
    assert (tmp_path / "run" / "config.toml").exists()


def test_a_model_of_transformers_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "open_run", lambda run: loading.Opened(run, ByteTokenizer(), 64, Config(), None))
    theirs = (
        "RUN must have trained llmfast's own decoder; hf trains a Hugging Face model, and transformers opens its "
        "folder as it is once the run has finished"
    )
    with pytest.raises(ValueError, match=f"^{theirs}$"):
        export(Path("hf"), tmp_path / "to")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "error", "arguments", "doing"),
    [
        ("llmfast.train.loading", "no torch", ["export", "run", "new"], "exporting"),
        ("llmfast.train.loading", "no torch", ["generate", "run", "--prompt=x"], "generating"),
        ("llmfast.train.loading", "pip install this", ["generate", "run", "--prompt=x"], ""),
    ],
)
def test_what_is_missing_to_open_a_run(
    module: str, error: str, arguments: list[str], doing: str, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = f"; {doing} needs the extra: pip install 'llmfast-torch[train]'" if doing else ""
    with mock.patch(f"{module}.open_run", side_effect=ImportError(error)):
        assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"llmfast: error: {error}{advice}\n")
