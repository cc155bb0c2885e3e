"""Sequential depths: each predicts one token further from the depth before it (DeepSeek-V3, arXiv:2412.19437)."""

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmfast._checks import describe, expect
from llmfast._kinds import expect_kinds, expect_tensors, kind_of

ConcatOrder = Literal["embedding_first", "hidden_first"]
HiddenKind = Literal["pre_norm", "post_norm"]


_SIZES = {"depths": kind_of(int), "width": kind_of(int), "norm_eps": kind_of(float)}


class SequentialDepths(nn.Module):
    """Depths after a trunk that predicts the next token; depth k at row t predicts token t + 1 + k, k = 1..depths.

        h_0 = the trunk's output
        h_k = block_k(eh_proj_k([enorm_k(Emb(x_{t+k})); hnorm_k(h_{k-1})]))

    The unembedding receives norm_k(h_k). Embedding and unembedding belong to the trunk and are passed by the caller.
    """

    def __init__(
        self,
        make_block: Callable[[], nn.Module],
        depths: int,
        width: int,
        *,
        concat_order: ConcatOrder = "embedding_first",
        hidden: HiddenKind = "pre_norm",
        repeated_layer: bool = False,
        detach: bool = False,
        norm_eps: float = 1e-5,
    ) -> None:
        """Create the depths.

        Args:
            make_block: Called once per depth; a block is any module `block(x, *args)` from (B, T, D) to (B, T, D).
            depths: How many there are.
            width: D, the width of the hidden states and of the embedding.
            concat_order: What `eh_proj` reads first. DeepSeek's paper says the hidden state, its weights the embedding.
            hidden: What a depth reads from the previous one, and so what the caller has to pass: the residual stream
                ("pre_norm"), or the stream after the norm for the unembedding ("post_norm").
            repeated_layer: Use the same module for all depths.
            detach: Depths learn from the trunk's hidden states and embeddings but do not change them. The loss
                handles the unembedding: `mtp_cross_entropy(detach_unembedding=)`.
        """
        super().__init__()
        expect_kinds(_SIZES, {"depths": depths, "width": width, "norm_eps": norm_eps})
        expect(depths >= 1, f"depths must be at least 1; got {depths}")
        expect(width >= 1, f"width must be at least 1; got {width}")
        expect(0 <= norm_eps < math.inf, f"norm_eps must be finite and not negative; got {norm_eps}")
        for name, value, kinds in (("concat_order", concat_order, ConcatOrder), ("hidden", hidden, HiddenKind)):
            choices = get_args(kinds)
            expect(value in choices, f"{name} must be one of {str(choices)[1:-1]}; got {value!r}")
        self.depths, self.width = depths, width
        self.concat_order, self.hidden, self.detach = concat_order, hidden, detach
        self.layers = nn.ModuleList(
            [Depth(make_block(), width, norm_eps) for _ in range(1 if repeated_layer else depths)]
        )

    def forward(
        self,
        hidden: Tensor,  # (B, T, D), the trunk's, before or after its norm as `self.hidden` says
        embeddings: Tensor,  # (B, T, D), embeddings of the same rows' input tokens
        *args: Any,
        document_ids: Tensor | None = None,  # (B, T)
    ) -> Tensor:
        """Return hidden states (depths, B, T, D), normalised and ready for the unembedding; `args` go to every block.

        If token t + k is outside the row or in another document, its embedding is replaced by zeros.
        """
        optional = {} if document_ids is None else {"document_ids": document_ids}
        expect_tensors(hidden=hidden, embeddings=embeddings, **optional)
        expect(
            hidden.dim() == 3 and hidden.shape[-1] == self.width,
            f"hidden must be (B, T, {self.width}); got {describe(hidden)}",
        )
        expect(
            embeddings.shape == hidden.shape,
            f"embeddings must be {tuple(hidden.shape)} like hidden; got {describe(embeddings)}",
        )
        expect(
            document_ids is None or document_ids.shape == hidden.shape[:2],
            f"document_ids must be {tuple(hidden.shape[:2])}; got "
            f"{describe(document_ids) if document_ids is not None else None}",
        )
        if self.detach:
            hidden, embeddings = hidden.detach(), embeddings.detach()
        outs = []
        for k in range(1, self.depths + 1):
            hidden, out = self.advance(k, hidden, ahead(embeddings, k, document_ids), *args)
            outs.append(out)
        return torch.stack(outs)

    def advance(self, k: int, hidden: Tensor, embeddings: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        """Run depth k only: from the state of depth k - 1 and Emb(x_{t+k}) to its own state and its output.

        All four are (B, T, D). Used for decoding, where x_{t+k} is known only after depth k - 1 has run.
        """
        layer = self.layers[(k - 1) % len(self.layers)]
        assert isinstance(layer, Depth)
        parts = [layer.enorm(embeddings), layer.hnorm(hidden)]
        x = layer.eh_proj(torch.cat(parts if self.concat_order == "embedding_first" else parts[::-1], dim=-1))
        x = layer.block(x, *args)
        out: Tensor = layer.norm(x)
        return (x if self.hidden == "pre_norm" else out), out


class Depth(nn.Module):
    """Parameters of one depth."""

    def __init__(self, block: nn.Module, width: int, norm_eps: float) -> None:
        super().__init__()
        self.enorm = nn.RMSNorm(width, eps=norm_eps)
        self.hnorm = nn.RMSNorm(width, eps=norm_eps)
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.block = block
        self.norm = nn.RMSNorm(width, eps=norm_eps)


def ahead(x: Tensor, k: int, document_ids: Tensor | None) -> Tensor:
    """Return row t + k at row t, (B, T, D); zeros if there is no such row in the same document."""
    T = x.shape[1]
    k = min(k, T)
    out = F.pad(x[:, k:], (0, 0, 0, k))
    if document_ids is not None:
        other = F.pad(document_ids[:, k:] != document_ids[:, : T - k], (0, k), value=True)
        out = out.masked_fill(other[..., None], 0)
    return out
