"""The blocks of a model, wherever its module lists are."""

import torch
from torch import Tensor, nn

from llmfast.models.blocks import blocks_of


class Layer(nn.Module):
    """A block that has a module list of its own, such as the experts of a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([expert(x) for expert in self.experts]).sum(0)


def test_the_outermost_lists_count_and_each_member_once() -> None:
    one, two, three = Layer(), Layer(), Layer()
    model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "trunk": nn.Module(), "heads": nn.ModuleList([three])})
    model["trunk"].layers = nn.ModuleList([one, two, one])
    model["trunk"].norm = nn.RMSNorm(2)
    assert [*blocks_of(model)] == [one, two, three]
    assert [*blocks_of(nn.Linear(2, 2))] == []


def test_of_a_member_that_is_never_called_the_parts_count_that_have_parts() -> None:
    """Hooks of a member without `forward` would never run; its norms and matrices are too small to go alone."""
    member, further = nn.Module(), nn.Module()
    member.norm, member.block, member.further = nn.RMSNorm(2), Layer(), further
    further.projection, further.block = nn.Linear(2, 2), Layer()
    model = nn.Module()
    model.depths = nn.ModuleList([member])
    assert [*blocks_of(model)] == [member.block, further.block]
