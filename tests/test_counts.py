"""Numbers that pages write as words, and the figures of pages outside docs/: each is known, or made from the code."""

import re
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

import pytest
import torch

from benchmarks.report import SHOWN, headline
from evidence.compiler import TARGETS
from llmfast import losses
from llmfast.checkup import command
from llmfast.checkup.shapes import MODELS
from llmfast.data.sources import BUILT_IN
from llmfast.losses import LinearCrossEntropyPlan
from llmfast.losses.ways import Mode
from llmfast.models import cost
from llmfast.optim import FusedAdam, FusedLion
from support.code_blocks import ROOT
from support.results import one, results

WORDS = dict(enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]))
LION = ("llmfast/optim/lion.py", "tests/optim/test_lion.py")
TIMES = {2: "twice", 4: "four times"}
NUMBER = "two|three|four|five|six|seven|eight|nine|ten|twelve|half|third|quarter|fifth|eighth|ninth|tenth|twice|million"
ROWS = results("results.json")
GIB = 1 << 30


@cache
def prose(page: str) -> str:
    """Return a page without its code, tables' lines of dashes, and targets of links."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$|^\|[-:|]+$|^ *<.*>$", "", text, flags=re.DOTALL | re.MULTILINE)
    return " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())


def products(**options: Any) -> str:
    return WORDS[int(LinearCrossEntropyPlan.make(**SHOWN, **options).products + 0.1)]


def syncs(operation: str) -> int:
    found = {row["syncs"] for row in ROWS if row.get("operation") == operation and row.get("way") == "Liger"}
    (waits,) = found - {None}
    return int(waits)


def launches(operation: str) -> int:
    row = one(
        ROWS, section="optimizers", operation=operation, way="llmfast", size={"parameters": "124M"}, dtype="float32"
    )
    return int(row["calls"])


def states(kind: type[torch.optim.Optimizer]) -> int:
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    optimizer = kind([p])
    optimizer.step()
    return sum(t.shape == p.shape for t in optimizer.state[p].values())


def from_code() -> Iterator[tuple[str, str]]:
    """Yield pages, and what each says of a number in the code or the results."""
    gpus, four = WORDS[len(TARGETS)], WORDS[len(list(LinearCrossEntropyPlan.make(**SHOWN)))]
    for page, text in (
        ("docs/gpu.md", "All tiles compile for {} GPUs"),
        ("docs/how-it-works/row-kernel.md", "compile every kind of launch for {} GPUs"),
        ("docs/index.md", "machine code compiled for {} GPUs"),
        ("CONTRIBUTING.md", "compile the launches the tests made, for {} targets"),
        ("CONTRIBUTING.md", "what `make test` compiles for {} targets"),
        ("kernels/README.md", "a selection of what the tests launch for {} GPUs"),
    ):
        yield page, text.format(gpus)
    lines = {path: len((ROOT / path).read_text("utf-8").splitlines()) for path in LION}
    yield "CONTRIBUTING.md", f"| {lines[LION[0]]}: `FusedLion`, half of it docstring and signature |"
    yield "CONTRIBUTING.md", f"| {lines[LION[1]]} |"
    minutes = WORDS[int(command.MINUTES)]
    yield "docs/gpu.md", f"It takes {minutes} minutes; `--minutes 4` takes four and leaves out"
    yield "README.md", f"how to check one in {minutes} minutes"
    yield "docs/gpu.md", f"you have a GPU for {minutes} minutes"
    yield "docs/limits.md", f"If you have a GPU, [{minutes} minutes on it]"
    yield "docs/data.md", f"a token file, or one of {WORDS[len(BUILT_IN)]} sources available on every machine"
    yield "docs/how-it-works/bytes.md", f"for each of its {four} chunks it reads the weight twice"
    yield "docs/how-it-works/bytes.md", f"also in place, with {WORDS[syncs('cross_entropy')]} host synchronisations"
    yield (
        "docs/migration.md",
        f"Liger synchronises with the device {TIMES[syncs('linear_cross_entropy')]} in the linear loss and "
        f"{TIMES[syncs('cross_entropy')]} in the other",
    )
    low = {"accumulate_dtype": torch.bfloat16, "memory_budget": 200 << 20}
    yield "docs/how-it-works/chunk-plan.md", f"It needs {products(**low)} products and no memory but the slab"
    yield "docs/losses.md", f"(the *slab*) and needs {products(**low)} matrix products"
    few = products(memory_budget=16 << 20)
    yield "docs/how-it-works/chunk-plan.md", f"16 MiB are enough for {few} products at nearly full speed"
    yield "docs/migration.md", f"llmfast takes {few} products at nearly full speed from about 10 MiB on"
    yield "docs/migration.md", f"and {products()} at 2.0 GiB, its default"
    yield "docs/how-it-works/chunk-plan.md", f"Hidden states in {four} chunks of rows"
    yield "docs/how-it-works/chunk-plan.md", f"choose among {WORDS[len(get_args(Mode))]} kinds of ways"
    yield "docs/how-it-works/chunk-plan.md", f"of the budgets above for {WORDS[len(MODELS)]} models"
    more = launches("adamw, clipped") - launches("adamw")
    assert more == 3
    yield "docs/how-it-works/optimizer.md", f"for the norm, or {WORDS[more]} if there are many parameters"
    yield "docs/how-it-works/optimizer.md", f"Clipping adds {WORDS[more - 1]} launches"
    kinds = [kind for name in losses.__all__ if isinstance(kind := getattr(losses, name), type)]
    modules = [kind for kind in kinds if issubclass(kind, torch.nn.Module)]
    yield "docs/losses.md", f"has losses, log-probabilities and {WORDS[len(modules)]} modules"
    yield "docs/optimizers.md", f"It keeps {WORDS[states(FusedLion)]} state where Adam keeps {WORDS[states(FusedAdam)]}"
    assert cost.AGAIN == 1 + 1 / 3
    yield "docs/planning.md", "activations computed again (a third more time"
    yield from (("README.md", " ".join(line.split())) for line in headline(ROWS).splitlines() if "---" not in line)


@cache
def made() -> list[tuple[str, str]]:
    return list(from_code())


# Other numbers: a change on a page is made here as well.
STATED = {
    "docs/data.md": ["at least 4,000 characters or a fifth of the text", "more than a million characters"],
    "docs/gpu.md": [
        "runs only these two",
        "To compare two machines",
        "The two curves should coincide",
    ],
    "docs/how-it-works/bytes.md": ["each of the two matrix products of backward", "computes the logits twice: 4"],
    "docs/how-it-works/chunk-plan.md": [
        "two curves of llmfast",
        "Two more products turn these into",
        "There are two exceptions",
        "A chunk of n rows reads the weight twice",
        "a ninth at 4,096 rows",
        "ten times the slab",
        "The two stages need not",
        "| two-stage |",
        "better from eight chunks on",
    ],
    "docs/index.md": [
        "for two expensive parts of LLM training",
        "in about four minutes on two cores. On a machine that is busy",
        ". ## Change two lines",
        "change one line for the optimizer and one for the loss",
        "takes about four minutes on two cores and has a folder of its own",
    ],
    "docs/integrations.md": ["in less than half of its memory", "Start in five minutes", "with two lines changed"],
    "docs/limits.md": [
        "the largest runs have a few million parameters",
        "Three kinds of figures",
        "within a tenth of the modelled time",
        "from two cores of a shared machine",
    ],
    "docs/losses.md": [
        "at most a tenth of the GPU's memory",
        "`hidden` is ten times that of the others",
        "at most two slabs of logits exist",
        "in one of two ways",
        "with the two sides exchanged",
    ],
    "docs/measured.md": [
        "Give llmfast 1 % more memory than another library holds",
        "For Llama-3 and 8k tokens on an H200, Liger's authors report 53.0, 37.7 and 35.1 ms at C = 1, 8 and 16 "
        "([Liger-Kernel#1472])",
        "for sm_80, sm_90, sm_100, gfx942 and gfx950",
    ],
    "docs/migration.md": ["V = 128,256, with four matrix products"],
    "docs/mtp.md": ["trains three small models"],
    "docs/planning.md": [
        "give two, and the third follows",
        "a power of two times the GPUs",
        "one gradient, and two gradients being sent",
    ],
    "docs/trainer.md": ["For these two, `optimizer.decay`", "a row of two documents"],
    "README.md": [
        "for two expensive parts of LLM training",
        "## Three commands They need a fresh clone, Linux and Python 3.10",
        "several GB, or 0.5 GB with `PIP_EXTRA_INDEX_URL",
        "## Two lines",
        "Change two lines of your own training loop",
        "for 16k or 8k tokens",
        "The next columns are for Llama-3, 16k",
        "On a busy machine, `OMP_NUM_THREADS=1 make train`",
        "MiB are values of `memory_budget`; the first row has none",
        "less memory, up to twice its error",
        "relative to float64, at N=1024 tokens, D=256, V=16384 classes; rounding to bfloat16 alone costs 1.6e-3.",
        "a five-minute introduction",
    ],
    "CONTRIBUTING.md": [
        "You need Linux, Python 3.10 or newer",
        "a loop with two lines changed",
        "## Two rules",
        "`TRITON_INTERPRET=1`",
        "any two properties that a launch has together are together",
        "compares three results: the truth in float64",
        "Two NamedTuples name the rule's own numbers",
        "and three new states",
        "(at most three, of the parameter's shape)",
        "apply the last two",
        "(Chen et al. 2023)",
        "| 34: numbers, coefficients, two functions, and an entry |",
        "`llmfast/optim/__init__.py` | 2 |",
        "| 3 rows and one |",
        "two files of the library (41 and 101 lines) and two lines of export.",
        "46 and 99 lines, and two of export.",
        "a 16-bit parameter",
        "in float32: two files of the library, 20 and 15 lines",
        "6 files of the library, 12 and 18 lines",
        "An AMD GPU is assumed to have 64 threads per warp",
        "Tried with sm_120, two lines",
        "train.steps=3",
        "3 files, 17 lines, and three training steps",
        "in about ten minutes without a GPU",
        "at most 72 characters long",
        "SETUPTOOLS_SCM_PRETEND_VERSION=0.2.0",
    ],
    "kernels/README.md": [
        "64-bit offsets",
        "can pass 2^31: `tl.program_id(0)",
        "16-byte accesses into 2-byte ones",
        "separate binaries for sizes that are 1, that are multiples of 16",
        "Triton before 3.7 has two limits",
        "since Triton turns its default off from 3.10 on",
        "in which any two properties of a launch meet",
    ],
    "examples/README.md": [
        "with the two original lines as comments",
        "imports and two lines",
        "torchrun --standalone --nproc-per-node 2 examples/",
        "max_grad_norm=1.0",
        "log-probabilities of its 16 likeliest bytes",
        "among the first five",
        "torchtitan 0.3.0",
        "about six minutes on two cores",
        "with three small models",
    ],
    "SECURITY.md": ["`torch.distributed.checkpoint` (2.13)"],
}
OUTSIDE = ("docs/measured.md", "README.md", "CONTRIBUTING.md", "kernels/README.md", "examples/README.md", "SECURITY.md")
PAGES = sorted(
    {str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md") if path.parent.name != "reference"}
    - {"docs/chapter.md"}  # which examples/chapter writes
    | {*OUTSIDE}
)


@pytest.mark.parametrize("page", PAGES)
def test_every_number_of_a_page_is_known(page: str) -> None:
    """Look for numbers in words that no sentence above has, and for figures where tests/test_figures.py does not."""
    text = prose(page)
    if page == "docs/measured.md":  # whose rows and modelled times tests/test_readme.py makes again
        text = re.sub(r"\|[^|]+\|[^|]+\|[^|]*\| `make [\w-]+` \||The model says .*? at C = 8 and 16\.", "", text)
    known = {at for m in re.finditer(r"(?:^|(?<=[ |])|(?<=\*\* ))\d\. ", text) for at in range(*m.span())}
    for sentence in [*STATED.get(page, []), *(said for place, said in made() if place == page)]:
        places = [m.span() for m in re.finditer(re.escape(sentence), text)]
        assert places, f"{page} does not say: {sentence}"
        known.update(at for place in places for at in range(*place))
    pattern = rf"(?i:\b(?:{NUMBER})\b)" + (r"|(?<![\w.,-])\d" if page in OUTSIDE else "")
    left = [text[max(0, m.start() - 40) : m.end() + 40] for m in re.finditer(pattern, text) if m.start() not in known]
    assert left == [], f"{page}: a number that nothing is compared with"
