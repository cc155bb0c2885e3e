"""Triton kernels and their launchers, one family per file. Importing them needs Triton, not a GPU.

This package never imports `llmfast`; it takes tensors and fills tensors. See `kernels/README.md`.
"""
