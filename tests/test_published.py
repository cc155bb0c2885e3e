"""Names that users rely on: arguments and their defaults, settings with their bounds and aliases, flags, and GPUs.

published.txt has them all. A difference is either a mistake, or a change of what users see: then run
`python tests/test_published.py > tests/published.txt` and add a line to CHANGELOG.md.
"""

import argparse
import enum
import functools
import importlib
import inspect
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import torch

from llmfast import _gpus
from llmfast.train.config import SCHEMA
from llmfast.train.settings import LARGEST
from support.names import parsers

FILE = Path(__file__).parent / "published.txt"
PACKAGES = ("losses", "losses.reference", "optim", "mtp", "data", "models", "plan", "train", "clean")


def shown(value: Any) -> str:
    """Return a default in a form that is the same in every environment."""
    if isinstance(value, type | types.FunctionType):
        return value.__name__
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str | tuple | torch.dtype | Path):
        return repr(value)
    return "new" if "FACTORY" in type(value).__name__ else type(value).__name__


def arguments(function: Any) -> str:
    """Return a function's arguments with their defaults."""
    found, keyword = [], False
    for name, p in inspect.signature(function).parameters.items():
        if p.kind is p.KEYWORD_ONLY and not keyword:
            found.append("*")
        keyword |= p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        found.append(f"{star}{name}" + ("" if p.default is p.empty else f"={shown(p.default)}"))
    return f"({', '.join(found)})"


def of_package(package: str) -> Iterator[str]:
    module = importlib.import_module(f"llmfast.{package}")
    for name in sorted(getattr(module, "__all__", [n for n in vars(module) if n.endswith("cross_entropy")])):
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            continue
        if not callable(value):
            yield f"{package}.{name} = {value!r}"
            continue
        try:
            yield f"{package}.{name}{arguments(value)}"
        except ValueError:  # a tuple of named fields in some versions of Python
            continue
        if not isinstance(value, type):
            continue
        for method, member in sorted(vars(value).items()):
            if method.startswith("_") or getattr(member, "hooked", False):  # torch wraps `step` for the first instance
                continue
            if isinstance(member, property | functools.cached_property):
                yield f"{package}.{name}.{method}"
            elif isinstance(member, types.FunctionType | classmethod | staticmethod):
                yield f"{package}.{name}.{method}{arguments(getattr(value, method))}"


def settings() -> Iterator[str]:
    aliases: dict[str, list[str]] = {}
    for alias, name in SCHEMA.aliases.items():
        if alias != name.rpartition(".")[2]:
            aliases.setdefault(name, []).append(alias)
    for name, s in SCHEMA.settings.items():
        bounds = {key: s.declared[key] for key in ("gt", "ge", "lt", "le") if key in s.declared}
        parts = [f"{name} = {json.dumps(s.default)}"]
        parts += [f"{key} {value}" for key, value in bounds.items() if value != LARGEST]
        if get_origin(s.kind) is not None and isinstance(s.default, str):
            parts.append(f"of {', '.join(map(str, get_args(s.kind)))}")
        parts += [f"by name: {s.by}"] * bool(s.by) + [f"kept by a {s.declared['kept']}"] * bool(s.declared["kept"])
        parts += [f"also {', '.join(aliases[name])}"] if name in aliases else []
        yield f"{'; '.join(parts)} | {s.meaning}"


def flags() -> Iterator[str]:
    for command, parser in parsers():
        for action in parser._actions:
            names = ", ".join(action.option_strings) or action.metavar or action.dest
            name = action.option_strings[0].lstrip("-") if action.option_strings else ""
            if (
                name in SCHEMA.settings
                or action.dest in ("help", "version")
                or isinstance(action, argparse._SubParsersAction)
            ):
                continue
            facts = {"nargs": action.nargs, "choices": action.choices and list(action.choices), "const": action.const}
            facts |= {"default": shown(action.default), "required": action.required or None}
            listed = ", ".join(f"{k} {v}" for k, v in facts.items() if v not in (None, "None"))
            told = "" if action.help == argparse.SUPPRESS else str(action.help) % {"default": action.default}
            yield f"{command}: {names} {listed} | {told}"


def data_sheets() -> Iterator[str]:
    for name, gpu in _gpus.KNOWN.items():
        yield f"{name}: {gpu}, compiled for {_gpus.ARCHITECTURES[name]}"


def published() -> list[str]:
    return [*(line for package in PACKAGES for line in of_package(package)), *settings(), *flags(), *data_sheets()]


def test_nothing_published_has_changed() -> None:
    now, before = published(), FILE.read_text(encoding="utf-8").splitlines()
    assert [line for line in now if line not in before] == [], "new, or changed"
    assert [line for line in before if line not in now] == [], "gone, or changed"


if __name__ == "__main__":
    print("\n".join(published()))
