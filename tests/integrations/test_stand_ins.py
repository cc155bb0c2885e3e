"""Stand-ins alone, without a model: whatever is done to them, the loss is that of logits to which the same was done."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast.integrations import stand_ins
from llmfast.integrations.stand_ins import Call, HeadInput, LazyLogits, Logits
from llmfast.losses import reference
from support.pairs import Case, covering

B, T, D, V = 2, 5, 4, 7

FACTORS: dict[str, list[Any]] = {
    "bias": [False, True],
    "adapter": ["", "plain", "scaled", "to scaled"],  # B(A(x)) added to the logits
    "its bias": [False, True],
    "before": [None, 0.7, "/3"],
    "cap": [False, True, "function"],
    "after": [None, 2.5, "/0.4"],
    "dtype": ["", "float", "to", "to a tensor's"],
    "rows": ["flat", "shift, then flat", "flat, then shift", "of one sequence", "where a mask says"],
    "view": ["view", "reshape", "named"],
    "reduction": ["mean", "sum", "none"],
    "smoothing": [0.0, 0.1],
    "weights": [False, True],
    "ignore": [-100, 2],
}


def can_be(case: Case) -> bool:
    """Have a factor behind a cap, and a bias of an adapter, only where there is one."""
    return not (
        (case.get("after") and case.get("cap") is False) or (case.get("its bias") and case.get("adapter") == "")
    )


CASES = covering(FACTORS, can_be)


def tensors(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    made = {"hidden": random(B, T, D), "weight": random(V, D), "a": random(3, D), "b": random(V, 3)}
    own, others = {"bias": random(V)}, {"c": random(V)}
    return made | (own if case["bias"] else {}) | (others if case["its bias"] else {})


def done(x: Any, case: Case, given: dict[str, Tensor]) -> Any:
    """Do to hidden states, or their stand-in, what a model does: up to logits (N, V)."""
    logits = F.linear(x, given["weight"], given.get("bias"))
    if case["adapter"] == "to scaled":
        logits = logits * 1.5
    if case["adapter"]:
        more = F.linear(F.linear(x, given["a"]), given["b"], given.get("c"))
        logits = logits + (more * 0.5 if case["adapter"] == "scaled" else more)
    for name in ("before", "after"):
        if isinstance(case[name], str):
            logits = logits / float(case[name][1:])
        elif case[name] is not None:
            logits = case[name] * logits if name == "before" else logits * case[name]
        if name == "before" and case["cap"]:
            logits = logits.tanh() if case["cap"] is True else torch.tanh(logits)
    if case["dtype"] == "float":
        logits = logits.to(torch.float64)
    elif case["dtype"]:
        logits = logits.to(torch.zeros((), dtype=torch.float64)) if "tensor" in case["dtype"] else logits.to("cpu")
    return logits


def rows_of(logits: Any, case: Case) -> Any:
    kinds = {
        "view": lambda x: x.contiguous().view(-1, V),
        "reshape": lambda x: x.reshape(-1, x.size(-1)),
        "named": lambda x: x.contiguous().view(size=(-1, x.shape[-1])),
    }
    flat = kinds[case["view"]]
    if case["rows"] == "shift, then flat":
        return flat(logits[..., :-1, :])
    if case["rows"] == "flat, then shift":
        return flat(logits)[1:]
    if case["rows"] == "of one sequence":
        return logits[1]
    if case["rows"] == "where a mask says":
        return logits[(torch.arange(B * T) % 3 > 0).view(B, T)]
    return flat(logits)


def losses(case: Case) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Yield the loss of the stand-in and that of logits, with the gradients."""
    for stand_in in (True, False):
        given = tensors(case)
        x: Any = HeadInput(given["hidden"], Call({})) if stand_in else given["hidden"]
        logits = rows_of(done(x, case, given), case)
        assert isinstance(logits, Logits) is stand_in
        targets = torch.arange(len(logits.shape) and logits.shape[0]) % V
        targets[1] = case["ignore"]
        options = {"reduction": case["reduction"], "label_smoothing": case["smoothing"], "ignore_index": case["ignore"]}
        if case["weights"]:
            options["weight"] = torch.linspace(0.5, 2.0, V, dtype=torch.float64)
        loss = F.cross_entropy(logits, targets, **options)
        slopes = torch.linspace(1, 2, loss.numel(), dtype=torch.float64).view(loss.shape)
        wanted = {name: t for name, t in given.items() if case["adapter"] or name not in ("a", "b")}
        grads = torch.autograd.grad((loss * slopes).sum(), list(wanted.values()))
        yield loss.detach(), dict(zip(wanted, grads))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))
def test_a_loss_is_that_of_logits_to_which_the_same_was_done(case: Case) -> None:
    (ours, d_ours), (wanted, d_wanted) = losses(case)
    torch.testing.assert_close(ours, wanted)
    for name, d in d_wanted.items():
        torch.testing.assert_close(d_ours[name], d, msg=name)
    given = tensors(case)
    logits = done(given["hidden"], case, given)
    lazy = done(HeadInput(given["hidden"], Call({})), case, given)
    assert lazy.shape == logits.shape and lazy.size(-1) == V and lazy.device == logits.device
    torch.testing.assert_close(lazy.computed(), logits)
    ids = torch.arange(B * T).view(B, T) % V
    torch.testing.assert_close(
        lazy.logprobs(ids, {"temperature": 0.7}), reference.logprobs(logits, ids, temperature=0.7)
    )


@pytest.mark.parametrize("bias", [None, torch.ones(V)])
def test_a_loss_has_the_dtype_that_logits_would_have(bias: Tensor | None) -> None:
    """Round it where the model's own would be of bfloat16 logits; `float` and `to` say otherwise."""
    hidden, weight = torch.randn(3, D).bfloat16(), torch.randn(V, D).bfloat16()
    plain = stand_ins.linear(hidden, Call({}), weight, bias)
    targets = torch.tensor([0, 1, 6])
    for logits, dtype in (
        (plain, torch.bfloat16),
        (plain.float(), torch.float32),
        (plain.to(torch.float64), torch.float64),
        (plain.to(dtype=torch.float32), torch.float32),
        (plain.to("cpu", torch.float32), torch.float32),
        (plain.to(torch.ones(1)), torch.float32),
        (plain.float() * 2.0, torch.float32),
    ):
        assert logits.dtype == logits.computed().dtype == dtype
        assert F.cross_entropy(logits, targets).dtype == dtype
        assert LazyLogits(logits).dtype == LazyLogits(logits).computed().dtype == dtype
    assert LazyLogits(plain).float().dtype == torch.float32 and LazyLogits(plain).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        inside = stand_ins.linear(hidden.float(), Call({}), weight.float())
        assert inside.dtype == inside.product == torch.bfloat16
        assert F.cross_entropy(inside, targets).dtype == torch.float32


def test_options_of_the_call_reach_the_loss_and_what_the_model_says_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(stand_ins, "linear_cross_entropy", lambda h, w, t, **given: seen.append(given) or h.sum())
    monkeypatch.setattr(stand_ins, "linear_logprobs", lambda h, w, t, **given: seen.append(given))
    options = {
        "label_smoothing": 0.2,
        "z_loss": 0.5,
        "memory_budget": 7,
        "slab_dtype": torch.float32,
        "grad_filter": 1e-3,
    }
    call, bias = Call(options), torch.ones(V)
    logits = stand_ins.linear(torch.ones(2, D), call, torch.ones(V, D), bias)
    weights, targets = torch.ones(V), torch.zeros(2, dtype=torch.int64)
    given = {"bias": bias, "softcap": None, "logit_scale": 1.0, "class_weights": weights}
    F.cross_entropy(logits, targets, weights, ignore_index=3, reduction="sum")
    assert seen.pop() == options | given | {"ignore_index": 3, "reduction": "sum"} and call.losses == 1
    F.cross_entropy((logits * 2.0).tanh() * 5.0, targets, label_smoothing=0.1)
    given = {"bias": bias, "softcap": 5.0, "logit_scale": 10.0, "class_weights": None}
    assert seen.pop() == options | given | {"ignore_index": -100, "reduction": "mean", "label_smoothing": 0.1}
    assert call.losses == 2
    (logits * 3.0).logprobs(targets, {"temperature": 0.5, "return_rank": True})
    given = {"bias": bias, "softcap": None, "logit_scale": 3.0}
    assert seen.pop() == {"temperature": 0.5, "return_rank": True} | given


NAMED = SimpleNamespace(
    hidden=torch.ones(B, T, D), weight=torch.ones(V, D), targets=torch.zeros(B * T, dtype=torch.int64)
)


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda x: x * torch.ones(V), "multiply or divide its logits by numbers; got a Tensor"),
        (lambda x: x * True, "multiply or divide its logits by numbers; got a bool"),
        (lambda x: x / torch.ones(V), "multiply or divide its logits by numbers; got a Tensor"),
        (lambda x: x.tanh().tanh(), "applies tanh to its logits twice"),
        (lambda x: x.tanh() + x, "adds a Logits to its logits"),
        (lambda x: x + x.tanh(), "adds a Logits to its logits"),
        (lambda x: x + torch.ones(V), "adds a Tensor to its logits"),
        (lambda x: x - x, "accesses their __sub__"),
        (lambda x: -x, "accesses their __neg__"),
        (lambda x: x.argmax, "accesses their .argmax"),
        (lambda x: x.view(-1, V - 1), "views its logits, (2, 5, 7), as (-1, 6)"),
        (lambda x: x.view(V, -1), "views its logits"),
        (lambda x: x.to("meta"), "moves its logits from cpu to meta"),
        (lambda x: x[..., 0], "selects part of its vocabulary"),
        (lambda x: x[..., :3], "selects part of its vocabulary"),
        (lambda x: x[0, 0, 0], "selects part of its vocabulary"),
        (lambda x: x[:, :, 1:], "selects part of its vocabulary"),
        (lambda x: x[torch.ones(B, T, V, dtype=torch.bool)], "selects part of its vocabulary"),
        (lambda x: x[..., torch.tensor([0, 1])], "selects part of its vocabulary"),
        (lambda x: torch.softmax(x, -1), "uses torch's softmax"),
        (lambda x: F.linear(x * 2.0, torch.ones(3, V)), "uses torch's linear"),
        (lambda x: F.linear(x.tanh(), torch.ones(3, V)), "uses torch's linear"),
        (lambda x: F.cross_entropy(x, NAMED.targets), "must call cross_entropy with (N, V) logits"),
        (lambda x: F.cross_entropy(x.view(-1, V), NAMED.targets.view(B, T)), "must call cross_entropy"),
        (lambda x: F.cross_entropy(x.view(-1, V), NAMED.targets, reduce=True), "not size_average or reduce"),
        (lambda x: F.cross_entropy(x.view(-1, V), NAMED.targets, size_average=True), "not size_average or reduce"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(use: Any, says: str) -> None:
    logits = stand_ins.linear(NAMED.hidden, Call({}), NAMED.weight)
    with pytest.raises((TypeError, AttributeError)) as raised:
        use(logits)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    "index",
    [
        (slice(None), slice(1, None)),
        (slice(None), slice(1, None), slice(None)),
        (..., slice(1, None), slice(None)),
        torch.tensor([[[0, 1, 1]]]),
        (None, torch.tensor([1, 0]), slice(None, None, 2)),
        torch.ones(B, T, dtype=torch.bool),
        -1,
    ],
    ids=str,
)
def test_rows_are_selected_as_of_a_tensor(index: Any) -> None:
    hidden = torch.arange(B * T * D).view(B, T, D).float()
    logits = stand_ins.linear(hidden, Call({}), NAMED.weight)[index]
    wanted = F.linear(hidden, NAMED.weight)[index]
    assert logits.shape == wanted.shape and torch.equal(logits.computed(), wanted)


def test_of_the_input_of_a_head_only_a_linear_map_is_followed() -> None:
    x = HeadInput(NAMED.hidden, Call({}))
    assert (x.shape, x.dtype, x.device) == (NAMED.hidden.shape, torch.float32, torch.device("cpu"))
    assert x.to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(F.dropout(x, 0.0).hidden, x.hidden) and not F.dropout(x, 1.0).hidden.any()
    for use in (lambda: F.relu(x), lambda: x + 1, lambda: x.sum(), lambda: x @ NAMED.weight.T):
        with pytest.raises((TypeError, AttributeError), match="the output embedding must be a linear map"):
            use()


def test_the_first_argument_is_found_by_place_or_by_name() -> None:
    class Named(torch.nn.Module):
        def forward(self, hidden_states: Tensor, mask: Any = None) -> Tensor:
            return hidden_states

    split = stand_ins.split_input
    assert split((1, 2), {"a": 3}) == (1, (2,), {"a": 3})
    assert split((), {"input": 1, "a": 3}) == (1, (), {"a": 3})
    assert split((), {"hidden_states": 1, "mask": 3}, Named()) == (1, (), {"mask": 3})
    assert split((), None, Named()) == (None, (), {})
    kept = {"input": 1}
    assert split((), kept)[0] == 1 and kept == {"input": 1}
