"""Weight gradients added into the main gradients by their own GEMM, where Apex is not installed.

Megatron's linear layers outside TransformerEngine, the output layer above all, call two functions
of Apex's extension `fused_weight_gradient_mlp_cuda` for it and refuse to be built without them.
TransformerEngine's GEMM does the same.
"""

from __future__ import annotations

import sys
from types import ModuleType

from megatron.core.tensor_parallel import layers
from torch import Tensor

EXTENSION = "fused_weight_gradient_mlp_cuda"


def use_transformer_engine() -> bool:
    """Give Megatron both functions by TransformerEngine; False where Apex's are there already.

    Raises:
        ImportError: TransformerEngine is not installed.
    """
    if layers._grad_accum_fusion_available:
        return False
    # fails here rather than in the first backward pass
    from transformer_engine.pytorch.cpp_extensions import general_gemm  # noqa: F401

    module = ModuleType(EXTENSION)
    module.wgrad_gemm_accum_fp32 = accumulate  # type: ignore[attr-defined]
    module.wgrad_gemm_accum_fp16 = accumulate  # type: ignore[attr-defined]
    # one function of Megatron's imports it when it is called
    sys.modules[EXTENSION] = module
    layers.fused_weight_gradient_mlp_cuda = module
    layers._grad_accum_fusion_available = True
    return True


def accumulate(total_input: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    """main_grad += grad_output^T total_input, in place.

    Args:
        total_input: [tokens, input_size].
        grad_output: [tokens, output_size] in the same type.
        main_grad: [output_size, input_size]; fp32 keeps the sums of the GEMM unrounded.
    """
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    general_gemm(
        total_input,
        grad_output,
        out_dtype=main_grad.dtype,
        layout="NT",
        out=main_grad,
        accumulate=True,
        # without meaning for bf16, as in TransformerEngine's own weight gradients
        use_split_accumulator=True,
        grad=True,
    )
