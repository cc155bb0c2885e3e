"""Messages of the trainer and of what is around it, word for word: they are all that a user is told."""

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path, PosixPath
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console
from torch import nn

from llmfast.data import ByteTokenizer, Mixture
from llmfast.export import export
from llmfast.optim import FusedAdamW, optimizer_in_backward
from llmfast.train import checkpoint, earlier, pretrained
from llmfast.train.config import Config, dump_config, load_config
from llmfast.train.continued import continued_config
from llmfast.train.loading import open_run
from llmfast.train.metrics import read_metrics
from llmfast.train.parallel import World
from llmfast.train.parts import doubts
from llmfast.train.reading import _Unpickler
from llmfast.train.report import write_report
from llmfast.train.report.logs import Log, flat
from llmfast.train.report.page import _differences, _summary
from llmfast.train.run import _choose_run, _remove
from llmfast.train.settings import ConfigError
from support.programs import batches, fused, model_of, settings, trainer_of, weighted
from support.runs import write_run

pytestmark = pytest.mark.usefixtures("one_thread")


def says(message: str) -> str:
    return f"^{re.escape(message)}$"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["optimizer.in_backward=true", "train.micro_batch_size=1"],
            "optimizer.in_backward needs all of a step's rows in one micro-batch",
        ),
        (
            ["optimizer.lr_scaling=sqrt", "optimizer.base_batch_size=0"],
            "optimizer.lr_scaling='sqrt' needs optimizer.base_batch_size, for which lr is right",
        ),
        (
            ["train.vocab_parallel=true"],
            "train.vocab_parallel needs model.tie_embeddings=false, and a model.mtp other than 'shared'",
        ),
        (
            ["train.vocab_parallel=true", "model.tie_embeddings=false", "model.mtp=shared", "model.mtp_heads=2"],
            "train.vocab_parallel needs model.tie_embeddings=false, and a model.mtp other than 'shared'",
        ),
        (["train.parallel=hsdp"], "train.parallel='hsdp' needs train.shard_size, the ranks per set"),
    ],
)
def test_settings_that_do_not_go_together(changes: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=says(message)):
        load_config(None, changes)


def test_text_that_is_not_new(tmp_path: Path) -> None:
    run = tmp_path / "old"
    run.mkdir()
    (run / "config.toml").write_text(dump_config(load_config(None, ["data.sources=['mine=texts', 'more']"])))
    command = f"llmfast train --resume --name old --set runs={tmp_path} --set train.steps=..."
    for target, general, message in (
        (
            *(["mine=texts", "more"], []),
            f"--target is all that {run} was trained on, so nothing is left to replay: give --no-replay, or more steps "
            f"to that run, {command}",
        ),
        (
            *(["more=there"], []),
            "--target must have another name than more, which is replayed: give --target new-more=there",
        ),
        (["x"], ["x"], "--target x must not be replayed as well: leave it out of --general"),
    ):
        with pytest.raises(ConfigError, match=says(message)):
            continued_config(run, target, general=general)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").touch()
    without = f"--general must name the old text: {theirs} is a model that does not say what it has read"
    with pytest.raises(ConfigError, match=says(without)):
        continued_config(theirs, ["new=there"])


def test_weights_of_another_tokenizer(tmp_path: Path) -> None:
    write_run(run := tmp_path / "run")
    other: Any = mock.Mock(ByteTokenizer, vocab_size=300)
    config = load_config(run / "config.toml", ["data.tokenizer=there"])
    message = (
        f"data.tokenizer must be that of the weights in train.init_from={run}, of 264 ids; got 'there', of 300 others. "
        f"Give data.tokenizer={run}/tokenizer.json"
    )
    with (
        mock.patch.object(earlier, "content", lambda tokenizer: tokenizer.vocab_size),
        pytest.raises(ConfigError, match=says(message)),
    ):
        earlier.expect_weights_usable({}, run, config, other, print)
    (run / "config.toml").unlink()
    said: list[str] = []
    earlier.expect_weights_usable({}, run, config, other, said.append)
    assert said == [f"{run} does not say how its weights were trained: only their shapes are compared"]


def test_folders_without_a_model(tmp_path: Path) -> None:
    either = "RUN must be the folder of a run, with config.toml, or one that `llmfast export` wrote; got"
    with pytest.raises(ValueError, match=says(f"{either} {tmp_path}/no, which does not exist")):
        open_run(tmp_path / "no")
    write_run(run := tmp_path / "run")
    export(run, out := tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    for change, message in (
        (
            {"max_position_embeddings": 0},
            f"{out}/config.json must say max_position_embeddings, the context's length; got 0",
        ),
        (
            {"llmfast_mtp": {}},
            f"{out} holds a model with heads of add_mtp. In Python, speculative_generate(load_mtp(folder), ...) "
            "decodes it; see llmfast.integrations.decoding",
        ),
    ):
        (out / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=says(message)):
            open_run(out)
    (run / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=says(f"{run} has no weights yet: neither a checkpoint nor model.safetensors")
    ):
        open_run(run).model()
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("width = 32", "width = 33"))
    with pytest.raises(ValueError, match=f"^{run}/config.toml describes no model: model: width must be a multiple"):
        open_run(run)


def test_metrics_that_are_none(tmp_path: Path) -> None:
    for content, message in (
        (b"\xff\xfe", "{} is not text: 'utf-8' codec can't decode byte 0xff"),
        (b"[1]", "{}: a line must be an object with the numbers step and tokens; got [1]"),
        (b'{"step": 1, "tokens": 2, "validation": 3}', "{}: validation must be an object of numbers; got 3"),
        (b'{"step": 1, "tokens": 2, "loss": "x"}', "{}: loss must be a number; got 'x'"),
        (b'{"step": 1, "tokens": 2, "validation_mean": null}', "{}: validation_mean must be a number; got None"),
    ):
        (file := tmp_path / "metrics.jsonl").write_bytes(content)
        with pytest.raises(ValueError, match=f"^{re.escape(message.format(file))}"):
            read_metrics(file)


def told(parameters: int, epochs: dict[str, float], *changes: str) -> list[str]:
    config = load_config(None, ["optimizer.warmup_steps=0", *changes])
    return list(doubts(config, mock.Mock(Mixture, epochs=lambda: epochs), parameters))


def test_doubts_about_a_run() -> None:
    (first,) = told(1000, {"a": 4.0, "b": 4.06})
    assert first == (
        "the run reads b 4.1 times. After 4 passes, repeated text teaches less and less (Muennighoff et al. 2023, "
        "arXiv:2305.16264): take more text or fewer steps"
    )
    (large,) = told(7 * 10**9, {}, "train.steps=10000", "train.batch_size=1000", "data.seq_len=2000")
    assert re.fullmatch(
        r"optimizer\.lr=0\.0015 is for small models: with 7\.00 B parameters and 20\.0 B tokens adamw takes less by "
        r"DeepSeek LLM's law: try optimizer\.lr=\S+",
        large,
    )
    (theirs,) = told(1000, {}, "model.pretrained=qwen")
    assert theirs == (
        "optimizer.lr=0.0015 is for small models that are trained from scratch, and can undo what qwen has learned. "
        "Continued pretraining usually takes 1e-5 to 1e-4 with adamw: try optimizer.lr=2e-05"
    )
    for warmup, count in ((7, 0), (8, 1), (9, 1)):
        found = told(1000, {}, "train.steps=8", f"optimizer.warmup_steps={warmup}")
        never = f"the learning rate never falls: optimizer.warmup_steps={warmup} is not below train.steps=8"
        assert found == [never] * count


def test_what_a_pretrained_model_does_not_allow() -> None:
    config = load_config(None, ["runs=there", "name=x", "train.init_from=y"])
    config.model.pretrained = "qwen"
    weights = "train.init_from must be left out with model.pretrained=qwen, which has weights already; got 'y'"
    with pytest.raises(ConfigError, match=says(weights)):
        pretrained._expect_alone(config)
    described: Any = mock.Mock()
    described.get_text_config.return_value = mock.Mock(vocab_size=300, max_position_embeddings=None)
    with mock.patch.object(ByteTokenizer, "start_ids", (5,)):
        fim = "data.fim_rate must be 0: this model's texts begin with a token that must stay in front; got 0.5"
        with pytest.raises(ValueError, match=says(fim)):
            pretrained._expect_fitting("Kind", described, load_config(None, ["data.fim_rate=0.5"]), ByteTokenizer())

    class Plain(nn.Module):
        def forward(self, input_ids: Any) -> None: ...

    with (
        mock.patch.dict("sys.modules", {"llmfast.integrations.transformers": mock.Mock()}),
        pytest.raises(ValueError, match=says("Plain takes no position_ids, which keep the documents of a row apart")),
    ):
        pretrained._with_own_loss(Plain())


def test_checkpoints_that_ask_for_more(tmp_path: Path) -> None:
    class Asked:
        def __reduce__(self) -> Any:
            return getattr, (PosixPath, "touch")

    asks = f"its .metadata asks {PosixPath!r} for 'touch', which no checkpoint needs"
    names = "its .metadata names collections.Counter, which no checkpoint needs"
    counter = b"\x80\x04ccollections\nCounter\n."
    for content, message in ((pickle.dumps(Asked()), asks), (counter, names)):
        with pytest.raises(pickle.UnpicklingError, match=says(message)):
            _Unpickler(io.BytesIO(content)).load()
    (folder := tmp_path / "checkpoint-00000008").mkdir()
    (folder / ".metadata").write_bytes(counter)
    with pytest.raises(OSError, match=says(f"{folder}/.metadata is damaged: {names}")):
        checkpoint._keys(folder)
    (folder / "meta.json").write_text('{"step": 8}')
    meta = (
        f"{folder}/meta.json must have the counts step, sequences, tokens, skipped, logged_step, the folder's step and "
        "recent losses, and may have settings of groups and what the trainer was told; got {'step': 8}"
    )
    with pytest.raises(OSError, match=says(meta)):
        checkpoint._meta(folder)
    (folder / "meta.json").write_text("{")
    with pytest.raises(OSError, match=f"^{folder}/meta.json is not JSON: Expecting"):
        checkpoint._meta(folder)


def test_reports_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says("runs must name at least one folder; got none")):
        write_report([], tmp_path / "page.html")
    neither = f"{tmp_path} is not the folder of a run: it has neither config.toml nor metrics.jsonl"
    with pytest.raises(ValueError, match=says(neither)):
        write_report([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_notes_about_settings() -> None:
    usual = flat(Config())
    same = [Log(name, usual, {}, "") for name in ("a", "b")]
    assert _differences(same[:1]).notes == ["All settings are the defaults."]
    assert _differences(same).notes == ["The runs have the same settings."]
    assert _differences([Log("a", {}, {}, "")]).notes == []
    other = Log("c", usual | {"data.vocab_size": "9", "data.held_out": "0.5", "train.steps": "9"}, {}, "")
    assert _summary([*same, other]).notes == [
        "The runs differ in data.vocab_size, data.held_out: their losses are not of the same tokens.",
        "Nothing was logged yet.",
    ]


def test_folders_that_are_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine := tmp_path / "mine").mkdir()
    (mine / "notes").touch()
    config = load_config(None, [f"runs={tmp_path}", "name=mine"])
    go_on = f"{mine} exists: go on with --resume, replace it with --overwrite, or choose a --name"
    foreign = f"{mine} exists and is not a run of llmfast; --overwrite will not remove it"
    for overwrite, message in ((False, go_on), (True, foreign)):
        with pytest.raises(FileExistsError, match=says(message)):
            _choose_run(config, resume=False, overwrite=overwrite)
    with pytest.raises(FileNotFoundError, match=says(f"nothing to resume: {mine} holds no run")):
        _choose_run(config, resume=True, overwrite=False)
    with mock.patch("shutil.rmtree"):
        _remove(mine, Console(width=999))
    rest = f"not all of the run before could be removed; the rest is in {tmp_path}/.mine.gone\n"
    assert capsys.readouterr().out == rest


@pytest.mark.parametrize(
    ("values", "make", "message"),
    [
        ({"epochs": 0.5}, fused, "train.epochs must be 0 here, where the length of the data is unknown; got 0.5"),
        (
            {},
            lambda model: FusedAdamW(model.parameters()),
            "the optimizer needs max_grad_norm in every group (math.inf: only measure), which skips bad steps; got "
            "None in group 0",
        ),
        (
            {"micro_batch_size": 1},
            lambda model: _in_backward(model),
            "an optimizer that steps in backward needs all of a step's rows in one micro-batch",
        ),
    ],
)
def test_what_the_trainer_refuses(values: dict[str, Any], make: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=says(message)):
        trainer_of(settings(**values), make)


def _in_backward(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = FusedAdamW(model.parameters(), lr=0.01)
    optimizer_in_backward(model, optimizer)
    return optimizer


def test_what_the_trainer_says(capsys: pytest.CaptureFixture[str]) -> None:
    data, console = batches(bad=(2,)), Console(width=999)
    optimizer: Any = lambda model: torch.optim.SGD(model.parameters(), lr=0.02)  # noqa: E731
    trainer_of(settings(), optimizer, data=data, loss=weighted, console=console)[0].fit()
    lines = capsys.readouterr().out.splitlines()
    assert "1 steps so far had a gradient that is not finite and were skipped" in lines
    assert lines[0] == (
        "config.optimizer.schedule is laid over the optimizer's own learning rate, 0.02: 2 steps of warm-up, then "
        "cosine to 10 % at step 6. With schedule='constant', warmup_steps=0 and lr_scaling='none' in config.optimizer "
        "the rate stays as it is"
    )


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"parallel": "fsdp"}, "train.parallel='fsdp'"),
        ({"parallel": "hsdp", "shard_size": 2}, "train.parallel='hsdp'"),
        ({"vocab_parallel": True}, "train.vocab_parallel"),
        ({"vocab_parallel": True, "parallel": "fsdp"}, "train.parallel='fsdp'"),
    ],
)
def test_an_optimizer_of_parameters_that_are_replaced(values: dict[str, Any], what: str) -> None:
    model = model_of()
    optimizer: Any = torch.optim.AdamW(model.parameters())
    message = (
        f"with {what} optimizer must be a function that makes one for the model, whose parameters are replaced; got "
        "AdamW"
    )
    with pytest.raises(TypeError, match=says(message)):
        trainer_of(settings(**values), optimizer, model=model, world=World(torch.device("cpu"), size=2))
    alone, _ = trainer_of(settings(**values), optimizer, model=model)  # one rank replaces nothing
    assert alone.optimizer is optimizer


def test_a_damaged_checkpoint_is_told_of_where_the_trainer_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer_of(settings(save_every=3), fused, run=tmp_path)[0].fit()
    last = tmp_path / "checkpoint-00000006"
    size = (last / "meta.json").stat().st_size
    (last / "meta.json").write_bytes(b"x" * (size - 1))
    out = io.StringIO()
    again, _ = trainer_of(settings(), fused, run=tmp_path, console=Console(file=out, width=999))
    again.resume()
    why = f"meta.json has {size - 1} bytes of {size}"
    assert out.getvalue() == f"{last} is damaged ({why}); trying the one before it\n"
    assert again.step == 3 and capsys.readouterr().out == ""
