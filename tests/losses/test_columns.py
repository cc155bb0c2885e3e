"""Row kernels on pieces of the columns, for any two settings: what they add up to, and each piece's gradient."""

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from llmfast_kernels import cross_entropy as rows
from llmfast_kernels.launch import Tile
from llmfast_kernels.terms import Partials, Softmax, Targets, Terms, Upstream
from support.pairs import Case, covering

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
N = 4
FACTORS: dict[str, list[Any]] = {
    "V": [1025, 5, 2048, 2100],
    "cuts": [(), (1,), (-1,), (3, -2), (1024,)],  # where a piece ends and the next begins
    "K": [1, 3],
    "ignored": ["one row", "no row", "all but one id"],
    "ignore_index": [-100, 2],
    "target_weights": [None, "of rows", "of all"],
    "token_weights": [False, True],
    "temperatures": [False, True],
    "bias": [False, True],
    "class_weights": [False, True],
    "label_smoothing": [None, 0.2],
    "z_loss": [None, 0.05],
    "logit_scale": [None, -1.3],
    "softcap": [None, 4.0],
    "stats": [False, True],
    "logprobs": [False, True],
    "padding": [0, 3, 64],
    "dtype": [F32, BF16, F16],
    "ids": [torch.int64, torch.int32],
    "inplace": [False, True],
}


def possible(case: Case) -> bool:
    """Return False for a cut that a small vocabulary does not have."""
    return not (case.get("V") == 5 and 1024 in case.get("cuts", ()))


def draw(case: Case) -> tuple[Tensor, Targets, dict[str, Any]]:
    """Return logits, targets, and terms of all columns."""
    V, K = case["V"], case["K"]
    y = torch.randint(0, V, (N, K))
    y[0], y[1, -1], y[2] = 0, V - 1, y[2, 0]
    if case["ignored"] == "one row":
        y[3] = case["ignore_index"]
    elif case["ignored"] == "all but one id":
        y[:, 1:] = case["ignore_index"]
    weights = {None: None, "of rows": torch.rand(N, K) + 0.5, "of all": torch.rand(1, K) + 0.5}[case["target_weights"]]
    tokens = torch.rand(N) + 0.5 if case["token_weights"] else None
    temperatures = torch.rand(N) + 0.5 if case["temperatures"] else None
    terms = {name: case[name] for name in ("label_smoothing", "z_loss", "logit_scale", "softcap", "ignore_index")}
    terms["bias"] = torch.randn(V).to(case["dtype"]) if case["bias"] else None
    terms["class_weights"] = torch.rand(V) + 0.5 if case["class_weights"] else None
    return (torch.randn(N, V) * 2).to(case["dtype"]), Targets(y.to(case["ids"]), weights, tokens, temperatures), terms


def truth(x: Tensor, targets: Targets, terms: dict[str, Any]) -> dict[str, Tensor]:
    """Compute everything by the definition."""
    y, V = targets.classes.long(), x.shape[1]
    z = x if terms["bias"] is None else x + terms["bias"].to(x.dtype)
    z = z * (terms["logit_scale"] or 1.0)
    z = z if terms["softcap"] is None else terms["softcap"] * (z / terms["softcap"]).tanh()
    z = z if targets.temperatures is None else z / targets.temperatures[:, None].to(x.dtype)
    valid = y != terms["ignore_index"]
    log_p, lse = z.log_softmax(1), z.logsumexp(1)
    c = torch.ones(V, dtype=x.dtype) if terms["class_weights"] is None else terms["class_weights"].to(x.dtype)
    w = torch.where(valid, 1.0 if targets.weights is None else targets.weights.to(x.dtype), 0.0)
    smoothing = terms["label_smoothing"] or 0.0
    each = torch.where(valid, log_p.gather(1, y.clamp(min=0)), 0.0)
    loss = (1 - smoothing) * (-each * c[y.clamp(min=0)] * w).sum(1) + smoothing / V * -(log_p @ c) * w.sum(1)
    loss = loss + (terms["z_loss"] or 0.0) * lse**2
    alive = valid.any(1)
    if targets.token_weights is not None:
        loss = loss * targets.token_weights.to(x.dtype)
    values = {"loss": loss, "lse": lse, "entropy": -(log_p.exp() * log_p).sum(1)}
    found = {name: torch.where(alive, t, 0.0) for name, t in values.items()}
    return found | {"logprobs": each, "argmax": torch.where(alive, z.argmax(1), -1)}


def together(parts: list[Partials], starts: list[int], case: Case, targets: Targets) -> dict[str, Any]:
    """Add up the contributions of all pieces in float64."""
    stacked = {name: torch.stack([getattr(p, name) for p in parts]).double() for name in ("peak", "total", "pull")}
    mass = torch.stack([p.mass for p in parts]).double()
    peak = stacked["peak"].amax(0)
    shift = stacked["peak"] - peak
    total = (stacked["total"] * shift.exp()).sum(0)
    loss = mass.sum(0) * total.log() - (stacked["pull"] + mass * shift).sum(0)
    alive = (targets.classes != case["ignore_index"]).any(1)
    lse = torch.where(alive, peak + total.log(), 0.0)
    loss = torch.where(alive, loss + (case["z_loss"] or 0.0) * lse**2, 0.0)
    loss = loss if targets.token_weights is None else loss * targets.token_weights
    found: dict[str, Any] = {"peak": peak, "total": torch.where(alive, total, 1.0), "loss": loss, "lse": lse}
    if case["stats"]:
        moments = torch.stack([p.moment for p in parts if p.moment is not None]).double()
        moment = ((moments + stacked["total"] * shift) * shift.exp()).sum(0)
        found["entropy"] = torch.where(alive, total.log() - moment / total, 0.0)
        best = torch.stack([p.argmax for p in parts if p.argmax is not None])
        found["argmax"] = torch.where(shift == 0, best, case["V"]).amin(0)
    if case["logprobs"]:
        y, sums = targets.classes, torch.zeros(targets.classes.shape, dtype=torch.float64)
        ends = [*starts[1:], case["V"]]
        for part, each, begin, end in zip(parts, shift, starts, ends, strict=True):
            here = (y >= begin) & (y < end)
            assert part.below is not None and not part.below[~here].any()
            sums += torch.where(here, part.below + each[:, None], 0.0)
        found["logprobs"] = torch.where(y != case["ignore_index"], sums - total.clamp(min=1e-30).log()[:, None], 0.0)
    return found


CASES = covering(FACTORS, possible)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_pieces_of_the_columns_add_up(kernels: None, case: Case) -> None:
    logits, targets, given = draw(case)
    V, dtype = case["V"], case["dtype"]
    exact = logits.double().requires_grad_()
    wanted = truth(exact, targets, given)
    upstream = Upstream(torch.randn(N), torch.randn(N), torch.randn(N) if case["stats"] else None)
    aims = zip(("loss", "lse", "entropy"), upstream)
    aim = sum((wanted[name] * u).sum() for name, u in aims if u is not None)
    (gradient,) = torch.autograd.grad(aim, exact)  # type: ignore[arg-type]

    starts = sorted({0, *(cut % V for cut in case["cuts"])})
    ends, parts, pieces = [*starts[1:], V], [], []
    tile = Tile(8, 128)
    tiles = [getattr(rows, name).trying(tile) for name in ("FEW_TERMS", "MANY_TERMS", "BACKWARD")]
    with tiles[0], tiles[1], tiles[2], mock.patch.object(rows, "MANY_RESULTS", tile):
        for begin, end in zip(starts, ends, strict=True):
            own = slice(begin, end)
            c = given["class_weights"]
            sums = None if c is None else torch.stack([c[own].sum(), c.sum()])
            bias = None if given["bias"] is None else given["bias"][own].contiguous()
            terms = Terms(V, v_start=begin, **{**given, "bias": bias, "class_weight_sums": sums})
            width = min(end - begin + case["padding"], ((end - begin) // rows.LEAST_BLOCK + 1) * rows.LEAST_BLOCK)
            buffer = torch.full((N, width), torch.nan, dtype=dtype)
            buffer[:, : end - begin] = logits[:, own]
            pieces.append((buffer, terms))
            asked = {"stats": case["stats"], "logprobs": case["logprobs"]}
            parts.append(rows.cross_entropy_partials(buffer, targets, terms, V=end - begin, **asked))
        found = together(parts, starts, case, targets)
        softmax = Softmax(found["peak"].float(), found["total"].float())
        if case["stats"]:
            softmax = softmax._replace(entropy=found["entropy"].float())
        made = []
        for (buffer, terms), begin, end in zip(pieces, starts, ends, strict=True):
            out = buffer if case["inplace"] else torch.full_like(buffer, torch.nan)
            rows.cross_entropy_backward(buffer, targets, terms, softmax, upstream, V=end - begin, d_logits=out)
            assert not out[:, end - begin :].any()
            made.append(out[:, : end - begin])
    ignored = (targets.classes == case["ignore_index"]).all(1)
    for part in parts:
        assert not any(t[ignored].any() for name, t in part._asdict().items() if t is not None and name != "argmax")
    if case["stats"]:
        assert torch.equal(found["argmax"], wanted["argmax"])
    for name in ("loss", "lse", "entropy", "logprobs"):
        if name in found:
            torch.testing.assert_close(found[name].double(), wanted[name].detach(), rtol=2e-5, atol=2e-5, msg=name)
    near = max(3e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(torch.cat(made, 1).double(), gradient, rtol=near, atol=3e-5 if dtype == F32 else 2e-4)


@pytest.mark.parametrize("grad_scale", [1.0, 0.5])
def test_a_group_of_columns_counts_from_the_threshold_on(kernels: None, grad_scale: float) -> None:
    """Let gradients be a half and 1, exactly; the target of the second row alone is in its group."""
    x = torch.full((3, 384), -1e4)
    x[0, 5] = x[0, 200] = x[1, 3] = x[1, 4] = 0.0
    targets, scale = Targets(torch.tensor([[5], [290], [-100]])), torch.tensor(grad_scale)
    kept = {0.25: [[1, 1, 0], [1, 0, 1]], 0.5: [[1, 1, 0], [1, 0, 1]], 0.500001: [[0, 0, 0], [0, 0, 1]]}
    kept |= {1.0: [[0, 0, 0], [0, 0, 1]], 1.000001: [[0, 0, 0], [0, 0, 0]]}
    for threshold, wanted in kept.items():
        alive, out = torch.full((3, 3), 7, dtype=torch.int8), torch.empty_like(x)
        more = {"d_logits": out, "grad_scale": scale, "alive": alive, "threshold": threshold * grad_scale}
        rows.cross_entropy(x, targets, Terms(300), V=300, **more)  # type: ignore[arg-type]
        assert alive.tolist() == [*wanted, [0, 0, 0]]
        assert out[0, 5] == -0.5 * grad_scale and out[1, 290] == -grad_scale and not out[2].any()


def test_a_group_whose_gradients_are_all_negative_counts_too(kernels: None) -> None:
    """Smoothing gives an improbable class a gradient of -0.3 / 300."""
    x = torch.full((1, 384), -1e4)
    x[0, 5] = 0.0
    for threshold, wanted in ((5e-4, [1, 1, 1]), (2e-3, [1, 0, 0])):
        alive, out = torch.empty((1, 3), dtype=torch.int8), torch.empty_like(x)
        terms = Terms(300, label_smoothing=0.3)
        targets = Targets(torch.tensor([[5]]))
        rows.cross_entropy(x, targets, terms, V=300, d_logits=out, alive=alive, threshold=threshold)
        assert alive.tolist() == [wanted]
