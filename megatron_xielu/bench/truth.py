"""The family in float64, to a few units of its last place, and the yardsticks errors are put in.

Written apart from `ops.reference` so that the two check each other, and for measuring rather than
for training: nothing here is differentiated, and where a formula cancels another one is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xielu.ops.family import Activation, Below

# 1/2!, 1/3!, ...: for |x| <= 1/2 the first term left out is below 1e-18 of the sum
_TAIL = [1 / math.factorial(k) for k in range(2, 18)]
# elements whose float64 intermediates are held at once
_PIECE = 1 << 18


@dataclass(frozen=True)
class Coefficients:
    """The trained scalars after softplus, in float64; names as in `ops.family`."""

    beta: float
    p2: float
    p3: float
    n: float
    n_minus_beta: float


@dataclass(frozen=True)
class Value:
    """A quantity at each x, and how large the terms are that it is the sum of.

    Arithmetic of some precision errs by a few of its roundings of the terms, which is much where
    they cancel.

    Attributes:
        value: float64, of x's shape.
        terms: sum of the absolute terms as `ops.reference` writes them.
        least: the same in the way of writing them that cancels least.
    """

    value: Tensor
    terms: Tensor
    least: Tensor

    @staticmethod
    def of(*terms: Tensor) -> Value:
        """The sum of terms."""
        value, absolute = terms[0], terms[0].abs()
        for term in terms[1:]:
            value, absolute = value + term, absolute + term.abs()
        return Value(value, absolute, absolute)

    def or_less_cancelling(self, other: Value) -> Value:
        """Another way to write the same values, at each element where its terms are smaller."""
        less = other.terms < self.terms
        return Value(
            torch.where(less, other.value, self.value),
            self.terms,
            torch.where(less, other.terms, self.terms),
        )

    def where(self, condition: Tensor, other: Value) -> Value:
        """Elements of this where the condition holds, else of the other."""
        return Value(
            torch.where(condition, self.value, other.value),
            torch.where(condition, self.terms, other.terms),
            torch.where(condition, self.least, other.least),
        )


@dataclass(frozen=True)
class Truth:
    """An activation, its derivative by x, and those by each coefficient that is trained."""

    y: Value
    dx: Value
    by_coefficient: dict[str, Tensor]


def coefficients(activation: Activation, alphas: Sequence[Tensor], beta: float) -> Coefficients:
    """The coefficients that the alphas, one element each, stand for."""
    found = {"p2": 1.0, "p3": 0.0, "n": 0.0}
    for name, alpha in zip(activation.coefficients, alphas, strict=True):
        raw = float(alpha)
        found[name] = max(raw, 0.0) + math.log1p(math.exp(-abs(raw)))
    softplus_n = found["n"]
    if activation.below == Below.EXPONENTIAL:
        found["n"] += beta
    return Coefficients(beta, **found, n_minus_beta=softplus_n)


def truth(activation: Activation, x: Tensor, c: Coefficients) -> Truth:
    """Values at x: any shape and floating type. Those at the infinities are the limits."""
    x = x.double()
    above, below, beta = x.clamp(min=0), x.clamp(max=0), torch.full_like(x, c.beta)
    by_coefficient = {"p2": above**2, "p3": above**3}
    # products, because a coefficient of zero times an infinity is no term
    cubic = c.p3 * above if activation.cubic else 0.0
    y = Value.of(above * (above * (cubic + c.p2) + c.beta))
    dx = Value.of(above * (3 * cubic + 2 * c.p2) + c.beta)
    match activation.below:
        case Below.EXPONENTIAL:
            expm1, excess = torch.expm1(below), exponential_excess(below)
            # the way without beta has the limit at -inf
            y_below = Value.of(c.n * expm1, -c.n_minus_beta * below).or_less_cancelling(
                Value.of(c.n * excess, c.beta * below)
            )
            dx_below = Value.of(c.n * expm1, beta).or_less_cancelling(
                Value.of(c.n * below.exp(), torch.full_like(x, -c.n_minus_beta))
            )
            by_coefficient["n"] = excess
        case Below.QUADRATIC:
            # one product, which is not inf - inf at -inf
            size = below * (c.n * below - c.beta)
            y_below = Value(below * (c.n * below + c.beta), size, size)
            dx_below = Value.of(2 * c.n * below, beta)
            by_coefficient["n"] = below**2
        case Below.ZERO:
            zero_or_nan = torch.where(x.isnan(), x, 0.0)
            y_below = Value.of(zero_or_nan)
            dx_below = Value.of(torch.where(x < 0, 0.0, zero_or_nan + c.beta))
    return Truth(
        y.where(x > 0, y_below),
        dx.where(x > 0, dx_below),
        {name: by_coefficient[name] for name in activation.coefficients},
    )


def alpha_gradients(
    activation: Activation, grad_y: Tensor, x: Tensor, alphas: Sequence[Tensor], beta: float
) -> tuple[list[float], list[float]]:
    """The gradient of each alpha, and the same sum of absolute terms.

    The quotient of the two says how much the terms cancel, hence how hard the sum is.
    """
    c = coefficients(activation, alphas, beta)
    sums, absolute = [0.0] * len(alphas), [0.0] * len(alphas)
    for grad, values in zip(grad_y.split(_PIECE), x.split(_PIECE), strict=True):
        derivatives = truth(activation, values, c).by_coefficient
        for i, name in enumerate(activation.coefficients):
            terms = grad.double() * derivatives[name]
            sums[i] += float(terms.sum())
            absolute[i] += float(terms.abs().sum())
    slopes = [float(torch.sigmoid(alpha.double())) for alpha in alphas]
    return (
        [total * slope for total, slope in zip(sums, slopes, strict=True)],
        [total * slope for total, slope in zip(absolute, slopes, strict=True)],
    )


def exponential_excess(x: Tensor) -> Tensor:
    """e^x - 1 - x for float64 x <= 0, to its last places near zero too."""
    tail = torch.full_like(x, _TAIL[-1])
    for coefficient in reversed(_TAIL[:-1]):
        tail = tail * x + coefficient
    return torch.where(x < -0.5, torch.expm1(x) - x, tail * x * x)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` around each finite float64 value."""
    info = torch.finfo(dtype)
    # |value| is in [1/2, 1) 2^exponent; zero is among the subnormal numbers
    exponent = torch.frexp(torch.where(value == 0, info.tiny, value)).exponent
    exponent = exponent.clamp(min=math.frexp(info.tiny)[1]) + (math.frexp(info.eps)[1] - 2)
    # by its bits, since torch.ldexp and pow take a detour through float32
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of `dtype` nearest to each float64 value, ties to even, as float64.

    `Tensor.to` rounds to float32 on the way to 16 bits, so twice.
    """
    spacing = ulp(value, dtype)
    nearest = torch.round(value / spacing) * spacing
    nearest = torch.where(nearest.abs() > torch.finfo(dtype).max, value.sign() * math.inf, nearest)
    return torch.where(value.isfinite(), nearest, value)


def distance(value: Tensor, exact: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each `value` is from the exact one, in units of the last place of `dtype`.

    Infinite where one is an infinity or a nan and the other does not round to the same.
    """
    nearest = rounded(exact, dtype)
    value = value.double()
    error = (value - exact).abs() / ulp(exact, dtype)
    same = (value == nearest) | (value.isnan() & nearest.isnan())
    comparable = value.isfinite() & nearest.isfinite()
    return torch.where(comparable, error, torch.where(same, 0.0, math.inf))
