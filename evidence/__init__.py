"""How llmfast knows what its kernels do on GPUs that are not here. For the tests and benchmarks; not installed.

`interpreter` makes Triton's CPU interpreter numerically honest and lets `observers` watch it: `sanitizer` for wrong
accesses, `traffic` for bytes and FLOPs, `launches` for what was launched. `compiler` compiles those launches for GPUs,
`machine_code` reads the result, `roofline` turns counts into modelled times.
"""
