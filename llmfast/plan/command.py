"""`llmfast plan`: what to train for a budget, a law of your own runs, what a run takes, and learning rates."""

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmfast import _gpus
from llmfast._checks import expect
from llmfast._commands import CommandParser, columns, expect_replaceable, fail
from llmfast._units import duration, in_bytes, number, parse_bytes, short
from llmfast.models import DecoderConfig, cost, memory
from llmfast.models.memory import MemoryEstimate
from llmfast.optim.scaling import scale_lr
from llmfast.plan import laws
from llmfast.plan.advice import Machine, Wish, advise
from llmfast.plan.fit import DISTINCT, Fit, distinct, fit_chinchilla, fit_power
from llmfast.plan.laws import Allocation, ChinchillaLaw, PowerLaw
from llmfast.plan.picture import expect_format, plot_chinchilla, plot_power
from llmfast.plan.runs import Run, model_config, read_run
from llmfast.plan.screen import advice_lines, remedies, settings_lines, smaller_model

if TYPE_CHECKING:
    from llmfast.train.config import Config

RESAMPLES = 100  # a second or two
SOURCES = {
    "besiroglu": ("Besiroglu et al. 2024", laws.BESIROGLU),
    "hoffmann": ("Hoffmann et al. 2022", laws.HOFFMANN),
}
# Options without a topic, by the names of their parsed values: those of any budget, and those of a planned run.
BUDGET = {"flops": "--flops", "params": "--params", "tokens": "--tokens"}
PLANNED = {"days": "--days", "seq_len": "--seq-len", "vocab_size": "--vocab-size", "settings": "--out"}
BUDGETS = (1, 10, 100)  # for which `fit` plans, as multiples of the largest run's
GPUS = {"gpu": "--gpu", "gpus": "--gpus", "utilisation": "--utilisation"}
DEFAULTS = {"law": "besiroglu", "gpus": 1, "utilisation": cost.UTILISATION}  # None for the others


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `llmfast plan` to its parser; `run` takes what it parses."""
    parser.description = (
        "Parameters and tokens for a budget of FLOPs, by published scaling laws. One of --flops, --params and --tokens "
        "gives the best for it; two say what they come to. With --gpu and --days or one of these: a run for such GPUs, "
        "with its memory and time, and the command that starts it. Numbers may end in k, M, B or T."
    )
    parser.add_argument("--flops", metavar="C", help="FLOPs of the whole training, e.g. 1e21")
    parser.add_argument("--params", metavar="N", help="parameters with embeddings, e.g. 2.8B")
    parser.add_argument("--tokens", metavar="D", help="training tokens, e.g. 60B")
    parser.add_argument("--law", choices=SOURCES, default=DEFAULTS["law"], help="scaling law (default: %(default)s)")
    _add_gpu(parser, "plan a run for it")
    parser.add_argument("--days", metavar="DAYS", help="how long the run may take, in place of --flops")
    parser.add_argument("--seq-len", metavar="TOKENS", help="tokens per row (default: by the model's size)")
    parser.add_argument("--vocab-size", metavar="IDS", help="vocabulary (default: by the model's size)")
    parser.add_argument(
        "--out", dest="settings", type=Path, metavar="FILE", help="write the run's settings there, in TOML"
    )

    topics = parser.add_subparsers(dest="topic", metavar="", parser_class=CommandParser)
    fit = topics.add_parser(
        "fit",
        help="a scaling law of finished runs",
        description="Fits E + A / N^alpha + B / D^beta to finished runs of `llmfast train` that vary both the model's "
        "size N and the tokens D, or floor + (scale / x)^exponent where they vary one of them.",
    )
    fit.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    fit.add_argument("--out", type=Path, metavar="FILE", help="a picture of the fit: .png, .svg, .pdf")
    fit.add_argument(
        "--flops",
        dest="budget",
        metavar="C",
        help="the budget to plan for (default: {}, {} and {} times the largest run)".format(*BUDGETS),
    )
    fit.add_argument(
        "--resamples", type=int, default=RESAMPLES, help="resamples for the intervals; 0: none (default: %(default)s)"
    )

    need = topics.add_parser(
        "memory",
        help="memory and modelled time of a configuration",
        description="What the settings of `llmfast train` take: parameters, gradients, AdamW's states, activations and "
        "loss, for each way to keep parameters; and the modelled time of a step.",
    )
    need.add_argument("--config", type=Path, metavar="FILE", help="settings in TOML")
    need.take_settings(_schema)
    _add_gpu(need, "whether it fits there, and how long a step takes", again=True)
    need.add_argument("--gpu-memory", metavar="SIZE", help="in place of --gpu's, e.g. 24GiB")

    lr = topics.add_parser(
        "lr",
        help="a learning rate for another batch size",
        description="The linear rule (SGD) and the square-root rule (Adam), for a batch of another size.",
    )
    lr.add_argument("--lr", type=float, required=True, help="the rate that is right for --base-batch")
    lr.add_argument(
        "--base-batch", required=True, metavar="SIZE", help="the batch that --lr was found at, in rows or tokens"
    )
    lr.add_argument("--batch", required=True, metavar="SIZE", help="the batch to find a rate for, in the same unit")


def _schema() -> Any:
    from llmfast.train.config import SCHEMA

    return SCHEMA


def _add_gpu(parser: argparse.ArgumentParser, purpose: str, *, again: bool = False) -> None:
    def default(value: object) -> object:
        return argparse.SUPPRESS if again else value  # a topic's default would hide what was given before the topic

    parser.add_argument("--gpu", default=default(None), metavar="NAME", help=f"{purpose}: {', '.join(_gpus.KNOWN)}")
    parser.add_argument(
        "--gpus", type=int, default=default(DEFAULTS["gpus"]), metavar="COUNT", help="number of GPUs (default: 1)"
    )
    parser.add_argument(
        "--utilisation",
        type=float,
        default=default(cost.UTILISATION),
        metavar="SHARE",
        help=f"assumed share of the GPU's FLOPs per second (default: {cost.UTILISATION})",
    )


def run(args: argparse.Namespace) -> int:
    """Print what was asked for; return the exit code. A user's mistake is one line on stderr and code 2."""
    topics: dict[str | None, Callable[[argparse.Namespace], list[str]]] = {
        None: _budget,
        "fit": _fit,
        "memory": _memory,
        "lr": _lr,
    }
    try:
        if args.topic is not None:
            unused = BUDGET | PLANNED | {"law": "--law"} | ({} if args.topic == "memory" else GPUS)
            for name, option in unused.items():
                expect(not _is_given(args, name), f"{option} before {args.topic} has no meaning")
        expect(args.gpus > 0, f"--gpus must be above 0; got {args.gpus}")
        expect(0 < args.utilisation <= 1, f"--utilisation must be above 0 and at most 1; got {args.utilisation}")
        lines = topics[args.topic](args)
    except ImportError as e:
        return fail(f"{e}; this needs the extra: pip install 'llmfast-torch[train]'")
    except (ValueError, OSError) as e:
        return fail(str(e))
    except (OverflowError, ZeroDivisionError) as e:
        return fail(f"these numbers are too large or too small to compute with: {e}")
    print("\n".join(lines))
    return 0


def _is_given(args: argparse.Namespace, name: str) -> bool:
    """Return True for an option that has another value than without it."""
    return bool(getattr(args, name) != DEFAULTS.get(name))


# A budget.


def _budget(args: argparse.Namespace) -> list[str]:
    wish = _wish(args)
    source, law = SOURCES[args.law]
    if args.gpu is not None:
        machine = Machine(_gpus.chosen(args.gpu), args.gpus, args.utilisation)
        advice = advise(machine, wish, law)
        lines = advice_lines(advice, machine, wish, source, law)
        if advice.fits:
            return [*lines, *settings_lines(advice, machine, args.settings)]
        print("\n".join(lines))  # what is wrong with it can be seen there
        need, smaller = advice.tried[-1].memory, smaller_model(advice, wish)
        raise ValueError(
            f"no way fits: {remedies(need, machine.gpu.memory, model=smaller, rows='a shorter --seq-len')}"
        )
    for name, option in PLANNED.items():
        expect(not _is_given(args, name), f"{option} needs --gpu, for which a run is planned")
    for name, option in GPUS.items():
        expect(not _is_given(args, name), f"{option} needs --gpu, one of {', '.join(_gpus.KNOWN)}")
    given = sum(x is not None for x in (wish.flops, wish.params, wish.tokens))
    chosen = wish.allocated(law, wish.flops)
    budget = chosen.flops
    best = law.optimal(budget)

    batch = laws.critical_batch(chosen.loss)
    lines = [
        f"{'the best for it' if given == 1 else 'this training'}, C = 6 N D, by {source}:",
        f"  FLOPs                {budget:.3g} ({short(budget / laws.PF_DAY)} PF-days; attention not counted)",
        f"  parameters           {short(chosen.params)}, embeddings included",
        f"  tokens               {short(chosen.tokens)}",
        f"  tokens per parameter {chosen.tokens_per_param:.1f}",
        f"  loss                 {chosen.loss:.3f} nats per token, for the text and tokenizer of the law",
        f"  critical batch       {short(batch)} tokens at that loss, by Kaplan et al. 2020: "
        f"{short(chosen.tokens / batch)} steps",
    ]
    lines += ["", f"{budget:.3g} FLOPs on models of other sizes:", *_allocations(law, best, chosen)]
    lines += ["", f"{budget:.3g} FLOPs by other laws:"]
    others = [(name, other.optimal(budget)) for name, other in SOURCES.values() if other is not law]
    others.append(("Kaplan et al. 2020, without embeddings", laws.kaplan_optimal(budget)))
    rows = [("", "parameters", "tokens", "tokens/N", "loss")]
    return lines + _table(rows + [(name, *_cells(a)) for name, a in others])


def _allocations(law: ChinchillaLaw, best: Allocation, chosen: Allocation) -> list[str]:
    found = {factor * best.params: law.spent(factor * best.params, best.flops) for factor in (0.25, 0.5, 1.0, 2.0, 4.0)}
    marks = {best.params: "the best"}
    if abs(chosen.params / best.params - 1) > 1e-6:
        found[chosen.params] = chosen
        marks[chosen.params] = "this training"
    rows = [("parameters", "tokens", "tokens/N", "loss", "")]
    return _table(rows + [(*_cells(found[N]), marks.get(N, "")) for N in sorted(found)])


def _cells(a: Allocation) -> tuple[str, str, str, str]:
    return short(a.params), short(a.tokens), f"{a.tokens_per_param:.1f}", f"{a.loss:.3f}"


def _wish(args: argparse.Namespace) -> Wish:
    options = BUDGET | PLANNED
    flops, days, params, tokens = (number(options[n], getattr(args, n)) for n in ("flops", "days", "params", "tokens"))
    expect(flops is None or days is None, "--flops and --days are both a budget; leave one out")
    given = sum(x is not None for x in (flops, days, params, tokens))
    also = "" if args.gpu is None else "--days, "
    expect(
        given > 0, f"plan needs {also}--flops, --params or --tokens, or one of fit, memory, lr; see llmfast plan --help"
    )
    expect(given < 3, "of a budget (--flops or --days), --params and --tokens, two determine the third; leave one out")
    sizes = []
    for name in ("seq_len", "vocab_size"):
        size = number(option := options[name], getattr(args, name))
        expect(
            size is None or (size == int(size) and 2 <= size <= 2**24),
            f"{option} must be a whole number in [2, 2^24]; got {size}",
        )
        sizes.append(None if size is None else int(size))
    return Wish(flops, None if days is None else 86_400 * days, params, tokens, *sizes)


# A fit.


def _fit(args: argparse.Namespace) -> list[str]:
    budget = number("--flops", args.budget)
    if args.out is not None:
        expect_format(args.out)
        expect_replaceable(args.out)
    runs = [read_run(folder) for folder in args.runs]
    varied = {
        name: int(distinct([getattr(r, name) for r in runs]).max()) + 1
        for name in ("params", "non_embedding", "tokens")
    }
    if varied["params"] > 1 and varied["tokens"] > 1:
        return _fit_both(runs, budget, args)
    expect(budget is None, "--flops needs runs that vary both the model's size and the tokens")
    expect(
        max(varied["params"], varied["tokens"]) >= DISTINCT,
        f"runs must vary the model's size or the tokens: at least {DISTINCT} values; got "
        f"{varied['params']} sizes and {varied['tokens']} numbers of tokens",
    )
    return _fit_one(runs, "non_embedding" if varied["params"] > 1 else "tokens", args)


def _fit_both(runs: list[Run], budget: float | None, args: argparse.Namespace) -> list[str]:
    N, D, losses = ([float(x) for x in column] for column in zip(*((r.params, r.tokens, r.loss) for r in runs)))
    fit = fit_chinchilla(N, D, losses, resamples=args.resamples)
    if args.out is not None:
        plot_chinchilla(fit, N, D, losses, args.out)
    lines = [f"L = E + A / N^alpha + B / D^beta of {len(runs)} runs, N with embeddings:"]
    names = ("E", "A", "B", "alpha", "beta")
    lines += [f"  {name:<7}{_value(fit, lambda law, name=name: float(getattr(law, name)))}" for name in names]
    lines += [*_interval_note(fit), "", *_residuals(fit, runs), "", "compute-optimal by this fit:"]
    largest = max(r.flops for r in runs)
    budgets = [times * largest for times in BUDGETS] if budget is None else [budget]
    rows: list[Sequence[str]] = [("FLOPs", "parameters", "", "tokens", "tokens/N", "loss")]
    for c in budgets:
        best = fit.law.optimal(c)
        interval = _interval(fit, lambda law, c=c: law.optimal(c).params, short)
        params, *rest = _cells(best)
        rows.append((f"{c:.2e}", params, interval, *rest))
    lines += _table(rows)
    lines.append(f"(the largest run took {largest:.2e}; what is far beyond that is a guess)")
    return lines + _written(args)


def _fit_one(runs: list[Run], name: str, args: argparse.Namespace) -> list[str]:
    label = {"non_embedding": "parameters N, without embeddings", "tokens": "tokens D"}[name]
    x, losses = [float(getattr(r, name)) for r in runs], [r.loss for r in runs]
    fit = fit_power(x, losses, resamples=args.resamples)
    if args.out is not None:
        plot_power(fit, x, losses, args.out, xlabel=label)
    lines = [f"L = floor + (scale / x)^exponent of {len(runs)} runs, x: {label}:"]
    names = ("floor", "scale", "exponent")
    lines += [f"  {name:<10}{_value(fit, lambda law, name=name: float(getattr(law, name)))}" for name in names]
    return lines + _interval_note(fit) + ["", *_residuals(fit, runs)] + _written(args)


def _value(fit: "Fit[ChinchillaLaw] | Fit[PowerLaw]", of: Callable[..., float]) -> str:
    return f"{of(fit.law):<12.5g}{_interval(fit, of, lambda v: f'{v:.4g}')}"


def _interval(
    fit: "Fit[ChinchillaLaw] | Fit[PowerLaw]", of: Callable[..., float], write: Callable[[float], str]
) -> str:
    if not fit.resampled:
        return ""
    low, high = fit.interval(of)
    return f"[{write(low)}, {write(high)}]"


def _interval_note(fit: "Fit[ChinchillaLaw] | Fit[PowerLaw]") -> list[str]:
    return [f"(intervals: 95 % of {len(fit.resampled)} fits to resampled runs)"] if fit.resampled else []


def _residuals(fit: "Fit[ChinchillaLaw] | Fit[PowerLaw]", runs: list[Run]) -> list[str]:
    rows: list[Sequence[str]] = [("run", "parameters", "tokens", "loss", "fit off by", "")]
    for i, (r, off) in enumerate(zip(runs, fit.residuals)):
        mark = "outlier" if i in fit.outliers else ""
        rows.append((r.name, short(r.params), short(r.tokens), f"{r.loss:.4f}", f"{100 * off:+.2f} %", mark))
    return _table(rows)


def _written(args: argparse.Namespace) -> list[str]:
    return [] if args.out is None else ["", f"picture: {args.out}"]


# A configuration.


def _memory(args: argparse.Namespace) -> list[str]:
    from llmfast.train.config import load_config
    from llmfast.train.estimate import Way, estimate_run, micro_batches, ways

    config = load_config(args.config, args.set)
    epochs = config.train.epochs
    expect(not epochs, f"train.epochs must be 0: a plan reads no text, so it needs train.steps; got {epochs}")
    try:
        model = model_config(config)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    t, seq_len, gpus, have = config.train, config.data.seq_len, args.gpus, _memory_there(args)
    rows, parts = micro_batches(config, gpus)
    count = cost.count_parameters(model)
    how: dict[str, Any] = {"gpus": gpus, "gpu_memory": have}

    def in_another(way: Way) -> MemoryEstimate:
        return estimate_run(way.of(config), model, **how)

    estimate = estimate_run(config, model, **how)
    lines = [
        f"{short(count.total)} parameters, {short(count.embedding)} of them embeddings"
        f"{' (tied)' if model.tie_embeddings else ''}; vocabulary of {model.vocab_size}",
        f"{t.batch_size * seq_len} tokens per step: {parts} micro-batch(es) of {rows} rows of {seq_len}"
        f"{f' on each of {gpus} GPUs' if gpus > 1 else ''}",
        "",
        f"`llmfast train` on {f'each GPU, train.parallel={t.parallel}' if gpus > 1 else 'one GPU'}, products in "
        f"{str(_products(config)).removeprefix('torch.')}:",
        *_sizes(config, estimate, have),
        "",
        "parameters and states kept in other ways, with the fused loss:",
    ]
    kept = [(p.name, partial(estimate_run, config, model, precision=p, **how)) for p in memory.PRECISIONS]
    lines += _estimates(kept, have)
    lines += ["", "other ways to train; recomputing activations takes 4 / 3 of the time:"]
    lines += _estimates([(way.name, partial(in_another, way)) for way in ways(gpus)], have)
    if have is not None and not memory.fits(estimate.peak, have):
        lines.append(_what_fits(config, model, gpus, have))
    return [*lines, "", *_step_lines(config, model, args)]


def _sizes(config: "Config", e: MemoryEstimate, have: int | None) -> list[str]:
    sizes = [
        (f"parameters, {config.train.param_dtype}", e.parameters),
        ("gradients", e.gradients),
        ("... whole, until a step's last part", e.unreduced),
        (f"states of {config.optimizer.name}", e.optimizer),
        ("activations", e.activations),
        ("... of one block, computed again", e.recomputed),
        ("copies of the matrices in bfloat16", e.weight_copies),
        ("parameters outside blocks, whole", e.gathered),
        ("... of blocks, and what is sent", e.buffers),
        ("whole model in float32, to begin with", e.begin if e.begin > e.parameters else 0),
        ("loss, fused", e.loss),
        ("loss, all logits in memory", e.loss_unfused),
    ]
    lines = [f"  {name:<36}{in_bytes(size):>12}" for name, size in sizes if size]
    for name, peak in (("at most at a time", e.peak), ("... with all logits", e.peak_unfused)):
        lines.append(f"  {name:<36}{in_bytes(peak):>12}   {_judged(peak, have)}".rstrip())
    return [*lines, "  not counted: the GPU's context and workspaces, about 1 GiB, and fragmentation"]


def _estimates(rows: Sequence[tuple[str, Callable[[], MemoryEstimate]]], have: int | None) -> list[str]:
    from llmfast.train.settings import ConfigError

    table: list[Sequence[str]] = [("", "parameters", "gradients", "states", "activations", "at most", "")]
    for name, estimate in rows:
        try:
            e = estimate()
        except ConfigError:  # the optimizer does not take these formats
            continue
        kinds = (e.parameters, max(e.gradients, e.unreduced), e.optimizer, e.activations + e.weight_copies, e.peak)
        table.append((name, *map(in_bytes, kinds), _judged(e.peak, have)))
    return _table(table)


def _what_fits(config: "Config", model: DecoderConfig, gpus: int, have: int) -> str:
    """Say which settings make it fit, or what else would."""
    from llmfast.train.config import SCHEMA
    from llmfast.train.estimate import estimate_run, most_rows, ways
    from llmfast.train.settings import ConfigError, overrides

    e = estimate_run(config, model, gpus=gpus, gpu_memory=have)
    for way in ways(gpus, small=True):
        try:
            most = config.train.batch_size // gpus
            changed, e = most_rows(way.of(config), model, gpus=gpus, gpu_memory=have, least=1, most=most)
        except ConfigError:  # the optimizer does not take these formats
            continue
        if memory.fits(e.peak, have):
            others = {name: s.of(changed) for name, s in SCHEMA.settings.items() if s.of(changed) != s.of(config)}
            return "it fits with " + shlex.join(word for text in overrides(others) for word in ("--set", text))
    return f"none of these fits: {remedies(e, have, model='a smaller model', rows='shorter rows')}"


def _memory_there(args: argparse.Namespace) -> int | None:
    if args.gpu_memory is not None:
        return parse_bytes(args.gpu_memory)
    return None if args.gpu is None else _gpus.chosen(args.gpu).memory


def _judged(need: int, have: int | None) -> str:
    return "" if have is None else f"{memory.verdict(need, have)} ({in_bytes(have)})"


def _products(config: "Config") -> torch.dtype:
    t = config.train
    return torch.float32 if t.dtype == "float32" and t.param_dtype == "float32" else torch.bfloat16


def _step_lines(config: "Config", model: DecoderConfig, args: argparse.Namespace) -> list[str]:
    t, seq_len = config.train, config.data.seq_len
    tokens = t.batch_size * seq_len
    step = cost.step_flops(model, tokens, seq_len)
    simple = laws.training_flops(cost.count_parameters(model).total, tokens)
    lines = [
        f"a step takes {step.flops:.3g} FLOPs, {100 * step.attention / step.flops:.1f} % of them in attention "
        f"(6 N D would be {simple:.3g}); all {t.steps} steps {step.flops * t.steps:.3g}"
    ]
    if args.gpu is not None:
        gpu, again = _gpus.chosen(args.gpu), t.checkpoint_activations
        seconds = step.seconds(gpu, _products(config), utilisation=args.utilisation, again=again) / args.gpus
        lines += [
            f"modelled on {f'{args.gpus} ' if args.gpus > 1 else ''}{gpu.name}: {duration(seconds)} per step, "
            f"{short(tokens / seconds)} tokens per second, {duration(seconds * t.steps)} in all",
            *(f"  {line}" for line in cost.formula(again=again, gpus=args.gpus)),
            f"  utilisation {args.utilisation:g} assumed",
        ]
    return lines


# A learning rate.


def _lr(args: argparse.Namespace) -> list[str]:
    base, batch = number("--base-batch", args.base_batch), number("--batch", args.batch)
    assert base is not None and batch is not None  # both are required
    rows: list[Sequence[str]] = [("rule", "learning rate", "for")]
    rows.append(("linear", f"{scale_lr(args.lr, batch, base, 'linear'):.4g}", "SGD (Goyal et al. 2017)"))
    rows.append(("square root", f"{scale_lr(args.lr, batch, base, 'sqrt'):.4g}", "Adam, RMSProp (Malladi et al. 2022)"))
    return [f"{args.lr:g} at a batch of {base:g}; at {batch:g}:", *_table(rows)]


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"  {line}" for line in columns(rows)]
