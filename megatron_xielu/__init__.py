"""xIELU for Megatron-Core: pretrain language models with a trainable activation.

What this package offers needs torch alone; Megatron, TransformerEngine, transformers and plotting
are imported by the parts that use them.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_xielu.activations import XIELU
    from megatron_xielu.ops import xielu

__version__ = "0.1.0"
__all__ = ["XIELU", "__version__", "xielu"]


def __getattr__(name: str) -> Any:
    # on first use, because torch takes seconds to import: before that, a rank of a run has to
    # listen to signals
    if name == "XIELU":
        from megatron_xielu.activations import XIELU

        return XIELU
    if name == "xielu":
        from megatron_xielu.ops import xielu

        return xielu
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
