"""xIELU for Megatron-Core: pretrain language models with a trainable activation.

Importing this package needs torch alone; Megatron, TransformerEngine, transformers and plotting are
imported by the parts that use them.
"""

from megatron_xielu.activations import XIELU
from megatron_xielu.ops import xielu

__version__ = "0.1.0"
__all__ = ["XIELU", "__version__", "xielu"]
