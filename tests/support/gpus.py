"""Hides GPUs from the tests, whose kernels run in the interpreter, on CPU tensors."""

import json
import os

# -1 is no device's number, for CUDA and for ROCm; an empty list means all devices to some versions of HIP. The last one
# tells SYCL, and with it torch.xpu, of CPUs alone.
HIDDEN = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "ONEAPI_DEVICE_SELECTOR": "*:cpu"}
_FOUND = "LLMFAST_TESTS_FOUND"  # in the environment, for processes that begin with all hidden


def hiding() -> dict[str, str]:
    """Return environment variables that hide all GPUs from a process and its children, set before torch is imported."""
    found = os.environ.get(_FOUND) or json.dumps({name: os.environ.get(name) for name in HIDDEN})
    return {**HIDDEN, _FOUND: found}


def as_found() -> dict[str, str]:
    """Return the environment for a process that uses the available GPUs with compiled kernels."""
    found = json.loads(os.environ[_FOUND])
    others = {name: value for name, value in os.environ.items() if name not in {*HIDDEN, "TRITON_INTERPRET"}}
    return others | {name: value for name, value in found.items() if value is not None}
