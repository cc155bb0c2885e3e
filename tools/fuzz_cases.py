"""Cases by kind: each damages the workspace and returns what to call."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

from tools.fuzz_damage import LONG, NUMBERS, TOKENS, VALUES, Damager
from tools.fuzz_process import Case
from tools.fuzz_workspace import SETTINGS, flags

FITS = [f"fits/run{i}" for i in range(7)]


def _arguments(d: Damager) -> Case:
    draw = d.draw
    first = draw.choice(["train", "train", "continue", "report", "plan", "plan", "plan", "clean", "", "x"])
    base = {
        "train": [*flags(SETTINGS), "--dry-run"],
        "continue": ["runs/base", *flags({"train.steps": 2, "runs": "runs"})],
    }
    arguments = [first, *base.get(first, []), *draw.choices(TOKENS, k=draw.choice([0, 1, 1, 2, 2, 3, 5]))]
    # Only new files named by --out may be written. The only run folder named here is that of base.
    outs = [a.removeprefix("--out=") for a in arguments if a.startswith("--out=")]
    outs = [out for out in outs if not os.path.lexists(d.folder / out)]
    return Case(arguments, may_change=tuple(outs) if first in ("report", "plan") else ())


def _overrides(d: Damager) -> Case:
    from llmfast.train.config import SCHEMA

    keys = sorted(SCHEMA.settings)
    dry = d.draw.random() < 0.5
    sets = []
    for key in d.draw.choices(keys, k=d.draw.choice([1, 1, 2])):
        value = d.draw.choice(d.draw.choice([VALUES, NUMBERS]))
        if key.rpartition(".")[2] in LONG and not dry:
            value = d.draw.choice(["0", "2", "nan", "x"])
        sets.append(f"--set={key}={value}")
    if dry and d.draw.random() < 0.3:
        return Case(["plan", "memory", *flags(SETTINGS), *sets])
    return Case(["train", *flags(SETTINGS), *sets, *(["--dry-run"] if dry else [])])


def _config(d: Damager) -> Case:
    how = d.draw.choice(["train", "dry", "memory", "report", "fit", "resume", "continue"])
    name = {
        "report": "runs/base/config.toml",
        "fit": "fits/run1/config.toml",
        "resume": "runs/base/config.toml",
        "continue": "runs/base/config.toml",
    }.get(how, "config.toml")
    if d.draw.random() < 0.75:
        d.toml(name, long=how in ("dry", "memory", "report", "fit"))
    else:
        d.file(name)
    # Settings lost from a truncated file fall back to defaults that train for minutes.
    small = flags(
        {k: SETTINGS[k] for k in ("data.sources", "data.tokenizer", "train.sample_tokens")} | {"train.steps": 2}
    )
    calls = {
        "train": ["train", "--config=config.toml", *small],
        "dry": ["train", "--config=config.toml", *small[:2], "--dry-run"],
        "memory": ["plan", "memory", "--config=config.toml"],
        "report": ["report", "runs/base", "--out=page.html"],
        "fit": ["plan", "fit", *FITS, "--resamples=2"],
        "resume": ["train", "--resume", "--name=base", "--set=train.steps=6"],
        "continue": ["continue", "runs/base", "--target", "other", "--set=train.steps=2"],
    }
    return Case(calls[how], may_change=("runs/base",) if how == "resume" else ())


def _tokenizer(d: Damager) -> Case:
    how = d.draw.choice(["train", "train", "clean", "continue", "resume", "fit"])
    name = {
        "continue": "runs/base/tokenizer.json",
        "resume": "runs/base/tokenizer.json",
        "fit": "fits/run0/tokenizer.json",
    }.get(how, "tokenizer.json")
    if how in ("continue", "resume", "fit") and d.draw.random() < 0.4:  # of another kind or size
        shutil.copy(d.folder / "tokenizer.json", d.folder / name)
        d.done.append(f"{name}: another tokenizer")
    elif d.draw.random() < 0.6:
        d.json_lines(name)
    else:
        d.file(name)
    calls = {
        "train": ["train", *flags({**SETTINGS, "data.tokenizer": "tokenizer.json", "train.steps": 2})],
        "clean": ["clean", "dirty", "cleaned", "--tokenizer=tokenizer.json"],
        "continue": ["continue", "runs/base", "--target", "other", "--set=train.steps=2"],
        "resume": ["train", "--resume", "--name=base", "--set=train.steps=6"],
        "fit": ["plan", "fit", *FITS, "--resamples=2"],
    }
    return Case(calls[how], may_change=("runs/base",) if how == "resume" else ())


def _tokens(d: Damager) -> Case:
    which = d.draw.choice(["tokens.ds", "tokens.bin", "tokens.idx"])
    of_ds, of_megatron = ["tokens.ds", "tokens.ds.index", "tokens.ds.metadata"], ["tokens.bin", "tokens.idx"]
    for _ in range(d.draw.choice([1, 1, 2])):
        d.file(d.draw.choice(of_ds if which == "tokens.ds" else of_megatron))
    settings = {**SETTINGS, "data.sources": [which], "data.tokenizer": "bytes.json", "train.steps": 2}
    return Case(["train", *flags(settings)])


def _texts(d: Damager) -> Case:
    how = d.draw.choice(["train", "train", "bpe", "continue", "clean", "file"])
    folder = {"continue": "other", "clean": "dirty"}.get(how, "corpus")
    for _ in range(d.draw.choice([1, 2, 12])):
        names = sorted(p.name for p in (d.folder / folder).iterdir())
        if not names:
            break
        victim = f"{folder}/{d.draw.choice(names)}"
        if victim.endswith(".jsonl") and d.draw.random() < 0.5:
            d.json_lines(victim)
        else:
            d.file(victim)
    if d.draw.random() < 0.2:
        (d.folder / folder / "loop").symlink_to("..")
        (d.folder / folder / os.fsdecode(b"\xff\n.txt")).write_text("odd name " * 50)
        (d.folder / folder / "code.py").write_bytes(b"# coding: nonsense\nx = 1\n")
        d.done.append(f"{folder}: a loop of links, an odd name, an unknown encoding")
    tiny = {**SETTINGS, "train.steps": 2}
    places = ["corpus/0.txt", "tokens.idx", "dirty/more.jsonl.gz", "a=corpus", "=corpus", "a=", "/dev/null", "", "\0"]
    dirty = ["dirty", "dirty", "dirty/lines.jsonl", "dirty/more.jsonl.gz", "dirty/0.txt"]
    calls = {
        "train": ["train", *flags(tiny)],
        "bpe": ["train", *flags({**tiny, "data.tokenizer": "bpe", "data.vocab_size": 300, "data.packing": "best_fit"})],
        "file": ["train", *flags({**tiny, "data.sources": [d.draw.choice(places)]})],
        "continue": ["continue", "runs/base", "--target", "other", "--set=train.steps=2"],
        "clean": ["clean", d.draw.choice(dirty), "cleaned"],
    }
    return Case(calls[how])


def _checkpoints(d: Damager) -> Case:
    found = sorted(p.relative_to(d.folder).as_posix() for p in (d.folder / "runs" / "base").glob("checkpoint-*"))
    for name in found if d.draw.random() < 0.3 else found[-1:]:
        d.checkpoint(name)
    if d.draw.random() < 0.2:
        d.file(f"runs/base/{d.draw.choice(['config.toml', 'tokenizer.json', 'metrics.jsonl'])}")
    if d.draw.random() < 0.6:
        return Case(["train", "--resume", "--name=base", "--set=train.steps=6"], may_change=("runs/base",))
    return Case(["continue", "runs/base", "--target", "other", "--set=train.steps=2"])


def _metrics(d: Damager) -> Case:
    how = d.draw.choice(["report", "report", "report", "fit", "fit", "resume"])
    name = "fits/run2/metrics.jsonl" if how == "fit" else "runs/base/metrics.jsonl"
    if d.draw.random() < 0.75:
        d.json_lines(name)
    else:
        d.file(name)
    if how == "report" and d.draw.random() < 0.2:
        d.file("runs/base/sample.txt")
    calls = {
        "report": ["report", "runs/base", *(["fits/run2"] if d.draw.random() < 0.3 else []), "--out=page.html"],
        "fit": ["plan", "fit", *FITS, "--resamples=2", "--out=fit.svg"],
        "resume": ["train", "--resume", "--name=base", "--set=train.steps=6"],
    }
    return Case(calls[how], may_change=("runs/base",) if how == "resume" else ())


def _models(d: Damager) -> Case:
    """Damage what a trained model is opened from, and let it write or be exported."""
    draw = d.draw
    folder = draw.choice(["runs/base", "exported"])
    names = {
        "runs/base": ["config.toml", "tokenizer.json", "model.safetensors"],
        "exported": ["config.json", "tokenizer.json", "model.safetensors"],
    }[folder]
    for name in draw.sample(names, k=draw.choice([1, 1, 2])):
        way = draw.random()
        if way < 0.1:
            (d.folder / folder / name).unlink(missing_ok=True)
            d.done.append(f"{folder}/{name}: removed")
        elif way < 0.6 and name.endswith(".toml"):
            d.toml(f"{folder}/{name}", long=False)
        elif way < 0.7 and name.endswith(".json"):
            d.json_lines(f"{folder}/{name}")
        else:
            d.file(f"{folder}/{name}")
    sides = draw.choice([["--prompt=the bees"], ["--prompt=" + draw.choice(VALUES)], ["--prefix=a", "--suffix=b"]])
    more = [f"--{name}={draw.choice(NUMBERS)}" for name in ("temperature", "top-p", "seed") if draw.random() < 0.2]
    calls = [["generate", folder, *sides, "--max-tokens=8", *more], ["export", folder, "new"]]
    return Case(draw.choice(calls))


def _places(d: Damager) -> Case:
    """Use folders that cannot be written, are not folders, or belong to something else."""
    draw = d.draw
    closed = d.folder / draw.choice(["runs", "runs/base", "corpus", "runs/base/checkpoint-00000004"])
    if draw.random() < 0.6:
        mode = draw.choice([0o000, 0o400, 0o500])
        closed.chmod(mode)
        d.done.append(f"{closed.relative_to(d.folder)}: mode {mode:o}")
    runs = draw.choice(["runs", "config.toml", "/proc", "/dev/null/x", "nowhere/deep", "corpus", "\0", "x" * 300])
    name = draw.choice(["base", "new", "0.txt", "self", "..."])
    over = draw.choice([[], ["--overwrite"]])
    page = draw.choice(["/proc/x", "corpus", "runs/new.html", "corpus/0.txt", "runs/base/metrics.jsonl"])
    cleaned = draw.choice(["corpus", "runs", "/proc/x", "/dev/null", "dirty/out", ".", "config.toml", "runs/new"])
    picture = draw.choice(["/proc/x.png", "corpus", "x.nothing", "no/where.png", "photo.png", "photo"])
    further = ["continue", "runs/base", "--target", "other", "--set=train.steps=2"]
    arguments = draw.choice(
        [
            ["train", *flags({**SETTINGS, "runs": runs, "train.steps": 2}), f"--name={name}", *over],
            ["train", f"--set=runs={runs}", "--resume", f"--name={name}", "--set=train.steps=6"],
            [*further, f"--name={name}", *over],
            ["report", draw.choice(["runs/base", "corpus", "runs", "tokens.ds"]), "--out", page],
            ["clean", draw.choice(["dirty", "corpus"]), cleaned, *over],
            ["plan", "fit", *FITS, "--resamples=0", f"--out={picture}"],
        ]
    )
    mine = arguments[0] == "train" and runs == "runs" and ("--overwrite" in arguments or "--resume" in arguments)
    mine |= arguments[0] == "continue" and name == "base" and "--overwrite" in arguments
    return Case(arguments, may_change=("runs/base",) if mine and name == "base" else (), obeys=draw.random() < 0.7)


KINDS: dict[str, tuple[Callable[[Damager], Case], int]] = {
    "arguments": (_arguments, 6),
    "overrides": (_overrides, 6),
    "config": (_config, 6),
    "tokenizer": (_tokenizer, 4),
    "tokens": (_tokens, 5),
    "texts": (_texts, 4),
    "checkpoints": (_checkpoints, 6),
    "metrics": (_metrics, 5),
    "places": (_places, 4),
    "models": (_models, 5),
}


def make(seed: int, number: int, folder: Path, only: str = "") -> tuple[str, Case]:
    """Prepare case `number` of a seed in the workspace copy at `folder`; return its kind and the case."""
    draw = random.Random(f"{seed}:{number}")
    kind = draw.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    d = Damager(folder, draw)
    case = KINDS[only or kind][0](d)
    case.damage = d.done
    case.obeys &= os.geteuid() == 0
    return only or kind, case
