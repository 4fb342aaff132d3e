"""The activations that share one set of kernels, as data.

Each is zero at zero with the slope beta there, a polynomial above, and below either zero, a
parabola or an exponential:

    x > 0:   beta x + p2 x^2 + p3 x^3
    x <= 0:  0  |  beta x + n x^2  |  beta x + n (e^x - 1 - x)

The trained scalars ("alphas") are kept before softplus: p2, p3 = softplus(alpha) and n =
softplus(alpha), plus beta for the exponential, so that its slope can become negative.

Sources: xIELU and xIPReLU, arXiv 2411.13010; XIEP, the code published with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Below(IntEnum):
    """The shape of the half x <= 0."""

    ZERO = 0
    QUADRATIC = 1
    EXPONENTIAL = 2


@dataclass(frozen=True)
class Activation:
    """One member of the family.

    Attributes:
        name: what it is called in the C++ and Triton kernels too.
        alphas: its trained scalars, in the order in which functions take them.
        coefficients: the coefficient of each alpha: "p2", "p3" or "n".
        below: the half x <= 0.
    """

    name: str
    alphas: tuple[str, ...]
    coefficients: tuple[str, ...]
    below: Below

    @property
    def cubic(self) -> bool:
        return "p3" in self.coefficients


XIELU = Activation("xielu", ("alpha_p", "alpha_n"), ("p2", "n"), Below.EXPONENTIAL)
XIPRELU = Activation("xiprelu", ("alpha_p", "alpha_n"), ("p2", "n"), Below.QUADRATIC)
XIEP = Activation("xiep", ("alpha_p3", "alpha_p2", "alpha_n"), ("p3", "p2", "n"), Below.EXPONENTIAL)
RELU2 = Activation("relu2", (), (), Below.ZERO)

FAMILY = {activation.name: activation for activation in (XIELU, XIPRELU, XIEP, RELU2)}
