"""The clock of `llmfast.checkup`, and memory also where there is no GPU."""

import torch

from llmfast.checkup.clock import Run, gpu_peak_bytes


def peak_bytes(run: Run) -> int:
    """Return the most bytes of tensors alive at a time during `run`, beyond those alive before it."""
    if torch.cuda.is_available():
        return gpu_peak_bytes(run)
    from evidence.traffic import counting

    with counting() as counts:
        run()
    return counts.peak_bytes
