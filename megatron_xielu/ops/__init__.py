"""Pure tensor functions: no modules, no Megatron."""

from megatron_xielu.ops.xielu import xielu

__all__ = ["xielu"]
