"""Text as it was found to text worth training on: `llmfast clean`, one recipe made of datatrove's own filters.

Whole documents go, for a reason, into `removed/`; `report.md` counts them by stage and shows samples. The recipe is
FineWeb's (Penedo et al. 2024, https://arxiv.org/abs/2406.17557) with what it takes to run on a folder, without a
network; `llmfast.clean.recipe` says where it differs. Everything but `clean` itself imports without datatrove.
"""

from llmfast.clean.command import add_arguments, run
from llmfast.clean.folder import clean
from llmfast.clean.report import Report, Sample, Stage

__all__ = ["Report", "Sample", "Stage", "add_arguments", "clean", "run"]
