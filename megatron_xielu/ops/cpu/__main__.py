"""Builds the kernels where they are not built yet, and prints where they lie."""

from megatron_xielu.ops.cpu import build

print(build.built())
