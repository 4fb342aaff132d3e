"""xIELU as an autograd function with its own backward, in torch operations that run on any device.

Autograd of the reference would keep a dozen intermediates; this keeps the input and the two alphas.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from megatron_xielu.ops.reference import compute_dtype


class EagerXIELU(torch.autograd.Function):
    """Each branch is evaluated on its own half of x and contributes nothing to the other half."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float
    ) -> Tensor:
        ctx.save_for_backward(x, alpha_p, alpha_n)
        ctx.beta = beta  # type: ignore[attr-defined]
        dtype = compute_dtype(x.dtype)
        excess = F.softplus(alpha_n.to(dtype))
        below = x.to(dtype).clamp(max=0)
        y = torch.expm1(below).mul_(excess + beta).addcmul_(below, excess, value=-1)
        # the half above zero takes over the buffer of the half below
        above = torch.clamp(x.to(dtype), min=0, out=below)
        slope = above.mul(F.softplus(alpha_p.to(dtype))).add_(beta)
        return y.addcmul_(above, slope).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha_p, alpha_n = ctx.saved_tensors  # type: ignore[attr-defined]
        beta = ctx.beta  # type: ignore[attr-defined]
        dtype = compute_dtype(x.dtype)
        grad_y = grad_y.to(dtype)
        below = x.to(dtype).clamp(max=0)
        above = x.to(dtype).clamp(min=0)
        exponential = torch.expm1(below)

        grad_p = _total(above.square().mul_(grad_y)) * torch.sigmoid(alpha_p.to(dtype))
        grad_n = _total(below.neg_().add_(exponential).mul_(grad_y)) * torch.sigmoid(
            alpha_n.to(dtype)
        )

        slope = exponential.mul_(F.softplus(alpha_n.to(dtype)) + beta)
        slope.addcmul_(above, 2 * F.softplus(alpha_p.to(dtype))).add_(beta)
        grad_x = slope.mul_(grad_y).to(x.dtype)
        return grad_x, grad_p.to(alpha_p.dtype), grad_n.to(alpha_n.dtype), None


def _total(terms: Tensor) -> Tensor:
    """Sum of all terms: rows in their own precision, then the rows' sums in float64."""
    return terms.sum(-1).sum(dtype=torch.float64).to(terms.dtype)
