"""A small decoder-only transformer: RMSNorm, RoPE, SwiGLU, scaled-dot-product attention.

In training it returns hidden states instead of logits: the loss takes them together with the unembedding matrix.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from llmfast._checks import describe, expect
from llmfast._kinds import expect_kinds, expect_tensors, kind_of, kinds_of, what
from llmfast.models.cache import KeyValues
from llmfast.models.depths import ConcatOrder, HiddenKind, SequentialDepths
from llmfast.models.heads import ParallelHeads
from llmfast.models.sampling import Sampler

MTP = Literal["none", "parallel", "sequential", "shared"]


@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a `Decoder`."""

    vocab_size: int
    width: int = 192  # D
    layers: int = 6
    heads: int = 6
    ffn_width: int = 0  # width of the SwiGLU; 0 means 8/3 of the model width, rounded up to a multiple of 64
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    mtp: MTP = "none"  # how further tokens are predicted
    mtp_heads: int = 0  # parallel: heads, the first being the last of `layers`; sequential: depths; shared: targets
    mtp_concat: ConcatOrder = "embedding_first"  # this and the following fields: options of `SequentialDepths`
    mtp_hidden: HiddenKind = "pre_norm"
    mtp_repeated_layer: bool = False
    mtp_detach: bool = False

    def __post_init__(self) -> None:
        expect_kinds(_CONFIG, vars(self))
        for name, kinds in (("mtp", MTP), ("mtp_concat", ConcatOrder), ("mtp_hidden", HiddenKind)):
            choices = get_args(kinds)
            value = getattr(self, name)
            expect(value in choices, f"{name} must be one of {str(choices)[1:-1]}; got {value!r}")
        if self.mtp == "none":
            expect(self.mtp_heads == 0, f"mtp_heads must be 0 with mtp='none'; got {self.mtp_heads}")
        else:
            expect(self.mtp_heads >= 1, f"mtp_heads must be at least 1 with mtp={self.mtp!r}; got {self.mtp_heads}")
        for name in ("vocab_size", "width", "layers", "heads"):
            expect(getattr(self, name) > 0, f"{name} must be positive; got {getattr(self, name)}")
        twice = 2 * self.heads  # rotary embeddings turn pairs of a head's numbers
        expect(self.width % twice == 0, f"width must be a multiple of 2 * heads, {twice}; got {self.width}")
        expect(self.ffn_width >= 0, f"ffn_width must not be negative; got {self.ffn_width}")
        expect(0 < self.rope_base < math.inf, f"rope_base must be finite and above 0; got {self.rope_base}")
        expect(0 <= self.norm_eps < math.inf, f"norm_eps must be finite and not negative; got {self.norm_eps}")

    @property
    def targets(self) -> int:
        """Number of tokens predicted from each row (K)."""
        return {"none": 1, "sequential": self.mtp_heads + 1}.get(self.mtp, self.mtp_heads)

    @property
    def hidden_ffn(self) -> int:
        return self.ffn_width or -(-8 * self.width // (3 * 64)) * 64


_CONFIG = kinds_of(DecoderConfig)


class Trunk(NamedTuple):
    """Input and output of a decoder's `blocks`."""

    embedded: Tensor  # (B, T, D)
    out: Tensor  # (B, T, D), before the norm
    rope: Tensor  # (2, B, 1, T, head_width / 2)
    mask: Tensor | None  # (B, 1, T, T), or None for causal attention


class Decoder(nn.Module):
    """Transformer from token ids to hidden states; `unembedding` is the matrix that turns these into logits."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if not isinstance(config, DecoderConfig):
            raise TypeError(f"config must be a DecoderConfig; got {what(config)}")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        in_trunk = config.layers - (config.mtp == "parallel")
        self.blocks = nn.ModuleList([Block(config) for _ in range(in_trunk)])
        self.mtp = _mtp(config)
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocab_size, bias=False)
        if not self.embedding.weight.is_meta:  # for which torch takes longer than for the numbers of a small model
            self._draw_weights()

    def _draw_weights(self) -> None:
        self.apply(_init)
        # Residual branches start small, so that depth does not scale the residual stream (GPT-2).
        for block in self.modules():
            if isinstance(block, Block):
                for out in (block.attention.out, block.ffn.out):
                    nn.init.normal_(out.weight, std=0.02 / (2 * self.config.layers) ** 0.5)

    @property
    def unembedding(self) -> Tensor:
        """Matrix from hidden states to logits, (V, D)."""
        return self.embedding.weight if self.head is None else self.head.weight

    def forward(
        self,
        tokens: Tensor,  # (B, T) int64
        *,
        positions: Tensor | None = None,  # (B, T), default 0..T-1
        document_ids: Tensor | None = None,  # (B, T); tokens attend only within their document
        all_heads: bool = False,
        cache: Sequence[KeyValues] | None = None,
    ) -> Tensor:
        """Return hidden states (B, T, D) for the next token, normalised and ready for the unembedding.

        With `all_heads`, return those of every head, (K, B, T, D), as `mtp_cross_entropy` takes them. With mtp="shared"
        all heads share one, so the shape stays (B, T, D).

        With a `cache`, which `new_cache` makes, `tokens` follow those of earlier calls with the same cache. It does not
        go with `all_heads` or `document_ids`.
        """
        expect(cache is None or not all_heads, "cache must be None with all_heads: the further heads have none")
        trunk = self.trunk(tokens, positions=positions, document_ids=document_ids, cache=cache)
        if not all_heads:
            return self.next_hidden(trunk, cache)
        if isinstance(self.mtp, ParallelHeads):
            heads: Tensor = self.norm(self.mtp(trunk.out, trunk.rope, trunk.mask))
            return heads
        hidden: Tensor = self.norm(trunk.out)
        if self.config.mtp == "shared":
            return hidden
        if self.mtp is None:
            return hidden[None]
        read = trunk.out if self.mtp.hidden == "pre_norm" else hidden
        further = self.mtp(read, trunk.embedded, trunk.rope, trunk.mask, document_ids=document_ids)
        return torch.cat([hidden[None], further])

    def next_hidden(self, trunk: Trunk, cache: Sequence[KeyValues] | None = None) -> Tensor:
        """Return the hidden states (B, T, D) for the next token from those of the trunk."""
        out = trunk.out
        if isinstance(self.mtp, ParallelHeads):
            out = self.mtp.blocks[0](out, trunk.rope, trunk.mask, cache[-1] if cache else None)
        hidden: Tensor = self.norm(out)
        return hidden

    def new_cache(self) -> list[KeyValues]:
        """Make an empty cache: one for each layer that the next token takes."""
        return [KeyValues() for _ in range(self.config.layers)]

    def trunk(
        self,
        tokens: Tensor,  # (B, T) int64
        *,
        positions: Tensor | None = None,  # (B, T)
        document_ids: Tensor | None = None,  # (B, T)
        cache: Sequence[KeyValues] | None = None,
    ) -> Trunk:
        """Run the part before the final norm and the heads, with the same arguments as the whole model."""
        optional = {"positions": positions, "document_ids": document_ids}
        expect_tensors(tokens=tokens, **{name: t for name, t in optional.items() if t is not None})
        expect(
            cache is None or document_ids is None, "document_ids must be None with a cache, which is of one document"
        )
        if positions is None:
            begin = cache[0].rows if cache else 0
            end = begin + tokens.shape[1]
            positions = torch.arange(begin, end, dtype=torch.int64, device=tokens.device).expand_as(tokens)
        rope = rotation(positions, self.config.width // self.config.heads, self.config.rope_base)
        mask = None
        if document_ids is not None:
            mask = (document_ids[:, None, :, None] == document_ids[:, None, None, :]).tril()  # (B, 1, T, T)
        x = embedded = self.embedding(tokens)
        for i, block in enumerate(self.blocks):
            x = block(x, rope, mask, cache[i] if cache else None)
        return Trunk(embedded, x, rope, mask)

    @torch.no_grad()
    def stream(self, tokens: Tensor, *, context: int, sampler: Sampler | None = None) -> Iterator[Tensor]:
        """Yield tokens (1,) that continue `tokens`, (T,) int64 and not empty, without end.

        The model sees the last `context` tokens. As long as these are all there are, a token costs one row; then every
        token costs `context` rows, because the positions of all others change. The default sampler is greedy.

        Raises:
            ValueError: The model's logits are not finite, so that there is nothing to sample from; or `tokens` is not
                (T,) with T > 0, or `context` is not above 0.
        """
        _expect_context(context)
        _expect_prompt("tokens", tokens)
        choose, cache = sampler or Sampler(), self.new_cache()
        while True:
            if len(tokens) <= context:
                hidden = self(tokens[None, cache[0].rows :], cache=cache)
            else:
                hidden = self(tokens[None, -context:])
            token = choose(self.unembedding @ hidden[0, -1])
            yield token
            tokens = torch.cat([tokens, token])

    def generate(
        self,
        tokens: Tensor,  # (T,) int64, not empty
        count: int,
        *,
        context: int,
        temperature: float = 0.8,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return `tokens` followed by `count` from `stream`, sampled as `Sampler` says.

        Raises:
            ValueError: As `stream`; or `temperature` or `top_p` is out of range, or `count` is negative.
        """
        _expect_prompt("tokens", tokens)
        _expect_count(count)
        _expect_context(context)
        sampler = Sampler(temperature, top_p, generator)
        return torch.cat([tokens, *islice(self.stream(tokens, context=context, sampler=sampler), count)])

    @torch.no_grad()
    def generate_batch(
        self,
        prompts: Sequence[Tensor],  # each (T,) int64, not empty; T may differ
        count: int,
        *,
        context: int,
        temperature: float = 0.8,
        top_p: float = 1.0,
        generator: torch.Generator | None = None,
        stop: int | None = None,
    ) -> list[Tensor]:
        """Return each prompt followed by `count` tokens, or by fewer where the token `stop` comes: it is then the last.

        All prompts share the passes of the model. The first one reads as many tokens of each as the shortest has; later
        ones add a token each, which a longer prompt has itself. So prompts need no padding, but should be of similar
        length: prompts of 1 and of 2000 tokens take 1999 passes before both are read. A text that has ended repeats its
        last token until all have. Without a temperature, the tokens are those that `generate` returns for each prompt
        alone, except where two logits are so close that the rounding of products of several rows decides.

        Raises:
            ValueError: As `generate`.
        """
        expect_kinds(_NUMBERS, {"stop": stop})
        for i, prompt in enumerate(prompts):
            _expect_prompt("prompts", prompt, i)
        _expect_count(count)
        _expect_context(context)
        choose, cache, rows = Sampler(temperature, top_p, generator), self.new_cache(), list(prompts)
        if count == 0:
            return rows
        ends = [len(prompt) + count for prompt in prompts]
        length = min(map(len, prompts), default=0)  # of what the model reads
        while any(length < end for end in ends):
            tokens = torch.stack([row[:length] for row in rows])
            read = tokens[:, cache[0].rows :] if length <= context else tokens[:, -context:]
            hidden = self(read, cache=cache if length <= context else None)[:, -1]
            for i, logits in enumerate(hidden @ self.unembedding.T):
                if len(rows[i]) == length:
                    done = length >= ends[i]
                    token = rows[i][-1:] if done else choose(logits)
                    rows[i] = torch.cat([rows[i], token])
                    if not done and stop is not None and int(token) == stop:
                        ends[i] = length + 1
            length += 1
        return [row[:end] for row, end in zip(rows, ends)]


_NUMBERS = {name: kind_of(kind) for name, kind in (("count", int), ("context", int), ("stop", int | None))}


def _expect_prompt(name: str, prompt: Tensor, index: int | None = None) -> None:
    expect_tensors(**{name if index is None else f"{name}[{index}]": prompt})
    at = "" if index is None else f" at {index}"
    expect(prompt.dim() == 1 and len(prompt) > 0, f"{name} must be (T,) with T > 0; got {describe(prompt)}{at}")


def _expect_count(count: int) -> None:
    expect_kinds(_NUMBERS, {"count": count})
    expect(count >= 0, f"count must not be negative; got {count}")


def _expect_context(context: int) -> None:
    expect_kinds(_NUMBERS, {"context": context})
    expect(context > 0, f"context must be above 0; got {context}")


class Block(nn.Module):
    """Attention and a feed-forward layer, each of which reads a norm of its input and adds to it."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.ffn = SwiGLU(config)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rope: Tensor,  # (2, B, 1, T, head_width / 2)
        mask: Tensor | None,  # (B, 1, T, T), or None for causal attention
        kept: KeyValues | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, kept)
        x = x + self.ffn(self.ffn_norm(x))
        return x


class Attention(nn.Module):
    """Self-attention with rotary embeddings, causal unless there is a mask."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(
        self,
        x: Tensor,  # (B, T, D)
        rope: Tensor,  # (2, B, 1, T, head_width / 2)
        mask: Tensor | None,  # (B, 1, T, T)
        kept: KeyValues | None = None,
    ) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b h t d", three=3, h=self.heads)
        q, k = rotate(q, rope), rotate(k, rope)
        before = 0
        if kept is not None:
            k, v = kept.extend(k, v)
            before = k.shape[2] - q.shape[2]
        if before > 0 and q.shape[2] > 1:  # new rows read all earlier ones, and of the new ones those up to themselves
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(before)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and before == 0)
        out: Tensor = self.out(rearrange(y, "b h t d -> b t (h d)"))
        return out


class SwiGLU(nn.Module):
    """Feed-forward layer out(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden_ffn, bias=False)
        self.out = nn.Linear(config.hidden_ffn, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.out(F.silu(gate) * up)
        return out


def rotation(positions: Tensor, head_width: int, base: float) -> Tensor:
    """Compute cosines and sines of rotary angles (Su 2021, arXiv:2104.09864): (2, B, 1, T, head_width / 2) float32."""
    frequencies = base ** (-torch.arange(0, head_width, 2, device=positions.device, dtype=torch.float32) / head_width)
    angles = rearrange(positions, "b t -> b 1 t 1").float() * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the two halves of each head, (B, H, T, head_width), by the position's angles."""
    cos, sin = rope.to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _mtp(config: DecoderConfig) -> ParallelHeads | SequentialDepths | None:
    if config.mtp == "parallel":
        return ParallelHeads(lambda: Block(config), config.mtp_heads)
    if config.mtp == "sequential":
        return SequentialDepths(
            lambda: Block(config),
            config.mtp_heads,
            config.width,
            concat_order=config.mtp_concat,
            hidden=config.mtp_hidden,
            repeated_layer=config.mtp_repeated_layer,
            detach=config.mtp_detach,
            norm_eps=config.norm_eps,
        )
    return None


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
