"""TransformerEngine's quantizers and their results, as scalings and matrices of our kernels."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, float32
from transformer_engine.pytorch import Float8BlockQuantizer, Float8CurrentScalingQuantizer
from transformer_engine.pytorch import Float8Quantizer as DelayedQuantizer
from transformer_engine.pytorch.constants import TE_DType_To_Torch

from megatron_xielu.ops.fp8_reference import Blockwise, Current, Delayed, Quantized, Scaling
from megatron_xielu.ops.triton import quantized


def scaling_of(quantizer: Any | None, x: Tensor) -> Scaling | None:
    """How our kernels do what a quantizer of TransformerEngine would do with a result for x.

    Returns:
        None where there is no quantizer, where it is of another kind (MXFP8, NVFP4, custom), where
        its amax is one over several ranks, and where the kernels cannot compute x.
    """
    if quantizer is None:
        return None
    # a subclass may do something else
    kind = type(quantizer)
    reason = quantized.unavailable(x)
    if kind not in (DelayedQuantizer, Float8CurrentScalingQuantizer, Float8BlockQuantizer):
        reason = f"there is no kernel that writes xIELU as a {kind.__name__} does"
    elif kind is Float8CurrentScalingQuantizer and quantizer.with_amax_reduction:
        reason = "the kernels do not exchange amaxes between ranks"
    if reason is not None:
        warnings.warn(
            f"xIELU writes {x.dtype}, which TransformerEngine casts in a pass of its own: {reason}",
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
    return Current(dtype, power_of_two=quantizer.force_pow_2_scales, epsilon=quantizer.amax_epsilon)


def rows(x: Tensor) -> Tensor:
    """x [..., K] as the matrix that the kernels take."""
    return x.flatten(0, -2)


def empty(quantizer: Any, x: Tensor) -> tuple[Any, Quantized]:
    """What the quantizer would return for a result of x's shape, and its parts as matrices."""
    result, columns = quantizer.make_empty(x.shape, dtype=x.dtype, device=x.device), x.shape[-1]
    if isinstance(quantizer, Float8BlockQuantizer):
        return result, Quantized(
            rowwise=_matrix(result._rowwise_data, -1, columns),
            columnwise=_matrix(result._columnwise_data, columns, -1),
            rowwise_scale_inv=result._rowwise_scale_inv,
            columnwise_scale_inv=result._columnwise_scale_inv,
        )
    # no transpose where the GPU multiplies FP8 along either dimension
    result._transpose_invalid = result._transpose is None
    delayed = isinstance(quantizer, DelayedQuantizer)
    return result, Quantized(
        rowwise=_matrix(result._data, -1, columns),
        columnwise=_matrix(result._transpose, columns, -1),
        rowwise_scale_inv=result._scale_inv,
        columnwise_scale_inv=result._scale_inv,
        amax=quantizer.amax if delayed else x.new_empty(1, dtype=float32),
    )


def _matrix(data: Tensor | None, rows: int, columns: int) -> Tensor | None:
    return None if data is None or data.numel() == 0 else data.view(rows, columns)
