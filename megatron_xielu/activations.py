"""The activations as nn.Modules with their trained parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_xielu.ops import functional
from megatron_xielu.ops.dispatch import Impl
from megatron_xielu.ops.family import FAMILY, Below
from megatron_xielu.ops.reference import inverse_softplus


class TrainedActivation(nn.Module):
    """What the activations with trained scalars have in common.

    The parameters hold the values before softplus. Their shape (1,) is what the usual rule spares
    from weight decay. They stay float32 through `.bfloat16()`, `.half()` and `.to(dtype)` to a
    shorter type, since a bf16 alpha starts at 0.8047 instead of 0.8 and stops moving at common
    learning rates.

    Args:
        name: of a function in `ops.functional`.
        initial: effective initial value of each alpha, in the function's order.
        beta: slope at zero, > 0; a constant.
        impl: see `megatron_xielu.xielu`.

    Raises:
        ValueError: an initial value outside its range.
    """

    def __init__(
        self,
        name: str,
        initial: Mapping[str, float],
        beta: float,
        impl: Impl,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self._formula, self._initial = FAMILY[name], dict(initial)
        self.beta, self.impl = beta, impl
        if not 0 < beta < math.inf:
            raise ValueError(f"beta={beta} must be > 0: it is the slope at zero")
        for alpha, value in initial.items():
            offset = self._offset(alpha)
            if value <= offset and offset:
                raise ValueError(
                    f"{alpha}_init={value} must be > beta={beta}: a_n = beta + softplus({alpha})"
                )
            if value <= 0:
                raise ValueError(f"{alpha}_init={value} must be > 0: it is a softplus")
            setattr(self, alpha, nn.Parameter(torch.empty(1, dtype=torch.float32, device=device)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the alphas to their initial values."""
        for alpha, value in self._initial.items():
            getattr(self, alpha).fill_(inverse_softplus(value - self._offset(alpha)))

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape, floating point; returns the same shape and dtype."""
        function = getattr(functional, self._formula.name)
        output: Tensor = function(x, *self.alphas(), beta=self.beta, impl=self.impl)
        return output

    def alphas(self) -> tuple[nn.Parameter, ...]:
        """The parameters in the order in which the function takes them, each of shape (1,)."""
        return tuple(getattr(self, alpha) for alpha in self._initial)

    @torch.no_grad()
    def effective_alphas(self) -> tuple[Tensor, ...]:
        """The alphas after softplus, with beta where it belongs to them, each of shape (1,)."""
        return tuple(
            F.softplus(parameter) + self._offset(alpha)
            for alpha, parameter in zip(self._initial, self.alphas(), strict=True)
        )

    def extra_repr(self) -> str:
        initial = "".join(f"{alpha}_init={value}, " for alpha, value in self._initial.items())
        return f"{initial}beta={self.beta}, impl={self.impl}"

    def _offset(self, alpha: str) -> float:
        below = self._formula.below == Below.EXPONENTIAL and alpha == "alpha_n"
        return self.beta if below else 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # mixed-precision wrappers call module.bfloat16(); of what that does to the parameters and
        # their gradients, only the device is followed
        def keep_type(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            shorter = result.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(result.device) if shorter else result

        return super()._apply(keep_type, recurse)


class XIELU(TrainedActivation):
    """xIELU with two trained scalars (arXiv 2411.13010).

    Args:
        alpha_p_init: initial effective a_p = softplus(alpha_p), > 0.
        alpha_n_init: initial effective a_n = beta + softplus(alpha_n), > beta.
        beta, impl: see `TrainedActivation`.
    """

    alpha_p: nn.Parameter
    alpha_n: nn.Parameter

    def __init__(
        self,
        alpha_p_init: float = 0.8,
        alpha_n_init: float = 0.8,
        beta: float = 0.5,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        initial = {"alpha_p": alpha_p_init, "alpha_n": alpha_n_init}
        super().__init__("xielu", initial, beta, impl, device)


class XIPReLU(TrainedActivation):
    """xIPReLU (arXiv 2411.13010): a trained parabola on each side.

    Args:
        alpha_p_init, alpha_n_init: initial effective a_p and a_n, both softplus, > 0.
        beta, impl: see `TrainedActivation`.
    """

    alpha_p: nn.Parameter
    alpha_n: nn.Parameter

    def __init__(
        self,
        alpha_p_init: float = 0.8,
        alpha_n_init: float = 0.8,
        beta: float = 0.5,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        initial = {"alpha_p": alpha_p_init, "alpha_n": alpha_n_init}
        super().__init__("xiprelu", initial, beta, impl, device)


class XIEP(TrainedActivation):
    """XIEP (the code of arXiv 2411.13010): xIELU with a trained cubic term above zero.

    Args:
        alpha_p3_init, alpha_p2_init: initial effective coefficients of x^3 and x^2, > 0.
        alpha_n_init: initial effective a_n = beta + softplus(alpha_n), > beta.
        beta, impl: see `TrainedActivation`.
    """

    alpha_p3: nn.Parameter
    alpha_p2: nn.Parameter
    alpha_n: nn.Parameter

    def __init__(
        self,
        alpha_p3_init: float = 0.4,
        alpha_p2_init: float = 0.8,
        alpha_n_init: float = 0.8,
        beta: float = 0.5,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        initial = {
            "alpha_p3": alpha_p3_init,
            "alpha_p2": alpha_p2_init,
            "alpha_n": alpha_n_init,
        }
        super().__init__("xiep", initial, beta, impl, device)
