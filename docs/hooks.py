"""Hooks for mkdocs: insert the trainer's settings into a page, and check the reference for missing public names."""

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PLACE = "<!-- settings -->"
# The integrations have no `__all__`: docs/reference/integrations.md lists their names.
PACKAGES = ("losses", "mtp", "optim", "data", "clean", "models", "train", "plan")


def lists() -> str:
    """List each section's settings (a table does not fit a phone): `section.key = default`, meaning and values."""
    from llmfast.train.config import SCHEMA

    lines: list[str] = []
    for section, kind in SCHEMA.sections.items():
        lines += [f"### {section}", "", *f"{kind.__doc__}".splitlines(), ""]
        for name, s in SCHEMA.settings.items():
            if name.startswith(f"{section}."):
                notes = "; ".join(filter(None, (s.values, str(s.by))))
                lines.append(f"- `{name} = {json.dumps(s.default)}`: {s.meaning}" + f" ({notes})" * bool(notes))
        lines.append("")
    return "\n".join(lines)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Insert the settings into a page; mkdocs calls this for each one."""
    return markdown.replace(PLACE, lists()) if PLACE in markdown else markdown


def public_names(package: str) -> list[str]:
    """Return the `__all__` of a package of llmfast without importing it."""
    tree = ast.parse((ROOT / "llmfast" / package / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise ValueError(f"llmfast.{package} has no __all__")


def on_post_build(config: Any, **_: Any) -> None:
    """Warn about each public name that has no entry in the reference; a warning fails a strict build."""
    pages = (Path(config.site_dir) / "reference").glob("*.html")
    found = {anchor for page in pages for anchor in re.findall(r'id="(llmfast\.[\w.]+)"', page.read_text())}
    for package in PACKAGES:
        for name in public_names(package):
            # If a module has its function's name, the entry has both.
            if not {f"llmfast.{package}.{name}", f"llmfast.{package}.{name}.{name}"} & found:
                logging.getLogger("mkdocs.hooks").warning("llmfast.%s.%s is not in the reference", package, name)
