"""The blocks of a model: what is compiled, recomputed and sharded as a unit."""

from collections.abc import Iterator

from torch import nn


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a model: the members of its outermost module lists, or the blocks that a member contains."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            for member in child.children():  # without repetitions
                yield from _with_forward(member)
        else:
            yield from blocks_of(child)


def _with_forward(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module if it has a `forward`; else its parts that contain other modules.

    A module without one, such as a depth of multi-token prediction, is never called, and its hooks never run.
    """
    if type(module).forward is not nn.Module.forward:
        yield module
        return
    for part in module.children():
        if next(part.children(), None) is not None:
            yield from _with_forward(part)
