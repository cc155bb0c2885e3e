"""Planning a training run: scaling laws, fits to your own runs, memory and modelled time. `llmfast plan` prints them.

    >>> from llmfast.plan import BESIROGLU
    >>> best = BESIROGLU.optimal(1e21)
    >>> f"{best.params:.2e} parameters, {best.tokens:.2e} tokens, loss {best.loss:.2f}"
    '2.78e+09 parameters, 6.00e+10 tokens, loss 2.31'

Nothing here is measured: losses come from published runs or your own, times are FLOPs over assumed rates, and memory
is counted from shapes.
"""

from llmfast.models.cost import ParameterCount, StepCost, count_parameters, step_flops
from llmfast.models.memory import PRECISIONS, MemoryEstimate, Precision, activation_bytes, estimate_memory
from llmfast.optim.scaling import scale_lr
from llmfast.plan.fit import Fit, fit_chinchilla, fit_power
from llmfast.plan.laws import (
    BESIROGLU,
    HENIGHAN_C,
    HENIGHAN_MATH_C,
    HENIGHAN_MATH_N,
    HENIGHAN_N,
    HOFFMANN,
    KAPLAN,
    KAPLAN_C,
    KAPLAN_D,
    KAPLAN_N,
    PF_DAY,
    Allocation,
    ChinchillaLaw,
    KaplanLaw,
    PowerLaw,
    critical_batch,
    kaplan_optimal,
    optimal_batch,
    optimal_lr,
    training_flops,
)
from llmfast.plan.picture import plot_chinchilla, plot_power
from llmfast.plan.runs import Run, model_config, read_run

__all__ = [
    "BESIROGLU",
    "HENIGHAN_C",
    "HENIGHAN_MATH_C",
    "HENIGHAN_MATH_N",
    "HENIGHAN_N",
    "HOFFMANN",
    "KAPLAN",
    "KAPLAN_C",
    "KAPLAN_D",
    "KAPLAN_N",
    "PF_DAY",
    "PRECISIONS",
    "Allocation",
    "ChinchillaLaw",
    "Fit",
    "KaplanLaw",
    "MemoryEstimate",
    "ParameterCount",
    "PowerLaw",
    "Precision",
    "Run",
    "StepCost",
    "activation_bytes",
    "count_parameters",
    "critical_batch",
    "estimate_memory",
    "fit_chinchilla",
    "fit_power",
    "kaplan_optimal",
    "model_config",
    "optimal_batch",
    "optimal_lr",
    "plot_chinchilla",
    "plot_power",
    "read_run",
    "scale_lr",
    "step_flops",
    "training_flops",
]
