"""Hooks for mkdocs: insert the trainer's settings into a page, and check the reference for missing public names."""

import ast
import logging
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "llmfast" / "train" / "config.py"
PLACE = "<!-- settings -->"
# The integrations have no `__all__`: docs/reference/integrations.md lists their names.
PACKAGES = ("losses", "mtp", "optim", "data", "clean", "models", "train", "plan")


def settings(section: ast.ClassDef, lines: list[str]) -> list[tuple[str, str, str]]:
    """Return name, default and comment of each field of a dataclass, in order."""
    found = []
    for field in section.body:
        if not isinstance(field, ast.AnnAssign) or field.value is None or field.end_lineno is None:
            continue
        value = field.value
        if isinstance(value, ast.Call):  # kept(value, ...) or field(default_factory=...)
            value = value.args[0] if value.args else value.keywords[0].value
            value = value.body if isinstance(value, ast.Lambda) else value
        default = "{}" if isinstance(value, ast.Name) else ast.unparse(value)
        above = lines[field.lineno - 2].strip()
        _, _, comment = lines[field.end_lineno - 1].partition("  # ")
        if not comment and above.startswith("# "):
            comment = above[2:]
        found.append((ast.unparse(field.target), default, comment.strip()))
    return found


def lists() -> str:
    """Format a list per section, because a table does not fit a phone: `section.key = default` and its comment."""
    text = CONFIG.read_text(encoding="utf-8")
    classes = {node.name: node for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    parts = []
    for field in classes["Config"].body:
        if not isinstance(field, ast.AnnAssign):
            continue
        name, kind = ast.unparse(field.target), ast.unparse(field.annotation)
        if kind not in classes:
            continue
        items = [
            f"- `{name}.{key} = {default}`" + (f": {comment}" if comment else "")
            for key, default, comment in settings(classes[kind], text.splitlines())
        ]
        parts.append("\n".join([f"### {name}", "", *items]))
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Process a page; mkdocs calls this for each one."""
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
