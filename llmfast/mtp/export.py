"""Export a decoder with sequential depths to DeepSeek-V3's layout: model.safetensors and config.json.

The names are those of `llmfast.models.llama`. Blocks use Hugging Face's names for a Llama, whose attention they have;
they do not use DeepSeek's latent attention.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from llmfast._checks import expect
from llmfast.models.llama import load_llama, save_llama

if TYPE_CHECKING:
    from llmfast.models import Decoder


def save_deepseek(model: "Decoder", folder: Path) -> None:
    """Write `model`, whose mtp is "sequential" or "none", to `folder`, which is created if necessary.

    `eh_proj` is written in the order of the released weights, embedding first, regardless of the model's own order.
    With a repeated layer, the file contains one depth.
    """
    mtp = model.config.mtp
    expect(mtp in ("sequential", "none"), f"model must have mtp='sequential' or 'none'; got {mtp!r}")
    save_llama(model, folder, depths=True)


def load_deepseek(folder: Path) -> "Decoder":
    """Load a decoder written by `save_deepseek`, on the CPU and in its saved dtype.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape, or a copy of what the depths share with the
            model differs from the model's own, which this model cannot represent.
        OSError: A file is missing.
    """
    return load_llama(folder)
