"""Behaviour shared by all commands: settings as flags, one-line errors, aligned columns, protected files."""

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

MISTAKE = 2
"""Exit code of a command that ended with a message of one line, for most a user's mistake."""
INTERRUPTED = 130
"""Exit code of a command that SIGINT ended, as shells report it."""
WRITTEN = "written by llmfast"
"""Marker near the start or the end of each single file that a command writes to `--out`."""
_MARKED = 4096  # bytes searched at either end
_METAVARS = {bool: "BOOL", int: "INT", float: "NUMBER", str: "TEXT", list: "LIST", dict: "TABLE"}


class CommandParser(argparse.ArgumentParser):
    """Parser that suggests options for misspelled ones, and can take each of the trainer's settings as a flag."""

    _settings: Any = None
    _load_settings: Callable[[], Any] | None = None
    _missing: ImportError | None = None  # why there are no settings

    def take_settings(self, load: Callable[[], Any]) -> None:
        """Add `--set` now, and a flag per setting at the first parse: `load` returns the trainer's settings."""
        self._load_settings = load
        self.formatter_class = partial(argparse.HelpFormatter, max_help_position=32)
        text = "override a setting, as the flags below do; a value is read as TOML, or as text if it is not valid TOML"
        self.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help=text)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if self._load_settings is not None and self._settings is None:
            self._add_settings(self._load_settings)
        self._expect_known(sys.argv[1:] if args is None else args)
        found, unknown = super().parse_known_args(args, namespace)
        if wrong := [text for text in unknown if text.startswith("--")]:
            self._refuse(wrong[0].partition("=")[0])
        if unknown and self._settings is not None and Path(unknown[0]).exists():  # probably text to train on
            likely = ("--config", "--target") if unknown[0].endswith(".toml") else ("--target",)
            option = next(name for name in (*likely, "--data.sources") if name in self._option_string_actions)
            self.error(f"unrecognized argument {unknown[0]}; did you mean {option} {unknown[0]}?")
        return found, unknown

    def _expect_known(self, args: Sequence[str]) -> None:
        """Refuse an unknown command or option before it: argparse would take the option's value for the command."""
        commands = [a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        for i, text in enumerate(args if commands else ()):
            if text in commands[0]:
                return
            if i == 0 and not text.startswith("-"):  # a later one may be an option's value
                near = difflib.get_close_matches(text, commands[0], n=1)
                advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(commands[0])}"
                self.error(f"unrecognized command {text}; {advice}")
            option = text.partition("=")[0]
            if option.startswith("--") and not any(known.startswith(option) for known in self._option_string_actions):
                self._refuse(option)

    def _add_settings(self, load: Callable[[], Any]) -> None:
        try:
            self._settings = schema = load()
        except ImportError as e:  # the command itself reports what is missing, unless it is given a setting
            self._missing = e
            return
        self.usage = self.format_usage().removeprefix("usage: ").rstrip() + " [--SECTION.KEY VALUE ...]"
        groups = {name: self.add_argument_group(name, kind.__doc__) for name, kind in schema.sections.items()}
        for name, s in schema.settings.items():
            group = groups.get(name.partition(".")[0], self)
            if f"--{name}" in self._option_string_actions:  # --name: an option of its own, whose value is plain text
                continue
            notes = filter(None, (s.values, f"default: {s.by or json.dumps(s.default)}"))
            group.add_argument(
                f"--{name}",
                dest="set",
                action="append",
                type=partial("{}={}".format, name),
                metavar=_METAVARS[type(s.default)],
                help=f"{s.meaning} ({'; '.join(notes)})".replace("%", "%%"),
            )

    def _refuse(self, option: str) -> NoReturn:
        if self._missing is not None and "." in option:
            self.error(f"{self._missing}; {option} needs the extra: pip install 'llmfast-torch[train]'")
        known = dict(zip(self._option_string_actions, self._option_string_actions))
        # Other programs put what an option takes into its name: --gpu-count for --gpus COUNT.
        known |= {f"{o}-{a.metavar.lower()}": o for o, a in self._option_string_actions.items() if _is_word(a.metavar)}
        if self._settings is not None:
            known |= {f"--{alias}": f"--{name}" for alias, name in self._settings.aliases.items()}
        exact = "--" + option.rpartition(".")[2].removeprefix("--").replace("-", "_")
        near = [exact] if exact in known else difflib.get_close_matches(option, known, n=1)
        said = "" if self._settings is None else self._settings.said(option.removeprefix("--"))
        self.error(f"unrecognized option {option}" + (f"; did you mean {known[near[0]]}?{said}" if near else ""))


def _is_word(metavar: Any) -> TypeGuard[str]:
    return isinstance(metavar, str) and metavar.isalpha()


def fail(message: str) -> int:
    """Print an error in one line on stderr; return the exit code."""
    print(f"llmfast: error: {' '.join(message.split())}", file=sys.stderr)  # file names may contain line breaks
    return MISTAKE


def expect_new(folder: Path) -> None:
    """Raise FileExistsError if `folder` exists and is not an empty folder."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: remove it first, or choose another DIR")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align rows, of which the first is the header, as lines: words to the left, columns of numbers to the right."""
    _, *body = rows
    lines = [""] * len(rows)
    for i, cells in enumerate(zip(*rows)):
        width = max(map(len, cells))
        words = i == 0 or any(row[i][:1].isalpha() for row in body)
        lines = [
            f"{line}{'   ' if i else ''}{cell.ljust(width) if words else cell.rjust(width)}"
            for line, cell in zip(lines, cells)
        ]
    return [line.rstrip() for line in lines]


def expect_replaceable(out: Path) -> None:
    """Raise FileExistsError for a non-empty file that no command wrote, so that a mistyped name destroys nothing."""
    if not out.is_file() or out.stat().st_size == 0:
        return
    with out.open("rb") as file:
        ends = file.read(_MARKED)
        file.seek(max(0, out.stat().st_size - _MARKED))
        ends += file.read()
    if WRITTEN.encode() not in ends:
        raise FileExistsError(f"{out} exists and was not {WRITTEN}: remove it first, or choose another --out")
