"""xIELU in FP8 for TransformerEngine's plain modules: fc2 takes an input that is quantized already.

Without the operation fuser fc2 (`te.Linear`) casts its input in a pass of its own, unless the input
is one of TransformerEngine's quantized tensors. So xIELU is written as fc2's own quantizer would
have cast it, rowwise and for the weight's gradient columnwise, and the amax goes to fc2's history.
Backward is as without FP8: fc2 returns the gradient in the layer's type, and fc1, which knows
nothing of xIELU, casts the gradient by xIELU's input itself.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from transformer_engine.debug.pytorch.debug_state import TEDebugState
from transformer_engine.pytorch import Linear
from transformer_engine.pytorch.constants import FP8FwdTensorIdx
from transformer_engine.pytorch.cpu_offload import is_cpu_offload_enabled
from transformer_engine.pytorch.distributed import (
    in_fp8_activation_recompute_phase,
    is_fp8_activation_recompute_enabled,
)
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor

from megatron_xielu.mcore.outliers import Look
from megatron_xielu.mcore.te_quantizers import empty, rows, scaling_of
from megatron_xielu.ops import library, saved_input
from megatron_xielu.ops.family import XIELU
from megatron_xielu.ops.fp8_reference import Scaling
from megatron_xielu.ops.saved_input import SavedInput
from megatron_xielu.ops.triton import quantized


def write_fc2_input(mlp: MLP) -> None:
    """Let the installed xIELU of an MLP write its fc2's input in FP8, wherever that is the same.

    Args:
        mlp: its fc2 is a `te.Linear` and reads xIELU's output as it is, which an expert, whose
            output the router's probabilities multiply, does not.
    """
    fc2, activation = mlp.linear_fc2, mlp.activation_func

    def write(x: Tensor, alphas: tuple[Tensor, Tensor]) -> Tensor | None:
        quantizer = _input_quantizer(fc2)
        scaling = scaling_of(quantizer, x)
        if scaling is None:
            return None
        look = activation.look if activation.look.on and torch.is_grad_enabled() else None
        y: Tensor = _Quantized.apply(
            x,
            *alphas,
            activation.beta,
            activation.impl,
            activation.saved_input,
            scaling,
            quantizer,
            look,
        )
        return y

    activation.quantized = write
    fc2.register_forward_hook(_keep_the_transpose)


def _input_quantizer(fc2: Linear) -> Any | None:
    """What fc2 will cast its input with in the forward pass to come; None: leave it to fc2."""
    if not FP8GlobalStateManager.is_fp8_enabled():
        return None
    # fc2 keeps its input unquantized then
    if FP8GlobalStateManager.get_fp8_recipe().backward_override or fc2.save_original_input:
        return None
    # its forward pass exchanges the scales of delayed scaling only after xIELU has been written
    if is_fp8_activation_recompute_enabled() or in_fp8_activation_recompute_phase():
        return None
    # each of them does something to the tensor that fc2 made itself
    if TEDebugState.debug_enabled or is_cpu_offload_enabled() or fc2.fsdp_group is not None:
        return None
    # as the beginning of its forward pass, which finds it done
    fc2.init_fp8_metadata(num_gemms=1)
    quantizer = fc2.quantizers["scaling_fwd"][FP8FwdTensorIdx.GEMM1_INPUT].copy()
    # a tensor that autograd knows
    quantizer.internal = False
    needed_in_backward = torch.is_grad_enabled() and fc2.weight.requires_grad
    quantizer.set_usage(rowwise=True, columnwise=needed_in_backward)
    return quantizer


class _Quantized(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        alpha_p: Tensor,
        alpha_n: Tensor,
        beta: float,
        impl: str,
        how: SavedInput,
        scaling: Scaling,
        quantizer: Any,
        look: Look | None,
    ) -> Any:
        ctx.save_for_backward(*saved_input.pack(x, how), alpha_p, alpha_n)
        ctx.beta, ctx.impl = beta, impl
        result, parts = empty(quantizer, x)
        alphas = alpha_p, alpha_n
        quantized.forward(XIELU, rows(x.contiguous()), None, alphas, beta, scaling, parts)
        if look is not None:
            y = library.forward(x, None, alphas, beta, XIELU.name, impl)
            look.see_output(y, parts, scaling)
        return result

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *kept, alpha_p, alpha_n = ctx.saved_tensors
        x, alphas = saved_input.unpack(kept, grad_y.dtype), (alpha_p, alpha_n)
        grads = library.backward(grad_y, x, None, alphas, ctx.beta, XIELU.name, ctx.impl)
        grad_x, grad_p, grad_n = grads
        return grad_x, grad_p.reshape(1), grad_n.reshape(1), *[None] * 6


def _keep_the_transpose(fc2: Linear, args: tuple[Any, ...], _: Any) -> None:
    """What fc2 does with an input that it quantized itself: backward reads the transpose alone."""
    y = args[0]
    if isinstance(y, QuantizedTensor) and y.requires_grad and fc2.weight.requires_grad:
        y.update_usage(rowwise_usage=False, columnwise_usage=True)
