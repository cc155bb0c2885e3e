"""Limits on the shape of the code: argument lists, lengths, import cycles, and names compared outside their file.

Each limit has a table of today's exceptions. An entry may only shrink, and must go when it is no longer needed.
"""

import ast
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from llmfast.optim.formats import PARAM_FORMATS, STATE_FORMATS
from llmfast.train.optimizers import OPTIMIZERS
from llmfast_kernels.optimizer import rules
from support.code_blocks import ROOT
from support.sources import tree_of

LIBRARY = sorted([*(ROOT / "llmfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
TOOLS = sorted(
    p for name in ("evidence", "benchmarks", "tools", "docs", "examples") for p in (ROOT / name).rglob("*.py")
)
TESTS = sorted((ROOT / "tests").rglob("*.py"))
EVERYTHING = [*LIBRARY, *TOOLS, *TESTS]

KERNEL_ARGUMENTS, ARGUMENTS, POSITIONALS = 22, 10, 7
KERNEL_LINES, FUNCTION_LINES, FILE_LINES, TEST_FILE_LINES = 120, 90, 500, 800
FORMATTER_OVERRIDES = 10  # "fmt: skip" in the whole tree

# Names of update rules and of precision formats. Only a rule's or format's own file may compare with them.
RULES = {*rules.RULES, *OPTIMIZERS}
FORMATS = {*PARAM_FORMATS, *(name for name in STATE_FORMATS if isinstance(name, str))}

# Today's exceptions: the measured values by place.
ARGUMENTS_NOW: dict[str, int] = {
    "tests/losses/test_options.py test_linear_cross_entropy": 12,
}
POSITIONALS_NOW: dict[str, int] = {
    "benchmarks/test_losses.py race_losses": 8,
    "tests/benchmarks/test_clock.py test_losses.race_losses": 8,
    "tests/losses/test_compiled.py Terms": 10,
    "tests/support/test_launched.py Code": 8,
}
FUNCTION_LINES_NOW: dict[str, int] = {}
FILE_LINES_NOW: dict[str, int] = {}
CYCLES_NOW: dict[str, int] = {}
NAMES_NOW: dict[str, int] = {}
FORMATTER_OVERRIDES_NOW: dict[str, int] = {}


class Function(NamedTuple):
    """Function with what the limits depend on."""

    place: str  # "llmfast/optim/adam.py FusedAdamW.__init__"
    node: ast.FunctionDef | ast.AsyncFunctionDef
    kernel: bool  # decorated with @triton.jit
    public: bool  # exported by its package or from an exported module or class, with a docstring


def is_test(path: Path) -> bool:
    return "tests" in path.relative_to(ROOT).parts


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def arguments_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


@cache
def exported() -> frozenset[str]:
    """Collect the names in `__all__` of the library's packages and modules."""
    found: set[str] = set()
    for path in LIBRARY:
        for node in tree_of(path).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= set(ast.literal_eval(node.value))
    return frozenset(found)


def functions(path: Path) -> Iterator[Function]:
    """Yield the functions of a file, including methods and nested functions."""

    def walk(parent: ast.AST, prefix: str, exports: bool, documentation: str) -> Iterator[Function]:
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, ast.ClassDef):
                text = documentation + (ast.get_docstring(node) or "")
                yield from walk(node, f"{prefix}{node.name}.", node.name in exported(), text)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
                text = documentation + (ast.get_docstring(node) or "")
                listed = node.name in exported() or (exports and (node.name[0] != "_" or node.name == "__init__"))
                documented = bool(text) or any("overload" in ast.unparse(d) for d in node.decorator_list)
                place = f"{name_of(path)} {prefix}{node.name}"
                yield Function(place, node, kernel, not kernel and listed and documented and path in LIBRARY)
                yield from walk(node, f"{prefix}{node.name}.", False, "")
            else:
                yield from walk(node, prefix, exports, documentation)

    yield from walk(tree_of(path), "", path.stem in exported(), "")


def compare(found: dict[str, int], now: dict[str, int]) -> None:
    """Fail for new or grown exceptions, and for entries that are no longer needed."""
    worse = {place: value for place, value in found.items() if value > now.get(place, 0)}
    assert worse == {}, "over the limit"
    assert now.keys() - found.keys() == set(), "remove these entries: they are no longer needed"


def test_arguments() -> None:
    """Public functions with documented options may have more arguments; kernels are never public."""
    found: dict[str, int] = {}
    for function in (f for path in EVERYTHING for f in functions(path)):
        limit = KERNEL_ARGUMENTS if function.kernel else ARGUMENTS
        count = len(arguments_of(function.node))
        if count > limit and not function.public:
            found[function.place] = max(count, found.get(function.place, 0))
    compare(found, ARGUMENTS_NOW)


def test_positional_arguments_of_calls() -> None:
    found: dict[str, int] = {}
    for path in EVERYTHING:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Call):
                count = sum(not isinstance(a, ast.Starred) for a in node.args)
                if count > POSITIONALS:
                    place = f"{name_of(path)} {ast.unparse(node.func).partition('[')[0]}"
                    found[place] = max(count, found.get(place, 0))
    compare(found, POSITIONALS_NOW)


def test_lengths_of_functions() -> None:
    found: dict[str, int] = {}
    for function in (f for path in EVERYTHING for f in functions(path)):
        lines = (function.node.end_lineno or 0) - function.node.lineno + 1
        if lines > (KERNEL_LINES if function.kernel else FUNCTION_LINES):
            found[function.place] = lines
    compare(found, FUNCTION_LINES_NOW)


def test_lengths_of_files() -> None:
    found = {}
    for path in EVERYTHING:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > (TEST_FILE_LINES if is_test(path) else FILE_LINES):
            found[name_of(path)] = lines
    compare(found, FILE_LINES_NOW)


def test_overrides_of_the_formatter() -> None:
    counts = {name_of(p): p.read_text(encoding="utf-8").count("fmt: skip") for p in [*LIBRARY, *TOOLS, *TESTS]}
    total = sum(counts.values())
    compare({"total": total} if total > FORMATTER_OVERRIDES else {}, FORMATTER_OVERRIDES_NOW)


def test_titles_of_commits() -> None:
    """The hook of `.pre-commit-config.yaml` refuses longer titles; older commits have some."""
    log = ["git", "log", "--since=2026-11-29T03:15:00Z", "--no-merges", "--format=%s"]
    if shutil.which("git") is None or (run := subprocess.run(log, cwd=ROOT, capture_output=True, text=True)).returncode:
        pytest.skip("git reads no history here")
    assert [title for title in run.stdout.splitlines() if len(title) > 72] == []


@pytest.mark.parametrize(("message", "fits"), [("x" * 72 + "\n\n" + "y" * 99, True), ("x" * 73 + "\n", False)])
def test_the_hook_for_titles(message: str, fits: bool) -> None:
    config = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    _, _, hook = config.partition("- id: title\n")
    (entry,) = re.findall("entry: '(.*)'", hook)
    assert "stages: [commit-msg]" in hook and "args: [--multiline]" in hook and "commit-msg]" in config[:999]
    assert (re.search(entry, message, re.MULTILINE | re.DOTALL) is None) == fits


def test_names_of_rules_and_formats_are_compared_only_in_their_own_files() -> None:
    """`rule == "adam"` belongs into a file named after the rule; formats have a file `formats.py`, or a folder."""
    found: dict[str, int] = {}
    for path in LIBRARY:
        for node in ast.walk(tree_of(path)):
            operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            if isinstance(node, ast.MatchValue):
                operands = [node.value]
            constants = {c.value for o in operands for c in ast.walk(o) if isinstance(c, ast.Constant)}
            foreign = {name for name in constants & (RULES | FORMATS) if not own(path, str(name))}
            if foreign:
                found[name_of(path)] = found.get(name_of(path), 0) + 1
    compare(found, NAMES_NOW)


def own(path: Path, name: str) -> bool:
    if name in FORMATS:
        return "formats" in (path.stem, path.parent.name)
    return path.stem == name.removesuffix("w")


@cache
def imports() -> dict[str, set[str]]:
    """Map each module of the library to the modules that it imports when it is imported."""
    modules = {}
    for path in LIBRARY:
        parts = path.relative_to(ROOT / "kernels" if "kernels" in path.relative_to(ROOT).parts[:1] else ROOT)
        modules[".".join(parts.with_suffix("").parts).removesuffix(".__init__")] = path
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set()
        for node in at_import(tree_of(path).body):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & modules.keys()
            elif isinstance(node, ast.ImportFrom):
                source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
                members = {f"{source}.{alias.name}" for alias in node.names} & modules.keys()
                # A package that is being imported can still provide its submodules.
                graph[name] |= members if members and len(members) == len(node.names) else {source} & modules.keys()
    return graph


def at_import(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run at import, without function bodies and blocks for type checkers."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from at_import(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from at_import(getattr(node, field, []))


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(graph[name])
    return seen


def test_no_module_imports_itself_through_others() -> None:
    graph = imports()
    assert len(graph) > 50 and any(graph.values())
    compare({name: 1 for name in graph if name in reachable(graph, name)}, CYCLES_NOW)


@pytest.mark.parametrize(
    ("found", "now", "fails"),
    [
        ({}, {}, False),
        ({"a": 3}, {"a": 3}, False),
        ({"a": 3}, {}, True),
        ({"a": 4}, {"a": 3}, True),
        ({"a": 2}, {"a": 3}, False),
        ({}, {"a": 3}, True),
    ],
)
def test_exceptions_can_only_shrink(found: dict[str, int], now: dict[str, int], fails: bool) -> None:
    if not fails:
        compare(found, now)
        return
    with pytest.raises(AssertionError):
        compare(found, now)
