"""Settings that are declared once, as fields of dataclasses, and read from TOML, flags and earlier runs by pydantic.

A field's type and bounds say what values it takes, its text what it means. Everything else follows from that: which
values are refused and how, what `--help` and the documentation list, and what a resumed run must keep.
"""

import copy
import dataclasses
import difflib
import json
import re
import reprlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from llmfast._checks import is_unicode

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LARGEST = 2**63 - 1  # what an int64 holds
RUN, WEIGHTS = "run", "weights"
Tree = dict[str, Any]
_FULL = {"bf16": "bfloat16", "fp32": "float32", "f32": "float32", "32": "float32"}
_SPELLINGS = re.compile(r"^(bf16|fp32|f32|32)")


class ConfigError(ValueError):
    """A setting that does not exist, has the wrong type, or makes no sense."""


class By(dict[str, Any]):
    """The default of a setting for each `name` of its section that has the setting; for others it is None."""

    @property
    def first(self) -> Any:
        return next(iter(self.values()))

    def __str__(self) -> str:
        """List the defaults: "0.9 for adamw, adam; 0.0 for sgd"."""
        names: dict[str, list[str]] = {}
        for name, default in self.items():
            names.setdefault(json.dumps(default), []).append(name)
        return "; ".join(f"{default} for {', '.join(those)}" for default, those in names.items())


def fill(section: Any) -> None:
    """Give each setting of a section that has no value its default for the section's `name`."""
    for f in dataclasses.fields(section):
        by = f.metadata.get("by")
        if by is not None and getattr(section, f.name) is None:
            setattr(section, f.name, by.get(section.name))


def had(section: Any, place: str) -> dict[str, Any]:
    """Return the settings that a section has by its `name`, with their values.

    Raises:
        ConfigError: another one has a value; it is named as a key of `place`.
    """
    by: dict[str, By] = {f.name: f.metadata["by"] for f in dataclasses.fields(section) if f.metadata["by"] is not None}
    own = {key: getattr(section, key) for key in by if section.name in by[key]}
    for key in by:
        if key not in own and (value := getattr(section, key)) is not None:
            raise ConfigError(
                f"{place}.{key} is a setting of {', '.join(by[key])}, and {place}.name is {section.name!r}, which has "
                f"{', '.join(own)}; got {shown(value)}"
            )
    return own


def read_value(text: str) -> Any:
    """Read a setting's value as it is given on the command line: TOML, or text where it is not."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):  # also for more digits or brackets than Python parses
        return text.strip()


def write_value(value: str | float | list[str]) -> str:
    """Write a setting's value as `read_value` reads it: text as it is, where that works."""
    if isinstance(value, str) and read_value(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """Write settings as `--set` takes them."""
    return [f"{name}={write_value(value)}" for name, value in settings.items()]


def setting(default: Any, meaning: str, *, kept: str = "", aka: Sequence[str] = (), **more: Any) -> Any:
    """Declare a setting as a field of a dataclass.

    Args:
        default: its value unless told otherwise; its type must be the field's. Or `By`, which depends on the section's
            `name`; call `fill` in the dataclass's `__post_init__`.
        meaning: one line for `--help` and the documentation.
        kept: what the setting must agree with. RUN: it cannot change on `--resume`, but another run may begin with the
            weights and have another value. WEIGHTS: the weights mean something else with another value, even where
            their shapes are the same, so `train.init_from` needs the same one too. All others take effect on
            `--resume`.
        aka: what other trainers call it.
        **more: bounds by pydantic's names: `ge`, `gt`, `le`, `lt`, `min_length`. And `seen`, a function from the
            section to the part of the value that weights depend on, if that is not all of it.
    """
    by = default if isinstance(default, By) else None
    kind = type(default if by is None else by.first)
    if kind in (int, float) and "lt" not in more:
        more = {"le": LARGEST, **more}
    if kind is float:
        more["allow_inf_nan"] = False
    # TOML has types of its own: "1" and true are not the number 1.
    strict = True if kind in (bool, int, float) else None
    metadata = {"description": meaning, "kept": kept, "aka": tuple(aka), "strict": strict, "by": by, **more}
    if by is not None:
        return field(default=None, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=partial(copy.copy, default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """One declared setting."""

    name: str  # section.key
    kind: Any  # its type
    default: Any
    declared: Mapping[str, Any]

    @property
    def meaning(self) -> str:
        return str(self.declared["description"])

    @property
    def by(self) -> By:
        """Its defaults by the `name` of its section; empty if they do not depend on that."""
        return self.declared["by"] or By()

    @property
    def values(self) -> str:
        """The values it takes, for a list of settings, where its type does not say it."""
        return f"one of {self.choices}" if self.choices else self.range

    @property
    def type_name(self) -> str:
        """Describe the type that a value must have: "int", "list of str", ..."""
        if get_origin(self.kind) is dict:
            return "a table"
        if get_origin(self.kind) is list:
            return f"list of {get_args(self.kind)[0].__name__}"
        return "str" if self.choices else str(self.kind.__name__)

    @property
    def choices(self) -> str:
        """The values there are, if they are few: "'cosine', 'linear'"."""
        return _listed(self.kind) if get_origin(self.kind) is Literal else ""

    @property
    def range(self) -> str:
        """The bounds of a number, or nothing."""
        d = self.declared
        low, high = d.get("ge", d.get("gt")), d.get("le", d.get("lt"))
        if low is not None and high not in (None, LARGEST):
            return f"in {'[' if 'ge' in d else '('}{low}, {high}{']' if 'le' in d else ')'}"
        return "" if low is None else f"{'at least' if 'ge' in d else 'above'} {low}"

    def of(self, root: Any) -> Any:
        """Return the setting's value in a tree of dataclasses."""
        for key in self.name.split("."):
            root = getattr(root, key)
        return root

    def seen(self, root: Any) -> Any:
        """Return the part of the value that weights depend on."""
        if "seen" not in self.declared:
            return self.of(root)
        return self.declared["seen"](getattr(root, self.name.partition(".")[0]))


class Schema:
    """All settings of a dataclass whose fields are settings and sections: dataclasses of settings."""

    def __init__(self, root: type[Any]) -> None:
        self.root, self._adapter = root, TypeAdapter(root)
        self.sections: dict[str, type[Any]] = {}
        self.settings: dict[str, Setting] = {}
        for name, kind in get_type_hints(root).items():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                self.sections[name] = kind
        for prefix, section in (("", root), *((f"{name}.", kind) for name, kind in self.sections.items())):
            kinds, fresh = get_type_hints(section), section()
            for f in dataclasses.fields(section):
                if f.metadata:
                    name, by = prefix + f.name, f.metadata["by"]
                    default = getattr(fresh, f.name) if by is None else by.first
                    self.settings[name] = Setting(name, _of_a_value(kinds[f.name]), default, f.metadata)
        # What may be written for a setting by mistake: its key alone, and what other trainers call it.
        self.aliases = {name.rpartition(".")[2]: name for name in reversed(self.settings)}
        self.aliases |= {other: name for name, s in self.settings.items() for other in s.declared["aka"]}

    def read(self, layers: Iterable[tuple[Tree, str]], base: Any = None) -> Any:
        """Lay tables over `base` or the defaults, each with the place it is from, and check every value.

        Raises:
            ConfigError: naming the place, the setting and its value.
        """
        base = base or self.root()
        tree: Tree = dataclasses.asdict(base)
        places: dict[str, str] = {}
        for table, place in layers:
            if not isinstance(table, dict):
                raise ConfigError(f"{place}: settings must be a table; got {shown(table)}")
            _lay(table, tree, places, place)
        self._forget(tree, base, places)
        self._round(tree)
        try:
            config = self._adapter.validate_python(tree)
        except ValidationError as e:
            self._refuse(e.errors()[0], tree, places)
        for section, kind in self.sections.items():
            if any(f.metadata["by"] is not None for f in dataclasses.fields(kind)):
                had(getattr(config, section), section)
        return config

    def _forget(self, tree: Tree, base: Any, places: Mapping[str, str]) -> None:
        """Drop the values of `base` that are for another `name` of their section than it has now."""
        for name, s in self.settings.items():
            section, _, key = name.partition(".")
            now = tree.get(section)
            if s.by and name not in places and isinstance(now, dict) and now["name"] != getattr(base, section).name:
                del now[key]

    def _round(self, tree: Tree) -> None:
        """Make integers of whole numbers that are written as floats, such as 1e3, where an integer is wanted."""
        for name, s in self.settings.items():
            section, _, key = name.rpartition(".")
            table = tree.get(section) if section else tree
            if s.kind is int and isinstance(table, dict) and isinstance(x := table.get(key), float) and x.is_integer():
                table[key] = int(x)

    def _refuse(self, error: ErrorDetails, tree: Tree, places: dict[str, str]) -> NoReturn:
        path = [str(part) for part in error["loc"]]
        name = ".".join(path)
        # An error within a list or table is reported for the whole setting.
        known = next((s for n, s in self.settings.items() if name == n or name.startswith(f"{n}.")), None)
        place = next((places[key] for i in range(len(path), 0, -1) if (key := ".".join(path[:i])) in places), "")
        raise ConfigError((f"{place}: " if place else "") + self._reason(error, name, known, tree))

    def _reason(self, error: ErrorDetails, name: str, known: Setting | None, tree: Tree) -> str:
        got = error["input"]
        if error["type"] == "unexpected_keyword_argument":
            near = self.near(name)
            hint = f"did you mean {near[0]}?{self.said(name)}" if near else f"valid keys are {', '.join(self.settings)}"
            return f"unknown key {name}; {hint}"
        if known is None:
            keys = ", ".join(n for n in self.settings if n.startswith(f"{name}."))
            return f"{name} = {shown(got)} is a section; its keys are {keys}"
        match error["type"]:
            case "value_error":
                reason = str(error.get("ctx", {})["error"])
                return f"{name}{' ' if reason.startswith('must ') else ': '}{reason}"
            case "literal_error":
                return f"{name} must be one of {_listed(known.kind)}; got {shown(got)}{_meant(got, known.kind)}"
            case "too_short":
                return f"{known.name} must have at least {known.declared['min_length']} item(s); got {shown(got)}"
            case "finite_number":
                return f"{name} must be finite and {known.range}; got {shown(got)}"
            case "less_than_equal" if known.declared["le"] == LARGEST:
                return f"{name} must be at most {LARGEST}; got {shown(got)}"
            case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal":
                return f"{name} must be {known.range}; got {shown(got)}"
        whole = tree
        for key in known.name.split("."):
            whole = whole[key]
        return f"{known.name} must be {known.type_name}; got {shown(whole)} ({type(whole).__name__})"

    def said(self, name: str) -> str:
        """Say what the setting means that other trainers call `name`: their value may be in other units."""
        found = self.settings.get(self.aliases.get(_leaf(name), ""))
        return f" That is: {found.meaning}" if found is not None and _leaf(name) in found.declared["aka"] else ""

    def listing(self, word: str = "") -> list[str]:
        """List the settings whose name, meaning or name elsewhere has `word`, with values and defaults."""
        lines = []
        for name, s in self.settings.items():
            if word.lower() in " ".join((name, s.meaning, *s.declared["aka"])).lower():
                notes = "; ".join(filter(None, (s.values, str(s.by))))
                lines += [f"{name} = {json.dumps(s.default)}", f"    {s.meaning}{f' ({notes})' if notes else ''}"]
        return lines

    def near(self, name: str) -> list[str]:
        """Find the setting or section that is meant by a name that does not exist, if one is near."""
        leaf = _leaf(name)  # `steps` and `data.steps` should find `train.steps`
        near = (
            [leaf] if leaf in self.aliases else difflib.get_close_matches(name, [*self.settings, *self.sections], n=1)
        )
        return [self.aliases.get(x, x) for x in near or difflib.get_close_matches(leaf, self.aliases, n=1)]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].replace("-", "_")


def _meant(got: Any, kind: Any) -> str:
    """Suggest the choice of a Literal that is meant: "bf16-mixed" is bfloat16, "adamw_torch" is adamw."""
    values = get_args(kind) if get_origin(kind) is Literal else get_args(get_args(kind)[-1])
    choices = [value for value in values if value and isinstance(value, str)]
    if isinstance(got, list | dict):  # as deep as a file nests them
        return ""
    text = _SPELLINGS.sub(lambda found: _FULL[found[0]], str(got).lower())
    begun = [choice for choice in choices if text.startswith(choice)]
    near = [max(begun, key=len)] if begun else difflib.get_close_matches(text, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _of_a_value(kind: Any) -> Any:
    """Return the type without None."""
    return get_args(kind)[0] if NoneType in get_args(kind) else kind


def _listed(kind: Any) -> str:
    """List the choices of a Literal, also of one in a table."""
    values = get_args(kind) if get_origin(kind) is Literal else get_args(get_args(kind)[-1])
    return str(values)[1:-1].rstrip(",")


def _lay(table: Tree, tree: Tree, places: dict[str, str], place: str, prefix: str = "") -> None:
    """Lay one table over another, key by key. `{}` empties a setting that is a table."""
    for key, value in table.items():
        name, below = prefix + key, tree.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and (value or not prefix):
            _lay(value, below, places, place, f"{name}.")
        else:
            of_list, of_table = isinstance(value, list), isinstance(value, dict)
            parts = [name, *value, *(value.values() if of_table else ())] if of_list or of_table else [name, value]
            if not all(is_unicode(part) for part in parts if isinstance(part, str)):
                raise ConfigError(
                    f"{place}: {shown(name)[1:-1]} must be valid Unicode, to be saved; got {shown(value)}"
                )
            tree[key] = value
        places[name] = place


def shown(value: Any) -> str:
    """Write a value for a message, cut short: values in a file may be long or deeply nested."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 200
    return short.repr(value)
