"""Telling DTensors from other tensors, without importing their module: that takes long."""

import sys

import torch
from torch import Tensor


def is_dtensor(t: Tensor | None) -> bool:
    """Return True for a DTensor."""
    if type(t) in (torch.nn.Parameter, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")  # a DTensor cannot exist before its module does
    return module is not None and isinstance(t, module.DTensor)


def local(t: Tensor) -> Tensor:
    """Return the piece of a DTensor that is here, which shares its memory; return any other tensor as it is."""
    piece: Tensor = getattr(t, "_local_tensor", t)
    return piece
