"""Estimate the memory of a training run, and check whether it fits on a GPU.

The estimate includes parameters, gradients, the optimizer's states, what autograd keeps of the small decoder from
forward to backward, the buffers of the loss, and on several GPUs those of communication. It omits the CUDA context and
library workspaces (about 1 GiB together), allocator fragmentation, and temporary buffers of operators.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from llmfast._checks import expect
from llmfast._gpus import GB
from llmfast.losses.plan import LinearCrossEntropyPlan
from llmfast.losses.targets import SMALL
from llmfast.models import DecoderConfig
from llmfast.models.blocks import blocks_of
from llmfast.models.cost import meta_decoder, own_hidden_states
from llmfast.optim import Extras, FusedAdamW, FusedOptimizer
from llmfast.optim.formats import MasterWeights, StateDtype

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Precision:
    """Formats of parameters and states: the parameters' dtype, and two options of `llmfast.optim.Extras`.

    Gradients have the parameters' dtype. Float32 parameters are trained under autocast to bfloat16, bfloat16 ones
    without autocast.
    """

    name: str
    parameters: torch.dtype
    master_weights: MasterWeights | None = None
    state_dtype: StateDtype | None = None  # None: the parameters' dtype


PRECISIONS = (
    Precision("fp32", torch.float32),
    Precision("fp32, 8-bit moments", torch.float32, state_dtype="8bit"),
    Precision("bf16, fp32 master", torch.bfloat16, "fp32", torch.float32),
    Precision("bf16, split16", torch.bfloat16, "split16"),
    Precision("bf16, split8", torch.bfloat16, "split8"),
    Precision("bf16, kahan", torch.bfloat16, "kahan"),
    Precision("bf16, stochastic", torch.bfloat16, "stochastic"),
    Precision("bf16, stochastic, 8-bit moments", torch.bfloat16, "stochastic", "8bit"),
)
"""Formats of parameters and states that `llmfast plan memory` compares."""
FP32 = PRECISIONS[0]  # the format that `llmfast train` uses by default


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of each kind, on one of the devices that train together."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int  # kept from forward to backward
    recomputed: int  # in the backward of one block, when its activations are recomputed
    weight_copies: int  # copies of matrices in autocast's dtype, kept with the activations
    loss: int  # beyond the hidden states: logits, gradients of hidden states and unembedding
    loss_unfused: int  # the same for torch's cross-entropy of F.linear
    loss_gradients: int  # the part of either that remains when backward reaches the blocks
    tied_gradients: int  # of a tied embedding: as unembedding, as embedding, and possibly their sum
    accumulate: bool  # gradients of an earlier micro-batch, or the buckets of DDP, exist throughout
    gathered: int = 0  # FSDP2: parameters outside the blocks, whole from forward to backward
    buffers: int = 0  # FSDP2: whole parameters and gradients of the blocks at work, as they are and as they are sent
    unreduced: int = 0  # FSDP2: whole gradients of earlier micro-batches
    begin: int = 0  # the whole model, in float32, before it is sharded or takes another dtype

    @property
    def peak(self) -> int:
        """Peak bytes: in the loss, or in backward at its beginning or its end."""
        return self._peak(self.loss)

    @property
    def peak_unfused(self) -> int:
        return self._peak(self.loss_unfused)

    def _peak(self, loss: int) -> int:
        waiting = self.unreduced or (self.gradients if self.accumulate else 0)
        backward = self.loss_gradients + self.recomputed + self.buffers
        if self.buffers and not self.recomputed:  # gradients of shards are smaller than the copies that go meanwhile
            backward += self.weight_copies
        middle = waiting + self.activations + max(self.weight_copies + loss, backward)
        end = self.gradients + self.buffers + max(self.recomputed, self.tied_gradients)
        return max(self.begin, self.parameters + self.optimizer + self.gathered + max(middle, end))


def estimate_memory(
    config: DecoderConfig,
    *,
    batch_size: int,
    seq_len: int,
    accumulate: int = 1,
    precision: Precision = FP32,
    autocast: bool = True,
    checkpoint_activations: bool = False,
    in_backward: bool = False,
    optimizer: Callable[..., FusedOptimizer] = FusedAdamW,
    device: Device = "cuda",
    gpu_memory: int = 80 * GB,
    ranks: int = 1,
    shards: int = 1,
) -> MemoryEstimate:
    """Estimate the memory for training `config`'s decoder as `llmfast train` does: packed rows, the fused loss.

    With `shards`, FSDP2 keeps an equal part of each parameter, gradient and state on each device. The parameters of a
    block are whole while it works. At most two blocks are whole at a time, because the next one arrives meanwhile; in
    addition there are the gradients of one and what is sent of two. Gradients of micro-batches before a step's last one
    stay whole.

    Args:
        config: The decoder.
        batch_size: Rows per micro-batch, on one device.
        seq_len: Tokens per row.
        accumulate: Micro-batches per step.
        precision: Formats of parameters and states.
        autocast: Use autocast to bfloat16 for float32 parameters; others are bfloat16 anyway.
        checkpoint_activations: Keep only the input of each block, and recompute the rest.
        in_backward: The optimizer steps during backward and frees the gradients.
        optimizer: Its class, or a function that makes it from the parameters and the precision's two options.
        device: An NVIDIA GPU, or a CPU.
        gpu_memory: Bytes of the GPU; the fused loss holds at most a tenth of them beyond its gradients.
        ranks: Devices that train together. DDP keeps gradients throughout, in the buckets that it reduces.
        shards: Devices that share one set of parameters, as with FSDP2 and HSDP.

    Raises:
        ValueError: A count is not above 0.
    """
    counts = {"batch_size": batch_size, "seq_len": seq_len, "accumulate": accumulate, "ranks": ranks, "shards": shards}
    for name, value in counts.items():
        expect(value > 0, f"{name} must be above 0; got {value}")
    expect(ranks % shards == 0, f"ranks must divide into sets of shards={shards}; got {ranks}")
    stored = precision.parameters
    model = meta_decoder(config)
    tensors = dict(model.named_parameters())
    formats: Extras = {"master_weights": precision.master_weights, "state_dtype": precision.state_dtype}
    own = [torch.empty_like(shard_of(p, shards), dtype=stored) for p in tensors.values()]
    stepping = optimizer(own, **formats)
    compute = torch.bfloat16 if autocast else stored
    size, local = (sum(p.numel() for p in those) for those in (tensors.values(), own))
    D, V, rows = config.width, config.vocab_size, batch_size * seq_len * own_hidden_states(config)

    copied = compute != stored
    copies = sum(p.numel() for name, p in tensors.items() if _is_matrix(name, p)) if copied else 0
    of_one_block = sum(p.numel() for p in next(blocks_of(model)).parameters() if p.dim() == 2) if copied else 0
    on_gpu = device == "cuda"
    plan = LinearCrossEntropyPlan.make(
        rows, D, V, dtype=compute, weight_dtype=stored, device=device, kernels=on_gpu, gpu_memory=gpu_memory
    )
    torchs = not on_gpu and compute == torch.float32 and config.mtp == "none" and rows * V <= SMALL["hidden"]
    cast = (rows + V) * D * compute.itemsize if copied else 0  # inputs of the loss in autocast's dtype
    unfused = unfused_loss_bytes(rows, D, V, stored)
    kept, recomputed = activation_bytes(
        config, batch_size, seq_len, stored=stored, compute=compute, device=device, checkpoint=checkpoint_activations
    )
    outside, block = _groups(model)
    buckets = ranks > 1 and shards == 1  # DDP's, which hold the gradients from step to step
    tied = (3 if accumulate > 1 or buckets else 2) * V * D * bool(config.tie_embeddings)
    return MemoryEstimate(
        parameters=local * stored.itemsize,
        gradients=(max(p.numel() for p in own) if in_backward else local) * stored.itemsize,
        optimizer=stepping.state_bytes(),
        activations=kept,
        recomputed=recomputed + (of_one_block * compute.itemsize if recomputed else 0),
        weight_copies=copies * compute.itemsize,
        loss=(unfused if torchs else plan.peak_bytes) + cast,
        loss_unfused=unfused + cast,
        loss_gradients=(rows + V) * D * stored.itemsize,
        tied_gradients=(max(tied, 2 * outside) if shards > 1 else tied) * stored.itemsize,
        accumulate=accumulate > 1 or buckets,
        gathered=outside * stored.itemsize if shards > 1 else 0,
        buffers=5 * block * stored.itemsize if shards > 1 else 0,
        unreduced=size * stored.itemsize if shards > 1 and accumulate > 1 else 0,
        begin=4 * size,
    )


def shard_of(p: Tensor, shards: int) -> Tensor:
    """Return the part of a parameter that the first of `shards` devices has with FSDP2, which no other's exceeds."""
    return p.detach()[: -(-len(p) // shards)]


def _groups(model: nn.Module) -> tuple[int, int]:
    """Count the parameters outside of the blocks, and those of the largest block: FSDP2 gathers them together."""
    blocks = [sum(p.numel() for p in block.parameters()) for block in blocks_of(model)]
    return sum(p.numel() for p in model.parameters()) - sum(blocks), max(blocks, default=0)


def unfused_loss_bytes(rows: int, D: int, V: int, stored: torch.dtype) -> int:
    """Count the bytes of `F.cross_entropy(F.linear(hidden, weight), targets)` with a float32 softmax.

    This takes 12 bytes per logit: the log-softmax is kept, and backward adds its gradient and that of the logit. The
    gradients of `hidden` and `weight` come later. Bfloat16 logits that the caller still holds take 2 more.
    """
    return rows * V * 4 + max(rows * V * 8, (rows + V) * D * stored.itemsize)


def activation_bytes(
    config: DecoderConfig,
    batch_size: int,
    seq_len: int,
    *,
    stored: torch.dtype,
    compute: torch.dtype,
    device: Device = "cuda",
    checkpoint: bool = False,
) -> tuple[int, int]:
    """Count the bytes that autograd keeps of the decoder's forward pass, and those that backward recomputes.

    The hidden states for the loss are included. Per token, with r bytes per element of the residual stream and c bytes
    per element of a matrix product:

        norm    r width + 4        its input, and a number (on a CPU: 8 width + 4, input and result in float32)
        block   2 norms, and c times
                2 width            the norms' results, which the matrices read
                3 width            queries, keys and values, in one piece
                2 width            rotated queries and keys
                width              attention's result (on a CPU twice)
                4 ffn_width        gate, up, silu(gate) and their product
                seq_len            the mask between documents, as an addend
                2 width / heads    cosines and sines, if they are cast
                and 4 heads        attention's log-sum-exp
        head    norm, r width      the last norm, and the hidden state that the loss reads
        depth   3 norms, 2 c width, 1, block, r width     for sequential prediction of further tokens
        rest    8 + 4 width / heads + seq_len             token, angles, mask

    With `checkpoint`, a block keeps its input, r width. In backward one block at a time has the rest, with c ffn_width
    of gradients in addition. The blocks of sequential depths are not recomputed.
    """
    D, T, H = config.width, seq_len, config.heads
    r, c = stored.itemsize, compute.itemsize
    # torch has no fused RMSNorm on a CPU: autograd keeps the input and the normalised input, both in float32.
    norm = (r if device == "cuda" else 8) * D + 4
    angles = 0 if c == 4 else 2 * D // H
    width = (8 if device == "cuda" else 9) * D
    block = 2 * norm + c * (width + 4 * config.hidden_ffn + T + angles) + 4 * H
    head = norm + r * D
    kept = r * D if checkpoint else block
    token = 8 + 4 * D // H + T + config.layers * kept + head
    if config.mtp == "parallel":  # one head is among the layers
        token += (config.mtp_heads - 1) * (kept + head)
    elif config.mtp == "sequential":
        token += config.mtp_heads * (2 * norm + 2 * c * D + 1 + block + head)
    again = block + c * config.hidden_ffn if checkpoint else 0
    return batch_size * T * token, batch_size * T * again


def fits(need: int, have: int) -> bool:
    """Return True if `need` bytes fit into `have` and leave a tenth of it free."""
    return need <= 0.9 * have


def verdict(need: int, have: int) -> str:
    """Say in words whether `need` bytes fit into `have`."""
    if need > have:
        return "too large"
    return "fits" if fits(need, have) else "just fits"


def _is_matrix(name: str, p: Tensor) -> bool:
    """Return True for a matrix used in products, except for the unembedding, which the loss casts."""
    return p.dim() == 2 and name not in ("embedding.weight", "head.weight")
