"""The blocks of a model: what is compiled, recomputed and sharded as a unit."""

from collections.abc import Iterator

from torch import nn


def blocks_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of a model: the members of its outermost module lists."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            for member in child.children():  # each once, however often it is in the list
                yield from _called(member)
        else:
            yield from blocks_of(child)


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the module, or its larger parts if it only holds them: hooks of modules that are not called never run."""
    if type(module).forward is not nn.Module.forward:
        yield module
        return
    for part in module.children():
        if any(True for _ in part.children()):
            yield from _called(part)
