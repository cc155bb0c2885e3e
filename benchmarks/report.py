"""What a run of the benchmarks found, as one page: `results.json`, `README.md` and pictures, all generated.

python -m benchmarks.report benchmarks/results     # draws a folder's page again from its results.json
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from evidence.roofline import FORMULA, GPUS, H100
from llmfast.checkup.shapes import MODELS, PARAMETERS

Row = dict[str, Any]

_HERE = Path(__file__).resolve().parent
# Where the pictures and the widest tables look: one large batch of a model whose vocabulary matters.
SHOWN = {"N": 16384, "D": 4096, "V": 128256}


def default_folder() -> Path:
    """`results/`, or a folder in it that is named after the GPU."""
    if not torch.cuda.is_available():
        return _HERE / "results"
    return _HERE / "results" / re.sub(r"\W+", "-", torch.cuda.get_device_name(0)).strip("-").lower()


def write(folder: Path, rows: list[Row]) -> None:
    """Write `results.json` and all that is made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    # A line a row, so that two versions can be compared.
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "results.json").write_text(f'{{"about": {json.dumps(about())},\n"rows": [\n{lines}\n]}}\n')
    draw(folder)


def draw(folder: Path) -> None:
    """Make the page and the pictures from `results.json`."""
    results = json.loads((folder / "results.json").read_text())
    rows: list[Row] = results["rows"]
    parts = [head(results["about"])]
    for section in (compared, real_sizes, heads, learned, optimizers, clock, kernels, machine_code):
        if text := section(rows, folder):
            parts.append(text)
    parts.append(how_it_was_made(rows))
    (folder / "README.md").write_text("\n\n".join(parts) + "\n")


def about() -> dict[str, Any]:
    """The machine, the versions and the date."""
    from llmfast.checkup.ways import versions

    def git(*command: str) -> str:
        done = subprocess.run(["git", *command], cwd=_HERE, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "--short", "HEAD") + changed,
        "cpu": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "versions": {"Python": platform.python_version(), **versions()},
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, cells))} |" for cells in body)])


def chosen(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


# Sections of the page.


def head(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    speed = (
        "No GPU was there: times on GPUs below are *modelled*, from counts."
        if about["gpu"] == "none"
        else f"On {about['gpu']}. Where it says *modelled*, times come from counts, not from a clock."
    )
    return (
        f"# Results\n\nMade by `make bench` on {about['date']} at commit {about['commit']}; edit nothing here.\n"
        f"{about['cpu']}. {speed}\n\n{versions}."
    )


def compared(rows: list[Row], folder: Path) -> str:
    parts = []
    for operation, title in (
        ("linear_cross_entropy", "The linear loss on the same inputs"),
        ("cross_entropy", "The loss of given logits on the same inputs"),
        ("mtp_cross_entropy", "Four heads' losses on the same inputs"),
    ):
        mine = chosen(rows, section="compared", operation=operation)
        if not mine:
            continue
        size = mine[0]["size"]
        logits = size.get("K", 1) * size["N"] * size["V"]
        linear = operation != "cross_entropy"
        errors = ("loss", "hidden", "weight") if linear else ("loss", "logits")
        columns = ["", "bytes a logit", "asked for", "peak, MiB", "host waits", *(f"error, {e}" for e in errors)]
        if linear:
            columns.insert(3, "products")
        body = []
        for row in mine:
            products = [f"{row['dot_flops'] / (2 * logits * size['D']):.2f}"] if linear else []
            cells = [f"{row['dram'] / logits:.2f}", f"{row['moved'] / logits:.2f}", *products]
            cells += [f"{row['peak_bytes'] / 2**20:.1f}", row["syncs"], *(f"{row['errors'][e]:.1e}" for e in errors)]
            body.append([row["way"], *cells])
        shape = ", ".join(f"{axis} = {size[axis]}" for axis in size)
        what = "forward and backward, bfloat16"
        parts.append(f"## {title}\n\nCounted, {what}, {shape}.\n\n{table(columns, body)}")
    if not parts:
        return ""
    legend = (
        "*Bytes a logit*: different bytes per launch, read and written, over N·V. *Asked for*: with every repetition, "
        "as if no cache helped. *Products*: FLOPs of matrix products over 2·N·D·V; 3 is the least. K heads have K·N "
        "rows. *Peak*: tensors beyond the inputs. "
        "*Host waits*: operators for which the host waits for the GPU. *Errors*: norm of the "
        "difference from float64, over the norm of that."
    )
    return "\n\n".join([*parts, legend])


def heads(rows: list[Row], folder: Path) -> str:
    mine = chosen(rows, section="real sizes", operation="mtp_cross_entropy")
    if not mine:
        return ""
    sizes = unique(tuple(row["size"].items()) for row in mine)
    body = []
    for way in unique(row["way"] for row in mine):
        cells = []
        for size in sizes:
            for row in chosen(mine, way=way, size=dict(size)):
                gib = row["dram"] / 2**30, row["peak_bytes"] / 2**30
                cells += [f"{row['seconds'][H100.name] * 1e3:.0f}", f"{gib[0]:.1f}", f"{gib[1]:.1f}"]
        body.append([way, *cells])
    shapes = [", ".join(f"{axis} = {value}" for axis, value in size) for size in sizes]
    columns = [f"{what}, {shape}" for shape in shapes for what in ("ms", "GiB moved", "GiB held")]
    return (
        f"## Four heads at real sizes\n\nModelled ms on an {H100.name}, counted GiB moved and counted peak of tensors "
        f"beyond the inputs, forward and backward, bfloat16.\n\n{table(['', *columns], body)}"
    )


def real_sizes(rows: list[Row], folder: Path) -> str:
    mine = chosen(rows, section="real sizes", operation="linear_cross_entropy")
    if not mine:
        return ""
    ways = unique(row["way"] for row in mine)
    by_gpu = {row["way"]: row["seconds"] for row in mine if row["size"] == SHOWN}
    by_model = {(row["way"], row["size"]["D"], row["size"]["V"]): row for row in mine if row["size"]["N"] == SHOWN["N"]}

    def cell(way: str, D: int, V: int) -> str:
        row = by_model.get((way, D, V))
        return "" if row is None else f"{row['seconds'][H100.name] * 1e3:.1f} ms, {row['peak_bytes'] / 2**30:.1f} GiB"

    first = table(["", *MODELS], [[way, *(cell(way, D, V) for D, V in MODELS.values())] for way in ways])
    second = table(
        ["", *(gpu.name for gpu in GPUS)],
        [[way, *(f"{by_gpu[way][gpu.name] * 1e3:.1f} ms" for gpu in GPUS)] for way in ways if way in by_gpu],
    )
    picture("time.svg", folder, lambda figure: draw_time(figure, mine, ways), (11, 4.2))
    picture("bytes.svg", folder, lambda figure: draw_bytes(figure, mine, ways), (11, 4.2))
    picture("memory.svg", folder, lambda figure: draw_memory(figure, mine, ways), (7, 4.2))
    shape = ", ".join(f"{axis} = {SHOWN[axis]}" for axis in SHOWN)
    return (
        f"## The linear loss at real sizes\n\nModelled time on an {H100.name} and counted peak of tensors beyond the "
        f"inputs, forward and backward, bfloat16, N = {SHOWN['N']}.\n\n{first}\n\n"
        f"Modelled, {shape}:\n\n{second}\n\n![modelled time against N and V](time.svg)\n\n"
        "![bytes a logit by what moves them](bytes.svg)\n\n![peak memory against N](memory.svg)"
    )


def learned(rows: list[Row], folder: Path) -> str:
    """Of the runs of `benchmarks.mtp_runs`, that `make bench` does not make again."""
    if not (folder / "mtp.json").exists():
        return ""
    found = json.loads((folder / "mtp.json").read_text())
    body = []
    for row in found["rows"]:
        losses = row["validation"]
        accepted = ", ".join(f"{share:.0%}" for share in row.get("acceptance", [])) or "-"
        body.append(
            [
                row["way"], ", ".join(f"{loss:.3f}" for loss in losses), f"{row['tokens_per_s']:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f}", accepted, f"{row.get('tokens_per_pass', 1.0):.2f}",
            ]
        )  # fmt: skip
    about = found["about"]
    columns = ["", "validation loss", "tokens/s", "peak, MiB", "guesses accepted, by head", "tokens a pass"]
    return (
        f"## Trained side by side\n\nBy `make bench-mtp` on {about['date']} at commit {about['commit']}, on "
        f"{about['cpu']}: `make train`'s model and text, {found['rows'][0]['tokens']:,} tokens each. "
        "*Validation loss*: of the next token alone, in nats, one figure a seed. *Tokens/s*: best of short runs in "
        "turn. *Peak*: of the whole process. *Guesses accepted*: of greedy self-speculative decoding after held-out "
        f"text.\n\n{table(columns, body)}"
    )


def optimizers(rows: list[Row], folder: Path) -> str:
    mine = chosen(rows, section="optimizers", operation="adamw")
    if not mine:
        return ""
    others = [row for row in chosen(rows, section="optimizers") if row["operation"] != "adamw"]
    smallest, *_, largest = PARAMETERS
    body = []
    for way in unique(row["way"] for row in mine):
        cells: list[str] = []
        for dtype in ("float32", "bfloat16"):
            small, large = (chosen(mine, way=way, dtype=dtype, size={"parameters": n}) for n in (smallest, largest))
            cells += [f"{bytes_a_parameter((large or small)[0]):.2f}", f"{small[0]['calls']:,}"] if small else ["", ""]
            cells += [f"{large[0]['seconds'][H100.name] * 1e3:.1f}" if large else ""]
            cells += [f"{large[0]['peak_bytes'] / 2**30:.1f}" if large else ""]
        body.append([way, *cells])
    columns = [f"{dtype}: {what}" for dtype in ("fp32", "bf16") for what in ("bytes", "calls", "ms", "GiB")]
    picture("optimizers.svg", folder, lambda figure: draw_optimizers(figure, mine), (9, 3.6))
    return (
        f"## AdamW\n\nCounted bytes a parameter; calls of kernels and operators in a step of GPT-2 {smallest}; "
        f"modelled ms on an {H100.name}, and tensors made meanwhile, of one of Llama-3 {largest}. Parameters, "
        f"gradients and states have one dtype, unless the name says otherwise.\n\n{table(['', *columns], body)}\n\n"
        "![bytes a parameter](optimizers.svg)\n\n"
        f"Other optimizers, and AdamW otherwise; of GPT-2 {smallest}.\n\n{table(OTHER_COLUMNS, map(other, others))}"
    )


OTHER_COLUMNS = ("", "way", "bytes a parameter", "calls", f"modelled ms, {H100.name}")


def other(row: Row) -> list[object]:
    milliseconds = row["seconds"][H100.name] * 1e3
    return [row["operation"], row["way"], f"{bytes_a_parameter(row):.2f}", f"{row['calls']:,}", f"{milliseconds:.2f}"]


def bytes_a_parameter(row: Row) -> float:
    numel = sum(torch.Size(shape).numel() for shape in PARAMETERS[row["size"]["parameters"]])
    dram: float = row["dram"]
    return dram / numel


def clock(rows: list[Row], folder: Path) -> str:
    mine = chosen(rows, section="clock")
    if not mine:
        return ""
    parts = []
    for operation in unique(row["operation"] for row in mine):
        body = []
        for row in chosen(mine, operation=operation):
            where = ", ".join(filter(None, [row["shape"], row.get("dtype", "").removeprefix("torch.")]))
            if "failure" in row:
                body.append([where, row["way"], row["failure"], "", ""])
                continue
            peak = f"{row['peak_bytes'] / 2**20:,.0f}" if "peak_bytes" in row else ""
            body.append(
                [where, row["way"], duration(row["seconds"]), f"{row['ratio']:.2f} ± {row['spread']:.2f}", peak]
            )
        for row in chosen(rows, section="roof", operation=operation):
            where = f"{row['shape']}, {row['dtype'].removeprefix('torch.')}"
            body.append([where, f"*{row['what']}*", duration(row["seconds"]), "", ""])
        columns = ["", "way", "median", "first / this", "peak, MiB"]
        parts.append(f"### {operation.replace('_', ' ')}\n\n{table(columns, body)}")
    note = (
        "Ways take turns, round by round. *First / this*: median over the rounds of the first way's time over this "
        "one's, and the distance between its quartiles; below 1, the first is faster. *Peak*: tensors beyond inputs."
    )
    return "\n\n".join(["## By the clock", note, *parts])


def kernels(rows: list[Row], folder: Path) -> str:
    mine = chosen(rows, section="kernels")
    body = [
        [r["kernel"], r["shape"], duration(r["seconds"]), f"{r['bandwidth'] / 1e9:,.0f}", f"{r['share']:.0%}"]
        for r in mine
    ]
    columns = ["", "shape", "median", "GB/s", "of a copy's"]
    return f"## Kernels alone\n\n{table(columns, body)}" if mine else ""


def machine_code(rows: list[Row], folder: Path) -> str:
    mine = chosen(rows, section="machine code")
    if not mine:
        return ""
    targets = unique(row["target"] for row in mine)
    body: dict[tuple[str, ...], set[str]] = {}  # launches that look the same share a line
    for launch in unique(row["launch"] for row in mine):
        by_target = {row["target"]: row for row in chosen(mine, launch=launch)}
        shown = by_target["sm_90"]
        loops = "; ".join(
            f"{loop['instructions']} of {'/'.join(map(str, loop['access_bits'])) or 'no'} bits"
            for loop in shown["loops"]
        )
        cells = (
            f"`{shown['kernel']}`",
            " ".join(str(by_target[t]["registers"]) for t in targets),
            " ".join(str(by_target[t]["spill_bytes"]) for t in targets),
            str(shown["shared_bytes"]),
            f"{shown['occupancy']:.0%}",
            "/".join(map(str, shown["access_bits"])),
            loops or "none",
        )
        body.setdefault(cells, set()).update(way.split(",")[0].split(" in ")[0] for way in shown["ways"])
    lines = [[name, ", ".join(sorted(ways)), *cells] for (name, *cells), ways in body.items()]
    columns = ["", "used by", "registers", "bytes spilled", "shared", "occupancy", "bits", "innermost loops"]
    return (
        f"## Machine code\n\nOf every kind of launch above, compiled for {', '.join(targets)} (registers and spilled "
        "bytes a thread, in this order). Shared memory, occupancy, widths of global accesses and innermost loops "
        "(instructions, and their widths) are those of sm_90.\n\n"
        f"{table(columns, sorted(lines, key=lambda cells: (cells[1] != 'llmfast', cells[0])))}"
    )


def how_it_was_made(rows: list[Row]) -> str:
    gpus = "; ".join(
        f"{gpu.name} {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.tensor_cores / 1e12:.0f} TFLOP/s bfloat16, "
        f"{gpu.float32 / 1e12:.1f} float32, {gpu.special / 1e12:.1f} T/s special"
        for gpu in GPUS
    )
    return (
        "## How to read this\n\n"
        "Counts come from the real code of every library, unmodified: kernels run in Triton's interpreter, and torch's "
        "operators are counted by their tensors, on CPU tensors that say they are on an H100, so that each library "
        "takes the way it takes there (matrix products of bfloat16 into float32 exist only there; they are emulated). "
        "At real sizes, operators on large tensors are counted and not run, and of a launch a few programs stand for "
        "all; at sizes that can be computed, both give the same numbers (`tests/evidence/test_traffic.py`).\n\n"
        f"{FORMULA}. Rates from data sheets: {gpus}. Caches count as perfect within a launch and empty before it; what "
        "their own bandwidth costs, which matters to kernels that ask for far more than they move, is not in the model."
    )


def duration(seconds: float) -> str:
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"


# Pictures.

COLORS = ("#0b5fa5", "#888888", "#bbbbbb", "#444444", "#d1662b", "#eaa678", "#4d8f3a", "#a5cf95", "#8c4fa0", "#c8a2d4")


def picture(name: str, folder: Path, draw: Callable[[Any], None], size: tuple[float, float]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # No date and no random names inside: the same results make the same file.
    with matplotlib.rc_context({"svg.hashsalt": "llmfast", "svg.fonttype": "none", "font.size": 9}):
        figure = pyplot.figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(folder / name, metadata={"Date": None})
        pyplot.close(figure)


def line(way: str) -> dict[str, float]:
    return {"markersize": 3, "linewidth": 1.0, "zorder": 2} | (
        {"linewidth": 2.2, "zorder": 3} if way == "llmfast" else {}
    )


def plain_ticks(axes: Any) -> None:
    """64k, not 2 to the 16th."""

    def text(value: float, position: int) -> str:
        return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(text)


def draw_time(figure: Any, rows: list[Row], ways: list[str]) -> None:
    by_n, by_v = figure.subplots(1, 2, sharey=True)
    for axes, axis, fixed in ((by_n, "N", ("D", "V")), (by_v, "V", ("N", "D"))):
        for way, color in zip(ways, COLORS):
            points = sorted(
                (row["size"][axis], row["seconds"][H100.name] / (row["size"]["N"] * row["size"]["V"]) * 1e12)
                for row in chosen(rows, way=way)
                if all(row["size"][name] == SHOWN[name] for name in fixed)
            )
            axes.plot(*zip(*points), "o-", color=color, label=way, **line(way))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        plain_ticks(axes)
        axes.set_xlabel({"N": "tokens N", "V": "vocabulary V"}[axis])
        axes.set_title(", ".join(f"{name} = {SHOWN[name]}" for name in fixed))
        axes.grid(alpha=0.3)
    by_n.set_ylabel(f"ps a logit, modelled on an {H100.name}")
    figure.legend(*by_n.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.suptitle("Linear cross-entropy, forward and backward, bfloat16: modelled time")


GROUPS = {
    "matrix products": lambda name: re.fullmatch(r"mm|addmm_?|_cce_\w+|_indexed\w+", name) is not None,
    "rows of logits": lambda name: "cross_entropy_kernel" in name or "softmax" in name or "nll" in name,
    "casts, copies, sums": lambda name: True,
}


def draw_bytes(figure: Any, rows: list[Row], ways: list[str]) -> None:
    axes = figure.subplots(1, 1)
    mine = {row["way"]: row for row in rows if row["size"] == SHOWN}
    labels = [way for way in ways if way in mine]
    left = [0.0] * len(labels)
    taken: set[tuple[str, str]] = set()
    for (group, belongs), color in zip(GROUPS.items(), ("#0b5fa5", "#d1662b", "#bbbbbb")):
        widths = []
        for way in labels:
            names = [n for n in mine[way]["by_name"] if (way, n) not in taken and belongs(n)]
            taken |= {(way, n) for n in names}
            widths.append(sum(mine[way]["by_name"][n] for n in names) / (SHOWN["N"] * SHOWN["V"]))
        axes.barh(labels, widths, left=left, color=color, label=group)
        left = [a + b for a, b in zip(left, widths)]
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.1f}", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("bytes a logit, different per launch")
    axes.legend(frameon=False)
    axes.set_title(f"What moves: N = {SHOWN['N']}, D = {SHOWN['D']}, V = {SHOWN['V']}, counted")


def draw_memory(figure: Any, rows: list[Row], ways: list[str]) -> None:
    axes = figure.subplots(1, 1)
    for way, color in zip(ways, COLORS):
        points = sorted(
            (row["size"]["N"], row["peak_bytes"] / 2**30)
            for row in chosen(rows, way=way)
            if (row["size"]["D"], row["size"]["V"]) == (SHOWN["D"], SHOWN["V"])
        )
        axes.plot(*zip(*points), "o-", color=color, label=way, **line(way))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    plain_ticks(axes)
    axes.set_xlabel("tokens N")
    axes.set_ylabel("peak of tensors beyond the inputs, GiB")
    axes.set_title(f"Memory: D = {SHOWN['D']}, V = {SHOWN['V']}, counted")
    axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False)


def draw_optimizers(figure: Any, rows: list[Row]) -> None:
    for axes, dtype in zip(figure.subplots(1, 2), ("float32", "bfloat16")):
        largest = {row["way"]: bytes_a_parameter(row) for row in chosen(rows, dtype=dtype)}
        labels, values = list(largest), list(largest.values())
        axes.barh(labels, values, color=["#0b5fa5" if way == "llmfast" else "#bbbbbb" for way in labels])
        for y, value in enumerate(values):
            axes.text(value, y, f" {value:.1f}", va="center")
        axes.set_title(f"parameters and gradients in {dtype}")
        axes.set_xlabel("bytes a parameter, counted")
        axes.margins(x=0.15)
        axes.invert_yaxis()


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
