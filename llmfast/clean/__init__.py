"""Turn raw text into text worth training on: `llmfast clean`, a recipe built from datatrove's own filters.

Whole documents are moved to `removed/`, each with a reason; `report.md` counts them by stage and shows samples. The
recipe is FineWeb's (Penedo et al. 2024, https://arxiv.org/abs/2406.17557), adapted to run on a folder without a
network; `llmfast.clean.recipe` lists the differences. Everything except `clean` itself imports without datatrove.
"""

from llmfast.clean.command import add_arguments, run
from llmfast.clean.folder import clean
from llmfast.clean.report import Report, Sample, Stage

__all__ = ["Report", "Sample", "Stage", "add_arguments", "clean", "run"]
