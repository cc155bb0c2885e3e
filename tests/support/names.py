"""Names that users read: dotted ones of Python, commands and their flags."""

import argparse
import contextlib
import importlib
from collections.abc import Iterator
from unittest import mock

from llmfast import cli
from llmfast._commands import CommandParser


def exists(name: str) -> bool:
    """Import what a dotted name begins with, and look for the rest."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return False
            found = getattr(found, attribute)
        return True
    return False


def parsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield the commands' parsers by name, those of commands within commands included."""
    stop = mock.patch.object(CommandParser, "parse_args", autospec=True, side_effect=SystemExit)
    with stop as called, contextlib.suppress(SystemExit):
        cli.main(["--help"])
    left: list[tuple[str, argparse.ArgumentParser]] = [("llmfast", called.call_args.args[0])]
    while left:
        name, parser = left.pop(0)
        yield name, parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                left += [(f"{name} {command}", each) for command, each in action.choices.items()]
