"""The sections of a check-up, in order of worth."""

from importlib import import_module
from typing import NamedTuple

import torch

from llmfast.checkup.record import Case, Size


class Section(NamedTuple):
    """A module of this package with a function `cases(device, size)`."""

    name: str
    title: str
    share: float  # of the time; what a section leaves goes to those after it
    processes: int = 1  # that share the cases; more where compiling takes longest, one where times are measured

    def cases(self, device: torch.device, size: Size) -> list[Case]:
        """Return the section's cases, those worth most first."""
        made: list[Case] = import_module(f"llmfast.checkup.{self.name}").cases(device, size)
        return made


SECTIONS = (
    Section("here", "What is here", 0.06),
    Section("numerics", "Numbers against float64", 0.24, 6),
    Section("behaviour", "What only a GPU has", 0.22, 3),
    Section("memory", "Memory against the plans", 0.14),
    Section("speed", "Speed", 0.24),
    Section("training", "A short training run", 0.10),
)
TUNING = Section("tuning", "Every tile of every kernel", 0.25)  # with --tune


def named(name: str) -> Section:
    """Return the section of this name.

    Raises:
        ValueError: there is none.
    """
    for section in (*SECTIONS, TUNING):
        if section.name == name:
            return section
    raise ValueError(f"section must be one of {[section.name for section in SECTIONS]}; got {name!r}")
