"""xIELU in plain torch: the definition that every faster implementation is compared with.

Source: "Deriving Activation Functions Using Integration", arXiv 2411.13010, with beta = 0.5:

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

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The arithmetic of an input type: float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def xielu_reference(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float = 0.5) -> Tensor:
    """xIELU, differentiated by autograd.

    Args:
        x: any shape, floating point.
        alpha_p, alpha_n: one element each, before softplus.
        beta: the slope at zero.

    Returns:
        A tensor of x's shape and dtype, computed in `compute_dtype` and rounded once.
    """
    dtype = compute_dtype(x.dtype)
    above, below = x.to(dtype).clamp(min=0), x.to(dtype).clamp(max=0)
    a_p = F.softplus(alpha_p.to(dtype))
    # a_n (e^x - 1 - x) + beta x = a_n (e^x - 1) - softplus(alpha_n) x, which is not nan at -inf
    excess = F.softplus(alpha_n.to(dtype))
    positive = above * (a_p * above + beta)
    negative = (beta + excess) * torch.expm1(below) - excess * below
    return torch.where(x > 0, positive, negative).to(x.dtype)


def inverse_softplus(value: float) -> float:
    """The alpha whose softplus is `value` > 0: log(e^value - 1), without overflow."""
    return value + math.log(-math.expm1(-value))
