"""The small decoder: it is causal, keeps documents apart, and learns."""

import re
from dataclasses import fields
from itertools import islice
from math import inf, nan
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llmfast.losses import linear_cross_entropy
from llmfast.models import Decoder, DecoderConfig
from llmfast.models.blocks import blocks_of
from llmfast.models.decoder import Block, rotate, rotation
from llmfast.models.depths import SequentialDepths
from llmfast.models.heads import ParallelHeads
from llmfast.models.sampling import Sampler
from llmfast.mtp import constant_weights, sequential_backward, speculative_generate, staged_weights


def small(**options: Any) -> Decoder:
    return Decoder(DecoderConfig(50, **{"width": 32, "layers": 2, "heads": 2} | options))


def test_hidden_states_and_unembedding() -> None:
    for tied in (True, False):
        model = small(tie_embeddings=tied)
        assert model(torch.randint(0, 50, (3, 7))).shape == (3, 7, 32)
        assert model.unembedding.shape == (50, 32)
        assert (model.unembedding is model.embedding.weight) == tied


def test_the_future_is_not_seen() -> None:
    model, tokens = small(), torch.randint(0, 50, (2, 9))
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 50
    a, b = model(tokens), model(changed)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.equal(a[:, 5:], b[:, 5:])


def test_packed_documents_are_computed_as_if_alone() -> None:
    model = small()
    first, second = torch.randint(0, 50, (1, 4)), torch.randint(0, 50, (1, 6))
    packed = model(
        torch.cat([first, second], 1),
        positions=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]),
        document_ids=torch.tensor([[0] * 4 + [1] * 6]),
    )
    torch.testing.assert_close(packed, torch.cat([model(first), model(second)], 1), rtol=1e-5, atol=1e-5)


def test_rotation_keeps_lengths_and_knows_only_distances() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> torch.Tensor:
        at = [rotation(torch.tensor([[p]]), 8, 10_000.0) for p in (i, j)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    torch.testing.assert_close(score(3, 1), score(103, 101), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(q, rotation(torch.tensor([[5]]), 8, 10_000.0)).norm(), q.norm())


def test_starts_at_the_entropy_of_a_uniform_guess() -> None:
    model, tokens = small(), torch.randint(0, 50, (4, 16))
    loss = linear_cross_entropy(model(tokens), model.unembedding, torch.randint(0, 50, (4, 16)))
    assert abs(loss.item() - torch.tensor(50.0).log().item()) < 0.1


def test_generates() -> None:
    model = small().eval()
    start = torch.tensor([1, 2, 3])
    greedy = model.generate(start, 5, context=4, temperature=0)
    assert greedy.shape == (8,) and torch.equal(greedy[:3], start)
    assert torch.equal(greedy, model.generate(start, 5, context=4, temperature=0))
    sampled = [model.generate(start, 20, context=4, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 4}, r"^width must be a multiple of 2 \* heads, 8; got 30$"),
        ({"layers": 0}, "layers must be positive; got 0"),
        ({"ffn_width": -1}, "^ffn_width must not be negative; got -1$"),
        *(({"rope_base": x}, f"^rope_base must be finite and above 0; got {x}$") for x in (0.0, -1.0, inf, nan)),
        *(({"norm_eps": x}, f"^norm_eps must be finite and not negative; got {x}$") for x in (-1e-5, inf, nan)),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_norms_may_have_no_epsilon() -> None:
    assert small(norm_eps=0.0).norm.eps == 0.0


@pytest.mark.parametrize("size", [0, -2])
@pytest.mark.parametrize("name", ["vocab_size", "width", "layers", "heads"])
def test_every_size_is_positive(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be positive; got {size}$"):
        DecoderConfig(**{"vocab_size": 50, "width": 32, "layers": 2, "heads": 2} | {name: size})


def test_a_size_alone_makes_a_small_plain_decoder() -> None:
    depths: dict[str, Any] = {"mtp_concat": "embedding_first", "mtp_hidden": "pre_norm"}
    depths |= {"mtp_repeated_layer": False, "mtp_detach": False}
    plain: dict[str, Any] = {"rope_base": 10_000.0, "norm_eps": 1e-5, "tie_embeddings": True, "mtp": "none"}
    assert DecoderConfig(7) == DecoderConfig(7, 192, 6, 6, ffn_width=0, mtp_heads=0, **plain, **depths)


@pytest.mark.parametrize(("width", "ffn"), [(24, 64), (26, 128), (48, 128), (50, 192), (192, 512), (4096, 10_944)])
def test_the_feed_forward_layer_is_8_thirds_as_wide_rounded_up(width: int, ffn: int) -> None:
    assert DecoderConfig(7, width, heads=1).hidden_ffn == ffn
    assert DecoderConfig(7, width, heads=1, ffn_width=5).hidden_ffn == 5


@pytest.mark.parametrize(("mtp", "targets"), [("none", 1), ("parallel", 3), ("sequential", 4), ("shared", 3)])
def test_tokens_that_are_predicted_from_a_row(mtp: Any, targets: int) -> None:
    assert DecoderConfig(7, mtp=mtp, mtp_heads=0 if mtp == "none" else 3).targets == targets


KINDS: list[dict[str, Any]] = [
    {"mtp": "parallel", "mtp_heads": 3},
    {"mtp": "sequential", "mtp_heads": 2},
    {"mtp": "sequential", "mtp_heads": 2, "mtp_hidden": "post_norm", "mtp_concat": "hidden_first"},
    {"mtp": "shared", "mtp_heads": 3},
]


def test_one_parallel_head_is_the_plain_decoder() -> None:
    """Compare parameters of the same seed, hidden states and gradients bit for bit."""
    models = []
    for options in ({}, {"mtp": "parallel", "mtp_heads": 1}):
        torch.manual_seed(0)
        models.append(small(tie_embeddings=False, **options))
    plain, parallel = models
    renamed = {name.replace("blocks.1.", "mtp.blocks.0."): p for name, p in plain.named_parameters()}
    assert renamed.keys() == dict(parallel.named_parameters()).keys()
    assert all(torch.equal(p, renamed[name]) for name, p in parallel.named_parameters())

    tokens = torch.randint(0, 50, (2, 9))
    hidden, heads = plain(tokens), parallel(tokens, all_heads=True)
    assert heads.shape == (1, 2, 9, 32)
    assert torch.equal(hidden, heads[0]) and torch.equal(hidden, parallel(tokens))
    hidden.square().sum().backward()
    heads.square().sum().backward()
    for name, p in parallel.named_parameters():
        assert (p.grad is None) == (renamed[name].grad is None)
        assert p.grad is None or torch.equal(p.grad, renamed[name].grad)  # type: ignore[arg-type]


def test_plain_decoders_have_the_parameters_they_had() -> None:
    names = dict(small().named_parameters()).keys()
    block = {"attention_norm", "attention.qkv", "attention.out", "ffn_norm", "ffn.gate_up", "ffn.out"}
    assert names == {f"blocks.{i}.{name}.weight" for i in (0, 1) for name in block} | {
        "embedding.weight",
        "norm.weight",
    }


@pytest.mark.parametrize("options", [{}, *KINDS, {"mtp": "sequential", "mtp_heads": 2, "mtp_repeated_layer": True}])
def test_blocks_are_the_layers_of_trunk_and_heads(options: dict[str, Any]) -> None:
    """They are compiled, recomputed and sharded as units: nothing smaller, and each once."""
    model = small(**options)
    assert [*blocks_of(model)] == [module for module in model.modules() if isinstance(module, Block)]


@pytest.mark.parametrize("options", KINDS)
def test_heads_share_the_hidden_state_of_the_next_token(options: dict[str, Any]) -> None:
    model, tokens = small(**options), torch.randint(0, 50, (2, 9))
    first, heads = model(tokens), model(tokens, all_heads=True)
    assert model.config.targets == 3
    if options["mtp"] == "shared":
        assert torch.equal(heads, first)
    else:
        assert heads.shape == (3, 2, 9, 32)
        torch.testing.assert_close(heads[0], first)
    assert small()(tokens, all_heads=True).shape == (1, 2, 9, 32)


@pytest.mark.parametrize("hidden", ["pre_norm", "post_norm"])
def test_depths_read_the_state_that_the_settings_name(hidden: Any) -> None:
    model, tokens = small(mtp="sequential", mtp_heads=2, mtp_hidden=hidden), torch.randint(0, 50, (2, 9))
    trunk = model.trunk(tokens)
    read = trunk.out if hidden == "pre_norm" else model.norm(trunk.out)
    assert isinstance(model.mtp, SequentialDepths) and model.mtp.hidden == hidden
    wanted = model.mtp(read, trunk.embedded, trunk.rope, trunk.mask)
    torch.testing.assert_close(model(tokens, all_heads=True)[1:], wanted)


@pytest.mark.parametrize("options", KINDS)
def test_heads_see_what_they_may(options: dict[str, Any]) -> None:
    """Head k at row t sees tokens up to t, and up to t + k where depths read on; never another document's."""
    model = small(**options)
    tokens = torch.randint(0, 50, (1, 10))
    documents = torch.tensor([[0] * 5 + [1] * 5])
    given = {"positions": torch.arange(5).repeat(1, 2), "document_ids": documents}
    before = model(tokens, all_heads=True, **given)
    for at in range(10):
        changed = tokens.clone()
        changed[0, at] = (changed[0, at] + 1) % 50
        after = model(changed, all_heads=True, **given)
        same = (before == after).all(-1).view(-1, 10)  # (K, T)
        for k in range(len(same)):
            reach = k if options["mtp"] == "sequential" else 0
            for t in range(10):
                unseen = documents[0, t] != documents[0, at] or at > t + reach
                assert same[k, t] if unseen else not same[k, t], (k, t, at)


def test_detached_depths_leave_the_trunk_alone() -> None:
    model = small(mtp="sequential", mtp_heads=2, mtp_detach=True)
    model(torch.randint(0, 50, (2, 9)), all_heads=True)[1:].sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.any())) == name.startswith("mtp."), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mtp": "both"}, "mtp must be one of 'none', 'parallel', 'sequential', 'shared'; got 'both'"),
        ({"mtp": "parallel"}, "mtp_heads must be at least 1 with mtp='parallel'; got 0"),
        ({"mtp_heads": 2}, "mtp_heads must be 0 with mtp='none'; got 2"),
        ({"mtp_concat": "x"}, "mtp_concat must be one of 'embedding_first', 'hidden_first'; got 'x'"),
        ({"mtp_hidden": "x"}, "mtp_hidden must be one of 'pre_norm', 'post_norm'; got 'x'"),
    ],
)
def test_refuses_heads_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_nothing_is_sampled_from_logits_that_are_not_finite() -> None:
    model = Decoder(DecoderConfig(16, width=8, layers=1, heads=2))
    model.embedding.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        model.generate(torch.zeros(1, dtype=torch.int64), 1, context=4)


# Every setting, by numbers.


def by_hand(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Compute hidden states (T, D) of one sequence (T,) in float64 from only the weights and the settings."""
    c, weights = model.config, {name: t.double() for name, t in model.state_dict().items()}
    T, half = len(tokens), c.width // c.heads // 2

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + c.norm_eps).sqrt() * weights[f"{name}.weight"]

    angles = torch.arange(T).double()[:, None] / c.rope_base ** (torch.arange(half).double() / half)

    def turned(x: torch.Tensor) -> torch.Tensor:
        turns = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turns.real, turns.imag], 1)

    x = weights["embedding.weight"][tokens]
    for i in range(c.layers):
        read = norm(x, f"blocks.{i}.attention_norm") @ weights[f"blocks.{i}.attention.qkv.weight"].T
        heads = []
        for q, k, v in zip(*(part.split(2 * half, 1) for part in read.chunk(3, 1)), strict=True):
            scores = turned(q) @ turned(k).T / (2 * half) ** 0.5
            heads.append(scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(1) @ v)
        x = x + torch.cat(heads, 1) @ weights[f"blocks.{i}.attention.out.weight"].T
        gate, up = (norm(x, f"blocks.{i}.ffn_norm") @ weights[f"blocks.{i}.ffn.gate_up.weight"].T).chunk(2, 1)
        x = x + (gate * gate.sigmoid() * up) @ weights[f"blocks.{i}.ffn.out.weight"].T
    return norm(x, "norm")


def random_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)


@pytest.mark.parametrize(
    "options", [{}, {"rope_base": 50.0, "norm_eps": 0.3, "ffn_width": 24, "tie_embeddings": False}]
)
def test_settings_reach_the_numbers(options: dict[str, Any]) -> None:
    model, tokens = small(**options).double(), torch.randint(0, 50, (9,))
    random_weights(model)
    torch.testing.assert_close(model(tokens[None])[0], by_hand(model, tokens), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("eps", [1e-5, 0.3])
@pytest.mark.parametrize("mtp", ["none", "parallel", "sequential"])
def test_every_norm_has_the_eps_of_the_settings(mtp: Any, eps: float) -> None:
    model = small(mtp=mtp, mtp_heads=0 if mtp == "none" else 2, norm_eps=eps)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert len(norms) == {"none": 5, "parallel": 7, "sequential": 15}[mtp]
    assert {norm.eps for norm in norms} == {eps}


@pytest.mark.parametrize("layers", [1, 8])
def test_weights_start_as_gpt2s(layers: int) -> None:
    """The last layer of each branch starts smaller, by the square root of the number of branches."""
    model = small(layers=layers, width=128, tie_embeddings=False)
    for name, p in model.named_parameters():
        if p.dim() == 2:
            wanted = 0.02 / (2 * layers) ** 0.5 if name.endswith("out.weight") else 0.02
            assert p.std().item() == pytest.approx(wanted, rel=0.05), name
            assert abs(p.mean().item()) < 0.05 * wanted, name
        else:
            assert p.eq(1).all(), name


@pytest.mark.parametrize("temperature", [0.0, 0.5, 2.0])
def test_samples_from_the_last_tokens_at_a_temperature(temperature: float) -> None:
    model, tokens = small(), torch.randint(0, 50, (7,))
    random_weights(model)
    found = model.generate(tokens, 12, context=4, temperature=temperature, generator=torch.Generator().manual_seed(3))
    generator, wanted = torch.Generator().manual_seed(3), tokens
    with torch.no_grad():
        for _ in range(12):
            logits = model(wanted[-4:][None])[0, -1] @ model.unembedding.T
            p = (logits / temperature).softmax(0) if temperature else logits.eq(logits.max()).float()
            token = torch.multinomial(p, 1, generator=generator) if temperature else p.argmax()[None]
            wanted = torch.cat([wanted, token])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"top_p": 0.3}, {"temperature": 2.0, "top_p": 0.6}])
@pytest.mark.parametrize("context", [4, 40])
def test_every_way_to_generate_has_the_settings_of_a_sampler(options: dict[str, float], context: int) -> None:
    """The temperature is 0.8 where none is given, and no token is left out."""
    model, tokens = small(), torch.randint(0, 50, (7,))
    random_weights(model)

    def chance() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    sampler = Sampler(**{"temperature": 0.8, "top_p": 1.0} | options, generator=chance())
    wanted = torch.cat([tokens, *islice(model.stream(tokens, context=context, sampler=sampler), 12)])
    assert torch.equal(model.generate(tokens, 12, context=context, generator=chance(), **options), wanted)
    (found,) = model.generate_batch([tokens], 12, context=context, generator=chance(), **options)
    assert torch.equal(found, wanted)
    greedy = torch.cat([tokens, *islice(model.stream(tokens, context=context), 12)])
    assert torch.equal(greedy, model.generate(tokens, 12, context=context, temperature=0))


def test_generating_keeps_nothing_for_gradients() -> None:
    model, prompt, kept = small(), torch.tensor([1, 2, 3]), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t), lambda t: t):
        model.generate(prompt, 3, context=4)
        model.generate_batch([prompt, prompt[:2]], 3, context=4)
        assert kept == []
        next(model.stream(prompt, context=4))
        assert torch.is_grad_enabled()
        model(prompt[None])
    assert kept


@pytest.mark.parametrize(
    "wrong", [[1, 2], np.ones((1, 2)), None, nn.Linear(2, 2)], ids=lambda wrong: type(wrong).__name__
)
def test_what_is_no_tensor_is_refused_by_its_name(wrong: Any) -> None:
    model, tokens = small(mtp="sequential", mtp_heads=1), torch.arange(4)
    depths = model.mtp
    assert depths is not None
    h = torch.zeros(1, 4, 32)
    calls: dict[str, list[Any]] = {
        "tokens": [model, model.trunk, lambda t: next(model.stream(t, context=4)), lambda t: generated(model, t)],
        "prompts[1]": [lambda t: model.generate_batch([tokens, t], 2, context=4)],
        "hidden": [lambda t: depths(t, h)],
        "embeddings": [lambda t: depths(h, t)],
        "trunk_out": [ParallelHeads(nn.Identity, 2), lambda t: sequential_backward(t, [nn.Identity()], lambda k, x: x)],
        "logits": [Sampler()],
    }
    if wrong is not None:
        calls["positions"] = [lambda t: model(tokens[None], positions=t)]
        calls["document_ids"] = [lambda t: model(tokens[None], document_ids=t), lambda t: depths(h, h, document_ids=t)]
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(TypeError, match=rf"^{re.escape(name)} must be a tensor; got (an? |None)"):
                function(wrong)


@pytest.mark.parametrize("way", ["stream", "generate", "generate_batch"])
def test_no_way_to_generate_takes_what_it_cannot_go_on_from(way: str) -> None:
    model, prompt = small(), torch.arange(3)

    def call(tokens: torch.Tensor, count: int, context: int) -> Any:
        if way == "stream":
            return [*islice(model.stream(tokens, context=context), count)]
        if way == "generate":
            return model.generate(tokens, count, context=context)
        return model.generate_batch([prompt, tokens], count, context=context)

    name, at = ("prompts", " at 1") if way == "generate_batch" else ("tokens", "")
    for wrong in (prompt[:0], prompt[None]):
        told = rf"^{name} must be \(T,\) with T > 0; got {re.escape(str(tuple(wrong.shape)))} torch.int64 on cpu{at}$"
        with pytest.raises(ValueError, match=told):
            call(wrong, 1, 4)
    for context in (0, -2):
        with pytest.raises(ValueError, match=rf"^context must be above 0; got {context}$"):
            call(prompt, 1, context)
    if way != "stream":
        with pytest.raises(ValueError, match=r"^count must not be negative; got -1$"):
            call(prompt, -1, 4)
        with pytest.raises(ValueError, match=rf"^{name} must be "):
            call(prompt[:0], 0, 4)
        assert len(call(prompt, 0, 1)) == {"generate": 3, "generate_batch": 2}[way]
    assert len(call(prompt, 1, 1)) == {"stream": 1, "generate": 4, "generate_batch": 2}[way]


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"context": 0}, "context must be above 0; got 0"),
        ({"temperature": -1.0}, "temperature must be finite and not negative; got -1.0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]; got 0.0"),
    ],
)
def test_arguments_are_checked_even_if_nothing_is_generated(wrong: dict[str, Any], message: str, count: int) -> None:
    model, prompt, options = small(), torch.arange(3), {"context": 4} | wrong
    for call in (
        lambda: model.generate(prompt, count, **options),
        lambda: model.generate_batch([prompt], count, **options),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call()


def generated(model: Decoder, tokens: Any) -> Any:
    return speculative_generate(model, tokens, 2)


@pytest.mark.parametrize("wrong", ["2", None, [1], True], ids=str)
def test_what_is_no_number_is_refused_by_its_name(wrong: Any) -> None:
    model, tokens = small(mtp="sequential", mtp_heads=1), torch.arange(4)
    calls: dict[str, list[Any]] = {
        "count": [
            lambda n: model.generate(tokens, n, context=4),
            lambda n: model.generate_batch([tokens], n, context=4),
            lambda n: speculative_generate(model, tokens, n),
        ],
        "context": [lambda n: model.generate(tokens, 2, context=n)],
        "temperature": [Sampler],
        "top_p": [lambda n: Sampler(0.5, n)],
        "n": [lambda n: ParallelHeads(nn.Identity, n)],
        "depths": [lambda n: SequentialDepths(nn.Identity, n, 8)],
        "width": [lambda n: SequentialDepths(nn.Identity, 2, n)],
        "K": [lambda n: constant_weights(n, 1.0)],
        "weight": [lambda n: constant_weights(2, n)],
        "fraction": [lambda n: staged_weights(n, 2)],
    }
    for name, functions in calls.items():
        for function in functions:
            with pytest.raises(TypeError, match=rf"^{name} must be (an int|a number); got "):
                function(wrong)
    for field in fields(DecoderConfig):
        if field.type in (int, float):
            with pytest.raises(TypeError, match=rf"^{field.name} must be (an int|a number); got "):
                DecoderConfig(**{"vocab_size": 50, field.name: wrong})


def test_a_decoder_takes_its_config() -> None:
    with pytest.raises(TypeError, match=r"^config must be a DecoderConfig; got a dict$"):
        Decoder({"vocab_size": 50})  # type: ignore[arg-type]
