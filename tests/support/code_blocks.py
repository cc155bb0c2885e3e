"""Code in Markdown: Python blocks that are run, and commands that are looked at."""

import argparse
import ast
import math
import re
import shlex
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from llmfast import cli
from llmfast.train.config import decoder_config, load_config
from llmfast.train.parallel import World, micro_batch_size, shard_count
from llmfast.train.settings import ConfigError

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^```([\w-]*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SHELL = ("", "sh", "bash")
COMMANDS = (
    "_train",
    "_continue",
    "_settings",
    "_doctor",
    "run_clean",
    "run_compile",
    "run_examples",
    "run_export",
    "run_generate",
    "run_plan",
    "run_report",
)  # of llmfast.cli
WORK: dict[str, Any] = {
    "llmfast.train.run.train": mock.Mock(),
    "llmfast.train.earlier.resumed_config": mock.Mock(),
    "llmfast.doctor.report": lambda: True,
    "llmfast.checkup.command.CheckUp": mock.Mock(),
    "llmfast.checkup.command.verdict": lambda results: (1, 0, 0),
    "torch.cuda.is_available": lambda: True,
}


class Block(NamedTuple):
    language: str
    code: str
    line: int  # of the file, where the code begins


def blocks(text: str, *languages: str) -> list[Block]:
    found = (Block(b[1], b[2], text.count("\n", 0, b.start(2)) + 1) for b in BLOCK.finditer(text))
    return [block for block in found if block.language in languages]


def missing_modules(page: Path) -> set[str]:
    """Return the modules that a page's Python imports and this environment lacks."""
    names = set()
    for block in blocks(page.read_text(encoding="utf-8"), "python"):
        for node in ast.walk(ast.parse(block.code)):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return {name for name in names if find_spec(name) is None}


def checked(code: str) -> str:
    """Add an assertion to each line whose comment states a result: `# (3, 4)` a shape, and `# about 7` a number."""

    def asserting(line: str) -> str:
        shown = re.fullmatch(r"(?:(\w+) = .+|print\((.+)\))  # (?:(\([\d, ]+\))|about ([\d.]+)\b.*)", line)
        if shown is None:
            return line
        name, printed, shape, about = shown.groups()
        found, size = printed or name, printed or f"{name}.shape"
        holds = f"tuple({size}) == {shape}" if shape else f"abs({found} - {about}) < 0.5"
        return f"{line.partition('  # ')[0]}; assert {holds}"

    return "\n".join(map(asserting, code.split("\n")))


def run_python(page: Path) -> int:
    """Run the page's Python blocks in order, in one namespace; how many there were. Tracebacks point into the page."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    found = blocks(page.read_text(encoding="utf-8"), "python")
    for block in found:
        lines = "\n" * (block.line - 1) + checked(block.code)
        exec(compile(lines, str(page), "exec"), namespace)
    return len(found)


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in shell blocks, without comments and leading variables."""
    for block in blocks(text, *SHELL):
        for line in block.code.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    yield words


def expect_command(words: list[str]) -> None:
    """Fail if the command names a sub-command, option, setting, make target or file that does not exist."""
    program, *rest = words
    if program == "torchrun":
        own, arguments = rest[: rest.index("llmfast")], rest[rest.index("llmfast") + 1 :]
        counts = [int(own[own.index(option) + 1]) for option in ("--nnodes", "--nproc-per-node") if option in own]
        expect_llmfast(arguments, ranks=math.prod(counts))
    elif Path(program).name == "llmfast":
        expect_llmfast(rest)
    elif program == "make":
        verb, *more = rest
        assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"make has no {verb}"
        for arguments in more:
            if verb == "train" and arguments.startswith("ARGS="):
                expect_llmfast(["train", *shlex.split(arguments.removeprefix("ARGS="))])
    elif program.startswith("python") and rest[:2] == ["-m", "llmfast"]:
        expect_llmfast(rest[2:])
    elif program.startswith("python") and rest[:2] == ["-m", "pytest"]:
        for path in (word for word in rest if word.startswith("tests/")):
            assert (ROOT / path).exists(), f"{path} is not there"
    elif program.startswith("python") and rest[:2] != ["-m", "venv"]:
        script = next(word for word in rest if word.endswith(".py"))
        assert (ROOT / script).exists(), f"{script} is not there"
    else:
        assert program in ("pip", "git", "cd", "source") or rest[:2] == ["-m", "venv"], f"what is {program}?"


def expect_llmfast(arguments: list[str], *, ranks: int = 1) -> None:
    """Check arguments with the command line's own parser, and settings with the trainer's, for so many ranks."""
    with mock.patch.multiple(cli, **{name: mock.DEFAULT for name in COMMANDS}) as ran:
        try:
            cli.main(arguments)
        except SystemExit as e:
            if e.code == 0:  # --help
                return
            raise AssertionError(f"llmfast does not take {shlex.join(arguments)}") from e
        ((args,), _) = next(each.call_args for each in ran.values() if each.called)
    assert isinstance(args, argparse.Namespace)
    file = getattr(args, "config", None)
    config = load_config(ROOT / file if file and (ROOT / file).exists() else None, getattr(args, "set", []))
    if not config.model.pretrained:
        decoder_config(config, config.data.vocab_size)
    try:
        shard_count(config, ranks)
        micro_batch_size(config, World(torch.device("cpu"), size=ranks))
    except ConfigError as e:
        raise AssertionError(f"{ranks} ranks refuse {shlex.join(arguments)}") from e
    with ExitStack() as stack:  # options can be right and yet not go together: only the work is left out
        for place, answer in WORK.items():
            stack.enter_context(mock.patch(place, answer))
        if args.command == "train" and (not file or args.resume or (ROOT / file).exists()):
            args.config = file and ROOT / file
            status = cli._train(args)
        else:
            status = cli._doctor(args) if args.command == "doctor" and not args.compare else 0
    assert status == 0, f"llmfast refuses {shlex.join(arguments)}"
