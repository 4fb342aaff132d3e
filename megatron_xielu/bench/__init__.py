"""Measurements of the kernels: time on CPUs and GPUs, errors, and machine code without a GPU."""
