"""The family as Triton kernels for GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megatron_xielu.ops.family import Activation


def unavailable(x: Tensor) -> str | None:
    """Why x cannot be computed here, or None."""
    return "not there yet"


def forward(
    activation: Activation, x: Tensor, bias: Tensor | None, alphas: Sequence[Tensor], beta: float
) -> Tensor:
    """The activation of x + bias, in x's memory order."""
    raise NotImplementedError


def backward(
    activation: Activation,
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    alphas: Sequence[Tensor],
    beta: float,
) -> list[Tensor]:
    """dx, then the gradient of each alpha, then that of the bias if there is one."""
    raise NotImplementedError
