"""The one public function: checks its input and picks an implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from megatron_xielu.ops.eager import EagerXIELU
from megatron_xielu.ops.reference import xielu_reference

Impl = Literal["auto", "eager", "reference"]

_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "auto": EagerXIELU.apply,
    "eager": EagerXIELU.apply,
    "reference": xielu_reference,
}


def xielu(
    x: Tensor, alpha_p: Tensor, alpha_n: Tensor, *, beta: float = 0.5, impl: Impl = "auto"
) -> Tensor:
    """The trainable activation xIELU (arXiv 2411.13010); `ops.reference` states the formula.

    Args:
        x: any shape and strides, floating point.
        alpha_p, alpha_n: one element each, before softplus; their gradients come in their own
            dtype, so keep them in float32 where they are trained.
        beta: slope at zero; not trained.
        impl: "auto" takes the fastest implementation for x; "eager" is torch operations with a
            hand-written backward (saves x alone), "reference" is the formula under autograd.

    Returns:
        A tensor of x's shape and dtype. Arithmetic is float32 (float64 for float64 input) whatever
        the storage type, with one rounding at the end.

    Raises:
        TypeError: x or an alpha is not floating point.
        ValueError: an alpha does not hold exactly one element, or impl is unknown.
    """
    for name, tensor in (("x", x), ("alpha_p", alpha_p), ("alpha_n", alpha_n)):
        if not tensor.is_floating_point():
            raise TypeError(f"xielu: {name} must be floating point, got {tensor.dtype}")
    for name, alpha in (("alpha_p", alpha_p), ("alpha_n", alpha_n)):
        if alpha.numel() != 1:
            raise ValueError(
                f"xielu: {name} must hold one element, got shape {tuple(alpha.shape)}; "
                "one pair of alphas belongs to one call"
            )
    if impl not in _IMPLEMENTATIONS:
        raise ValueError(f"xielu: impl={impl!r} is unknown; choose one of {get_args(Impl)}")
    # shape (1,) broadcasts against every x, a 0-d x included, without changing its shape
    return _IMPLEMENTATIONS[impl](x, alpha_p.reshape(()), alpha_n.reshape(()), beta)
