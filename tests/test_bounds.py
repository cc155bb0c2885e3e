"""Every check of a number accepts what its message says, to the last digit, and refuses everything beyond."""

import ast
import copy
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

from support.bounds import Bounds, told
from support.code_blocks import ROOT
from support.sources import tree_of

# These import what need not be installed.
FOLDERS = [p for p in (ROOT / "llmfast").iterdir() if p.is_dir() and p.name not in ("integrations", "__pycache__")]


class Check(NamedTuple):
    """A condition, the expression that it is about, and what its message says."""

    module: str
    line: int
    condition: ast.expr
    holds: bool  # whether the condition must be true
    about: ast.expr
    bounds: Bounds

    def __str__(self) -> str:
        return f"{self.module}:{self.line}"


def parts_of(message: ast.expr, module: ModuleType) -> tuple[str, list[ast.expr]]:
    """Return the text of a message, with the constants of its module, and the expressions in it that vary."""
    if not isinstance(message, ast.JoinedStr):
        return "", []
    text, varying = "", []
    for part in message.values:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue):
            constant = vars(module).get(ast.unparse(part.value))
            text += str(constant) if isinstance(constant, int | float) else "{}"
            varying += [] if isinstance(constant, int | float) else [part.value]
    return text, varying


def conditions(tree: ast.Module) -> Iterator[tuple[int, ast.expr, bool, ast.expr]]:
    """Yield the line, the condition, whether it must hold, and the message of each check."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="expect"), args=[condition, message]):
                yield node.lineno, condition, True, message
            case ast.If(test=condition, body=[ast.Raise(exc=ast.Call(args=[message])), *_]):
                yield node.lineno, condition, False, message


def checks_of(path: Path) -> Iterator[Check]:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    for line, condition, holds, message in conditions(tree_of(path)):
        text, varying = parts_of(message, module)
        # What came is told last, and the condition is about that.
        inside = [ast.dump(n) for n in ast.walk(condition)]
        if varying and ast.dump(varying[-1]) in inside and (bounds := told(text)) is not None:
            yield Check(module.__name__, line, condition, holds, varying[-1], bounds)


def accepts(check: Check, value: float) -> bool:
    """Evaluate the condition for a value of what it is about."""

    class Put(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            same = isinstance(node, ast.expr) and ast.dump(node) == ast.dump(check.about)
            return ast.Name("value", ast.Load()) if same else super().visit(node)

    expression = ast.fix_missing_locations(ast.Expression(Put().visit(copy.deepcopy(check.condition))))
    names = {**vars(importlib.import_module(check.module)), "value": value}
    return bool(eval(compile(expression, str(check), "eval"), names)) == check.holds


CHECKS = [check for folder in FOLDERS for path in sorted(folder.rglob("*.py")) for check in checks_of(path)]


@pytest.mark.parametrize("check", CHECKS, ids=str)
def test_a_check_accepts_what_it_says(check: Check) -> None:
    try:
        accepts(check, check.bounds.low)
    except (NameError, TypeError, AttributeError):
        pytest.skip("it is about more than one number")
    for value in check.bounds.accepted():
        assert accepts(check, value), f"{value} should be accepted"
    for value in check.bounds.refused():
        assert not accepts(check, value), f"{value} should be refused"


def test_checks_are_found() -> None:
    assert len(CHECKS) > 40
