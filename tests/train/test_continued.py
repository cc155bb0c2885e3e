"""Continued pretraining: from a run's weights, with the mixture, and what it says at the end."""

from pathlib import Path

import pytest

from llmfast.cli import main
from llmfast.data.dataset import source_name
from llmfast.train.config import dump_config, load_config
from llmfast.train.continued import continued_config
from llmfast.train.earlier import resumed_config
from llmfast.train.metrics import read_metrics
from llmfast.train.run import train
from llmfast.train.settings import ConfigError

pytestmark = pytest.mark.usefixtures("unpictured")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    folder = tmp_path / "other"
    folder.mkdir()
    for i in range(12):
        (folder / f"file{i}.txt").write_text("".join(f"{j}|{i * j}|{i + j}|x\n" for j in range(60)))
    return folder


@pytest.fixture
def before(settings: list[str], tmp_path: Path) -> Path:
    assert main(["train", *(f"--set={s}" for s in settings), "--name=before", "--set=train.steps=20"]) == 0
    return tmp_path / "runs" / "before"


def test_a_run_goes_on_with_new_text(before: Path, other: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It forgets less with a replay than without."""
    old = load_config(before / "config.toml").data.sources
    ends = {}
    for name, more in (("replayed", []), ("not", ["--no-replay"])):
        capsys.readouterr()
        arguments = [str(before), "--target", f"new={other}", f"--name={name}", "--set=train.steps=30", *more]
        assert main(["continue", *arguments, "--set=optimizer.lr=0.02"]) == 0
        lines = [x for x in read_metrics(before.parent / name / "metrics.jsonl") if "validation" in x]
        earlier = [x for x in read_metrics(before / "metrics.jsonl") if "validation" in x][-1]
        # It begins with the very weights and tokenizer that the run before ended with.
        assert lines[0]["validation"][old[0]] == pytest.approx(earlier["validation"][old[0]], rel=1e-6)
        assert (before / "tokenizer.json").read_text() == (before.parent / name / "tokenizer.json").read_text()
        output = " ".join(capsys.readouterr().out.split())
        share = "0%" if more else "90% -> 30%"
        assert f"{share}" in output and "... of new " in output
        was, now = (line["validation"][old[0]] for line in (lines[0], lines[-1]))
        assert f"{was:.3f} -> {now:.3f}, {abs(now - was):.3f}" in output
        ends[name] = lines[-1]["validation"]
    assert ends["replayed"][old[0]] < ends["not"][old[0]]
    assert ends["not"]["new"] < 3.5


def test_the_settings_are_those_of_the_run_but_for_the_text(before: Path, other: Path) -> None:
    saved = load_config(before / "config.toml")
    config = continued_config(before, [str(other)], end=0.8, overrides=["train.steps=7", "name=x"])
    assert config.model == saved.model and config.data.seq_len == saved.data.seq_len
    assert config.data.sources == [str(other), *saved.data.sources]
    assert config.data.weights == {str(other): "0.1->0.8", saved.data.sources[0]: "rest"}
    assert config.data.tokenizer == str(before / "tokenizer.json") and config.train.init_from == str(before)
    assert (config.train.steps, config.name) == (7, "x")
    assert config.data.split == {saved.data.sources[0]: "documents"}
    # Validation text stays what it was, also of runs that do not say how they were split.
    path = before / "config.toml"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.endswith('= "documents"')))
    assert load_config(path).data.split == {}
    assert continued_config(before, [str(other)]).data.split == config.data.split


@pytest.mark.parametrize("spelled", ["{0}", "{0}/", "again={0}/../corpus"])
def test_a_source_that_the_run_has_read(settings: list[str], other: Path, corpus: Path, spelled: str) -> None:
    """Its share grows, it is not replayed as well, and what was held out stays out of the text to train on."""
    sources = f'data.sources=["mine={corpus}", "old={other}"]'
    before = train(load_config(None, [*settings, sources, "train.steps=2", 'data.split={mine="end", old="documents"}']))
    target = spelled.format(corpus)
    config = continued_config(before, [target], overrides=["train.steps=2"])
    name = source_name(target)[0]
    assert config.data.sources == [target, f"old={other}"]
    assert config.data.weights == {name: "0.1->0.7", "old": "rest"}
    assert config.data.split == {name: "end", "old": "documents"}
    train(config)


def test_sources_that_cannot_be_told_apart(
    before: Path, other: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    on = f"llmfast train --resume --name before --set runs={before.parent} --set train.steps=..."
    named = ["continue", str(before), f"--general=mine={corpus}", "--set=train.steps=2", "--target"]
    for arguments, message in (
        ([*named[:2], "--target", str(corpus)], f"give --no-replay, or more steps to that run, {on}"),
        ([*named, f"mine={other}"], f"which is replayed: give --target new-mine={other}"),
        ([*named, f"mine={corpus}/."], "must not be replayed as well: leave it out of --general"),
        ([*named, f"new={corpus}/."], "must not be replayed as well: leave it out of --general"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main([*named[:2], "--target", str(corpus), "--no-replay", "--name=on", "--set=train.steps=2"]) == 0
    assert load_config(before.parent / "on" / "config.toml").data.weights == {str(corpus): 1.0}


def test_what_makes_no_sense_is_one_line(
    before: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([str(before), "--target", "nowhere"], "unknown source 'nowhere'"),
        (
            [str(before), "--target", str(other), "--end=0.95"],
            "end must be at most 0.9, to leave floor=0.1 for replay; got 0.95",
        ),
        ([str(tmp_path), "--target", str(other)], "cannot read"),
        ([str(before), "--target", str(other), "--set=model.width=64"], "Give model.width=32, or begin without"),
        ([str(before), "--target", str(other), "--set=train.stpes=64"], "did you mean train.steps"),
    ):
        assert main(["continue", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not list((before.parent).glob("demo*/checkpoint*"))


def test_weights_change_on_resume_and_the_past_does_not(before: Path, other: Path) -> None:
    more = ["--target", f"new={other}", "--name=more", "--set=train.save_every=5", "--set=train.steps=5"]
    assert main(["continue", str(before), *more]) == 0
    runs = f"--set=runs={before.parent}"
    arguments = ["train", "--resume", "--name=more", runs, "--set=train.steps=10", "--set=data.weights.new=0.9"]
    assert main(arguments) == 0
    config = load_config(before.parent / "more" / "config.toml")
    assert config.data.weights["new"] == 0.9
    lines = read_metrics(before.parent / "more" / "metrics.jsonl")
    assert lines[-1]["step"] == 10
    more_than_all = resumed_config(before.parent / "more", ["data.weights.new=1.5"])
    with pytest.raises(ConfigError, match=r"data.weights: .*must not sum to more than 1"):
        train(more_than_all, resume=True)


def a_run(folder: Path, *settings: str) -> Path:
    """Write the settings of a run, which is all that is read of it."""
    folder.mkdir(parents=True)
    text = dump_config(load_config(None, ["data.sources=['mine=texts', 'more']", *settings]))
    (folder / "config.toml").write_text(text)
    return folder


def test_every_argument_reaches_the_weights_and_the_sources(tmp_path: Path) -> None:
    run = a_run(tmp_path / "all" / "old", "name=old", "runs=elsewhere", "data.seq_len=99")
    config = continued_config(run, ["new=there", "x"], start=0.2, end=0.5, floor=0.3)
    assert config.data.weights == {"new": "0.1->0.25", "x": "0.1->0.25", "mine": "rest", "more": "rest"}
    assert config.data.sources == ["new=there", "x", "mine=texts", "more"] and config.data.seq_len == 99
    assert (config.name, config.runs, config.train.init_from) == ("", str(tmp_path / "all"), str(run))
    assert config.data.split == {"mine": "documents", "more": "documents"} and config.model.pretrained == ""
    for share in ("start", "end"):
        with pytest.raises(
            ConfigError, match=rf"^{share} must be at most 0\.7, to leave floor=0\.3 for replay; got 0\.75"
        ):
            continued_config(run, ["new=there"], floor=0.3, **{"start": 0.2, "end": 0.5, share: 0.75})
    other = continued_config(run, ["new=there"], general=["old=one", "mine=texts"], replay=False)
    assert other.data.sources == ["new=there", "old=one", "mine=texts"]
    assert other.data.weights == {"new": 1.0, "old": 0.0, "mine": 0.0} and other.data.split == {"mine": "documents"}
    usual = continued_config(run, ["new=there"])
    assert usual.data.weights == {"new": "0.1->0.7", "mine": "rest", "more": "rest"}


def test_a_pretrained_model_goes_on_as_one(tmp_path: Path) -> None:
    config = continued_config(a_run(tmp_path / "runs" / "old", "model.pretrained=qwen"), ["new=there"])
    assert (config.model.pretrained, config.train.init_from) == (str(tmp_path / "runs" / "old"), "")
    (theirs := tmp_path / "theirs").mkdir()
    (theirs / "config.json").touch()
    with pytest.raises(ConfigError, match=rf"^--general must name the old text: {theirs} is a model that does not say"):
        continued_config(theirs, ["new=there"])
    config = continued_config(theirs, ["new=there"], general=["old=texts"])
    assert (config.model.pretrained, config.train.init_from, config.runs) == (str(theirs), "", "runs")
    assert config.data.sources == ["new=there", "old=texts"] and config.data.split == {}
    assert config.data.tokenizer == str(theirs / "tokenizer.json")


def test_what_was_held_out_stays_so_under_whatever_name(tmp_path: Path) -> None:
    """A source is known by its place, also behind a link; of new ones nothing is known."""
    (texts := tmp_path / "texts").mkdir()
    (tmp_path / "link").symlink_to(texts)
    split = ["data.split.mine=end", "data.split.more=documents"]
    run = a_run(tmp_path / "runs" / "old", f"data.sources=['mine={texts}', 'more', 'code']", *split)
    usual = {"more": "documents", "code": "documents"}
    for target, general, wanted in (
        (["new=there"], [], {"mine": "end", **usual}),
        ([f"new={tmp_path}/link"], [], {"new": "end", **usual}),
        (["new=there"], [f"other={texts}/.", "more"], {"other": "end", "more": "documents"}),
        (["mine=there"], ["more"], {"more": "documents"}),
        (["new=there", "newer=elsewhere"], ["x=nowhere"], {}),
    ):
        config = continued_config(run, target, general=general)
        assert config.data.split == wanted
        replayed = general or [s for s in (f"mine={texts}", "more", "code") if "link" not in target[0] or s in usual]
        assert config.data.sources == [*target, *replayed]
    with pytest.raises(ConfigError, match=rf"^--target new={tmp_path}/link must not be replayed as well"):
        continued_config(run, [f"new={tmp_path}/link"], general=[f"mine={texts}"])
