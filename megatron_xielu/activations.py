"""The activation as an nn.Module with its trained parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_xielu.ops.dispatch import Impl
from megatron_xielu.ops.functional import xielu
from megatron_xielu.ops.reference import inverse_softplus


class XIELU(nn.Module):
    """xIELU with two trained scalars (arXiv 2411.13010).

    Args:
        alpha_p_init: initial effective a_p = softplus(alpha_p), > 0.
        alpha_n_init: initial effective a_n = beta + softplus(alpha_n), > beta.
        beta: slope at zero, > 0; a constant.
        impl: see `megatron_xielu.xielu`.

    The parameters `alpha_p` and `alpha_n` hold the values before softplus. Their shape (1,) is what
    the usual rule spares from weight decay. They stay float32 through `.bfloat16()`, `.half()` and
    `.to(dtype)` to a shorter type, since a bf16 alpha starts at 0.8047 instead of 0.8 and stops
    moving at common learning rates.

    Raises:
        ValueError: an initial value outside its range.
    """

    def __init__(
        self,
        alpha_p_init: float = 0.8,
        alpha_n_init: float = 0.8,
        beta: float = 0.5,
        impl: Impl = "auto",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if alpha_p_init <= 0:
            raise ValueError(f"alpha_p_init={alpha_p_init} must be > 0: it is a softplus")
        if beta <= 0 or alpha_n_init <= beta:
            raise ValueError(
                f"alpha_n_init={alpha_n_init} must be > beta={beta} > 0: "
                "a_n = beta + softplus(alpha_n)"
            )
        self.alpha_p_init, self.alpha_n_init = alpha_p_init, alpha_n_init
        self.beta, self.impl = beta, impl
        self.alpha_p = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device))
        self.alpha_n = nn.Parameter(torch.empty(1, dtype=torch.float32, device=device))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set both alphas to their initial values."""
        self.alpha_p.fill_(inverse_softplus(self.alpha_p_init))
        self.alpha_n.fill_(inverse_softplus(self.alpha_n_init - self.beta))

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape, floating point; returns the same shape and dtype."""
        return xielu(x, self.alpha_p, self.alpha_n, beta=self.beta, impl=self.impl)

    @torch.no_grad()
    def effective_alphas(self) -> tuple[Tensor, Tensor]:
        """(a_p, a_n) after softplus, each of shape (1,)."""
        return F.softplus(self.alpha_p), self.beta + F.softplus(self.alpha_n)

    def extra_repr(self) -> str:
        return (
            f"alpha_p_init={self.alpha_p_init}, alpha_n_init={self.alpha_n_init}, "
            f"beta={self.beta}, impl={self.impl}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # mixed-precision wrappers call module.bfloat16(); a round trip would lose the low bits, so
        # the values are kept aside and only what fn says about the device is followed
        kept = [(alpha, alpha.data) for alpha in (self.alpha_p, self.alpha_n)]
        super()._apply(fn, recurse)
        for alpha, data in kept:
            if data.dtype.itemsize > alpha.dtype.itemsize:
                alpha.data = data.to(alpha.device)
        return self
