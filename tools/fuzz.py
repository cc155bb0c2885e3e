"""Malformed input for the command line: no traceback, no hang, nothing overwritten, a message that says what is wrong.

    python tools/fuzz.py --minutes 10 --seed 1     as many cases as fit
    python tools/fuzz.py --seed 1 --case 42        one of them again, with all that it wrote

A case is a copy of a small workspace (texts, files of tokens, a tokenizer, trained runs), a few of its files damaged,
and a call of `llmfast.cli.main` in a process of its own, with limits on time and memory. Which case it is depends on
the seed and its number alone. What must hold is in `judge`.
"""

import argparse
import contextlib
import ctypes
import gzip
import hashlib
import importlib
import io
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SECONDS = 90.0  # that a case may take, on a machine that does other things too
MEMORY = 4 * 2**30  # bytes of addresses that a case may take beyond those of the process it is forked from
MESSAGE = re.compile(r"^llmfast( \w+)*: error: .+$", re.MULTILINE)
BEGUN = "run folder "  # what `train` prints when all checks are behind it: from there on a run may be half there

Main = Callable[[Sequence[str]], int]


@dataclass
class Case:
    """What to call, and which files that were there before may change if it works."""

    arguments: list[str]
    may_change: tuple[str, ...] = ()  # relative to the workspace, with all below
    damage: list[str] = field(default_factory=list)  # for people
    obeys: bool = False  # files' permissions also stop root


@dataclass(frozen=True)
class Outcome:
    status: int | None  # None: it took too long; negative: a signal
    out: str
    err: str
    changed: list[str]  # files that are no longer what they were
    new: list[str]


# A case's process.


def run(case: Case, folder: Path, main: Main, seconds: float = SECONDS) -> Outcome:
    """Call `main` in a fork of this process, in `folder`."""
    before = _tree(folder)
    logs = folder.with_name(folder.name + ".logs")
    logs.mkdir(exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        _child(case, folder, logs, main)
    status, end = None, time.monotonic() + seconds
    while time.monotonic() < end:
        done, code = os.waitpid(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(code)
            break
        time.sleep(0.005)
    with contextlib.suppress(ProcessLookupError):  # also what the child has started and left
        os.killpg(child, signal.SIGKILL)
    if status is None:
        os.waitpid(child, 0)
    after = _tree(folder)
    texts = [(logs / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
    changed = [name for name, state in before.items() if after.get(name) != state]
    return Outcome(status, *texts, changed, sorted(after.keys() - before.keys()))


def _child(case: Case, folder: Path, logs: Path, main: Main) -> None:
    status = 1
    try:
        os.setpgid(0, 0)
        for name, number in (("out", 1), ("err", 2)):
            os.dup2(os.open(logs / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (
            io.TextIOWrapper(io.FileIO(n, "w", closefd=False), "utf-8", errors)
            for n, errors in ((1, "strict"), (2, "backslashreplace"))  # as Python's own are
        )
        os.chdir(folder)
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if case.obeys:
            _obey_permissions()
        status = main(case.arguments)
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _obey_permissions() -> None:
    """Root without the capabilities to pass over them: it stays the owner of what it has to read. Linux only.

    `sets` are the effective, permitted and inheritable capabilities, and then the upper halves of these.
    """
    libc, words = ctypes.CDLL(None), ctypes.c_uint32 * 6
    header, sets = (
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        words(),
    )
    libc.capget(header, sets)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        sets[0] &= ~(1 << capability)
    libc.capset(header, sets)


def _tree(folder: Path) -> dict[str, str]:
    """Every file below, and a digest of what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_dir():
            found[name] = "folder"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def judge(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with how a case ended; nothing if it is as it should be."""
    if outcome.status is None:
        return ["it did not end"]
    faults = []
    if outcome.status < 0:
        faults.append(f"killed by {signal.Signals(-outcome.status).name}")
    elif outcome.status not in (0, 2):
        faults.append(f"exit status {outcome.status}")
    if "Traceback (most recent call last)" in outcome.err:
        faults.append("a traceback")
    elif outcome.status:
        last = outcome.err.rstrip("\n").rpartition("\n")[2]
        broken = any("\n" in argument for argument in case.arguments)  # which argparse repeats as they are
        if not MESSAGE.search(outcome.err if broken else last):
            faults.append(f"the last line of stderr is no message: {last[:200]!r}")
    whole = outcome.status == 0 or BEGUN in outcome.out
    allowed = case.may_change if whole else ()
    changed = [
        name for name in outcome.changed if not any(Path(a) in (Path(name), *Path(name).parents) for a in allowed)
    ]
    if changed:
        faults.append(f"changed: {', '.join(changed[:5])}")
    if outcome.new and not whole:
        faults.append(f"left behind: {', '.join(outcome.new[:5])}")
    return faults


# The workspace.

SETTINGS = {
    "runs": "runs",
    "data.sources": ["corpus"],
    "data.tokenizer": "bytes",
    "data.seq_len": 32,
    "data.held_out": 0.3,
    "model.width": 32,
    "model.layers": 1,
    "model.heads": 2,
    "optimizer.warmup_steps": 2,
    "train.steps": 4,
    "train.batch_size": 2,
    "train.eval_every": 4,
    "train.eval_rows": 4,
    "train.log_every": 2,
    "train.save_every": 2,
    "train.sample_tokens": 4,
    "train.device": "cpu",
}


def _set(settings: dict[str, Any]) -> list[str]:
    return [f"--set={key}={json.dumps(value)}" for key, value in settings.items()]


def _toml(settings: dict[str, Any]) -> str:
    from llmfast.train.config import dump_config, load_config

    return dump_config(load_config(None, [argument.removeprefix("--set=") for argument in _set(settings)]))


def build(folder: Path, main: Main) -> None:
    """What cases begin with. Trains one run, in a process of its own, and makes up those that a law is fitted to."""
    import numpy as np

    from llmfast.data import ByteTokenizer, write_ds
    from llmfast.data.tokenizer import BPETokenizer

    draw = random.Random(0)
    words = shlex.split("the a of harbour bread clock bees paper and then goes comes makes old new very")

    def text() -> str:
        return "\n".join(" ".join(draw.choices(words, k=12)).capitalize() + "." for _ in range(12)) + "\n"

    texts = [text() for _ in range(12)]
    for name in ("corpus", "other", "dirty"):
        (folder / name).mkdir(parents=True)
        for i, content in enumerate(texts):
            (folder / name / f"{i}.txt").write_text(content)
    lines = "".join(json.dumps({"text": t, "id": str(i)}) + "\n" for i, t in enumerate(texts))
    (folder / "dirty" / "lines.jsonl").write_text(lines)
    with gzip.open(folder / "dirty" / "more.jsonl.gz", "wt") as file:
        file.write(lines)
    (folder / "config.toml").write_text(_toml(SETTINGS))
    (folder / "photo.png").write_bytes(b"\x89PNG\r\n\x1a\n" + draw.randbytes(10_000))
    ByteTokenizer().save(folder / "bytes.json")
    BPETokenizer.train(texts, 300).save(folder / "tokenizer.json")
    ids = [np.frombuffer(t.encode(), np.uint8).astype(np.int64) for t in texts]
    write_ds(folder / "tokens.ds", ids, vocab_size=264, eot_id=256)
    _write_megatron(folder / "tokens.bin", ids)
    outcome = run(Case(["train", *_set(SETTINGS), "--name=base"]), folder, main)
    if outcome.status != 0:
        raise RuntimeError(f"the run that cases begin with failed:\n{outcome.err}")
    for i, (width, steps) in enumerate([(16, 10), (16, 40), (32, 20), (32, 80), (48, 10), (48, 60), (64, 40)]):
        made = folder / "fits" / f"run{i}"
        made.mkdir(parents=True)
        these = {**SETTINGS, "model.width": width, "train.steps": steps}
        (made / "config.toml").write_text(_toml(these))
        ByteTokenizer().save(made / "tokenizer.json")
        last = {"step": steps, "tokens": 64 * steps}
        loss = 1 + 30 / (width * width) ** 0.3 + 20 / steps**0.3
        (made / "metrics.jsonl").write_text(
            json.dumps({**last, "loss": loss})
            + "\n"
            + json.dumps({**last, "validation": {"x": loss}, "validation_mean": loss})
        )


def _write_megatron(path: Path, documents: list[Any]) -> None:
    import numpy as np

    lengths = np.array([len(d) for d in documents], "<i4")
    starts = np.concatenate([[0], np.cumsum(lengths, dtype="<i8")[:-1]]) * 2
    bounds = np.arange(len(documents) + 1, dtype="<i8")
    path.write_bytes(np.concatenate(documents).astype("<u2").tobytes())
    head = b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x08"
    counts = len(lengths).to_bytes(8, "little") + len(bounds).to_bytes(8, "little")
    tables = lengths.tobytes() + starts.astype("<i8").tobytes() + bounds.tobytes()
    path.with_suffix(".idx").write_bytes(head + counts + tables)


# Damage.

NUMBERS = shlex.split(
    "0 -1 1 2 3 7 -0.0 0.5 1e308 -1e-320 nan -inf inf 2147483648 4294967296 9223372036854775807 9223372036854775808"
)
NUMBERS.append("1" + "0" * 30)
VALUES = [*NUMBERS, "true", '""', '"x"', '"\\u0000"', '"../up"', '"a/b"', "[]", "[1]", '["corpus", "corpus"]', "{}"]
VALUES += ["{a = 1}", "[[[]]]", "1979-05-27T07:32:00Z", '"\\u202e\\n[red]"', f'"{"y" * 5000}"', "'''\n'''"]
# Settings of which a large value is what one asks for, and takes its time.
LONG = {"steps", "batch_size", "sample_tokens", "layers", "mtp_heads", "width", "ffn_width", "compile", "eval_rows"}
JSONS: list[Any] = [None, True, -1, 0, 1e308, 10**30, "", "x", [], {}, [[]], {"a": 1}, float("nan"), float("inf")]
TOKENS = shlex.split("""
    '' - -- -h --help --version --name --set --set== --set=a --set=.=1 --set=a..b=1 --name= --name=.. --name=a/b
    --config --resume --config=corpus --config=. --config=/dev/null --config=/dev/zero --overwrite --dry-run --profile
    --set=data.tokenizer=/dev/zero --out=. --out=config.toml --out=corpus/0.txt
    --out=no/where.html --out=/dev/full --out=x.xyz --out= --start=nan --end=2 --floor=-1 --floor=nan --no-replay
    --target --target=corpus --general runs/base runs corpus nowhere [red] --gpu=H100 --gpu=x --gpus=0 --gpus=-1
    --gpus=x --utilisation=nan --utilisation=0 --utilisation=inf --flops=1e21 --params=-1 --params=1e400
    --params=1e-300 --params=1e300 --tokens=nan --tokens=1T --law=x --law=hoffmann fit memory lr --lr=nan --lr=1
    --lr=-inf --base-batch=0 --base-batch=8 --batch=1e300 --batch=k --gpu-memory=x --gpu-memory=1e400GiB
    --gpu-memory=-1 --gpu-memory=0 --resamples=-1 --resamples=2 --workers=0 --workers=x --language=xx --language=
    --language=de --language-model=tokens.bin --tokenizer=tokens.bin --tokenizer=tokenizer.json --flops=1e-300
    --flops=1e308 --tokens=1e308 --lr=1e308 --gpus=99999999999999999999
""")
TOKENS += ["\n", "a\nb", "\udcff", "--name=\udcff", "--name=\x01", "--name=" + "n" * 300, "--out=\udcff"]


class Damager:
    """Damages files of a workspace, and says what it did."""

    def __init__(self, folder: Path, draw: random.Random) -> None:
        self.folder, self.draw, self.done = folder, draw, list[str]()

    def file(self, name: str) -> None:
        """One of the ways in which any file can be broken."""
        path, draw = self.folder / name, self.draw
        if not path.is_file():  # an earlier damage
            return
        content = path.read_bytes()
        ways: list[Callable[[], bytes]] = [
            lambda: b"",
            lambda: content[: int(draw.random() * len(content))],
            lambda: self._flipped(content),
            lambda: self._flipped(content),
            lambda: content + draw.randbytes(draw.choice([1, 8, 4096])),
            lambda: draw.randbytes(draw.choice([1, 16, 1024])),
            lambda: content[:8] + b"\xff" * 26 + content[34:],
            lambda: content[: len(content) // 2] + b"\x00" * 64 + content[len(content) // 2 :],
            lambda: content * 2,
            lambda: b"[" * 100_000,
            lambda: b"\xff\xfe" + content,
        ]
        way = draw.randrange(len(ways) + 5)
        if way < len(ways):
            path.write_bytes(ways[way]())
        else:
            path.unlink()
            if way == len(ways) + 1:
                path.mkdir()
            elif way == len(ways) + 2:
                path.symlink_to(path.name)  # a loop
            elif way == len(ways) + 3:
                path.symlink_to("nowhere")
            elif way == len(ways) + 4:
                path.write_bytes(content)
                path.chmod(0)
        self.done.append(f"{name}: way {way}")

    def _flipped(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(min(len(changed), self.draw.choice([1, 1, 3, 20]))):
            changed[self.draw.randrange(len(changed))] = self.draw.randrange(256)
        return bytes(changed)

    def toml(self, name: str, *, long: bool) -> None:
        """Settings that are TOML, or nearly, and wrong. Without `long` none that only takes its time."""
        path, draw = self.folder / name, self.draw
        lines = path.read_text().splitlines()
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(len(lines))
            key = lines[at].partition(" = ")[0]
            value = draw.choice(VALUES)
            if key in LONG and not long and value not in ("0", "-1", "1", "2", "3", "7", "nan"):
                value = draw.choice(["0", "2", "[]", "nan"])
            way = draw.randrange(8)
            if way < 5:
                lines[at] = f"{key} = {value}"
            elif way == 5:
                lines.insert(at, lines[at])
            elif way == 6:
                lines.insert(
                    at,
                    draw.choice(["[model]", "[x.y]", "unknown = 1", "a" + ".b" * 3000 + " = 1", "x = " + "[" * 5000]),
                )
            else:
                lines[at] = lines[at][: draw.randrange(len(lines[at]) + 1)]
            self.done.append(f"{name}: {lines[at][:100]}")
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")

    def json_lines(self, name: str) -> None:
        """Lines that are JSON, and not what they should be."""
        path, draw = self.folder / name, self.draw
        if not path.is_file():
            return
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        for _ in range(draw.choice([1, 2, 5]) if lines else 0):
            at = draw.randrange(len(lines))
            try:
                value = json.loads(lines[at])
            except (ValueError, RecursionError):  # an earlier damage
                continue
            lines[at] = json.dumps(self._changed(value))
            self.done.append(f"{name}: {lines[at][:150]}")
        path.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape")

    def _changed(self, value: Any) -> Any:
        """With one thing in it replaced, dropped or added."""
        draw = self.draw
        if isinstance(value, dict) and value and draw.random() < 0.9:
            key = draw.choice(list(value))
            if draw.random() < 0.25:
                return {k: v for k, v in value.items() if k != key}
            return {**value, key: self._changed(value[key])}
        if isinstance(value, list) and value and draw.random() < 0.8:
            at = draw.randrange(len(value))
            return [*value[:at], self._changed(value[at]), *value[at + 1 :]]
        return draw.choice(JSONS)

    def checkpoint(self, folder: str) -> None:
        """Files of a checkpoint, with checksums that are right again in half of the cases."""
        path, draw = self.folder / folder, self.draw
        names = sorted(p.name for p in path.iterdir())
        way = draw.randrange(8)
        if way < 5:
            victim = f"{folder}/{draw.choice(names)}"
            if victim.endswith(".json") and draw.random() < 0.7:
                self.json_lines(victim)
            else:
                self.file(victim)
        elif way == 5:
            a, b = draw.sample(names, 2)
            for x, y in ((a, "swap"), (b, a), ("swap", b)):
                (path / x).rename(path / y)
            self.done.append(f"{folder}: {a} and {b} swapped")
        elif way == 6:
            shutil.rmtree(path)
            draw.choice([path.touch, path.mkdir, lambda: path.symlink_to(path.name)])()
            self.done.append(f"{folder}: replaced")
        else:
            path.rename(path.with_name("checkpoint-" + draw.choice(["1", "00000009", "9" * 30, "x", "\u0663"])))
            self.done.append(f"{folder}: renamed")
        if path.is_dir() and (path / "checksums.json").is_file() and draw.random() < 0.5:
            files = [p for p in sorted(path.iterdir()) if p.is_file() and p.name != "checksums.json"]
            sums = {p.name: [p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest()] for p in files}
            (path / "checksums.json").write_text(json.dumps(sums))
            self.done.append(f"{folder}: signed again")


# Cases by kind: each damages the workspace and says what to call.


FITS = [f"fits/run{i}" for i in range(7)]


def _arguments(d: Damager) -> Case:
    draw = d.draw
    first = draw.choice(["train", "train", "continue", "report", "plan", "plan", "plan", "clean", "", "x"])
    base = {
        "train": [*_set(SETTINGS), "--dry-run"],
        "continue": ["runs/base", *_set({"train.steps": 2, "runs": "runs"})],
    }
    arguments = [first, *base.get(first, []), *draw.choices(TOKENS, k=draw.choice([0, 1, 1, 2, 2, 3, 5]))]
    # What may be written: where it was told to and nothing was. No run's folder is named here but base's.
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
        return Case(["plan", "memory", *_set(SETTINGS), *sets])
    return Case(["train", *_set(SETTINGS), *sets, *(["--dry-run"] if dry else [])])


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
    # What a file that was cut short leaves to the defaults would be a demo of minutes.
    small = _set(
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
    if how in ("continue", "resume", "fit") and d.draw.random() < 0.4:  # of the other kind, or of another size
        shutil.copy(d.folder / "tokenizer.json", d.folder / name)
        d.done.append(f"{name}: another tokenizer")
    elif d.draw.random() < 0.6:
        d.json_lines(name)
    else:
        d.file(name)
    calls = {
        "train": ["train", *_set({**SETTINGS, "data.tokenizer": "tokenizer.json", "train.steps": 2})],
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
    return Case(["train", *_set(settings)])


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
        "train": ["train", *_set(tiny)],
        "bpe": ["train", *_set({**tiny, "data.tokenizer": "bpe", "data.vocab_size": 300, "data.packing": "best_fit"})],
        "file": ["train", *_set({**tiny, "data.sources": [d.draw.choice(places)]})],
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


def _places(d: Damager) -> Case:
    """Folders that cannot be written, or are not folders, or are somebody else's."""
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
            ["train", *_set({**SETTINGS, "runs": runs, "train.steps": 2}), f"--name={name}", *over],
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
}


def make(seed: int, number: int, folder: Path, only: str = "") -> tuple[str, Case]:
    """Case `number` of a seed, in a copy of the workspace at `folder`: its kind, and what to call."""
    draw = random.Random(f"{seed}:{number}")
    kind = draw.choices(list(KINDS), [weight for _, weight in KINDS.values()])[0]
    d = Damager(folder, draw)
    case = KINDS[only or kind][0](d)
    case.damage = d.done
    case.obeys &= os.geteuid() == 0
    return only or kind, case


@contextlib.contextmanager
def workspaces(main: Main) -> Iterator[Callable[[Path], None]]:
    """A function that copies the workspace to where there is nothing yet."""
    with TemporaryDirectory(prefix="fuzz-") as temporary:
        template = Path(temporary, "template")
        template.mkdir()
        build(template, main)

        def copy(to: Path) -> None:
            shutil.copytree(template, to, symlinks=True)

        yield copy


def fuzz(
    seed: int,
    numbers: Iterator[int] | range,
    minutes: float,
    main: Main,
    *,
    only: str = "",
    say: Callable[[str], None] = print,
    keep: Path | None = None,
) -> tuple[Counter[str], int]:
    """Run cases until numbers or minutes are used up.

    Returns how many ran, by kind and status, and how many of them ended as they must not.
    """
    end, counts, failed = time.monotonic() + 60 * minutes, Counter[str](), 0
    with workspaces(main) as copy, TemporaryDirectory(prefix="fuzz-") as temporary:
        for number in numbers:
            if time.monotonic() > end:
                break
            folder = (keep or Path(temporary)) / f"case-{number}"
            copy(folder)
            kind, case = make(seed, number, folder, only)
            begun = time.monotonic()
            outcome = run(case, folder, main)
            counts[f"{kind} {outcome.status}"] += 1
            faults = judge(case, outcome)
            if faults or keep:
                failed += bool(faults)
                took = time.monotonic() - begun
                say(f"--seed {seed} --case {number} ({kind}, {took:.1f} s): {'; '.join(faults) or 'fine'}")
                say(f"  llmfast {' '.join(map(repr, case.arguments))}")
                for line in case.damage[:6]:
                    say(f"  damaged {line!r}")
                for line in outcome.err.splitlines()[-6:]:
                    say(f"  | {line[:300]}")
            if keep is None:
                _remove(folder)
    return counts, failed


def _remove(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder)
    shutil.rmtree(folder.with_name(folder.name + ".logs"))


def prepare_process() -> Main:
    """Import what cases need once, before the forks; returns the command line's `main`."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from llmfast.cli import main

    # What the command line imports when it needs it.
    for name in (
        "llmfast.train.run",
        "llmfast.clean.pipelines",
        "spacy",
        "torch._dynamo",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "safetensors.torch",
        "tomli_w",
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)

    torch.set_num_threads(1)
    return main


def command() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="this one alone; its folder stays")
    parser.add_argument("--kind", choices=KINDS, default="", help="cases of this kind alone")
    args = parser.parse_args()
    main = prepare_process()
    begun = time.monotonic()
    if args.case is None:
        numbers: Iterator[int] | range = range(10**9)
        keep = None
    else:
        numbers = range(args.case, args.case + 1)
        keep = Path(f"fuzz-{args.seed}-{args.case}").resolve()
        keep.mkdir()
    say = lambda line: print(line.encode("utf-8", "replace").decode(), flush=True)  # noqa: E731
    counts, failed = fuzz(args.seed, numbers, args.minutes, main, only=args.kind, say=say, keep=keep)
    for kind in sorted(counts):
        print(f"{kind:20} {counts[kind]:6}")
    took = (time.monotonic() - begun) / 60
    print(f"{sum(counts.values())} cases in {took:.1f} minutes: {failed} ended as they must not")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(command())
