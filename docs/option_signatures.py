"""Extension for the reference: show the options of a loss in place of `**options: Unpack[...]` in its signature."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from griffe import Extension, Function, Parameter, ParameterKind

OPTIONS = Path(__file__).parent.parent / "llmfast" / "losses" / "options.py"


@cache
def options(kind: str) -> list[tuple[str, str, str]]:
    """Return name, type and default of each option that a TypedDict declares, those of its bases first."""
    tree = ast.parse(OPTIONS.read_text(encoding="utf-8"))
    (node,) = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == kind]
    found = [option for base in node.bases if ast.unparse(base) != "TypedDict" for option in options(ast.unparse(base))]
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.annotation, ast.Subscript):
            hint, option = field.annotation.slice.elts  # Annotated[type, Option(default, ...)]
            kind = hint.value if isinstance(hint, ast.Constant) else ast.unparse(hint)
            found.append((ast.unparse(field.target), kind, ast.unparse(option.args[0])))
    return found


class OptionSignatures(Extension):
    """Puts options in the place of `**options` in the signatures of losses."""

    def on_function(self, *, func: Function, **_: Any) -> None:
        for parameter in list(func.parameters):
            match = re.search(r"Unpack\[(\w+)\]", str(parameter.annotation))
            if match is None or not func.canonical_path.startswith("llmfast.losses."):
                continue
            last = [p for p in func.parameters if p.kind is ParameterKind.keyword_only]
            for p in (parameter, *last):
                del func.parameters[p.name]
            for name, annotation, default in options(match[1]):
                func.parameters.add(
                    Parameter(name, annotation=annotation, kind=ParameterKind.keyword_only, default=default)
                )
            for p in last:
                func.parameters.add(p)
