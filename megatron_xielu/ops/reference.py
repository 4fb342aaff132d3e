"""The formulas in plain torch: what every faster implementation is compared with.

xIELU (arXiv 2411.13010), with beta = 0.5:

    a_p = softplus(alpha_p)             a_n = beta + softplus(alpha_n)
    x > 0:   a_p x^2 + beta x
    x <= 0:  a_n (e^x - 1 - x) + beta x

The slope is 2 a_p x + beta above zero and a_n (e^x - 1) + beta below; it is beta at zero. The
paper's code clamps x to at most -1e-6 in the exponential so that autograd's unused branch stays
finite, which gives the slope beta - a_n on (-1e-6, 0]. Here each branch sees only its own half of
the input instead: the slope is right everywhere and no clamp constant is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

PAPER_EPS = 1e-6


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic of a storage type: float64 for float64 and float16, else float32.

    float16 has too many bits for float32 to round its results correctly where they cross zero.
    """
    return torch.float64 if dtype in (torch.float64, torch.float16) else torch.float32


def xielu_reference(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float = 0.5) -> Tensor:
    """xIELU, differentiated by autograd.

    Args:
        x: any shape, floating point.
        alpha_p, alpha_n: one element each, before softplus.
        beta: the slope at zero.

    Returns:
        A tensor of x's shape and dtype, computed in `compute_dtype` and rounded once.
    """
    above, below = _halves(x)
    positive = above * (_softplus(alpha_p, above) * above + beta)
    # a_n (e^x - 1 - x) + beta x = a_n (e^x - 1) - softplus(alpha_n) x, which is not nan at -inf
    excess = _softplus(alpha_n, below)
    negative = (beta + excess) * torch.expm1(below) - excess * below
    return torch.where(x > 0, positive, negative).to(x.dtype)


def xiprelu_reference(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float = 0.5) -> Tensor:
    """xIPReLU: a parabola on each side; x > 0: a_p x^2 + beta x, x <= 0: a_n x^2 + beta x.

    Here a_n = softplus(alpha_n), without beta.
    """
    above, below = _halves(x)
    positive = above * (_softplus(alpha_p, above) * above + beta)
    negative = below * (_softplus(alpha_n, below) * below + beta)
    return torch.where(x > 0, positive, negative).to(x.dtype)


def xiep_reference(
    x: Tensor, alpha_p3: Tensor, alpha_p2: Tensor, alpha_n: Tensor, beta: float = 0.5
) -> Tensor:
    """XIEP: xIELU with a cubic term, x > 0: a_p3 x^3 + a_p2 x^2 + beta x."""
    above, below = _halves(x)
    slope = _softplus(alpha_p3, above) * above + _softplus(alpha_p2, above)
    excess = _softplus(alpha_n, below)
    negative = (beta + excess) * torch.expm1(below) - excess * below
    return torch.where(x > 0, above * (slope * above + beta), negative).to(x.dtype)


def relu2_reference(x: Tensor, beta: float = 0.0) -> Tensor:
    """ReLU squared: max(x, 0)^2, plus beta x above zero."""
    above, _ = _halves(x)
    # a nan is neither above nor below zero
    return torch.where(x <= 0, torch.zeros_like(x), (above * (above + beta)).to(x.dtype))


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "xielu": xielu_reference,
    "xiprelu": xiprelu_reference,
    "xiep": xiep_reference,
    "relu2": relu2_reference,
}


def xielu_as_published(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float = 0.5) -> Tensor:
    """xIELU with the arithmetic of the code published with the paper, to the bit.

    Everything is rounded after each operation, and the exponential never sees more than -1e-6, so
    that y(0) is not 0 and autograd's slope at 0 is beta - a_n. The alphas are taken as they are, so
    that the result has the type and shape that torch promotes x and them to; the published module
    keeps them in the model's type.
    """
    a_p = F.softplus(alpha_p)
    a_n = beta + F.softplus(alpha_n)
    # filled on the device, which a CUDA graph can capture and a copy from the host cannot
    eps = torch.full((), -PAPER_EPS, dtype=x.dtype, device=x.device)
    exponential = torch.expm1(torch.min(x, eps))
    return torch.where(x > 0, a_p * x * x + beta * x, a_n * exponential - a_n * x + beta * x)


def inverse_softplus(value: float) -> float:
    """The alpha whose softplus is `value` > 0: log(e^value - 1), without overflow."""
    return value + math.log(-math.expm1(-value))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = x.to(compute_dtype(x.dtype))
    return wide.clamp(min=0), wide.clamp(max=0)


def _softplus(alpha: Tensor, like: Tensor) -> Tensor:
    # in float64, because a rounded coefficient would be an error of every element; not below what
    # like's type has, because zero times an infinite x is no number
    return F.softplus(alpha.double()).to(like.dtype).clamp(min=torch.finfo(like.dtype).tiny)
