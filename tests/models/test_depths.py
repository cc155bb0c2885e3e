"""Sequential depths against the paper's formula, written out row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmfast.models.depths import Depth, ahead
from llmfast.mtp import SequentialDepths

B, T, D = 2, 7, 4


def depths(count: int = 2, **options: Any) -> SequentialDepths:
    torch.manual_seed(0)
    module = SequentialDepths(lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh()), count, D, **options).double()
    for name, p in module.named_parameters():
        if "norm" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    return module


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, embeddings = torch.randn(2, B, T, D, generator=generator, dtype=torch.float64)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 2, 2, 2, 2]], dtype=torch.int32)
    return hidden, embeddings, documents


def rms(x: Tensor, gain: Tensor, eps: float = 1e-5) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * gain


def reference(
    module: SequentialDepths, hidden: Tensor, embeddings: Tensor, documents: Tensor | None, eps: float = 1e-5
) -> Tensor:
    out = torch.empty(module.depths, B, T, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):  # rows do not meet: the blocks of these tests act on each alone
            h = hidden[b, t]
            for k in range(1, module.depths + 1):
                layer = module.layers[0 if len(module.layers) == 1 else k - 1]
                assert isinstance(layer, Depth)
                there = t + k < T and (documents is None or documents[b, t + k] == documents[b, t])
                e = embeddings[b, t + k] if there else torch.zeros(D, dtype=torch.float64)
                e, h = rms(e, layer.enorm.weight, eps), rms(h, layer.hnorm.weight, eps)
                pair = torch.cat([e, h] if module.concat_order == "embedding_first" else [h, e])
                h = layer.block(layer.eh_proj.weight @ pair)
                out[k - 1, b, t] = rms(h, layer.norm.weight, eps)
                h = h if module.hidden == "pre_norm" else out[k - 1, b, t]
    return out


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"concat_order": "hidden_first"},
        {"hidden": "post_norm"},
        {"repeated_layer": True},
        {"detach": True, "norm_eps": 1e-5},
        {"norm_eps": 0.25},
    ],
)
def test_is_the_formula(options: dict[str, Any], packed: bool) -> None:
    module = depths(3, **options)
    hidden, embeddings, documents = inputs()
    given = documents if packed else None
    torch.testing.assert_close(
        module(hidden, embeddings, document_ids=given),
        reference(module, hidden, embeddings, given, options.get("norm_eps", 1e-5)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_repeated_layers_share_their_parameters() -> None:
    count = sum(p.numel() for p in depths(1).parameters())
    assert sum(p.numel() for p in depths(3, repeated_layer=True).parameters()) == count
    assert sum(p.numel() for p in depths(3).parameters()) == 3 * count


@pytest.mark.parametrize("detach", [False, True])
def test_detach_keeps_gradients_from_the_trunk(detach: bool) -> None:
    module = depths(detach=detach)
    hidden, embeddings, documents = inputs()
    hidden.requires_grad_()
    embeddings.requires_grad_()
    module(hidden, embeddings, document_ids=documents).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())
    assert (hidden.grad is None) == (embeddings.grad is None) == detach


def test_looking_ahead() -> None:
    x = torch.arange(1.0, 6.0).view(1, 5, 1)
    documents = torch.tensor([[0, 0, 0, 1, 1]])
    assert ahead(x, 1, None).flatten().tolist() == [2, 3, 4, 5, 0]
    assert ahead(x, 1, documents).flatten().tolist() == [2, 3, 0, 5, 0]
    assert ahead(x, 2, documents).flatten().tolist() == [3, 0, 0, 0, 0]
    for k in (5, 9):
        assert ahead(x, k, documents).flatten().tolist() == [0] * 5
    x[0, 3] = torch.nan  # of another document, and not just multiplied by 0
    assert ahead(x, 1, documents)[0, 2] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "depths must be at least 1; got 0"),
        ({"count": -1}, "depths must be at least 1; got -1"),
        ({"concat_order": "both"}, "concat_order must be one of 'embedding_first', 'hidden_first'; got 'both'"),
        ({"hidden": "norm"}, "hidden must be one of 'pre_norm', 'post_norm'; got 'norm'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depths(**options)


def test_refuses_shapes_that_do_not_fit() -> None:
    module, (hidden, embeddings, documents) = depths(), inputs()
    with pytest.raises(ValueError, match=r"hidden must be \(B, T, 4\); got \(2, 7, 3\)"):
        module(hidden[..., :3], embeddings)
    with pytest.raises(ValueError, match=r"embeddings must be \(2, 7, 4\) like hidden; got \(2, 6, 4\)"):
        module(hidden, embeddings[:, 1:])
    with pytest.raises(ValueError, match=r"document_ids must be \(2, 7\); got \(2, 6\)"):
        module(hidden, embeddings, document_ids=documents[:, 1:])


def test_blocks_receive_the_further_arguments_and_advance_goes_depth_by_depth() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float, shift: Tensor) -> Tensor:
            return x * scale + shift

    for options in ({}, {"hidden": "post_norm", "repeated_layer": True}):
        module = SequentialDepths(Scaled, 3, D, **options).double()
        hidden, embeddings, _ = inputs()
        args = 2.0, torch.ones(D, dtype=torch.float64)
        found, state = module(hidden, embeddings, *args), hidden
        for k in (1, 2, 3):
            state, out = module.advance(k, state, ahead(embeddings, k, None), *args)
            assert torch.equal(found[k - 1], out)
            assert torch.equal(state, out) == (module.hidden == "post_norm")


@pytest.mark.parametrize("eps", [-1e-5, float("inf"), float("nan")])
def test_refuses_an_epsilon_that_is_none(eps: float) -> None:
    with pytest.raises(ValueError, match=f"^norm_eps must be finite and not negative; got {eps}$"):
        SequentialDepths(nn.Identity, 1, 4, norm_eps=eps)


def test_refuses_no_width() -> None:
    with pytest.raises(ValueError, match="width must be at least 1; got 0"):
        SequentialDepths(nn.Identity, 1, 0)
