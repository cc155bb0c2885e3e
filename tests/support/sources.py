"""Source files as syntax trees, which take Python as long to make as many a test takes."""

import ast
from functools import cache
from pathlib import Path


@cache
def tree_of(path: Path) -> ast.Module:
    """Return the file's tree, which callers leave as it is."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))
