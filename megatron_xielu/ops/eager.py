"""The family in torch operations with a backward by hand, for any device and floating type.

Autograd of the reference would keep a dozen intermediates; the operations of `ops.library`, which
call this, keep the input and the alphas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu.ops.family import Activation, Below
from megatron_xielu.ops.reference import compute_dtype


def unavailable(x: Tensor) -> str | None:
    """Why x cannot be computed here, or None."""
    return None


def forward(
    activation: Activation, x: Tensor, bias: Tensor | None, alphas: Sequence[Tensor], beta: float
) -> Tensor:
    """Each branch is evaluated on its own half of x and contributes nothing to the other half."""
    values = _values(x, bias)
    p2, p3, n, excess = _coefficients(activation, alphas, beta, values)
    below = values.clamp(max=0)
    match activation.below:
        case Below.EXPONENTIAL:
            y = torch.expm1(below).mul_(n).addcmul_(below, excess, value=-1)
        case Below.QUADRATIC:
            y = below.mul(n).add_(beta).mul_(below)
        case Below.ZERO:
            y = torch.zeros_like(values)
    # the half above zero takes over the buffer of the half below
    above = torch.clamp(values, min=0, out=below)
    slope = above.mul(p3).add_(p2) if activation.cubic else p2
    return y.addcmul_(above, above.mul(slope).add_(beta)).to(x.dtype)


def backward(
    activation: Activation,
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    alphas: Sequence[Tensor],
    beta: float,
) -> list[Tensor]:
    """dx, then the gradient of each alpha, then that of the bias if there is one."""
    values = _values(x, bias)
    p2, p3, n, _ = _coefficients(activation, alphas, beta, values)
    grad_y = grad_y.to(values.dtype)
    above, below = values.clamp(min=0), values.clamp(max=0)
    square = above.square()

    sums = {}
    if activation.alphas:
        sums["p2"] = _total(square * grad_y)
    if activation.cubic:
        # not 3 p3 x^2, whose x^2 overflows before the product does
        slope = above.mul(3 * p3).add_(2 * p2).mul_(above).add_(beta)
        sums["p3"] = _total(square.mul_(above).mul_(grad_y))
    else:
        slope = above.mul_(2 * p2).add_(beta)
    match activation.below:
        case Below.EXPONENTIAL:
            exponential = torch.expm1(below)
            sums["n"] = _total(below.neg_().add_(exponential).mul_(grad_y))
            slope.addcmul_(exponential, n)
        case Below.QUADRATIC:
            slope.addcmul_(below, 2 * n)
            sums["n"] = _total(below.square_().mul_(grad_y))
        case Below.ZERO:
            pass
    grad_x = slope.mul_(grad_y)
    grads = [
        (sums[coefficient] * torch.sigmoid(alpha.double())).to(alpha.dtype)
        for coefficient, alpha in zip(activation.coefficients, alphas, strict=True)
    ]
    result = [grad_x.to(x.dtype), *grads]
    if bias is not None:
        result.append(grad_x.flatten(0, -2).sum(0).to(bias.dtype))
    return result


def _values(x: Tensor, bias: Tensor | None) -> Tensor:
    dtype = compute_dtype(x.dtype)
    return x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)


def _coefficients(
    activation: Activation, alphas: Sequence[Tensor], beta: float, like: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p2, p3, n and n - beta, rounded once from float64."""
    one, zero = (like.new_full((), value) for value in (1.0, 0.0))
    # zero times an infinite x would be no number
    least = torch.finfo(like.dtype).tiny
    found = {
        coefficient: F.softplus(alpha.double()).clamp(min=least)
        for coefficient, alpha in zip(activation.coefficients, alphas, strict=True)
    }
    excess = found.get("n", zero)
    n = excess + beta if activation.below == Below.EXPONENTIAL else excess
    p2, p3 = found.get("p2", one), found.get("p3", zero)
    return p2.to(like.dtype), p3.to(like.dtype), n.to(like.dtype), excess.to(like.dtype)


def _total(terms: Tensor) -> Tensor:
    """Sum of all terms: rows in their own precision, then the rows' sums in float64."""
    return terms.sum(-1).sum(dtype=torch.float64)
