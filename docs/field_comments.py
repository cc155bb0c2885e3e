"""Extension for the reference: a field's comment becomes its description (`loss: Tensor  # () float32, the mean`)."""

import ast
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Attribute, Docstring, Extension


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


class FieldComments(Extension):
    """Extension for fields of classes that have no docstring."""

    def on_attribute_instance(self, *, node: ast.AST, attr: Attribute, **_: Any) -> None:
        if attr.docstring is not None or attr.parent is None or not attr.parent.is_class or attr.endlineno is None:
            return
        if attr.annotation is None:  # a class constant rather than a field
            return
        _, _, comment = _lines(Path(str(attr.filepath)))[attr.endlineno - 1].partition("  # ")
        if comment and not comment.startswith(("type:", "pyright:", "noqa")):
            attr.docstring = Docstring(comment[0].upper() + comment[1:], parent=attr)
