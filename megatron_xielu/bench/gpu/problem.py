"""The input of `gpu`'s measurements, and whether a result for it is right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu.bench.truth import Truth, Value, alpha_gradients, coefficients, truth, ulp
from megatron_xielu.ops.family import XIELU
from megatron_xielu.ops.reference import inverse_softplus

# each alpha another one, so that exchanging them shows
A_P, A_N, BETA = 0.8, 1.1, 0.5
# in (-1e-6, 0] the published code has another slope than the formula
PUBLISHED_EPS = 1e-6
# elements whose float64 truth is held at once
_PIECE = 1 << 22


class Float8(NamedTuple):
    """round(value * scale) as [M, K] and as [K, M], and the largest |value|; one element each."""

    rowwise: Tensor
    columnwise: Tensor
    amax: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Results:
    """What a contender has computed; None or empty where it does not compute it."""

    y: Tensor | Float8 | None = None
    dx: Tensor | Float8 | None = None
    alphas: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Allowance:
    """How far from float64 a result may be.

    Attributes:
        relative: to the absolute terms that a value is the sum of; roundings of the arithmetic.
        absolute: errors of arithmetic whose terms are larger than those of the best formula, as
            e^x is in e^x - 1.
        sums: of an alpha's gradient, relative to the sum of its absolute terms.
        clamped: whether dx may be anything where the published code clamps.
    """

    relative: float
    absolute: float = 0.0
    sums: float = 0.0
    clamped: bool = False


_EPS = torch.finfo(torch.bfloat16).eps
# float32 arithmetic; the rounding to the result's type comes on top of each of these
ONE_ROUNDING = Allowance(relative=2.0**-20, sums=1e-6)
# to bfloat16 before something else casts it
TWO_ROUNDINGS = Allowance(relative=_EPS, sums=1e-6)
# a dozen roundings to bfloat16, of which few add up
BFLOAT16_ARITHMETIC = Allowance(relative=4 * _EPS, absolute=4 * _EPS, sums=0.02, clamped=True)


@dataclass(frozen=True)
class Problem:
    """One input, and alphas that are exact in bfloat16, so that rounding them costs nobody digits.

    Attributes:
        x, grad_y: [tokens, columns], contiguous, of an even number of elements.
        alphas: float32, one element each, before softplus.
    """

    x: Tensor
    grad_y: Tensor
    alphas: tuple[Tensor, Tensor]

    @staticmethod
    def random(rows: int, columns: int, dtype: torch.dtype, device: str) -> Problem:
        """Normal numbers; the upstream gradient has a mean, so that its sums do not cancel."""
        torch.manual_seed(0)
        x = torch.randn(rows, columns, device=device, dtype=dtype)
        grad_y = torch.randn(rows, columns, device=device, dtype=dtype).add_(0.5)
        alpha_p, alpha_n = (
            torch.tensor([inverse_softplus(value)], device=device).bfloat16().float()
            for value in (A_P, A_N - BETA)
        )
        return Problem(x, grad_y, (alpha_p, alpha_n))

    def wrong(self, allowance: Allowance, activation: str, results: Results) -> str | None:
        """What is wrong with the results, or None.

        Args:
            activation: "xielu", "gelu" (by tanh) or "srelu".
        """
        largest = {"y": 0.0, "dx": 0.0}
        for rows in self._pieces():
            exact = self._truth(activation, self.x[rows])
            grad_y = self.grad_y[rows].double()
            for what, value, terms, weight in (
                ("y", exact.y.value, exact.y.terms, 1.0),
                ("dx", exact.dx.value * grad_y, exact.dx.terms * grad_y.abs(), grad_y.abs()),
            ):
                got = getattr(results, what)
                if got is None:
                    continue
                allowed = allowance.relative * terms + allowance.absolute * weight
                if isinstance(got, Float8):
                    largest[what] = max(largest[what], float(value.abs().max()))
                    error, allowed, apart = _float8_error(got, rows, value, allowed)
                    if apart:
                        return f"the transposed {what} differs from {what}"
                else:
                    error = (got[rows].double() - value).abs()
                    allowed = allowed + 0.5 * ulp(value, got.dtype)
                bad = ~(error <= allowed)
                if what == "dx" and allowance.clamped:
                    bad &= ~((self.x[rows] > -PUBLISHED_EPS) & (self.x[rows] <= 0))
                if bool(bad.any()):
                    return _first(what, bad, self.x[rows], error, allowed)
        return self._wrong_amax(results, allowance, largest) or self._wrong_sums(results, allowance)

    def _wrong_amax(
        self, results: Results, allowance: Allowance, largest: dict[str, float]
    ) -> str | None:
        for what, expected in largest.items():
            got = getattr(results, what)
            if isinstance(got, Float8):
                # the truth's own largest element may be a neighbour of the result's
                error = abs(float(got.amax) / expected - 1)
                if not error <= 2 * allowance.relative:
                    return f"the amax of {what} is {float(got.amax)} instead of {expected}"
        return None

    def _wrong_sums(self, results: Results, allowance: Allowance) -> str | None:
        if not results.alphas:
            return None
        exact, absolute = self._exact_sums
        for name, got, value, scale in zip(
            XIELU.alphas, results.alphas, exact, absolute, strict=True
        ):
            if not abs(float(got) - value) <= allowance.sums * scale:
                return f"the gradient of {name} is {float(got):.7g} instead of {value:.7g}"
        return None

    @functools.cached_property
    def _exact_sums(self) -> tuple[list[float], list[float]]:
        return alpha_gradients(XIELU, self.grad_y.flatten(), self.x.flatten(), self.alphas, BETA)

    def _pieces(self) -> Iterator[slice]:
        rows, columns = self.x.shape
        step = max(1, _PIECE // columns)
        return (slice(first, first + step) for first in range(0, rows, step))

    def _truth(self, activation: str, x: Tensor) -> Truth:
        if activation == "xielu":
            return truth(XIELU, x, coefficients(XIELU, self.alphas, BETA))
        return _other_truth(_OTHERS[activation], x)


_OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "srelu": lambda x: F.relu(x).square(),
}


def _other_truth(function: Callable[[Tensor], Tensor], x: Tensor) -> Truth:
    """By autograd in float64."""
    with torch.enable_grad():
        x = x.double().requires_grad_()
        y = function(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    y, size = y.detach(), x.detach().abs()
    # gelu is x times a difference of numbers up to 1
    terms = size + y.abs(), 1 + dx.abs()
    return Truth(Value(y, terms[0], terms[0]), Value(dx, terms[1], terms[1]), {})


def _float8_error(
    got: Float8, rows: slice, value: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """|error| and what is allowed, both times the scale; whether the transposed bytes differ."""
    data = got.rowwise[rows]
    limit = torch.finfo(data.dtype).max
    scale = float(got.scale)
    target = (value * scale).clamp(-limit, limit)
    error = (data.float().double() - target).abs()
    apart = not torch.equal(got.columnwise[:, rows].view(torch.uint8), data.view(torch.uint8).t())
    return error, allowed * scale + 0.5 * ulp(target, data.dtype), apart


def _first(what: str, bad: Tensor, x: Tensor, error: Tensor, allowed: Tensor) -> str:
    """The first wrong element, and how many there are."""
    row, column = (int(index) for index in bad.nonzero()[0])
    return (
        f"{int(bad.sum())} elements of {what} are wrong, as at x={float(x[row, column])!r}: off by "
        f"{float(error[row, column]):.2e}, allowed {float(allowed[row, column]):.2e}"
    )
