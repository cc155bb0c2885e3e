"""No circles of imports, neither of modules nor of packages: what a file needs can be read from the bottom up.

An import inside a function counts too: it is how a circle would be hidden. Each name counts as the module that it comes
from, so that `from llmfast.losses import plain` needs `llmfast.losses.plain`, and not what `llmfast/losses/__init__.py`
collects.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.sources import tree_of

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"llmfast": ROOT / "llmfast", "llmfast_kernels": ROOT / "kernels" / "llmfast_kernels"}
Graph = dict[str, set[str]]


def modules() -> dict[str, Path]:
    """Return the files of all modules, by their names."""
    found = {}
    for package, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = path
    assert len(found) > 80
    return found


def needed(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Yield the modules that a file imports anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known:
                    yield full
                elif node.module in known:
                    yield node.module


def graph_of(files: dict[str, Path]) -> Graph:
    return {name: {*needed(tree_of(path), {*files})} - {name} for name, path in files.items()}


def packages(graph: Graph) -> Graph:
    """Return the same between the first folders of llmfast, and the modules next to them."""

    def package(name: str) -> str:
        return ".".join(name.split(".")[:2])

    found: Graph = {}
    for name, imported in graph.items():
        if name != "llmfast":
            found.setdefault(package(name), set()).update({package(other) for other in imported} - {package(name)})
    return found


def circles(graph: Graph) -> list[list[str]]:
    """Return the groups of nodes that can all be reached from each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        open_nodes = [start]
        while open_nodes:
            for node in graph.get(open_nodes.pop(), ()):
                if node not in seen:
                    seen.add(node)
                    open_nodes.append(node)
        return seen

    reach = {node: reached(node) for node in graph}
    return sorted(
        map(list, {tuple(sorted(b for b in reach[a] if a in reach.get(b, ()))) for a in graph if a in reach[a]})
    )


def test_no_circle_of_modules() -> None:
    assert circles(graph_of(modules())) == []


def test_no_circle_of_packages() -> None:
    assert circles(packages(graph_of(modules()))) == []


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}, [["a", "b", "c"]]),
        ({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}}, [["a", "b"], ["c", "d"]]),
    ],
)
def test_circles_are_found(graph: Graph, found: list[list[str]]) -> None:
    assert circles(graph) == found


def test_imports_are_found_wherever_they_are() -> None:
    source = """if True:
        import p.a
        from p import b, name
        def f():
            from p.c import other
    """
    assert {*needed(ast.parse(source), {"p", "p.a", "p.b", "p.c"})} == {"p", "p.a", "p.b", "p.c"}
