"""Kernels over pairs of rows, for any two settings, in several tiles: loss, fused gradient, and that of each piece."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast_kernels import distillation as pairs
from llmfast_kernels.cross_entropy import LEAST_BLOCK
from llmfast_kernels.launch import Tile
from llmfast_kernels.teaching import Divergence, TeacherRows
from llmfast_kernels.terms import Targets, Terms, Upstream
from support.pairs import Case, covering

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N = 4
FACTORS: dict[str, list[Any]] = {
    "V": [1025, 5, 2048, 2100],
    "cuts": [(), (1,), (-1,), (3, -2), (1024,)],  # where a piece of the later gradient ends and the next begins
    "beta": [0.0, 1.0, 0.3],
    "entropy": [True, False],
    "soft": [1.0, 0.6],
    "hard": [None, 0.4],
    "temperature": [1.0, 0.6, 1.7, "of rows"],
    "teacher": ["logits", "probabilities", "halves"],
    "dtype": [F32, BF16, F16],
    "teachers_dtype": [F32, BF16],
    "ignored": [False, True],
    "ignore_index": [-100, 2],
    "token_weights": [False, True],
    "grad_scale": [None, 2.0],
    "bias": [False, True],
    "logit_scale": [None, -1.3],
    "softcap": [None, 4.0],
    "z_loss": [None, 0.05],
    "teachers_bias": [False, True],
    "teachers_scale": [None, 0.7],
    "teachers_cap": [None, 3.0],
    "class_weights": [False, True],
    "label_smoothing": [None, 0.2],
    "padding": [0, 3, 64],
    "teachers_padding": [0, 8],
    "inplace": [False, True],
}


def possible(case: Case) -> bool:
    """Return False for a cut that a small vocabulary does not have, and for terms of another loss or teacher."""
    given = case.get
    dense = not given("entropy", True)
    others = given("beta") or given("hard") or given("temperature", 1.0) != 1.0 or given("teacher") == "logits"
    terms = any(given(name) for name in ("z_loss", "class_weights", "label_smoothing"))
    of_logits = any(given(name) for name in ("teachers_bias", "teachers_scale", "teachers_cap"))
    return (
        not (given("V") == 5 and 1024 in given("cuts", ()))
        and not (dense and others)
        and not (terms and (given("entropy", False) or others))
        and not (of_logits and (given("teacher", "logits") != "logits" or dense))
    )


def final(x: Tensor, bias: Tensor | None, scale: float | None, cap: float | None) -> Tensor:
    z = (x if bias is None else x + bias.to(x.dtype)) * (scale or 1.0)
    return z if cap is None else cap * (z / cap).tanh()


def truth(x: Tensor, y: Tensor, said: Tensor, case: Case, own: dict[str, Any], theirs: dict[str, Any]) -> Tensor:
    """Return the loss of each row by the definition, without token weights."""
    z = final(x, own["bias"], case["logit_scale"], case["softcap"])
    T = own["temperature"].double()[:, None]
    log_q = (z / T).log_softmax(1)
    q = log_q.exp()
    if case["teacher"] == "logits":
        p = (final(said.double(), theirs["bias"], case["teachers_scale"], case["teachers_cap"]) / T).softmax(1)
    else:
        p = said.double()
    beta, m = case["beta"], case["beta"] * p + (1 - case["beta"]) * q
    if not case["entropy"]:
        smoothing = case["label_smoothing"] or 0.0
        p = p * (1 - smoothing) + smoothing / x.shape[1]
        p = p if theirs["class_weights"] is None else p * theirs["class_weights"].double()
        soft = -(p * log_q).sum(1) + (case["z_loss"] or 0.0) * z.logsumexp(1) ** 2
    elif beta == 0:
        soft = (p * (p.log() - log_q)).sum(1)
    elif beta == 1:
        soft = (q * (log_q - p.log())).sum(1)
    else:
        soft = beta * (p * (p / m).log()).sum(1) + (1 - beta) * (q * (q / m).log()).sum(1)
    loss = case["soft"] * soft
    if case["hard"] is not None:
        loss = loss - case["hard"] * z.log_softmax(1).gather(1, y.clamp(min=0)[:, None])[:, 0]
    return torch.where(y == case["ignore_index"], 0.0, loss)


def padded(t: Tensor, padding: int) -> Tensor:
    """Return a copy of `t` with columns of NaN behind it, as many as a row may have."""
    most = (t.shape[1] // LEAST_BLOCK + 1) * LEAST_BLOCK
    buffer = torch.full((N, min(t.shape[1] + padding, most)), torch.nan, dtype=t.dtype)
    buffer[:, : t.shape[1]] = t
    return buffer


CASES = covering(FACTORS, possible)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_loss_and_gradients(kernels: None, case: Case) -> None:
    V, dtype = case["V"], case["dtype"]
    x = (torch.randn(N, V) * 2).to(dtype)
    said = torch.randn(N, V) * 2
    if case["teacher"] != "logits":
        said = said.softmax(1) * (0.5 if case["teacher"] == "halves" else 1.0)
    if not case["entropy"]:
        said[:, 1] *= -1.0  # which are any numbers
    said = said.to(case["teachers_dtype"])
    y = torch.tensor([0, V - 1, V // 2, case["ignore_index"] if case["ignored"] else 1])
    T = torch.rand(N) + 0.6 if case["temperature"] == "of rows" else torch.full((N,), case["temperature"])
    own = {"bias": torch.randn(V).to(dtype) if case["bias"] else None, "temperature": T}
    theirs = {
        "bias": torch.randn(V) if case["teachers_bias"] else None,
        "class_weights": torch.rand(V) + 0.5 if case["class_weights"] else None,
    }
    weights = torch.rand(N) + 0.5 if case["token_weights"] else None
    exact = x.double().requires_grad_()
    wanted = truth(exact, y, said, case, own, theirs) * (1.0 if weights is None else weights.double())
    upstream = torch.randn(N)
    (fused,) = torch.autograd.grad(wanted.sum() * (case["grad_scale"] or 1.0), exact, retain_graph=True)
    (later,) = torch.autograd.grad((wanted * upstream).sum(), exact)

    given = {name: case[name] for name in ("ignore_index", "logit_scale", "softcap", "z_loss")}
    terms = Terms(V, bias=own["bias"], **given)
    their_terms = Terms(
        V,
        bias=theirs["bias"],
        logit_scale=case["teachers_scale"],
        softcap=case["teachers_cap"],
        class_weights=theirs["class_weights"],
        label_smoothing=case["label_smoothing"],
    )
    targets = Targets(
        y[:, None].contiguous(), token_weights=weights, temperatures=T if case["temperature"] == "of rows" else None
    )
    one = 1.0 if case["temperature"] == "of rows" else case["temperature"]
    loss = Divergence(case["beta"], one, case["soft"], case["hard"], entropy=case["entropy"])

    def teacher(begin: int, end: int) -> TeacherRows:
        values = padded(said, case["teachers_padding"])[:, begin:end]
        terms = their_terms.columns(slice(begin, end))
        if case["teacher"] == "logits":
            return TeacherRows(terms, logits=values)
        return TeacherRows(terms, probabilities=values)

    def place(buffer: Tensor) -> Tensor:
        return buffer if case["inplace"] else torch.full_like(buffer, torch.nan)

    near: dict[str, Any] = {"rtol": max(5e-5, torch.finfo(dtype).eps), "atol": 5e-5 if dtype == F32 else 3e-4}
    tile = Tile(8, 128)
    with pairs.FEW_TERMS.trying(tile), pairs.MANY_TERMS.trying(tile), pairs.BACKWARD.trying(tile):
        buffer = padded(x, case["padding"])
        out = place(buffer)
        scale = None if case["grad_scale"] is None else torch.tensor(case["grad_scale"])
        found = pairs.distillation(buffer, targets, terms, teacher(0, V), loss, V=V, d_logits=out, grad_scale=scale)
        torch.testing.assert_close(found.loss.double(), wanted.detach(), rtol=5e-5, atol=5e-5)
        torch.testing.assert_close(out[:, :V].double(), fused, **near)
        assert not out[:, V:].any() and not found.lse[y == case["ignore_index"]].any()
        starts = sorted({0, *(cut % V for cut in case["cuts"])})
        for begin, end in zip(starts, [*starts[1:], V], strict=True):
            buffer = padded(x[:, begin:end], case["padding"])
            out, piece = place(buffer), terms.columns(slice(begin, end))
            pairs.distillation_backward(
                buffer,
                targets,
                piece,
                teacher(begin, end),
                loss,
                found.softmax,
                Upstream(upstream),
                V=end - begin,
                d_logits=out,
            )
            torch.testing.assert_close(out[:, : end - begin].double(), later[:, begin:end], **near)
            assert not out[:, end - begin :].any()
