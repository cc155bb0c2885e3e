"""Tables and sentences of pages about losses and optimizers, compared with the code or tried."""

import inspect
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from llmfast.losses import (
    LinearCrossEntropyLoss,
    LinearCrossEntropyPlan,
    TeacherLogits,
    TeacherProbabilities,
    TeacherStates,
    TeacherTopK,
    cross_entropy,
    linear_cross_entropy,
    linear_distillation,
    linear_logprobs,
    logprobs,
    options,
    reference,
)
from llmfast.losses.distillation import LinearDistillation
from llmfast.losses.from_hidden import LinearCrossEntropy
from llmfast.losses.from_logits import CrossEntropy
from llmfast.losses.mtp import head_targets
from llmfast.losses.ways import Mode
from llmfast.models.decoder import MTP
from llmfast.mtp import schedules
from llmfast.optim import Extras, FusedAdam, FusedAdamW, FusedSGD, loading
from llmfast.optim.decay import DecayMode
from llmfast.optim.formats import LOW_BITS, PARAM_FORMATS, STATE_FORMATS
from llmfast.optim.options import Options
from support.code_blocks import ROOT


def text_of(page: str) -> str:
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def words_of(page: str) -> str:
    return " ".join(text_of(page).split())


def table(page: str, head: str) -> list[list[str]]:
    """Return the cells of the rows under the row that begins with `head`."""
    _, found, rest = text_of(page).partition(f"\n| {head}")
    assert found, f"docs/{page} has no table of {head!r}"
    lines = rest.split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def code_in(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def named(page: str, before: str, after: str) -> set[str]:
    """Return the names in code between two parts of a sentence."""
    found = re.search(f"{re.escape(before)}(.*?){re.escape(after)}", words_of(page))
    assert found, f"docs/{page} does not say: {before} ... {after}"
    return set(code_in(found[1]))


def of(function: Callable[..., Any]) -> set[str]:
    """Return the names of the keyword arguments of a function."""
    return {name for name, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY}


# Losses.


def test_options_of_the_losses_are_those_of_the_table() -> None:
    shown = {name for row in table("losses.md", "option | what it does") for name in code_in(row[0])}
    assert shown == of(cross_entropy) & of(linear_cross_entropy)
    assert named("losses.md", "Only the linear loss takes ", ".") == of(linear_cross_entropy) - of(cross_entropy)


def test_options_that_log_probabilities_share_with_losses() -> None:
    same = named("losses.md", "[a float32 output layer](#float32-logits-an-fp32-lm-head). ", "mean what they mean")
    assert same | {"memory_budget", "vocab_size", "return_stats"} == of(linear_logprobs) & of(linear_cross_entropy)


def test_teachers_take_what_their_table_says() -> None:
    shown = {}
    for cell, *_ in table("losses.md", "teacher | what it is"):
        name, arguments = re.findall(r"`(\w+)\((.*)\)`", cell)[0]
        shown[name] = arguments.split(", ")
    kinds = (TeacherStates, TeacherLogits, TeacherProbabilities, TeacherTopK)
    assert [*shown] == [kind.__name__ for kind in kinds]
    for kind in kinds:
        parameters = inspect.signature(kind).parameters
        given = shown[kind.__name__]
        assert given == [*parameters][: len(given)], kind
        assert {name for name, p in parameters.items() if p.default is p.empty} <= set(given), kind


def test_divergences_are_the_formulas_of_the_table() -> None:
    rows = {code_in(kind)[0].strip('"'): formula for kind, formula in table("losses.md", "`kind` | divergence")}
    assert [*rows] == [*get_args(options.Kind)]
    student, teacher = (torch.randn(1, 9, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    beta, p, q = 0.3, teacher.exp()[0], student.exp()[0]
    for kind, text in rows.items():
        formula, _, where = text.split(" = sum")[0].partition(", where m = ")
        numbers: dict[str, Any] = {"beta": beta, "p": p, "q": q, "KL": lambda a, b: (a * (a / b).log()).sum()}
        if where:
            numbers["m"] = value_of(where, numbers)
        weight = torch.eye(9, dtype=torch.float64)
        found = linear_distillation(
            student, weight, TeacherLogits(teacher), kind=kind, **({"beta": beta} if kind == "jsd" else {})
        )
        torch.testing.assert_close(found, value_of(formula, numbers))


def value_of(formula: str, numbers: dict[str, Any]) -> Tensor:
    """Compute a formula in which a space multiplies."""
    product = re.sub(r"(beta|\)) (?=[a-zA-Z])", r"\1 * ", formula)
    found: Tensor = eval(product, {}, numbers)
    return found


def test_modes_are_those_of_the_table() -> None:
    assert [mode for mode, *_ in table("how-it-works/chunk-plan.md", "mode | row stage")] == [*get_args(Mode)]


# What other libraries call the options of the linear loss.
ELSEWHERE = {
    "accum_dtype=torch.float32": {"accumulate_dtype"},
    "chunk_mem_const": {"memory_budget"},
    "lse_square_scale": {"z_loss"},
    "ce_weight": {"class_weights"},
    "weight": {"class_weights"},
    "return_z_loss": {"return_stats"},
    "return_token_accuracy": {"return_stats"},
    "shift=True": {"shift"},
    'filter_eps="high"': {"grad_filter"},
}


@pytest.mark.parametrize("head", ["Liger 0.", "cut-cross-entropy 2"])
def test_options_of_other_libraries_are_translated(head: str) -> None:
    for theirs, ours in table("migration.md", head):
        names = {name.partition("=")[0] for name in code_in(ours)}
        assert names <= of(linear_cross_entropy), ours
        for name in code_in(theirs):
            assert names == ELSEWHERE.get(name, set()) if names else name in of(linear_cross_entropy), name
    for name, here in options._ELSEWHERE.items():
        (wanted,) = (ours for theirs, ours in ELSEWHERE.items() if theirs.partition("=")[0] == name)
        assert {here} == wanted


# Heads.


def test_kinds_of_heads_and_their_schedules_are_listed() -> None:
    assert {kind for kind, *_ in table("mtp.md", "kind | description")} == {*get_args(MTP)} - {"none"}
    (shown,) = re.findall(
        r'the heads\' weights at a given fraction of the run \(((?:"\w+"(?:, )?)+)\)', words_of("mtp.md")
    )
    assert tuple(re.findall(r'"(\w+)"', shown)) == schedules.SCHEDULES


def test_a_head_predicts_the_label_that_the_page_says() -> None:
    (index,) = re.findall(r"Head k at row t predicts `labels\[(.*?)\]`", words_of("mtp.md"))
    labels = torch.arange(10, 17)
    found = head_targets(labels, 3, None, -100)
    for k in range(3):
        for t in range(4):
            assert found[k, t] == labels[eval(index, {"k": k, "t": t})]


# Optimizers.


def test_keywords_of_the_optimizers_are_those_of_the_table() -> None:
    rows = {code_in(name)[0]: what for name, what in table("optimizers.md", "keyword | what it does")}
    assert rows.keys() == Extras.__annotations__.keys()
    assert {name.strip('"') for name in code_in(rows["master_weights"])} == {*PARAM_FORMATS}
    dtypes = {str(name).removeprefix("torch.") for name in STATE_FORMATS if name is not None}
    assert {*re.findall(r"\w+\d+|8bit", rows["state_dtype"])} == dtypes
    assert named("optimizers.md", "### Per parameter group ", " can be set per group") == Options.PER_GROUP
    old, new = re.findall(r"`(\w+)` used to be called `(\w+)`", words_of("optimizers.md"))[0][::-1]
    assert (old, new) == (loading.OLD_LOW_BITS, LOW_BITS)
    assert f"for `split8` make that tensor {str(PARAM_FORMATS['split8'].dtype).removeprefix('torch.')};" in words_of(
        "optimizers.md"
    )


def test_decay_is_what_the_page_says() -> None:
    sentence = r'a step shrinks each parameter: `"lr".*?`"independent".*?`"relative".*?\.'
    said = re.search(sentence, words_of("optimizers.md"))
    assert said
    shares = dict(re.findall(r'`"(\w+)"` is (.*?)(?:, as in torch)?[;.]', said[0]))
    assert shares.keys() == {*get_args(DecayMode)}
    lr, most, decay = 0.25, 0.5, 0.125
    meant = {
        "lr times weight_decay": lr * decay,
        "weight_decay regardless of lr": decay,
        "weight_decay times lr over the largest lr": decay * lr / most,
    }
    for mode, share in shares.items():
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = FusedAdamW([p], lr=most, weight_decay=decay, decay=mode)
        optimizer.param_groups[0]["lr"], p.grad = lr, torch.zeros(3)
        optimizer.step()
        torch.testing.assert_close(p.detach(), torch.full((3,), 1 - meant[share]))


# Sentences, each with what tries it.


def some(**given: Any) -> dict[str, Any]:
    return {"hidden": torch.randn(4, 3), "weight": torch.randn(7, 3), "targets": torch.tensor([0, 1, 2, 6]), **given}


def divides_late() -> Iterable[tuple[bool, bool]]:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loss = object.__new__(CrossEntropy)
        object.__setattr__(loss, "dtype", dtype)
        yield loss.divides_early, dtype != torch.float16


def needs_upstream() -> Iterable[tuple[str, str]]:
    for reduction, mode in (("none", "recompute"), ("mean", "two-stage"), ("sum", "two-stage")):
        plan = LinearCrossEntropyPlan.make(4096, 256, 32768, memory_budget=16 << 20, reduction=reduction)
        yield plan.mode, mode


def one_operator() -> Iterable[tuple[bool, bool]]:
    for kind in (CrossEntropy, LinearCrossEntropy, LinearDistillation):
        loss = object.__new__(kind)
        for name in ("group", "accumulate_into"):
            object.__setattr__(loss, name, None)
        yield loss.traceable, kind is not LinearDistillation


def differentiable() -> Iterable[tuple[bool, bool]]:
    for function in (linear_cross_entropy, linear_logprobs):
        inputs = [*some().values()]
        _, stats = function(inputs[0].requires_grad_(), *inputs[1:], return_stats=True)
        yield stats.lse.requires_grad and stats.entropy.requires_grad, True
        yield stats.argmax.requires_grad, False


def after_the_cap() -> Iterable[tuple[Tensor, Tensor]]:
    x, ids = torch.randn(4, 9) * 3, torch.tensor([0, 1, 2, 8])
    found = logprobs(x, ids, softcap=2.0, temperature=0.7)
    yield found, (2.0 * torch.tanh(x / 2.0) / 0.7).log_softmax(-1).gather(1, ids[:, None])[:, 0]


def infinite() -> Iterable[tuple[bool, bool]]:
    ids, said = torch.tensor([[0, 1]] * 4), torch.tensor([[0.5, 0.25]] * 4).log()
    for kind in get_args(options.Kind):
        for tail in ("drop", "bucket"):
            inputs = [*some().values()][:2]
            call = partial(linear_distillation, *inputs, TeacherTopK(ids, said, tail), kind=kind)
            yield refused(call), (kind, tail) == ("reverse_kl", "drop")


def refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except (ValueError, TypeError):
        return True
    return False


def no_token_is_ignored() -> Iterable[tuple[Tensor, Tensor]]:
    inputs, p = some(), torch.rand(4, 7)
    p[1] = 0.0
    losses = linear_cross_entropy(inputs["hidden"], inputs["weight"], p, reduction="none")
    yield losses.ne(0), torch.tensor([True, False, True, True])
    yield linear_cross_entropy(inputs["hidden"], inputs["weight"], p), losses.sum() / 4


def the_same_divisor() -> Iterable[tuple[Tensor, Tensor]]:
    given, weights = some(), torch.rand(7) + 0.1
    plain, added = (
        linear_cross_entropy(**given, class_weights=weights, z_loss=z, reduction="none").sum() for z in (0.0, 0.5)
    )
    with_z = linear_cross_entropy(**given, class_weights=weights, z_loss=0.5)
    yield with_z, added / weights[given["targets"]].sum()
    yield (plain < added), torch.tensor(True)


def without_effect() -> Iterable[tuple[bool, bool]]:
    for name in ("fused", "foreach", "capturable"):
        for kind in (FusedAdam, FusedAdamW, FusedSGD):
            if name in inspect.signature(kind).parameters:
                yield refused(partial(kind, [torch.nn.Parameter(torch.ones(2))], **{name: True})), False


def rejected() -> Iterable[tuple[bool, bool]]:
    yield refused(partial(LinearCrossEntropyLoss, 3, 7, options=object())), True  # type: ignore[arg-type]


def as_in_the_reference() -> Iterable[tuple[Tensor, Tensor]]:
    given = some()
    yield linear_cross_entropy(**given), reference.linear_cross_entropy(**given)


def limits_of_groups() -> Iterable[tuple[Tensor, Tensor]]:
    params = [torch.nn.Parameter(torch.zeros(4)) for _ in range(4)]
    own: tuple[dict[str, Any], ...] = ({}, {"max_grad_norm": None}, {"max_grad_norm": 3.0}, {})
    groups = [{"params": [p], **limit} for p, limit in zip(params, own)]
    optimizer = FusedSGD(groups, lr=1.0, max_grad_norm=5.0)
    for p, size in zip(params, (3.0, 7.0, 2.0, 4.0)):
        p.grad = torch.full((4,), size)
    optimizer.step()
    norms = torch.stack([p.detach().norm() for p in params])  # of what each moved by
    yield norms, torch.tensor([5 * 3 / 5, 14.0, 3.0, 5 * 4 / 5])
    assert optimizer.grad_norm is not None
    yield optimizer.grad_norm, torch.tensor(6.0**2 + 4.0**2 + 8.0**2).sqrt()


CLAIMS: dict[str, tuple[str, Callable[[], Iterable[tuple[Any, Any]]]]] = {
    "float16 gradients, which would underflow": ("how-it-works/chunk-plan.md", divides_late),
    'With `reduction="none"`, the upstream gradients of the tokens are known only in backward.': (
        "how-it-works/chunk-plan.md",
        needs_upstream,
    ),
    "Under `torch.compile` each loss but `linear_distillation` is one operator": ("losses.md", one_operator),
    "`return_stats` adds logsumexp and entropy (both differentiable) and the argmax": ("losses.md", differentiable),
    "`temperature` divides the logits after `softcap`": ("losses.md", after_the_cap),
    '`"reverse_kl"` would then be infinite, and is refused.': ("losses.md", infinite),
    "to leave one out, give it a row of zeros or a token weight of zero": ("losses.md", no_token_is_ignored),
    "adds a multiple of the squared logsumexp, with the same divisor as the mean": ("losses.md", the_same_divisor),
    "llmfast divides the whole loss by the sum of the weights": ("migration.md", the_same_divisor),
    "`fused=`, `foreach=` and `capturable=` are accepted and have no effect": ("migration.md", without_effect),
    "A group that sets `None` is neither clipped nor measured. `grad_norm` is the norm of all measured gradients": (
        "optimizers.md",
        limits_of_groups,
    ),
    "torch's `options` argument is rejected; use `memory_budget` instead.": ("migration.md", rejected),
    "It computes `F.cross_entropy(F.linear(hidden, weight), targets)` without holding all logits": (
        "losses.md",
        as_in_the_reference,
    ),
}


@pytest.mark.parametrize("sentence", CLAIMS)
def test_what_a_page_claims_is_so(sentence: str) -> None:
    page, tried = CLAIMS[sentence]
    assert sentence in words_of(page), f"docs/{page} does not say so"
    results = list(tried())
    assert results
    for found, wanted in results:
        if isinstance(found, Tensor):
            torch.testing.assert_close(found, wanted)
        else:
            assert found == wanted


# Until results of a GPU are among those of `make bench`.
NEVER_RUN = {
    "README.md": "*no kernel has run on a GPU yet*",
    "docs/index.md": "No kernel has run on a GPU yet",
    "docs/limits.md": "**No kernel of llmfast has run on a GPU.**",
    "docs/measured.md": "No kernel of llmfast has been timed on a GPU.",
}


def test_pages_agree_on_what_has_not_run() -> None:
    for page, sentence in NEVER_RUN.items():
        assert sentence in " ".join((ROOT / page).read_text(encoding="utf-8").split()), page
    known = dict(row for row in table("limits.md", "what | how it is known"))
    unknown = {what for what, how in known.items() if how.startswith("not ") or "not run" in how}
    assert unknown == {
        "time taken",
        "whether drivers and hardware behave like the interpreter",
        "CUDA graphs, streams, asynchronous copies",
        "NCCL, several GPUs",
        "training at scale",
    }
    assert "interpreter on a CPU" in known["what kernels compute"] and known["machine code"].startswith("compiled for")
    assert known["bytes moved"] == "counted in the interpreter"
