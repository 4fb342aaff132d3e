"""TransformerEngine's fused activations and casts as plain functions, to measure beside ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# the extension module by way of the package, which has to load the library that it needs
from transformer_engine.pytorch.tensor.float8_tensor import Float8Quantizer, tex

_DTYPES = {
    torch.float8_e4m3fn: tex.DType.kFloat8E4M3,
    torch.float8_e5m2: tex.DType.kFloat8E5M2,
}
_FORWARD = {"gelu": tex.gelu, "srelu": tex.srelu}
_BACKWARD = {"gelu": tex.dgelu, "srelu": tex.dsrelu}


Float8 = tuple[Tensor, Tensor, Tensor]
"""FP8 data [M, K], the same transposed, and the amax before the cast."""


def forward(name: str, x: Tensor) -> Tensor:
    """GELU (by tanh) or ReLU squared of x, in x's dtype."""
    result: Tensor = _FORWARD[name](x, None)
    return result


def backward(name: str, grad_y: Tensor, x: Tensor) -> Tensor:
    """The gradient by x, in x's dtype."""
    result: Tensor = _BACKWARD[name](grad_y, x, None)
    return result


class Quantizer:
    """Casts to FP8 with a scale that is given (delayed scaling).

    Args:
        scale: float32, one element; values are multiplied by it.
        dtype: float8_e4m3fn or float8_e5m2.
    """

    def __init__(self, scale: Tensor, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._amax = torch.zeros_like(scale)
        self._quantizer = Float8Quantizer(scale, self._amax, _DTYPES[dtype])

    def cast(self, tensor: Tensor) -> Float8:
        """A tensor [M, K] of another kernel."""
        return self._unpack(tex.quantize(tensor, self._quantizer))

    def forward(self, name: str, x: Tensor) -> Float8:
        """As the function `forward`, cast in the same pass."""
        return self._unpack(_FORWARD[name](x, self._quantizer))

    def backward(self, name: str, grad_y: Tensor, x: Tensor) -> Float8:
        """As the function `backward`, cast in the same pass."""
        return self._unpack(_BACKWARD[name](grad_y, x, self._quantizer))

    def _unpack(self, tensor: Any) -> Float8:
        data, transposed = (
            bytes_.view(self._dtype) for bytes_ in (tensor._data, tensor._transpose)
        )
        return data, transposed, self._amax
