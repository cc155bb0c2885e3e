"""The documentation: its code runs, its commands and names exist, every public name is there, pictures are of today."""

import ast
import doctest
import gzip
import importlib
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.data.sources import text_files
from llmfast.losses import CrossEntropyLoss, linear_cross_entropy, linear_logprobs
from llmfast.optim import FusedAdamW
from llmfast.train.config import SCHEMA, load_config
from support.code_blocks import ROOT, blocks, checked, commands, expect_command, missing_modules, run_python
from support.names import exists
from support.sources import tree_of

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
SOURCES = sorted([*(ROOT / "llmfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def loaded(file: Path) -> ModuleType:
    """Import a module of docs/, which is not a package."""
    spec = importlib.util.spec_from_file_location(f"docs_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = loaded(DOCS / "hooks.py")


# Code.


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(text_of(p), "python")], ids=name_of)
def test_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing := missing_modules(page):
        pytest.skip(f"needs {', '.join(sorted(missing))}")
    monkeypatch.chdir(tmp_path)
    run_python(page)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("x = torch.zeros(3, 4)  # (3, 4)", "(4, 3)"),
        ("x = torch.zeros(3)  # (3,)", "(1,)"),
        ("print(torch.zeros(3, 4).shape)  # (3, 4)", "(3, 4, 1)"),
        ("print(6.6)  # about 7: whatever it is", "about 8"),
        ("x = 6.6  # about 7", "about 6"),
    ],
)
def test_results_in_comments_of_code_are_compared(line: str, wrong: str) -> None:
    exec(checked(line), {"torch": torch})
    with pytest.raises(AssertionError):
        exec(checked(f"{line.partition('#')[0]}# {wrong}"), {"torch": torch})
    assert checked(line.replace("#", "# so")) == line.replace("#", "# so"), "other comments are left"


def test_commands_exist() -> None:
    found = [words for page in PAGES for words in commands(text_of(page))]
    assert found
    for words in found:
        expect_command(words)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("llmfast train --resume --train.steps 3000", "refuses train --resume"),
        ("python -m llmfast train --resume --name x --config run.toml", "refuses train --resume"),
        ("torchrun --nproc-per-node 4 -m llmfast train --resume", "refuses train --resume"),
        ("llmfast train --resume --overwrite --name x", "does not take train --resume"),
        ("llmfast doctor --tune", "refuses doctor --tune"),
        (
            "torchrun --nproc-per-node 4 -m llmfast train --train.parallel hsdp --train.shard_size 3",
            "4 ranks refuse train",
        ),
        ("torchrun --nnodes 3 --nproc-per-node 7 -m llmfast train", "21 ranks refuse train"),
        ("llmfast doctor --full --sections losess", "refuses doctor --full"),
    ],
)
def test_commands_that_the_library_refuses_are_found(command: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        expect_command(command.split())


def test_all_code_is_looked_at() -> None:
    for page in PAGES:
        text = text_of(page)
        assert text.count("```") == 2 * len(blocks(text, "python", "sh", "toml")), page


def test_settings_in_toml_exist(tmp_path: Path) -> None:
    from llmfast.train import load_config

    for page in PAGES:
        for block in blocks(text_of(page), "toml"):
            file = tmp_path / "settings.toml"
            file.write_text(block.code)
            load_config(file)


@pytest.mark.parametrize("source", [s for s in SOURCES if ">>>" in s.read_text(encoding="utf-8")], ids=name_of)
def test_docstrings_run(source: Path) -> None:
    parts = source.relative_to(ROOT).with_suffix("").parts
    module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0


# What is an error.


def probabilities(**options: Any) -> None:
    hidden, weight = torch.ones(2, 4), torch.ones(6, 4)
    linear_cross_entropy(hidden, weight, torch.rand(2, 6, requires_grad=options.pop("learned", False)), **options)


def log_probabilities(**options: Any) -> None:
    linear_logprobs(torch.ones(2, 4), torch.ones(6, 4), torch.tensor([0, 5]), **options)


def class_indices(targets: Tensor) -> None:
    CrossEntropyLoss()(torch.ones(2, 6), targets)


def a_group(**options: Any) -> None:
    FusedAdamW([{"params": [torch.nn.Parameter(torch.ones(2))], **options}])


def a_file(name: str, content: bytes) -> None:
    with TemporaryDirectory() as folder:
        Path(folder, name).write_bytes(content)
        list(text_files(folder))


def settings(*given: str) -> None:
    load_config(None, list(given))


def is_refused(call: Callable[[], None]) -> bool:
    try:
        call()
    except (TypeError, ValueError):
        return True
    return False


SENTENCE = r"[A-Z](?:[^.`]|`[^`]*`|\.(?=\S))*\b(?:is|are) (?:an error|errors)\b(?:[^.`]|`[^`]*`|\.(?=\S))*\."
# Each sentence that calls something an error, with what it speaks of.
ERRORS: dict[str, list[Callable[[], None]]] = {
    "A damaged or truncated file is an error, and so is a Latin-1 or UTF-16 file; the message has the command that "
    "converts it.": [
        partial(a_file, "a.jsonl.gz", gzip.compress(b'{"text": "hello"}')[:-6]),
        *(partial(a_file, "a.txt", "Grüße".encode(encoding)) for encoding in ("latin-1", "utf-16")),
    ],
    "Options that are about class indices are errors: `shift`, `document_ids`, `target_weights`, an `ignore_index` "
    "that is not negative, `return_stats` and `grad_filter`.": [
        *(partial(probabilities, **{name: 1}) for name in ("shift", "ignore_index", "return_stats", "grad_filter")),
        *(partial(probabilities, **{name: torch.ones(2)}) for name in ("document_ids", "target_weights")),
    ],
    "Probabilities that require a gradient are an error too, as only the other inputs get one.": [
        partial(probabilities, learned=True)
    ],
    "Options that say what a loss is, such as `label_smoothing`, are errors.": [
        partial(log_probabilities, **{name: 0.1})
        for name in ("label_smoothing", "z_loss", "class_weights", "reduction")
    ],
    "As in torch, integers in the logits' shape (such as one-hot targets) are an error.": [
        partial(class_indices, torch.eye(2, 6).long())
    ],
    "A target out of range is an error on a CPU.": [partial(class_indices, torch.tensor([0, t])) for t in (6, -1)],
    "All other arguments that torch does not have apply to all groups; setting one in a group is an error, and so is "
    "misspelling one.": [partial(a_group, seed=3), partial(a_group, max_grad_nrom=0.1)],
    "A setting that the chosen optimizer does not have is an error.": [
        partial(settings, "optimizer.name=lion", "optimizer.nesterov=true")
    ],
    "A name that does not exist is an error that suggests the closest one.": [partial(settings, "train.stpes=3")],
}


def test_what_pages_call_an_error_is_one() -> None:
    prose = (re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE) for page in PAGES)
    found = {sentence for text in prose for sentence in re.findall(SENTENCE, " ".join(text.split()))}
    assert found == set(ERRORS)
    for sentence, examples in ERRORS.items():
        for example in examples:
            assert is_refused(example), f"{sentence} {example} is none"


# Names.


@pytest.mark.parametrize("package", hooks.PACKAGES)
def test_public_names_have_docstrings(package: str) -> None:
    assert [name for name in hooks.public_names(package) if not documented(f"llmfast.{package}", name)] == []


def documented(module: str, name: str) -> bool:
    """Return True if the source has a docstring; Python may generate `__doc__` for dataclasses and constants."""
    where = ROOT.joinpath(*module.split("."))
    if (where / f"{name}.py").exists() and name == "reference":
        return ast.get_docstring(tree_of(where / f"{name}.py")) is not None
    file = where / "__init__.py" if where.is_dir() else where.with_suffix(".py")
    tree = tree_of(file)
    for node, following in zip(tree.body, [*tree.body[1:], None]):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name and ast.get_docstring(node):
            return True
        if isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and target.id == name:
                return isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return any(documented(str(n.module), name) for n in imports if name in [alias.name for alias in n.names])


def names_in(text: str) -> Iterator[str]:
    """Yield the dotted names of llmfast in the text and in the directives of reference pages."""
    yield from re.findall(r"^::: (llmfast[\w.]+)", text, re.MULTILINE)
    yield from re.findall(r"`(llmfast\.[\w.]+?)(?:\(.*?\))?`", text)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_exist(page: Path) -> None:
    for name in names_in(text_of(page)):
        if name.startswith("llmfast.integrations") and find_spec("transformers") is None:
            continue
        assert exists(name), f"{name} does not exist"


def test_every_public_name_is_in_the_reference() -> None:
    """Check package pages; mkdocstrings shows a package's `__all__`, and the build checks the result."""
    pages = "\n".join(map(text_of, (DOCS / "reference").glob("*.md")))
    shown = set(re.findall(r"^::: (\S+)", pages, re.MULTILINE))
    for package in hooks.PACKAGES:
        if package == "losses":  # one by one, for two functions have the names of their modules
            for name in hooks.public_names(package):
                assert {f"llmfast.losses.{name}", f"llmfast.losses.{name}.{name}"} & shown, name
        else:
            assert f"llmfast.{package}" in shown


def test_figures_of_the_limits_are_the_codes() -> None:
    """Compare figures of models and targets on the page with the code."""
    from evidence.compiler import TARGETS
    from llmfast import _gpus
    from llmfast.models import cost

    page = " ".join((ROOT / "docs" / "limits.md").read_text().split())
    micro = f"{_gpus.LAUNCH * 1e6:g} µs"
    shares = f"{_gpus.BANDWIDTH_SHARE:g} · bandwidth", f"{_gpus.TENSOR_CORE_SHARE:g} · tensor cores"
    for formula in re.findall(r"sum over launches of .*?\)\)", page):
        assert micro in formula and all(share in formula for share in shares), formula
    assert len(re.findall(r"sum over launches of", page)) == 2
    assert f"with a utilisation of {cost.UTILISATION:g}," in page
    assert f"compiled for {', '.join(TARGETS[:-1])} and {TARGETS[-1]}:" in page


def test_settings_are_all_listed() -> None:
    page = hooks.on_page_markdown(text_of(DOCS / "trainer.md"))
    assert hooks.PLACE not in page
    settings = [name for name in SCHEMA.settings if "." in name]
    assert settings
    for name in settings:
        assert f"- `{name} = " in page, name
    assert "- `optimizer.lr = 0.0015`: highest learning rate (at least 0; 0.0015 for adamw, adam, rmsprop; 0.1" in page
    assert "- `optimizer.warmup_steps = 50`: steps in which the rate rises from 0 (at least 0)" in page
    assert '- `data.packing = "concat"`: ' in page and "(one of 'concat', 'best_fit')" in page
    assert "### optimizer\n\nThe optimizer with its hyperparameters, and the schedule of its learning rate.\n\n" in page


# Names of other libraries and of the shell, and states' names that are put together.
OTHERS = {
    *("PATH", "opt", "set_state_dict", "exp_avg_code", "exp_avg_scale", "apply_liger_kernel_to_llama", "ce_weight"),
    *("lse_square_scale", "return_token_accuracy", "return_z_loss", "kl_div", "activate"),
}


@cache
def known_words() -> set[str]:
    folders = ("llmfast", "kernels", "evidence", "benchmarks", "examples")
    files = [
        file for folder in folders for kind in ("py", "toml", "ipynb") for file in (ROOT / folder).rglob(f"*.{kind}")
    ]
    files += [ROOT / "Makefile", ROOT / "pyproject.toml", ROOT / "constraints.txt"]
    found = set(re.findall(r"\w+", "\n".join(map(text_of, files))))
    return found | {name for file in files for name in file.relative_to(ROOT).as_posix().replace(".", "/").split("/")}


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.parent.name != "reference" and p.stem != "chapter"], ids=name_of
)
def test_words_in_code_are_known(page: Path) -> None:
    """Look up each word of code within a sentence in the sources: a name that has changed is in none of them."""
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    words = {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"[A-Za-z_]\w+", code)}
    assert sorted(words - known_words() - OTHERS) == []


def test_the_states_of_each_setting_are_listed() -> None:
    """Step optimizers of every format, and look for the names of their states in the row of the setting."""
    rows = dict(
        re.findall(
            r"^\| (`\w+`.*?) \| (.*?) \|$", text_of(DOCS / "optimizers.md").partition("written with")[2], re.MULTILINE
        )
    )
    found: dict[str, set[str]] = {}
    every = [{"master_weights": master} for master in ("fp32", "split16", "split8", "kahan")]
    for options in [*every, {"state_dtype": "8bit"}, {"ema_decay": 0.5}]:
        p = torch.nn.Parameter(torch.ones(256).bfloat16())
        optimizer = FusedAdamW([p], **options)
        p.grad = torch.ones_like(p)
        optimizer.step()
        (setting, value), *_ = options.items()
        names = {name for name in optimizer.state_dict()["state"][0] if name not in ("step", "exp_avg", "exp_avg_sq")}
        assert names
        for name in names:
            shown = f'`{setting}="{value}"`' if isinstance(value, str) else f"`{setting}`"
            (row,) = (text for text in rows if re.search(rf"`{name.replace('_sq', '')}`", text))
            assert shown.removeprefix("`master_weights=") in rows[row], name
            found.setdefault(row, set()).add(f'"{value}"' if isinstance(value, str) else setting)
    for row, settings in found.items():
        named = set(re.findall(r'"[\w]+"|`(?:ema_decay)`', rows[row]))
        assert {each.strip("`") for each in named} == settings, row


def test_named_files_exist() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:llmfast|kernels|tests|examples|benchmarks)/[\w./]+)`", text_of(page)):
            assert (ROOT / path).exists(), f"{page}: {path}"


# Pictures and the site.


def test_pictures_are_of_these_numbers() -> None:
    figures = loaded(DOCS / "figures.py")
    for name in figures.FIGURES:
        for theme in figures.INK:
            picture = text_of(figures.FOLDER / f"{name}-{theme}.svg")
            assert figures.drawn_from(picture) == figures.digest(name), f"{name}: run python -m docs.figures"
    assert len(list(figures.FOLDER.iterdir())) == len(figures.FIGURES) * len(figures.INK)


def test_pictures_have_words_and_two_versions() -> None:
    for page in PAGES:
        for words, name, theme in re.findall(r"!\[(.*?)\]\(.*?figures/(\w+)-(\w+)\.svg#only-\w+\)", text_of(page)):
            assert len(words.split()) > 5, f"{page}: {name}"
            other = {"light": "dark", "dark": "light"}[theme]
            assert f"figures/{name}-{other}.svg#only-{other})" in text_of(page), f"{page}: {name}"


@pytest.mark.skipif(find_spec("mkdocstrings") is None, reason="needs the extra docs")
def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page: page.read_text(encoding="utf-8") for page in (tmp_path / "site").rglob("*.html")}
    for page, html in pages.items():
        assert not re.findall(r'(?:src|<link[^>]*href)="(https?://[^"]+)"', html), f"{page}: asks other hosts"
        if page.parent.name == "reference":
            assert "<details" not in html, f"{page}: a docstring's text was taken for an admonition"
            for block in re.findall(r"doc-signature.*?<code>(.*?)</code>", html, re.DOTALL):
                lines = re.sub(r"<[^>]+>", "", block).splitlines()
                assert max(map(len, lines)) < 120, f"{page}: a signature that ruff has not formatted"
