"""Pure tensor functions: no modules, no Megatron."""

from megatron_xielu.ops.functional import relu2, xielu, xiep, xiprelu

__all__ = ["relu2", "xielu", "xiep", "xiprelu"]
