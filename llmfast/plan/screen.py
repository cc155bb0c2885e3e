"""A planned run in one screen, and the command that starts it."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from llmfast._commands import WRITTEN, columns, expect_replaceable
from llmfast._units import duration, in_bytes, short
from llmfast.models import cost
from llmfast.models.memory import MemoryEstimate, fits, verdict
from llmfast.plan import laws
from llmfast.plan.advice import TEXT, TOKENIZER, TOKENS, Advice, Machine, Wish
from llmfast.plan.laws import ChinchillaLaw

USUAL = (0.3, 0.5)  # utilisations between which most runs of this size are
SLACK = 0.01  # nats per token that hardly matter
BYTES = 4  # of English text per token, about: fewer with a small vocabulary
WIDTH = 110  # columns


def advice_lines(advice: Advice, machine: Machine, wish: Wish, source: str, law: ChinchillaLaw) -> list[str]:
    """Say what run to begin, whether it fits, how long it takes and how sure that is."""
    shape, model, gpu = advice.shape, advice.shape.model, machine.gpu
    N, D, batch = shape.params, shape.tokens, shape.batch * shape.seq_len
    flops, again = laws.training_flops(N, D), advice.tried[-1].way.again
    low, high = law.sizes_within(flops, SLACK)
    whole = shape.steps * shape.seconds
    per_step = [duration(shape.seconds * machine.utilisation / share) for share in USUAL]
    lines = [
        f"{machine.gpus} {gpu.name}{_asked(wish)}, at {machine.utilisation:g} of {gpu.tensor_cores:.3g} FLOPs per "
        "second each, which is assumed:",
        f"  model    {short(N)} parameters: {model.layers} layers of width {model.width}, {model.heads} heads, "
        f"vocabulary of {model.vocab_size}{'' if model.tie_embeddings else ', untied'}",
        f"  tokens   {short(D)}, {short(D / N)} per parameter; {_bytes_of(BYTES * D)} of English text at about {BYTES} "
        "bytes per token",
        f"  loss     {law.loss(N, D):.3f} nats per token by {source}, for the text and tokenizer of the law",
        f"  batch    {short(batch)} tokens: {shape.batch} rows of {shape.seq_len}; {shape.steps} steps. DeepSeek LLM "
        f"2024: 0.292 C^0.3271 = {short(shape.best_batch)}",
        f"  rate     {shape.lr:g} at its highest: 0.3118 C^-0.125 by the same, and at most the trainer's default",
        f"  time     {duration(whole)}, {duration(shape.seconds)} per step ({per_step[0]} at {USUAL[0]}, {per_step[1]} "
        f"at {USUAL[1]} of the peak), modelled:",
        *(f"           {line}" for line in cost.formula(again=again, gpus=machine.gpus)),
        f"  sure?    for C = 6 N D = {flops:.3g}, {short(low)} to {short(high)} parameters come within {SLACK} nats of "
        "the best by this law;",
        *(f"           {line}" for line in _other_laws(law, flops)),
        *_doubts(shape.best_batch, batch, machine.gpus),
        "",
        f"GiB on each GPU, modelled, for the rows that it takes at once; it has {gpu.memory / 2**30:.2f}, a tenth of "
        "which stays free:",
        *_memory_table(advice, gpu.memory),
    ]
    return lines


def settings_lines(advice: Advice, machine: Machine, out: Path | None) -> list[str]:
    """Say how to start a run that fits, and write its settings to `out`.

    Raises:
        FileExistsError: `out` is a file that no command wrote.
    """
    from llmfast.train.settings import write_value

    command, machines = _launcher(machine.gpus)
    within, then = ("", ":") if out is None else (f" in {out}", "; then:")
    lines = [f"put your text in place of {TEXT}{within}{then}"]
    if advice.shape.mapped:
        ids = advice.shape.model.vocab_size
        lines = [
            "so much text cannot be read into memory: write its tokens once, with `llmfast clean --tokenizer` or",
            f"llmfast.data.write_ds (docs/data.md). Put them in place of {TOKENS}, and their tokenizer, of about",
            f"{ids} ids, in place of {TOKENIZER}{within}{then}",
        ]
    if machines > 1:
        lines.append(f"run this on each of {machines} machines, with the first one's name in place of HOST:")
    if out is not None:
        _write(advice, out)
        return ["", *lines, *_wrapped([*command, "--config", str(out)])]
    flags = [part for name, value in advice.settings.items() for part in (f"--{name}", write_value(value))]
    return ["", *lines, *_wrapped([*command, *flags])]


def remedies(need: MemoryEstimate, have: int, *, model: str, rows: str) -> str:
    """Say what would make a training fit that needs too much even in its smallest way.

    Args:
        need: What that way takes on each GPU.
        have: Bytes of memory on each GPU.
        model: How to ask for a smaller model.
        rows: How to ask for shorter rows.
    """
    if not fits(need.begin, have):
        whole = f"each GPU first holds the whole model in float32, {in_bytes(need.begin)}"
        return f"{whole}: take a --gpu with more memory, or {model}"
    kept = need.parameters + need.optimizer + need.gathered
    found = ["more --gpus", "a --gpu with more memory", model, *([rows] if fits(kept, have) else [])]
    return f"take {', '.join(found[:-1])} or {found[-1]}"


def smaller_model(advice: Advice, wish: Wish) -> str:
    """Say how to ask for a smaller model than that of a plan."""
    if wish.params is not None:
        return "fewer --params"
    if wish.tokens is None or (wish.flops is None and wish.seconds is None):
        return f"--params below {short(advice.shape.params)}"
    return "a smaller --flops" if wish.seconds is None else "fewer --days"


def _asked(wish: Wish) -> str:
    return "" if wish.seconds is None else f" for {duration(wish.seconds)}"


def _bytes_of(n: float) -> str:
    return f"{n / 1e9:.3g} GB" if n < 1e12 else f"{n / 1e12:.3g} TB"


def _other_laws(law: ChinchillaLaw, flops: float) -> list[str]:
    name, other = ("Besiroglu", laws.BESIROGLU) if law is laws.HOFFMANN else ("Hoffmann", laws.HOFFMANN)
    low, high = (short(N) for N in laws.FITTED)
    return [
        f"best by other laws: {short(other.optimal(flops).params)} ({name}), "
        f"{short(laws.kaplan_optimal(flops).params)} (Kaplan, without embeddings);",
        f"Besiroglu's and Hoffmann's were fitted to models of {low} to {high} parameters",
    ]


def _doubts(best: float, batch: int, gpus: int) -> list[str]:
    if batch <= 2 * best:
        return []
    return [
        f"           With {gpus} GPUs the batch is {batch / best:.1f} times the best one, so tokens teach less; fewer "
        "GPUs waste less"
    ]


def _memory_table(advice: Advice, have: int) -> list[str]:
    rows: list[Sequence[str]] = [
        ("", "rows", "weights", "grads", "states", "activations", "loss", "gathered", "at most", "")
    ]
    for tried in advice.tried:
        e = tried.memory
        kinds = (
            *(e.parameters, max(e.gradients, e.unreduced), e.optimizer),
            *(e.activations + e.recomputed + e.weight_copies, e.loss, e.gathered + e.buffers, e.peak),
        )
        rows.append((tried.way.name, str(tried.rows), *(f"{n / 2**30:.2f}" for n in kinds), verdict(e.peak, have)))
    return [f"  {line}" for line in columns(rows)]


def _launcher(gpus: int) -> tuple[list[str], int]:
    """Return the command without settings, and the number of machines that it has to run on."""
    from llmfast.train.estimate import NODE

    if gpus == 1:
        return ["llmfast", "train"], 1
    machines = max(1, gpus // NODE)
    several = ["--nnodes", str(machines), "--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    start = ["torchrun", *(several if machines > 1 else []), "--nproc-per-node", str(gpus // machines)]
    return [*start, "-m", "llmfast", "train"], machines


def _wrapped(words: Sequence[str]) -> list[str]:
    """Break a command into lines that a shell joins, with each option next to its value."""
    lines, line = [], "  "
    for i, word in enumerate(map(shlex.quote, words)):
        pair = len(word) + (len(shlex.quote(words[i + 1])) + 1 if word.startswith("--") and i + 1 < len(words) else 0)
        if word.startswith("--") and len(line) + pair > WIDTH:
            lines.append(f"{line} \\")
            line = "     "
        line += word if not line.strip() else f" {word}"
    return [*lines, line]


def _write(advice: Advice, out: Path) -> None:
    import tomli_w

    expect_replaceable(out)
    tree: dict[str, dict[str, object]] = {}
    for name, value in advice.settings.items():
        section, _, key = name.partition(".")
        tree.setdefault(section, {})[key] = value
    out.write_text(f"# {WRITTEN} plan\n{tomli_w.dumps(tree)}", encoding="utf-8")
