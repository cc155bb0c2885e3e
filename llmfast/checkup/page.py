"""The results of a check-up as a page of Markdown: of one machine, or of two side by side."""

from collections.abc import Iterable, Iterator
from typing import Any

from llmfast.checkup.record import SCHEMA, VERSION

Results = dict[str, Any]
# Figures that stand for a finding when two machines are compared, best first.
COMPARED = (
    "share_of_copy",
    "times_matrix_products",
    "seconds",
    "bytes_per_s",
    "flops_per_s",
    "ratio",
    "relative_error",
)


def check(results: Any) -> Results:
    """Return results that this version can read.

    Raises:
        ValueError: they are not the results of a check-up, or are those of a newer version.
    """
    if not isinstance(results, dict) or results.get("schema") != SCHEMA:
        raise ValueError(f"results must be a JSON object with schema {SCHEMA!r}; got {results!r:.80}")
    if results.get("version", 0) > VERSION:
        raise ValueError(f"results must be of version {VERSION} or older; got version {results['version']}")
    return results


def verdict(results: Results) -> tuple[int, int, int]:
    """Count findings that are right, that are wrong, and cases that were not reached."""
    findings = [found for section in results["sections"] for found in section["findings"]]
    right = sum(found["ok"] is True for found in findings)
    wrong = sum(found["ok"] is False for found in findings)
    return right, wrong, sum(len(section["not_reached"]) for section in results["sections"])


def page(results: Results) -> str:
    """Return a page: what is wrong first, then every section."""
    return "\n".join(_page(results)) + "\n"


def _page(results: Results) -> Iterator[str]:
    right, wrong, left = verdict(results)
    yield f"# Check-up of llmfast {results['llmfast']}"
    yield ""
    yield f"{results['date']}, {machine(results)}: {right} right, {wrong} wrong, {left} not reached."
    if results["not_reached"]:
        yield f"\nSections not reached: {', '.join(results['not_reached'])}."
    if wrong:
        yield "\n## Wrong\n"
        yield from _table(
            ("section", "case", "what", "figures"),
            (
                (section["name"], found["case"], found["what"], _figures(found["figures"]))
                for section in results["sections"]
                for found in section["findings"]
                if found["ok"] is False
            ),
        )
    for section in results["sections"]:
        yield f"\n## {section['title']}\n"
        yield f"{section['seconds']:.0f} of {section['budget']:.0f} seconds.\n"
        yield from _table(
            ("", "case", "what", "figures"),
            (
                (
                    {True: "right", False: "WRONG", None: ""}[found["ok"]],
                    found["case"],
                    found["what"],
                    _figures(found["figures"]),
                )
                for found in section["findings"]
            ),
        )
        if section["not_reached"]:
            yield "\nNot reached: " + "; ".join(f"{case} ({why})" for case, why in section["not_reached"].items())


def machine(results: Results) -> str:
    """Return the name of the device that was looked at."""
    for section in results["sections"]:
        for found in section["findings"]:
            if "name" in found["figures"]:
                return str(found["figures"]["name"])
    return "an unknown device"


def comparison(first: Results, second: Results) -> str:
    """Return a page that sets two machines side by side."""
    return "\n".join(_comparison(first, second)) + "\n"


def _comparison(first: Results, second: Results) -> Iterator[str]:
    names = [f"{machine(results)}, llmfast {results['llmfast']}" for results in (first, second)]
    yield f"# {names[0]} and {names[1]}\n"
    found = [
        {
            (section["title"], finding["case"], finding["what"]): finding
            for section in results["sections"]
            for finding in section["findings"]
        }
        for results in (first, second)
    ]
    titles = dict.fromkeys(key[0] for one in found for key in one)
    for title in titles:
        keys = dict.fromkeys(key for one in found for key in one if key[0] == title)
        rows = []
        for key in keys:
            pair = [one.get(key) for one in found]
            name = next((n for n in COMPARED if any(p and n in p["figures"] for p in pair)), "")
            rows.append((key[1], key[2], name, *(_cell(p, name) for p in pair)))
        yield f"## {title}\n"
        yield from _table(("case", "what", "figure", *names), rows)
        yield ""


def _cell(found: dict[str, Any] | None, name: str) -> str:
    if found is None:
        return "not reached"
    mark = "WRONG " if found["ok"] is False else ""
    return mark + (_value(found["figures"][name]) if name in found["figures"] else "")


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def _figures(figures: dict[str, Any]) -> str:
    told = {name: value for name, value in figures.items() if value is not None and not isinstance(value, list)}
    return ", ".join(f"{name} {_value(value)}" for name, value in told.items())


def _value(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
