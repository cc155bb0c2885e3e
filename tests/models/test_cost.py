"""Parameters and FLOPs against real decoders."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llmfast._gpus import H100
from llmfast.losses import linear_cross_entropy, mtp_cross_entropy
from llmfast.models import Decoder, DecoderConfig
from llmfast.models.cost import AGAIN, UTILISATION, formula
from llmfast.plan import count_parameters, step_flops

SHAPES: list[dict[str, Any]] = [
    {},
    {"tie_embeddings": False, "ffn_width": 200},
    {"mtp": "parallel", "mtp_heads": 3},
    {"mtp": "sequential", "mtp_heads": 2, "tie_embeddings": False},
    {"mtp": "sequential", "mtp_heads": 3, "mtp_repeated_layer": True},
    {"mtp": "shared", "mtp_heads": 3},
]


def config(**options: Any) -> DecoderConfig:
    return DecoderConfig(512, **{"width": 64, "layers": 3, "heads": 4} | options)


def numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("options", SHAPES)
def test_parameters_are_counted_exactly(options: dict[str, Any]) -> None:
    c = config(**options)
    count = count_parameters(c)
    assert count.total == numel(Decoder(c))
    # Without what predicts further tokens it is the plain decoder.
    plain = config(tie_embeddings=c.tie_embeddings, ffn_width=c.ffn_width)
    assert count.next_token == numel(Decoder(plain))
    assert count.embedding == 512 * 64 * (1 if c.tie_embeddings else 2)
    # By hand: a block has 4 width^2 in attention, 3 width ffn_width in its SwiGLU, and two gains.
    block = 4 * 64**2 + 3 * 64 * (c.ffn_width or 192) + 2 * 64
    assert count.non_embedding == 3 * block + 64


@pytest.mark.parametrize("options", SHAPES)
def test_flops_are_those_that_torch_counts(options: dict[str, Any]) -> None:
    B, T, c = 2, 32, config(**options)
    model = Decoder(c)
    tokens = torch.randint(0, 512, (B, T))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        hidden = model(tokens, document_ids=torch.zeros(B, T, dtype=torch.int32), all_heads=c.mtp != "none")
        if c.mtp == "none":
            loss = linear_cross_entropy(hidden, model.unembedding, tokens)
        else:
            loss = mtp_cross_entropy(hidden, model.unembedding, tokens, head_weights=[1.0] * c.targets)
        loss.backward()
    step = step_flops(c, B * T, T)
    # On a CPU rows whose label lies past the end, k of each row for head k, take no part in the loss.
    idle = 0 if c.mtp == "shared" else B * c.targets * (c.targets - 1) // 2
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert step.attention == counted.pop("aten.bmm")
    assert step.matrices == sum(counted.values()) + 6 * 512 * 64 * idle


def test_attention_is_the_share_of_6nd_that_the_laws_leave_out() -> None:
    c = DecoderConfig(1000, width=512, layers=8, heads=8)
    step = step_flops(c, 1000, 1024)
    N = count_parameters(c).non_embedding
    assert step.matrices == pytest.approx(6 * (N + 512 * 1000) * 1000, rel=1e-3)
    assert step.attention / (6 * N * 1000) == pytest.approx(1024 / (6 * 512), rel=0.05)


def test_seconds_are_modelled_from_the_data_sheet() -> None:
    step = step_flops(config(), 1000, 100)
    for dtype in (torch.bfloat16, torch.float16):
        assert step.seconds(H100, dtype, utilisation=0.5) == pytest.approx(step.flops / 494.5e12)
        again = step.seconds(H100, dtype, utilisation=0.5, again=True)
        assert again == pytest.approx(4 / 3 * step.flops / 494.5e12)
    assert step.seconds(H100, torch.float32, utilisation=1.0) == pytest.approx(step.flops / 66.9e12)


def test_without_a_measurement_two_fifths_of_the_rate_are_assumed() -> None:
    step = step_flops(config(), 1000, 100)
    assert (UTILISATION, AGAIN) == (0.4, 4 / 3)
    assert step.seconds(H100, torch.bfloat16) == step.seconds(H100, torch.bfloat16, utilisation=0.4)
    assert step.flops == step.matrices + step.attention and step.tokens == 1000


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("gpus", [1, 2, 64])
def test_the_formula_in_words_names_each_factor(gpus: int, again: bool) -> None:
    first, second, third = formula(again=again, gpus=gpus)
    assert first == "modelled seconds = (6 * matrix parameters * tokens + 12 * layers * row * width * tokens)"
    devices, end = "" if gpus == 1 else f"{gpus} GPUs * ", " * 4 / 3" if again else ""
    assert second == f"  / ({devices}utilisation * FLOPs per second of the data sheet){end}"
    assert third == f"  launches{'' if gpus == 1 else ' and communication'} are not in it"


def test_refuses() -> None:
    for tokens, seq_len, message in ((0, 1, "tokens must be above 0; got 0"), (1, -1, "seq_len must be above 0")):
        with pytest.raises(ValueError, match=message):
            step_flops(config(), tokens, seq_len)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match="utilisation must be above 0 and at most 1"):
            step_flops(config(), 1, 1).seconds(H100, torch.bfloat16, utilisation=share)
