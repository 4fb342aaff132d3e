"""xIELU as an operation of TransformerEngine's operation fuser, inside Megatron's `TEFusedMLP`.

Between two FP8 linears TransformerEngine's own activations write bfloat16 wherever it has no fused
kernel for the recipe (blockwise scaling, current scaling), and the linear's quantizer reads it
again. `XIELUOp` writes what the next linear's quantizer would have made, data and transpose and
scales, in the pass that computes xIELU, and in backward the same for the gradient that the linear
before it multiplies. Quantizers that it has no kernel for get bfloat16 and do their own work.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEFusedMLP
from torch import Tensor
from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer
from transformer_engine.pytorch import Float8Quantizer as DelayedQuantizer
from transformer_engine.pytorch.constants import TE_DType_To_Torch
from transformer_engine.pytorch.ops import BasicOperation
from transformer_engine.pytorch.quantization import FP8GlobalStateManager
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.utils import clear_tensor_data

from megatron_xielu.mcore.activation import ParallelXIELU
from megatron_xielu.ops import library
from megatron_xielu.ops.family import XIELU
from megatron_xielu.ops.triton import quantized
from megatron_xielu.ops.triton.quantized import Blockwise, Current, Delayed, Quantized, Scaling


class XIELUFusedMLP(TEFusedMLP):
    """Megatron's MLP over TransformerEngine's operation fuser, with xIELU."""

    def _make_activation_op(self, activation_func: Callable[..., Any], *_: bool) -> BasicOperation:
        assert isinstance(activation_func, ParallelXIELU)
        return XIELUOp(activation_func)


class XIELUOp(BasicOperation):
    """xIELU between two operations of TransformerEngine.

    Args:
        activation: the module whose parameters it trains; both hold the same parameters.
    """

    def __init__(self, activation: ParallelXIELU) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = activation.alpha_p, activation.alpha_n
        self.beta, self.impl = activation.beta, activation.impl
        # the sum over ranks that Megatron does not do by itself
        self.tp_group = activation.tp_group if activation.sum_in_backward else None

    @property
    def alphas(self) -> tuple[Tensor, Tensor]:
        """In the order of the parameters."""
        return self.alpha_p, self.alpha_n

    def op_forward(
        self,
        ctx: Any,
        input_: Tensor,
        *,
        prev_op_grad_output_quantizer: Any | None,
        next_op_input_quantizer: Any | None,
    ) -> Tensor:
        """xIELU of input_ [..., ffn_hidden_size / tp], in FP8 if the next operation wants it."""
        x = _plain(input_)
        if _backward_in_high_precision():
            # both linears keep and get unquantized tensors then
            prev_op_grad_output_quantizer = next_op_input_quantizer = None
        y = self._quantized_forward(x, next_op_input_quantizer)
        if y is None:
            y = library.forward(x, None, self.alphas, self.beta, XIELU.name, self.impl)
        if ctx.requires_grad:
            ctx.save_for_backward(x)
            ctx.quantizer = prev_op_grad_output_quantizer
        return y

    def op_backward(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradients by the input, in FP8 if the operation before wants it, and the alphas."""
        (x,) = ctx.saved_tensors
        grad_y = _plain(grad_output).to(x.dtype)
        with torch.no_grad():
            results = self._quantized_backward(grad_y, x, ctx.quantizer)
            if results is None:
                results = library.backward(
                    grad_y, x, None, self.alphas, self.beta, XIELU.name, self.impl
                )
            grad_x, *grads = results
            both = torch.stack([grad.reshape(1) for grad in grads])
            if self.tp_group is not None:
                torch.distributed.all_reduce(both, group=self.tp_group)
        # the fuser holds it until the whole MLP's backward is done
        clear_tensor_data(x)
        return grad_x, both.unbind()

    def _quantized_forward(self, x: Tensor, quantizer: Any | None) -> Any | None:
        scaling = scaling_of(quantizer, x)
        if scaling is None:
            return None
        result = _empty(quantizer, x)
        quantized.forward(
            XIELU, _rows(x), None, self.alphas, self.beta, scaling, _parts(result, quantizer, x)
        )
        return result

    def _quantized_backward(
        self, grad_y: Tensor, x: Tensor, quantizer: Any | None
    ) -> list[Any] | None:
        scaling = scaling_of(quantizer, x)
        if scaling is None:
            return None
        result = _empty(quantizer, x)
        grads = quantized.backward(
            XIELU,
            _rows(grad_y),
            _rows(x),
            None,
            self.alphas,
            self.beta,
            scaling,
            _parts(result, quantizer, x),
        )
        return [result, *grads]


def scaling_of(quantizer: Any | None, x: Tensor) -> Scaling | None:
    """How our kernels do what a quantizer of TransformerEngine would do with a result for x.

    Returns:
        None where there is no quantizer, where it is of another kind (MXFP8, NVFP4, custom), where
        its amax is one over several ranks, and where the kernels cannot compute x.
    """
    if quantizer is None or quantized.unavailable(x) is not None:
        return None
    # a subclass may do something else
    kind = type(quantizer)
    if kind not in (DelayedQuantizer, Float8CurrentScalingQuantizer, Float8BlockQuantizer):
        warnings.warn(
            "there is no kernel that writes xIELU as a "
            f"{kind.__name__} does: it writes {x.dtype}, which TransformerEngine casts in a "
            "pass of its own",
            # this line, so that Python says it once and not for each caller
            stacklevel=1,
        )
        return None
    dtype = TE_DType_To_Torch[quantizer.dtype]
    if kind is DelayedQuantizer:
        return Delayed(quantizer.scale, dtype)
    if kind is Float8BlockQuantizer:
        return Blockwise(
            dtype,
            square=quantizer.block_scaling_dim == 2,
            power_of_two=quantizer.force_pow_2_scales,
            epsilon=quantizer.amax_epsilon,
        )
    if quantizer.with_amax_reduction:
        return None
    return Current(dtype, power_of_two=quantizer.force_pow_2_scales, epsilon=quantizer.amax_epsilon)


def _plain(tensor: Any) -> Tensor:
    if isinstance(tensor, QuantizedTensorStorage):
        tensor = tensor.dequantize()
    return tensor.contiguous()


def _backward_in_high_precision() -> bool:
    if not FP8GlobalStateManager.is_fp8_enabled():
        return False
    return FP8GlobalStateManager.get_fp8_recipe().backward_override is not None


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _empty(quantizer: Any, x: Tensor) -> Any:
    """The quantized tensor that the quantizer would return for a result of x's shape."""
    return quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device)


def _parts(result: Any, quantizer: Any, x: Tensor) -> Quantized:
    """The tensors of TransformerEngine's that a result consists of, as matrices."""
    columns = x.shape[-1]
    if isinstance(quantizer, Float8BlockQuantizer):
        return Quantized(
            rowwise=_matrix(result._rowwise_data, -1, columns),
            columnwise=_matrix(result._columnwise_data, columns, -1),
            rowwise_scale_inv=result._rowwise_scale_inv,
            columnwise_scale_inv=result._columnwise_scale_inv,
        )
    # no transpose where the GPU multiplies FP8 along either dimension
    result._transpose_invalid = result._transpose is None
    delayed = isinstance(quantizer, DelayedQuantizer)
    return Quantized(
        rowwise=_matrix(result._data, -1, columns),
        columnwise=_matrix(result._transpose, columns, -1),
        rowwise_scale_inv=result._scale_inv,
        columnwise_scale_inv=result._scale_inv,
        amax=quantizer.amax if delayed else x.new_empty(1, dtype=torch.float32),
    )


def _matrix(data: Tensor | None, rows: int, columns: int) -> Tensor | None:
    return None if data is None or data.numel() == 0 else data.view(rows, columns)
