"""Tests that the figures on the documentation's pages are those of the results and of the code."""

import inspect
import math
import re
import sys
from collections.abc import Iterator
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.mtp_runs import WAYS
from benchmarks.report import SHOWN, bytes_per_parameter, gib, unique
from evidence.roofline import H100
from llmfast import _gpus
from llmfast.checkup import command, numerics, record, speed, tuning
from llmfast.checkup.shapes import MODELS, SMALL
from llmfast.clean.command import EMPTY
from llmfast.data import cache, reader, split, tokenizer
from llmfast.losses import LinearCrossEntropyPlan, linear_cross_entropy, plan
from llmfast.losses.plan import row_width
from llmfast.models import cost
from llmfast.models.memory import fits
from llmfast.optim import FusedAdam, FusedAdamW
from llmfast.plan import advice, screen
from llmfast.train import estimate, metrics
from llmfast_kernels.cross_entropy import tile
from llmfast_kernels.sizes import PER_SCALE
from support.code_blocks import ROOT
from support.results import Row, one, results, row_kernel

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MEASURED = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")
ROWS = results("results.json")
GIB, MIB = 1 << 30, 1 << 20


def words_of(page: str) -> str:
    return " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())


def linear(way: str, *, small: bool = False) -> Row:
    """Return a way's linear loss at the size of the pictures, or at that of the errors."""
    size = {"N": 1024, "D": 256, "V": 16384} if small else SHOWN
    section = "compared" if small else "real sizes"
    return one(ROWS, section=section, operation="linear_cross_entropy", way=way, size=size, dtype="bfloat16")


def held(way: str) -> float:
    """Return the bytes that a way holds beyond inputs and gradients."""
    N, D, V = SHOWN.values()
    return float(linear(way)["peak_bytes"] - 2 * (N * D + V * D))


def error(way: str, of: str) -> str:
    return f"{linear(way, small=True)['errors'][of]:.1e}".replace("e-0", "e-")


def counted(operation: str, way: str, dtype: str = "float32") -> Row:
    """Return a way's step on GPT-2's parameters."""
    return one(ROWS, section="optimizers", operation=operation, way=way, size={"parameters": "124M"}, dtype=dtype)


def step_bytes(operation: str, way: str, dtype: str = "float32") -> str:
    return f"{bytes_per_parameter(counted(operation, way, dtype)):.1f}".removesuffix(".0").removesuffix(".1")


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def oldest(package: str) -> str:
    """Return the oldest version of a package that the project takes."""
    (version,) = (found[1] for text in project()["dependencies"] if (found := re.match(rf"{package}>=([\d.]+)", text)))
    return version


SHAPE = ", ".join(f"{axis} = {size:,}" for axis, size in SHOWN.items())
ROOFLINE = (
    f"sum over launches of ({_gpus.LAUNCH * 1e6:g} µs + max(",
    f"bytes / ({_gpus.BANDWIDTH_SHARE:g} · bandwidth), ",
    f"FLOPs / ({_gpus.TENSOR_CORE_SHARE:g} · tensor cores)",
)

# Each yields sentences, or parts of them, that a page must have.


def multi_token() -> Iterator[str]:
    settings = {way: dict(each.removeprefix("model.").split("=") for each in given) for way, given in WAYS.items()}
    names = {way: f"{given['mtp']}, `mtp_heads={given['mtp_heads']}`" for way, given in settings.items() if given}
    rows = results("mtp.json")
    for row in rows:
        accepted = ", ".join(f"{100 * share:.0f} %" for share in row.get("acceptance", []))
        cells = f"{mean(row['validation']):.3f} | {row['tokens_per_s']:,.0f} | {accepted}".rstrip()
        yield f"| {names.get(row['way'], row['way'])} | {cells} |"
    (tokens,) = {row["tokens"] for row in rows}
    yield f"trained on {tokens / 1e6:.2f} M tokens with one seed"


def the_optimizer() -> Iterator[str]:
    launches = {way: counted("adamw", way)["calls"] for way in ("llmfast", "torch foreach", "torch fused")}
    yield f"| AdamW, float32 | {launches['llmfast']} | {step_bytes('adamw', 'llmfast')} |"
    clipped = step_bytes("adamw, clipped", "llmfast")
    yield f"| the same, clipped to a norm | {counted('adamw, clipped', 'llmfast')['calls']} | {clipped} |"
    (same,) = {step_bytes(rule, "llmfast") for rule in ("rmsprop", "adagrad", "sgd, momentum")}
    yield f"| RMSprop, Adagrad, Lion, SGD with momentum, float32 | {launches['llmfast']} | {same} |"
    foreach = step_bytes("adamw", "torch foreach")
    yield f"| torch's `foreach` AdamW, on GPT-2's tensors | {launches['torch foreach']} | {foreach} |"
    fused = step_bytes("adamw", "torch fused")
    yield f"| torch's fused AdamW, on GPT-2's tensors | {launches['torch fused']} calls | {fused} |"
    yield f"({clipped} bytes instead of {step_bytes('adamw, clipped', 'torch fused')})"
    yield f"torch has not fused ({same} instead of {step_bytes('rmsprop', 'torch foreach')})"
    more = "adamw, bfloat16 with more bits"
    for mode, kept in {
        "fp32 master": '`"fp32"` | a float32 copy; float32 moments',
        "split16, fp32 states": '`"split16"`, float32 moments | 16 bits that extend the parameter to a float32',
        "split16": '`"split16"` | the same 16 bits; bfloat16 moments',
        "kahan": '`"kahan"` | the rounding error',
        "split8": '`"split8"` | 8 bits that extend the parameter',
        "stochastic": '`"stochastic"` | nothing; the parameter is rounded up or down at random',
    }.items():
        yield f"| {kept} | {math.floor(bytes_per_parameter(counted(more, f'llmfast, {mode}', 'bfloat16')))} |"
    # tests/optim/test_traffic.py compares that page with counts.
    (coded,) = re.findall(r"with bfloat16 moments, ([\d.]+) with 8-bit moments \|", MEASURED)
    yield f'| `"stochastic"`, 8-bit moments | nothing | {coded} |'
    yield f"one float32 scale per {PER_SCALE} elements"
    yield f"GPT-2's {counted('adamw', 'llmfast')['size']['parameters'].removesuffix('M')} M parameters"


def bytes_moved() -> Iterator[str]:
    yield f"N = {SHOWN['N']:,} tokens, D = {SHOWN['D']:,}, V = {SHOWN['V']:,}"
    yield f"{held('torch') / GIB:.1f} GiB beyond inputs and gradients, compared with"
    yield f"compared with llmfast's {held('llmfast') / GIB:.1f} GiB."
    four = {4: "four"}[len(list(LinearCrossEntropyPlan.make(**SHOWN)))]
    yield f"for each of its {four} chunks it reads the weight twice"
    again, others = (
        linear(way)["dot_flops"] / (2 * math.prod(SHOWN.values())) for way in ("cut-cross-entropy", "torch")
    )
    yield f"computes the logits twice: {again:.0f} matrix products where the others need {others:.0f}"
    rows = {
        way: one(ROWS, section="compared", operation="cross_entropy", way=way)
        for way in ("llmfast", "llmfast in place", "torch", "Liger")
    }
    moved = {way: f"{row['dram'] / (row['size']['N'] * row['size']['V']):.0f}" for way, row in rows.items()}
    waits = {4: "four"}[rows["Liger"]["syncs"]]
    yield f"moves {moved['llmfast']} bytes per logit, or {moved['llmfast in place']} in place."
    yield f"torch moves {moved['torch']}. Liger moves {moved['Liger']}, also in place, with"
    yield f"also in place, with {waits} host synchronisations."
    yield from ROOFLINE


def chunk_plan() -> Iterator[str]:
    _, D, V = SHOWN.values()
    # 12 bytes per element of the weight for each chunk, against 6 FLOPs per element and row.
    traffic, products = 12 / (0.9 * H100.bandwidth), 6 / H100.product_rate(torch.bfloat16)
    ratio = traffic / products
    yield f"this traffic takes {ratio:.0f} / n of the time"
    yield f"a {dict(zip(range(8, 11), ('eighth', 'ninth', 'tenth')))[round(4096 / ratio)]} at 4,096 rows"
    yield f"{4 * V * D / GIB:.0f} GiB in this example, ten times the slab"
    # 2 bytes per element of the hidden states for each slab, against 2 FLOPs per element and column.
    columns = H100.product_rate(torch.bfloat16) / (0.9 * H100.bandwidth)
    yield f"as long as the product itself at about {round(columns, -1):.0f} columns"
    few, more = (LinearCrossEntropyPlan.make(**SHOWN, memory_budget=most * MIB).seconds for most in (16, 200))
    assert few < 1.05 * more
    N, *others = (f"{axis} = {size:,}" for axis, size in SHOWN.items())
    yield f"{N} tokens, {', '.join(others)}, bfloat16"
    for mode, budget in {"chunk": 3 << 30, "two-stage": 200 << 20}.items():
        made = LinearCrossEntropyPlan.make(**SHOWN, memory_budget=budget)
        assert made.mode == mode and 3 <= made.products < 4


def rows_of_logits() -> Iterator[str]:
    code = row_kernel(ROWS)
    _, first, second = (loop["instructions"] / 16 for loop in code["loops"])
    yield f"the kernel uses {code['registers']} registers, no spills, 16 bytes per access in the loops"
    assert code["spill_bytes"] == 0
    yield f"{first + 1e-9:.1f} instructions per logit in the first pass and {second + 1e-9:.1f} in the second"
    yield f"{row_width(50257, torch.bfloat16, kernels=True, filtered=False):,} columns for 50,257"
    yield f"Long rows use {tile(50257)['THREADS']:,} threads each"


def beside_others(operation: str, error: str) -> Iterator[str]:
    """Yield the rows of a table of all libraries: GiB held beyond inputs and gradients, modelled ms, and an error."""
    N, chosen = 8192, {"operation": operation, "dtype": "bfloat16"}
    yield f"{N:,} tokens, bfloat16): GiB held"
    for way in unique(row["way"] for row in ROWS if row.get("operation") == operation):
        cells = []
        for D, V in (MODELS[name] for name in ("Llama-3", "Gemma-2", "Qwen-3")):
            row = one(ROWS, section="real sizes", way=way, size={"N": N, "D": D, "V": V}, **chosen)
            held = row["peak_bytes"] - 2 * (N * D + V * D)
            cells.append(f"{gib(held)} GiB, {row['seconds'][H100.name] * 1e3:.0f} ms")
        wrong = one(ROWS, section="compared", way=way, size=SMALL, **chosen)["errors"][error]
        yield f"| {way} | {' | '.join(cells)} | {wrong:.1e} |".replace("e-0", "e-")


def losses() -> Iterator[str]:
    yield from beside_others("linear_logprobs", "loss")
    yield from beside_others("linear_distillation", "weight")
    compared = {"section": "compared", "operation": "linear_logprobs", "size": SMALL}
    cut, ours = (one(ROWS, way=way, **compared)["errors"]["hidden"] for way in ("cut-cross-entropy", "llmfast"))
    assert round(cut / ours) == 10, "ten times that of the others"
    cpu, elsewhere = plan.DEFAULT_SLAB_ON_CPU, plan.DEFAULT_SLAB_ELSEWHERE
    yield f"is {cpu // MIB} MiB on a CPU. On a GPU it is {elsewhere // GIB} GiB, or the weight's gradient in float32"
    low, wide = (
        LinearCrossEntropyPlan.make(64, 64, 4096, slab_dtype=dtype).call.logit_bytes for dtype in (None, torch.float32)
    )
    yield f"It takes {wide} bytes per logit of the slab instead of {low}."


def data() -> Iterator[str]:
    share = {0.2: "fifth"}[split.LEAST_SHARE]
    yield f"at least {split.LEAST_CHARACTERS:,} characters or a {share} of the text, whichever is smaller"
    yield f"runs of digits, punctuation or spaces, at {tokenizer.LONGEST_WORD} characters"
    yield {1_000_000: "take long with more than a million characters"}[cache.LEAST_CHARACTERS]
    yield f"Above {cache.MOST_BYTES // GIB} GiB, the least recently used are removed."
    (formats,) = {extras()[package] for package in reader._NEEDED.values()}
    assert reader._NEEDED.keys() == {".parquet", ".zst"}
    yield f"`.parquet` and `.zst` need the extra `{formats}`."
    yield f"The command needs the extra `{extras()['datatrove']}`"
    yield f"if nothing was kept, the exit code is {EMPTY}."


def extras() -> dict[str, str]:
    """Return the extra that installs each package, by the package's name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [
        (re.split(r"[\[<>=;]", package)[0], extra)
        for extra, packages in project["optional-dependencies"].items()
        for package in packages
    ]
    return dict(reversed(listed))  # the first that lists it


def planning() -> Iterator[str]:
    yield f"The decoder's width is about {advice.ASPECT} times its layers."
    yield f"HSDP within machines of {estimate.NODE} and FSDP2"
    low, high = screen.USUAL
    yield f"within {screen.SLACK} of the best by the law"
    yield f"From 10^{math.log10(advice.READ_WHOLE):g} tokens on"
    yield f"the processes of a machine of {estimate.NODE} GPUs need {4 * estimate.NODE} bytes per parameter together"
    yield f"the time of a step at utilisations of {low} and {high}"
    most = max(share for share in range(100) if fits(share, 100))
    yield f"the first that fits {most} % of the memory"
    assert cost.AGAIN == 4 / 3
    yield "With activations computed again it is 4 / 3 of that"
    yield f"The default utilisation of {cost.UTILISATION} is a guess"


def limits() -> Iterator[str]:
    worse = (
        linear("cut-cross-entropy", small=True)["errors"]["hidden"] / linear("llmfast", small=True)["errors"]["hidden"]
    )
    yield f"Its gradient of `hidden` has {worse:.0f} times the error."
    near = LinearCrossEntropyPlan.make(**SHOWN, memory_budget=11 * MIB)
    assert near.held_bytes == pytest.approx(10 * MIB, rel=0.1)
    assert near.seconds < 1.1 * linear("cut-cross-entropy")["seconds"][H100.name]
    yield "10 MiB beyond the gradients to come within a tenth of the modelled time"
    yield f"cut-cross-entropy, which holds {held('cut-cross-entropy') / MIB:.0f} MiB"

    yield f"at {SHAPE} llmfast needs some 10 MiB"
    yield from ROOFLINE
    yield f"with a utilisation of {cost.UTILISATION}, which is a guess"
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    newest, earlier = (re.findall(rf"transformers{sign}(\d+\.\d+)", constraints)[0] for sign in ("==", " "))
    yield f"`fuse_loss` and `add_mtp` are tested with transformers {earlier} and {newest}."
    torch_, triton = (re.findall(rf"{name}==([\d.]+)", constraints)[0] for name in ("torch", "triton"))
    python = re.findall(r"on Python ([\d.]+\d)", constraints)[0]
    yield f"The tests run on Python {python} with torch {torch_} and Triton {triton};"


def migration() -> Iterator[str]:
    yield f"beyond the gradients at {SHAPE}"
    yield f"and three at {held('llmfast') / GIB:.1f} GiB, its default"
    compared = {
        re.split("==", text)[0]: text.rpartition("==")[2]
        for text in project()["optional-dependencies"]["bench"]
        if "==" in text
    }
    yield f"| Liger {compared['liger-kernel']} | llmfast |"
    yield f"| cut-cross-entropy {compared['cut-cross-entropy']} | llmfast |"
    adamw, adam = (inspect.signature(kind).parameters["weight_decay"].default for kind in (FusedAdamW, FusedAdam))
    yield f"llmfast uses torch's defaults: {adamw} for `FusedAdamW`, {adam} for `FusedAdam`."
    yield f"bfloat16, with an error of {error('torch', 'loss')}; llmfast's error is {error('llmfast', 'loss')}."
    yield f"in bfloat16 its error is {error('torch linear_cross_entropy', 'loss')}."
    ours = error("llmfast", "weight")
    yield f"with an error of {error('torch linear_cross_entropy', 'weight')}; llmfast's error is {ours}."
    yield f"In bfloat16 its error is {error('Liger', 'weight')}, compared with {ours} for float32 sums."
    worse, better = (error(way, "hidden") for way in ("cut-cross-entropy", "llmfast"))
    yield f"hidden's gradient is {worse}, compared with llmfast's {better}."
    liger = one(ROWS, section="compared", operation="cross_entropy", way="Liger")["errors"]["loss"]
    yield f"bfloat16 logits is bfloat16 (error {liger:.1e}".replace("e-0", "e-")
    yield f"By default llmfast holds {held('llmfast') / GIB:.1f} GiB beyond the gradients"
    yield f"Liger holds {gib(held('Liger'))} GiB, or {held('Liger, float32 sums') / GIB:.1f} GiB with float32 sums."
    few, more = linear("llmfast, 16 MiB"), linear("llmfast, 200 MiB")
    products = few["dot_flops"] / (2 * math.prod(SHOWN.values()))
    yield f"`memory_budget=16 << 20` holds {held('llmfast, 16 MiB') / MIB:.0f} MiB, at the same error"
    yield f"with {products:.0f} matrix products instead of 3; 200 MiB are hardly faster"
    assert 1 < few["seconds"][H100.name] / more["seconds"][H100.name] < 1.05
    yield f"fourth powers with groups of {PER_SCALE}, rounded stochastically"


def trainer() -> Iterator[str]:
    yield f"Up to {metrics.FEW} evaluations are drawn as dots"
    yield f"Both need the extra `{extras()['pydantic']}`."
    yield f"transformers loads the model (extra `{extras()['transformers']}`)"


def gpu() -> Iterator[str]:
    yield f'`"llmfast-checkup"` and {record.VERSION}'
    yield f"torch {oldest('torch')}, Triton {oldest('triton')}, NumPy and einops"
    yield f"repeated up to {numerics.FULL.repeats} times with equal bits"
    most = max(case.gpu_bytes for case in speed.cases(torch.device("cpu"), "full")) >> 30
    yield f"No case takes more than {most} GiB of GPU memory"
    yield f"if no other is at least {100 * tuning.WORTH:.0f} % faster"
    yield f"It takes {({8: 'eight'})[command.MINUTES]} minutes"


def start() -> Iterator[str]:
    yield f"with Python {project()['requires-python'].removeprefix('>=')} or newer"


def optimizers() -> Iterator[str]:
    adam, lion = step_bytes("adamw", "llmfast"), step_bytes("sgd, momentum", "llmfast")  # Lion has one state too
    yield f"a step moves {lion} instead of {adam} bytes per parameter in float32"


PAGES = {
    "mtp.md": multi_token,
    "how-it-works/optimizer.md": the_optimizer,
    "how-it-works/bytes.md": bytes_moved,
    "how-it-works/chunk-plan.md": chunk_plan,
    "how-it-works/row-kernel.md": rows_of_logits,
    "losses.md": losses,
    "data.md": data,
    "planning.md": planning,
    "limits.md": limits,
    "migration.md": migration,
    "trainer.md": trainer,
    "gpu.md": gpu,
    "index.md": start,
    "optimizers.md": optimizers,
}


# Figures that papers, other libraries or plain arithmetic give: a change on a page is made here as well.
STATED = {
    "data.md": ["without this limit 2 MB of DNA", "Bavarian et al. 2022, arXiv:2207.14255"],
    "distributed.md": ["sharded on dimension 0", "it needs torch 2.13: in earlier versions"],
    "gpu.md": ["The exit code is 1 if anything is wrong", "TRITON_DEBUG=1"],
    "how-it-works/chunk-plan.md": [
        "and the upstream gradient is 1.",
        "12 bytes per weight element, whatever n is",
        "The float32 sum takes 4·V·D bytes",
        "costs 4·D bytes of memory",
        "its 2·V·D bytes are free for the slab of rows: 1 GiB in this example",
        "Hence 16 MiB are enough for four products",
        "a call takes 4 \N{MINUS SIGN} r products.",
        "so a call holds max(slab of columns, r · 4·V·D) + about 12·N bytes.",
        "at 2·N bytes per column in bfloat16. That is less than 4·D if N < 2·D",
        "| materialise | makes all logits, which are kept | turns them into gradients | 3 |",
        "| chunk | makes all gradients | none | 3 |",
        "and sums or keeps some columns | makes the others again | 3 to 4 |",
        "| makes all gradients | 4 to 5 |",
        "finishes whole chunks of rows (5 \N{MINUS SIGN} r products)",
        "over slabs of columns (4 products, 4·N·D bytes)",
        "at N = 4,096, D = 128, V = 4,096, simulated: | chunks | 1 | 2 | 4 | 8 | 16 | 32 | 64 |",
        "| rounded to nearest | 1.7e-3 | 2.1e-3 | 2.7e-3 | 3.5e-3 | 4.9e-3 | 7.2e-3 | 1.1e-2 |",
        "| rounded stochastically | 2.4e-3 | 2.9e-3 | 3.7e-3 | 5.0e-3 | 6.8e-3 | 9.2e-3 | 1.2e-2 |",
        "| product rounded, then the sum | 1.7e-3 | 2.4e-3 | 3.1e-3 | 3.9e-3 | 5.2e-3 | 7.5e-3 | 1.2e-2 |",
        "from eight chunks on (3.4e-3 for 8, 4.3e-3 for 64)",
        "a `grad_dtype` of float32 (torch 2.10)",
    ],
    "how-it-works/optimizer.md": ["this adds 4 bytes in float32 and 2 in 16 bits"],
    "how-it-works/row-kernel.md": [
        "only if it can prove that all 16 bytes are valid",
        "a multiple of 8 elements turns them into 2-byte loads",
        "if not padded, are read 2 or 4 bytes at a time",
        "for an H100 in bfloat16 at V = 50,257",
    ],
    "index.md": ["trains a 4 M parameter model", "`OMP_NUM_THREADS=1 make train` can be several times as fast"],
    "integrations.md": ["in less than half of its memory at a vocabulary of 128k"],
    "limits.md": [
        "(6 · matrix parameters · tokens + 12 · layers · row · width · tokens) /",
        "it takes 0.78 to 0.97 times as long",
        "with Triton before 3.6 they cannot",
        "with torch 2.8.0 and Triton 3.4.0, and with torch 2.14.1 and Triton 3.8.0",
    ],
    "losses.md": [
        "is float32 (torch 2.10)",
        "round them by up to 2^-9 of a logit",
        "N = 1,024, D = 256, V = 16,384",
        "| bfloat16 logits | 1.6e-4 | 1.7e-3 | 1.6e-3 |",
        "| `slab_dtype=torch.float32` | 3.8e-8 | 1.7e-3 | 1.6e-3 |",
        "products in float32 | 3.8e-8 | 3.0e-7 | 2.5e-7 |",
        "has a log-probability of 0 and no gradient",
        "its sum is divided by 0",
        "the most probable class has rank 0",
        "beta KL(p, m) + (1 - beta) KL(q, m), where m = beta p + (1 - beta) q",
        '0 stands for `"forward_kl"` and 1 for `"reverse_kl"`',
        "not multiplied by temperature^2; `soft_weight=temperature**2` does that",
        "gives them probability 0",
        # tests/losses/test_distillation.py counts the table again.
        "for 8,192 tokens in bfloat16, 128,256 classes, a student of width 2,048 and a teacher of width 4,096",
        "| `F.kl_div` of `log_softmax` in float32, forward KL | 19.05 | 5.00 |",
        "| the same with a mixture, JSD | 46.45 | 5.00 |",
        "| `linear_distillation`, either | 0.98 | 5.00 |",
        "| `memory_budget=16 << 20`, either | 0.02 | 8.00 |",
        "| the teacher learns: `F.kl_div`, forward KL | 21.92 | 9.00 |",
        "| the teacher learns: `linear_distillation`, either | 1.96 | 12.00 |",
        "| the teacher learns: `memory_budget=16 << 20`, either | 0.02 | 18.00 |",
        "TRITON_DEBUG=1",
    ],
    "migration.md": [
        "at N = 1,024, D = 256, V = 16,384, bfloat16",
        "torch 2.13's loss",
        "With `accumulate_dtype=torch.bfloat16`, it takes 3 and sums",
        "| `shift=True` | `shift=1` |",
        "`grad_filter=2.4e-4`; by default nothing is skipped",
        "from about 10 MiB on (`memory_budget=16 << 20`)",
        "Apex's default `weight_decay` is 0.",
        "blocks of 256 elements",
        "chunks of 4,096 rows",
    ],
    "mtp.md": ["Gloeckle et al. 2024, arXiv:2404.19737", "DeepSeek-V3, arXiv:2412.19437"],
    "optimizers.md": [
        "Chen et al. 2023, [arXiv:2302.06675]",
        'and 10.1 in bfloat16 with `master_weights="split8"` and `state_dtype="8bit"`',
        "a learning rate 3 to 10 times smaller than AdamW's",
        "Goyal et al. 2017",
        "Malladi et al. 2022",
    ],
    "planning.md": [
        "DeepSeek LLM's laws (arXiv:2401.02954)",
        "a refit of Hoffmann's runs (arXiv:2404.10102)",
        "bfloat16 parameters whose other 16 bits the optimizer keeps",
        "(about 1 GiB together)",
        "Each GPU also holds 5 times the largest block",
        "(6 · matrix parameters · tokens + 12 · layers · row · width · tokens)",
    ],
    "trainer.md": [
        "the command exits with 130",
        "usually takes 1e-5 to 1e-4 with AdamW",
        "less than the 30 seconds that torchrun waits",
    ],
}
# What looks like a figure and is a name, an example or the number of a heading.
NAMES = re.compile(
    r"""(?:8|16)-(?:bit|byte)|16- and|"8bit"|`[^`]*(?:weights\.|->|:0\.|--gpus |--minutes |_steps=)[^`]*`|## \d\."""
)


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT / "docs")) for p in sorted((ROOT / "docs").rglob("*.md"))])
def test_every_figure_of_a_page_is_known(page: str) -> None:
    """Look for figures outside code that no sentence above has.

    examples/chapter writes its page itself, and tests/test_readme.py compares the page of measurements.
    """
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = " ".join(re.sub(r"\]\([^)]*\)", "]", text).split())
    known: set[int] = set()
    for sentence in [*STATED.get(page, []), *(PAGES[page]() if page in PAGES else [])]:
        places = [m.span() for m in re.finditer(re.escape(" ".join(sentence.split())), text)]
        assert places or sentence not in STATED.get(page, []), f"docs/{page} does not say: {sentence}"
        known.update(at for place in places for at in range(*place))
    known.update(at for m in NAMES.finditer(text) for at in range(*m.span()))
    if page not in ("chapter.md", "measured.md") and not page.startswith("reference/"):
        figures = [m.start() for m in re.finditer(r"(?<![\w.,-])\d", text) if m.start() not in known]
        left = [text[max(0, at - 40) : at + 40] for at in figures]
        assert left == [], f"docs/{page}: a figure that nothing is compared with"


@pytest.mark.parametrize("page", PAGES)
def test_figures_of_a_page(page: str) -> None:
    text, found = words_of(page), list(PAGES[page]())
    assert found
    for sentence in found:
        assert " ".join(sentence.split()) in text, f"docs/{page} does not say: {sentence}"


def test_what_pages_say_of_bytes_is_so_of_the_results() -> None:
    """Compare what each way moves and holds, and what that costs, at the size of the pictures."""
    found = {row["way"]: row for row in ROWS if row.get("section") == "real sizes" and row["size"] == SHOWN}
    found = {way: row for way, row in found.items() if row["operation"] == "linear_cross_entropy"}
    moved, cut = {way: row["dram"] for way, row in found.items()}, "cut-cross-entropy"
    assert min(found, key=held) == min(moved, key=lambda way: moved[way]) == cut
    assert held(cut) < 16 * SHOWN["N"] * 8, "some numbers per row, and no logits"
    assert found[cut]["moved"] > 100 * moved[cut], "what caches would have to serve"
    large = min((way for way in moved if way != cut), key=lambda way: moved[way])
    assert large == "Liger, C = 16"
    errors = {way: linear(way, small=True)["errors"] for way in found}
    assert errors[large]["weight"] > 1.3 * errors["Liger, float32 sums"]["weight"]
    assert errors[cut]["hidden"] > 10 * errors["llmfast"]["hidden"], "its filter"


def test_which_log_probabilities_are_fastest() -> None:
    found = [row for row in ROWS if row.get("section") == "real sizes" and row["operation"] == "linear_logprobs"]
    for size in unique(str(row["size"]) for row in found):
        at = {row["way"]: row for row in found if str(row["size"]) == size}
        assert min(at, key=lambda way: at[way]["seconds"][H100.name]) == "TRL"
        products = {way: row["dot_flops"] / (2 * math.prod(row["size"].values())) for way, row in at.items()}
        assert products["TRL"] == 3 and products["llmfast"] > 3.5


def test_what_further_tokens_cost_the_next_one() -> None:
    found = {row["way"]: mean(row["validation"]) for row in results("mtp.json")}
    alone = found.pop("next token only")
    depth = found.pop("sequential depths, D = 1")
    assert 0 < depth - alone < 0.01 and len(found) == 3
    assert all(loss > alone + 0.05 for loss in found.values())


def test_nothing_in_the_table_is_better_than_rounding_to_nearest() -> None:
    table = {
        text.split(" | ")[0]: text for text in STATED["how-it-works/chunk-plan.md"] if "e-" in text and "|" in text
    }
    nearest, *others = ([float(cell) for cell in text.strip("| ").split(" | ")[1:]] for text in table.values())
    assert next(iter(table)) == "| rounded to nearest" and len(others) == 2 and len(nearest) == 7
    assert all(a <= b for other in others for a, b in zip(nearest, other, strict=True))


def test_errors_of_float32_logits() -> None:
    """Compute the table again; a CPU rounds products with float32 sums once more, which the weight's gradient shows."""
    torch.manual_seed(0)
    N, D, V = 1024, 256, 16384
    hidden, weight = torch.randn(N, D).bfloat16(), (torch.randn(V, D) * D**-0.5).bfloat16()
    targets = torch.randint(0, V, (N,))

    def computed(dtype: torch.dtype, **options: Any) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        if dtype == torch.float64:
            losses = F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="none")
            return [losses.detach(), *torch.autograd.grad(losses.mean(), leaves)]
        losses = linear_cross_entropy(*leaves, targets, reduction="none", **options).detach()
        return [losses, *torch.autograd.grad(linear_cross_entropy(*leaves, targets, **options), leaves)]

    truth = computed(torch.float64)
    text = words_of("losses.md")
    assert f"relative error, N = {N:,}, D = {D}, V = {V:,} | loss per token | d_hidden | d_weight |" in text
    # With each way, the number of errors that do not depend on the order in which a CPU's products sum.
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "bfloat16 logits": (3, {"dtype": torch.bfloat16}),
        "`slab_dtype=torch.float32`": (2, {"dtype": torch.bfloat16, "slab_dtype": torch.float32}),
        "hidden, weight (both of bfloat16 values) and products in float32": (1, {"dtype": torch.float32}),
    }
    for way, (exact, options) in ways.items():
        found = [float((a.double() - b).norm() / b.norm()) for a, b in zip(computed(**options), truth)]
        published = [float(cell) for cell in text.partition(f"| {way} |")[2].split("|")[:3]]
        assert published[:exact] == pytest.approx(found[:exact], rel=0.1), way
        assert published[exact:] == pytest.approx(found[exact:], rel=0.5), way
