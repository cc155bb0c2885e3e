"""Cost of a decoder's training step: parameters, FLOPs and modelled seconds."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from llmfast._checks import expect
from llmfast._gpus import Gpu
from llmfast.models import Decoder, DecoderConfig
from llmfast.models.depths import SequentialDepths
from llmfast.models.heads import ParallelHeads

# Share of the peak rate that a whole training step reaches: Llama 3's pretraining reports 38 to 43 % on H100s (Dubey et
# al. 2024, arXiv:2407.21783, table 4), PaLM's 46 % on TPUs (Chowdhery et al. 2022, arXiv:2204.02311). Small models and
# short rows reach less. This value is a guess; replace it with a measurement.
UTILISATION = 0.4
AGAIN = 4 / 3  # times the FLOPs where activations are computed again: forward is a third of a step


@dataclass(frozen=True)
class ParameterCount:
    """Counts of a decoder's parameters: of all, and of two parts."""

    total: int
    next_token: int  # all parameters but those of heads that only predict further tokens
    embedding: int  # embedding and unembedding, counted once if they are tied

    @property
    def non_embedding(self) -> int:
        """Kaplan's N: parameters that predict the next token, without embedding and unembedding."""
        return self.next_token - self.embedding


def formula(*, again: bool) -> list[str]:
    """Write in words how the seconds of a step are modelled, in two lines."""
    return [
        "modelled seconds = (6 * matrix parameters * tokens + 12 * layers * row * width * tokens)",
        f"  / (utilisation * FLOPs per second of the data sheet){' * 4 / 3' if again else ''}",
    ]


@lru_cache(maxsize=8)
def meta_decoder(config: DecoderConfig) -> Decoder:
    """Build the decoder that `config` describes, on the meta device, so that no parameter is allocated."""
    with torch.device("meta"):
        return Decoder(config)


def count_parameters(config: DecoderConfig) -> ParameterCount:
    """Count the parameters of the decoder that `config` describes, without allocating them."""
    model = meta_decoder(config)
    total = _numel(model)
    further = 0
    if isinstance(model.mtp, ParallelHeads):
        further = _numel(model.mtp.blocks[1:])
    elif model.mtp is not None:
        further = _numel(model.mtp)
    embedding = _numel(model.embedding) + (0 if model.head is None else _numel(model.head))
    return ParameterCount(total, total - further, embedding)


@dataclass(frozen=True)
class StepCost:
    """FLOPs of forward and backward for all tokens of a step."""

    tokens: int
    matrices: float  # FLOPs of products with parameters
    attention: float  # FLOPs of products of two activations

    @property
    def flops(self) -> float:
        return self.matrices + self.attention

    def seconds(self, gpu: Gpu, dtype: torch.dtype, *, utilisation: float = UTILISATION, again: bool = False) -> float:
        """Compute the step's time from a model, not a measurement; see `formula`.

        Args:
            gpu: The GPU whose data sheet gives the rates.
            dtype: The dtype of the matrix products; float32 products run on the ordinary units, not on tensor cores.
            utilisation: The share of that rate that the step is assumed to reach.
            again: Activations are computed again in backward, so FLOPs are taken times `AGAIN`.

        Raises:
            ValueError: `utilisation` is not in (0, 1].
        """
        expect(0 < utilisation <= 1, f"utilisation must be above 0 and at most 1; got {utilisation}")
        rate = gpu.tensor_cores if dtype in (torch.bfloat16, torch.float16) else gpu.float32
        return self.flops * (AGAIN if again else 1) / (utilisation * rate)


def step_flops(config: DecoderConfig, tokens: int, seq_len: int) -> StepCost:
    """Count the FLOPs of a training step over `tokens` tokens in rows of `seq_len`.

    Each parameter of a matrix takes 6 FLOPs per token: 2 in forward, 4 in backward. The embedding takes none, because
    it is a lookup. The unembedding counts once per head that has its own hidden states. Attention takes
    12 * seq_len * width FLOPs per token and block, as if every token attended to its whole row. A kernel that skips
    what the causal mask hides needs half of that. It skips nothing if documents are separated, because the mask is then
    a tensor.

    Raises:
        ValueError: `tokens` or `seq_len` is not above 0.
    """
    expect(tokens > 0, f"tokens must be above 0; got {tokens}")
    expect(seq_len > 0, f"seq_len must be above 0; got {seq_len}")
    model = meta_decoder(config)
    blocks, used = len(model.blocks), _matrices(model.blocks)
    if isinstance(model.mtp, ParallelHeads):
        blocks += len(model.mtp.blocks)
        used += _matrices(model.mtp)
    elif isinstance(model.mtp, SequentialDepths):
        blocks += model.mtp.depths
        used += _matrices(model.mtp) * model.mtp.depths // len(model.mtp.layers)
    used += own_hidden_states(config) * config.vocab_size * config.width
    return StepCost(tokens, 6.0 * used * tokens, 12.0 * blocks * seq_len * config.width * tokens)


def own_hidden_states(config: DecoderConfig) -> int:
    """Count the hidden states per token that the unembedding multiplies: one per head, or one that all heads share."""
    return 1 if config.mtp == "shared" else config.targets


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _matrices(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)
