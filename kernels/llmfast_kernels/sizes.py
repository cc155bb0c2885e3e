"""Sizes on which the kernels and the plain-torch path agree. No Triton."""

PER_SCALE = 128  # elements of an 8-bit state that share a scale
