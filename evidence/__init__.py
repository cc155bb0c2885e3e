"""Verification of kernels for GPUs that are not available. For tests and benchmarks; not installed.

`interpreter` makes Triton's CPU interpreter numerically faithful and observable through `observers`: `sanitizer`
detects faulty accesses, `traffic` counts bytes and FLOPs, `launches` records launches. `compiler` compiles those
launches for GPUs, `machine_code` reads the result, and `roofline` converts counts to modelled times.
"""
