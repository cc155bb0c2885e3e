"""Tests that Hugging Face models compute the same under other default devices and dtypes of torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfast.optim import FusedAdamW
from support.defaults import DEFAULTS, assert_same, defaults

transformers = pytest.importorskip("transformers", reason="transformers is missing: make test-integrations")

from llmfast.integrations.mtp import add_mtp, load_mtp, set_head_weights  # noqa: E402
from llmfast.integrations.transformers import fuse_loss  # noqa: E402

Make = Callable[..., Any]
WEIGHTS = [1.0, 0.3, 0.1]


def step(model: Any) -> Any:
    ids = torch.arange(3, 27, dtype=torch.int64, device="cpu").view(2, 12)
    optimizer = FusedAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.detach(), [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("kind", DEFAULTS)
@pytest.mark.parametrize("heads", ["none", "parallel", "sequential"])
def test_a_step_under_other_defaults(make: Make, heads: str, kind: str) -> None:
    def prepared() -> Any:
        model = make("llama")
        return fuse_loss(model) if heads == "none" else add_mtp(model, 2, heads, head_weights=WEIGHTS)  # type: ignore[arg-type]

    wanted = step(prepared())
    model = prepared()
    with defaults(**DEFAULTS[kind]):
        assert_same(step(model), wanted)


@pytest.mark.parametrize("kind", DEFAULTS)
def test_heads_given_under_other_defaults(make: Make, kind: str) -> None:
    model = make("llama")
    with defaults(**DEFAULTS[kind]):
        add_mtp(model, 2, head_weights=WEIGHTS)
    assert_same(model.mtp_weights, torch.tensor(WEIGHTS))
    assert_same(step(model), step(add_mtp(make("llama"), 2, head_weights=WEIGHTS)))
    with defaults(**DEFAULTS[kind]):
        set_head_weights(model, WEIGHTS)
    assert_same(model.mtp_weights, torch.tensor(WEIGHTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_model_has_its_head_weights(make: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    """While it loads a model, transformers makes that model's dtype the default."""
    model = add_mtp(make("llama").to(dtype), 2, head_weights=WEIGHTS)
    model.save_pretrained(tmp_path)
    loaded = load_mtp(tmp_path).train()
    assert next(loaded.parameters()).dtype == dtype
    assert_same(loaded.mtp_weights, model.mtp_weights)
