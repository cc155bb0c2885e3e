"""Results of several processes, compared with those of one: here on CPUs."""

import torch

from llmfast.checkup import several


def test_two_processes() -> None:
    found = list(several.findings(torch.device("cpu"), 2))
    assert [one.what for one in found] == ["vocab-parallel", "DDP", "FSDP2"]
    assert all(one.ok for one in found), found
