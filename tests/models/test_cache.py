"""Decoding with kept keys and values: the numbers of reading everything again, at the cost of the new rows."""

import re
from typing import Any

import pytest
import torch

from llmfast.models import Decoder, DecoderConfig
from llmfast.models.cache import KeyValues


def small(**options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(50, **{"width": 32, "layers": 3, "heads": 2} | options)).double().eval()


@pytest.mark.parametrize("parts", [(9,), (1,) * 9, (4, 1, 3, 1), (1, 8)])
@pytest.mark.parametrize("mtp", [{}, {"mtp": "parallel", "mtp_heads": 2}, {"mtp": "sequential", "mtp_heads": 1}])
def test_parts_equal_the_whole(parts: tuple[int, ...], mtp: dict[str, Any]) -> None:
    model, tokens, cache = small(**mtp), torch.randint(0, 50, (2, 9)), []
    cache = model.new_cache()
    found = torch.cat([model(part, cache=cache) for part in tokens.split(parts, 1)], 1)
    torch.testing.assert_close(found, model(tokens), rtol=1e-10, atol=1e-12)
    assert [kept.rows for kept in cache] == [9, 9, 9]


def test_rows_can_be_taken_back() -> None:
    model, tokens = small(), torch.randint(0, 50, (1, 200))  # more than the first room
    cache = model.new_cache()
    model(tokens[:, :150], cache=cache)
    model(torch.randint(0, 50, (1, 9)), cache=cache)
    for kept in cache:
        kept.crop(150)
        kept.crop(151)  # there are no more
    found = model(tokens[:, 150:], cache=cache)
    torch.testing.assert_close(found, model(tokens)[:, 150:], rtol=1e-10, atol=1e-12)


def test_what_is_returned_is_what_was_added() -> None:
    kept, parts = KeyValues(), [torch.randn(2, 3, n, 4) for n in (5, 60, 1, 200)]
    for i, part in enumerate(parts):
        k, v = kept.extend(part, -part)
        assert torch.equal(k, torch.cat(parts[: i + 1], 2)) and torch.equal(v, -k)


def test_each_new_token_computes_one_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds within the context; beyond it, the positions of all tokens change."""
    model, rows = small(), []
    block = model.blocks[0].forward
    monkeypatch.setattr(model.blocks[0], "forward", lambda x, *args: (rows.append(x.shape[1]), block(x, *args))[1])
    model.generate(torch.randint(0, 50, (7,)), 6, context=10, temperature=0)
    assert rows == [7, 1, 1, 1, 10, 10]


@pytest.mark.parametrize("context", [4, 30])
def test_greedy_equals_greedy_without_a_cache(context: int) -> None:
    model, tokens = small(), torch.randint(0, 50, (3,))
    for p in model.parameters():
        torch.nn.init.normal_(p)
    wanted = tokens
    with torch.no_grad():
        for _ in range(20):
            logits = model(wanted[None, -context:])[0, -1] @ model.unembedding.T
            wanted = torch.cat([wanted, logits.argmax(keepdim=True)])
    assert torch.equal(model.generate(tokens, 20, context=context, temperature=0), wanted)
    assert len(wanted.unique()) > 5


def test_compiled_blocks_are_not_compiled_for_every_length() -> None:
    count = 0

    def backend(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        nonlocal count
        count += 1
        return graph.forward

    torch.compiler.reset()
    model, tokens = small(), torch.randint(0, 50, (3,))
    wanted = model.generate(tokens, 20, context=99, temperature=0)
    for block in model.blocks:
        block.compile(backend=backend)
    assert torch.equal(model.generate(tokens, 6, context=99, temperature=0), wanted[:9])
    before = count
    assert torch.equal(model.generate(tokens, 20, context=99, temperature=0), wanted)
    assert before > 0 and count == before


def test_refuses() -> None:
    model, tokens = small(), torch.randint(0, 50, (1, 3))
    with pytest.raises(ValueError, match=r"^cache must be None with all_heads: the further heads have none$"):
        model(tokens, all_heads=True, cache=model.new_cache())
    with pytest.raises(ValueError, match=r"^document_ids must be None with a cache, which is of one document$"):
        model(tokens, document_ids=torch.zeros_like(tokens), cache=model.new_cache())


@pytest.mark.parametrize("context", [6, 12, 40])
@pytest.mark.parametrize("mtp", [{}, {"mtp": "parallel", "mtp_heads": 2}, {"mtp": "sequential", "mtp_heads": 1}])
def test_prompts_of_a_batch_go_on_as_each_alone(context: int, mtp: dict[str, Any]) -> None:
    """Prompts shorter and longer than the context, which ends in the midst of others."""
    model = small(**mtp)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    prompts = [torch.randint(0, 50, (n,)) for n in (3, 15, 1, 9, 3)]
    found = model.generate_batch(prompts, 8, context=context, temperature=0)
    wanted = [model.generate(prompt, 8, context=context, temperature=0) for prompt in prompts]
    assert [row.tolist() for row in found] == [row.tolist() for row in wanted]
    stop = int(wanted[0][5])
    until = model.generate_batch(prompts, 8, context=context, temperature=0, stop=stop)
    for row, whole, prompt in zip(until, wanted, prompts):
        new = whole[len(prompt) :].tolist()
        made = new.index(stop) + 1 if stop in new else 8  # and not where the prompt itself has it
        assert row.tolist() == whole[: len(prompt) + made].tolist()


def test_a_batch_shares_passes_and_its_random_numbers_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = small(), []
    block = model.blocks[0].forward
    monkeypatch.setattr(model.blocks[0], "forward", lambda x, *args: (read.append(x.shape[:2]), block(x, *args))[1])
    prompts = [torch.randint(0, 50, (n,)) for n in (4, 6)]
    one, two = (
        model.generate_batch(prompts, 3, context=20, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert read[: len(read) // 2] == [(2, 4), (2, 1), (2, 1), (2, 1), (2, 1)]
    assert [row.tolist() for row in one] == [row.tolist() for row in two] and [len(row) for row in one] == [7, 9]
    assert model.generate_batch([], 3, context=20) == []
    read.clear()
    assert torch.equal(model.generate_batch(prompts, 0, context=20)[1], prompts[1]) and read == []
    with pytest.raises(ValueError, match=r"prompts must be \(T,\) with T > 0; got \(0,\) torch.int64 on cpu at 1"):
        model.generate_batch([prompts[0], prompts[0][:0]], 3, context=20)
    with pytest.raises(ValueError, match="count must not be negative; got -1"):
        model.generate_batch(prompts, -1, context=20)


@pytest.mark.parametrize(("wrong", "told"), [("5", "'5'"), (5.0, "5.0"), ([5], "a list"), (True, "True")])
def test_a_token_to_stop_at_is_a_number(wrong: Any, told: str) -> None:
    with pytest.raises(TypeError, match=rf"^stop must be an int or None; got {re.escape(told)}$"):
        small().generate_batch([torch.tensor([1])], 0, context=20, stop=wrong)
