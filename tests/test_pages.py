"""Links, settings, flags and tables on the documentation's pages: all that they name exists, and nothing is missing."""

import re
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from evidence.compiler import TARGETS
from llmfast import _gpus
from llmfast.checkup import command, implementations
from llmfast.checkup.record import SCHEMA as RESULTS
from llmfast.checkup.record import Finding
from llmfast.checkup.runner import CheckUp, Outcome
from llmfast.checkup.sections import SECTIONS, TUNING
from llmfast.data.reader import TABLE_SUFFIXES, TEXT_SUFFIXES
from llmfast.models import Decoder
from llmfast.train.config import SCHEMA, decoder_config, load_config
from support.code_blocks import ROOT
from support.names import exists, parsers

PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md")]
PAGES += [*(ROOT / "kernels").glob("*.md"), *(ROOT / "benchmarks").rglob("*.md")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def code(page: Path) -> list[str]:
    """Return what a page's sentences have as code."""
    return re.findall(r"`([^`]+)`", prose(page))


def table(page: str, head: str) -> list[list[str]]:
    """Return the cells of the table on a page of docs/ whose first line begins like this."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = text[text.index(head) :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_variables_of_make_are_its_own(page: Path) -> None:
    """`CONSTRAINTS` is a file, or nothing."""
    variables = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"\bmake [\w-]+ ([A-Z_]+)=", text)) <= {*variables}
    assigned = re.findall(r"`([A-Z]\w*)=", text)
    assert {name for name in assigned if "_" not in name or name in variables} <= {*variables}, assigned
    for value in re.findall(r"\bCONSTRAINTS=([^\s`\"]*)", text):
        assert value == "" or (ROOT / value).is_file(), value


@pytest.mark.parametrize("page", [page for page in PAGES if "results" not in page.parts], ids=name_of)
def test_modelled_times_in_sentences_are_of_an_h100(page: Path) -> None:
    """Only the page of results, which is generated, has those of the others."""
    others = {gpu.name.split()[0] for gpu in _gpus.GPUS} - {"H100"}
    for sentence in re.split(r"(?<=[.:])\s", prose(page)):
        if "modelled" in sentence.lower():
            assert not others.intersection(re.findall(r"[A-Z]+\d+\w*", sentence)), sentence


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub make them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{target}: there is no {path}"
        if anchor.startswith("llmfast."):
            assert exists(anchor), target
        elif anchor and not anchor.startswith("only-"):  # which chooses the picture of a theme
            assert anchor in anchors(file), f"{target}: {sorted(anchors(file))}"


NO_SETTINGS = {"model.generate", "model.safetensors", "optimizer.grad_norm", "optimizer.group_options"}


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "CHANGELOG"], ids=name_of)
def test_settings_in_sentences_exist_and_take_their_values(page: Path) -> None:
    sections = "|".join(SCHEMA.sections)
    for text in code(page):
        for name, call, value in re.findall(rf"(?<![\w./])((?:{sections})\.\w+)(\(?)(?:=([\w.\"]+))?", text):
            if call or name in NO_SETTINGS:
                continue
            assert name in SCHEMA.settings, text
            if value and value not in ("RUN", "FILE"):
                kept = {"optimizer.decay": ["optimizer.name=adamw"], "train.parallel": ["train.shard_size=2"]}
                load_config(None, [*kept.get(name, []), f"{name}={value}"])


@cache
def flags() -> set[str]:
    """Return the flags of all commands."""
    found = {flag for _, parser in parsers() for action in parser._actions for flag in action.option_strings}
    return found | {f"--{name}" for name in SCHEMA.settings}


# Of Megatron's preprocessing, torchrun, these tests and the benchmarks.
OTHERS = {"--append-eod", "--standalone", "--nproc-per-node", "--device", "--machine-code", "--results"}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_in_sentences_exist(page: Path) -> None:
    found = {flag for text in code(page) for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", text)}
    assert found - flags() - OTHERS - {"--section.key"} == set()


def test_a_check_ups_sections_and_results_are_those_of_the_page() -> None:
    assert [names(row[0]) for row in table("gpu.md", "| section |")] == [[section.name] for section in SECTIONS]
    written: list[dict[str, Any]] = []
    CheckUp(minutes=0.0, sections=[]).run(written.append, say=lambda text: None)
    assert {name for row in table("gpu.md", "| key |") for name in names(row[0])} == written[0].keys()
    text = " ".join(prose(ROOT / "docs" / "gpu.md").split())
    listed = text.partition("A section has ")[2].partition(". A finding has ")
    assert set(names(listed[0])) == asdict(Outcome("", "", 0.0)).keys()
    after = names(listed[2].partition("an object of")[0])
    assert set(after) - {"true", "false", "null"} == {f.name for f in fields(Finding)} | {"case"}
    assert f'`"{RESULTS}"`' in text and f"The section `{TUNING.name}`, which `--tune` adds" in text


def test_libraries_that_are_compared_with_are_named() -> None:
    """A GPU may have all of them; those that only other operations than these have are not named."""
    text = " ".join(prose(ROOT / "docs" / "gpu.md").split())
    listed = text.partition("any other installed library (")[2].partition(")")[0]
    operations = ("cross_entropy", "linear_cross_entropy", "adamw")
    wanted = {one.library.distribution for name in operations for one in implementations._IMPLEMENTATIONS[name]}
    named = {name.lower() for name in listed.split(", ")}
    assert len(named) == len(wanted - {"torch", "llmfast-torch"})
    for name in wanted - {"torch", "llmfast-torch"}:
        assert any(each in name.lower() for each in named), name


def test_files_that_are_read_are_those_of_the_page() -> None:
    (text, _), (lines, _), (rows, _) = table("data.md", "| files |")
    assert sorted(names(text)) == sorted(TEXT_SUFFIXES)
    assert sorted(names(lines) + names(rows)) == sorted(TABLE_SUFFIXES)


def test_choices_of_a_setting_are_all_described() -> None:
    def choices(name: str) -> set[str]:
        return set(re.findall(r"'(\w+)'", SCHEMA.settings[name].choices))

    assert {name for row in table("data.md", "| packing |") for name in names(row[0])} == choices("data.packing")
    text = " ".join(prose(ROOT / "docs" / "trainer.md").split())
    listed = text.partition("`optimizer.name` chooses among ")[2].partition(":")[0]
    assert set(names(listed)) == choices("optimizer.name")
    assert f"`{SCHEMA.settings['optimizer.name'].default}` (the default)" in listed
    for mode in choices("optimizer.decay") - {SCHEMA.settings["optimizer.decay"].default}:
        assert f"`{mode}`" in text.partition("`optimizer.decay` has other modes")[2].partition(". ")[0]


def test_every_example_has_a_recipe() -> None:
    files = {file.name for kind in ("py", "ipynb") for file in (ROOT / "examples").glob(f"*.{kind}")} - {"tiny_gpt.py"}
    recipes = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8").partition("## Recipes")[2]
    assert set(re.findall(r"`examples/(\w+\.\w+)`", recipes)) == files | {"README.md"}
    listed = re.findall(r"^\| \[`([\w.]+)`\]\(([\w.]+)\)", prose(ROOT / "examples" / "README.md"), re.MULTILINE)
    assert {name for name, _ in listed} == files | {"tiny_gpt.py"} and all(name == file for name, file in listed)


def test_gpus_of_the_pages_are_known() -> None:
    for page in PAGES:
        for gpu in re.findall(r"--gpu (\w+)", page.read_text(encoding="utf-8")):
            assert _gpus.chosen(gpu), name_of(page)


# What a page says of settings on --resume, and which settings that is about.
TAKE_EFFECT = {
    "Rates": ["optimizer.lr"],
    "betas": ["optimizer.beta1", "optimizer.beta2"],
    "momentum": ["optimizer.momentum"],
    "decay": ["optimizer.weight_decay", "optimizer.decay"],
    "clipping": ["optimizer.max_grad_norm"],
    "schedules": ["optimizer.schedule", "optimizer.warmup_steps", "train.mtp_schedule"],
    "the mixture's weights": ["data.weights"],
    "steps": ["train.steps"],
    "batch sizes": ["train.batch_size", "train.micro_batch_size"],
    "ranks": ["train.parallel", "train.shard_size"],
    "devices": ["train.device"],
}
# Every setting that a run keeps: a second list, because the trainer's own is what it is compared with.
CANNOT_CHANGE = {
    "The model": [
        *("model.width", "model.layers", "model.heads", "model.ffn_width", "model.tie_embeddings", "model.mtp"),
        *("model.mtp_heads", "model.mtp_concat", "model.mtp_hidden", "model.mtp_repeated_layer", "model.pretrained"),
        "train.init_from",
    ],
    "the optimizer's name": ["optimizer.name", "optimizer.initial_accumulator_value"],
    "the sources and how they are cut into rows": [
        *("data.sources", "data.text_column", "data.held_out", "data.split", "data.tokenizer", "data.vocab_size"),
        *("data.seq_len", "data.packing", "data.fim_rate", "data.fim_spm_rate", "data.fim_level", "data.fim_unit"),
        *("data.fim_spm_variant", "data.fim_loss"),
    ],
    "the seed": ["train.seed"],
    "`train.param_dtype`": ["train.param_dtype"],
}


def test_what_changes_on_resume_is_what_the_page_says() -> None:
    text = " ".join(prose(ROOT / "docs" / "trainer.md").split())
    listed = text.partition("is refused by name. ")[2].partition(" take effect.")
    assert re.split(r", | and ", listed[0]) == list(TAKE_EFFECT)
    convert, _, rest = listed[2].partition(" convert the optimizer's states.")
    refused = rest.strip().partition(" cannot change;")[0]
    assert refused == "{}, {}, {}, {} and {}".format(*CANNOT_CHANGE)
    for name in [*names(convert), *(name for listed in TAKE_EFFECT.values() for name in listed)]:
        assert not SCHEMA.settings[name].declared["kept"], name
    kept = {name for name, setting in SCHEMA.settings.items() if setting.declared["kept"]}
    assert kept == {name for listed in CANNOT_CHANGE.values() for name in listed}


def test_what_the_pages_count_in_words() -> None:
    """Targets of the compiler, minutes of a check-up, and the parameters of the demo."""
    number = {4: "four", 5: "five", 6: "six", 8: "eight"}
    text = {page: " ".join(page.read_text(encoding="utf-8").split()) for page in PAGES if page.stem != "CHANGELOG"}
    gpus = [found for page in text.values() for found in re.findall(r"compiled? for (?:the )?(\w+) GPUs", page)]
    assert len(gpus) >= 2 and set(gpus) == {number[len(TARGETS)]}
    minutes = re.findall(r"how to check one in (\w+) minutes", text[ROOT / "README.md"])
    assert minutes == [number[int(command.MINUTES)]]
    with torch.device("meta"):
        demo = Decoder(decoder_config(load_config(None), SCHEMA.settings["data.vocab_size"].default))
    millions = round(sum(p.numel() for p in demo.parameters()) / 1e6)
    said = [found for page in text.values() for found in re.findall(r"train\w* a (\d+) M parameter model", page)]
    assert len(said) == 2 and set(said) == {str(millions)}


def test_a_runs_folder_holds_what_the_page_lists() -> None:
    listed = [name for row in table("trainer.md", "| file |") for name in names(row[0])]
    assert listed == [
        *("config.toml", "metrics.jsonl", "tokenizer.json", "checkpoint-<step>/"),
        *("model.safetensors", "loss.png", "sample.txt"),
    ]
    exported = " ".join(prose(ROOT / "docs" / "trainer.md").split()).partition("and its tokenizer: ")[2].partition(". ")
    assert exported[0] == "config.json, model.safetensors, tokenizer.json and tokenizer_config.json"


def test_lines_that_an_update_rule_takes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    stated = {file: int(lines) for file, lines in re.findall(r"^\| `(\S+lion\.py)` \| (\d+)", text, re.MULTILINE)}
    assert len(stated) == 2
    assert stated == {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in stated}
