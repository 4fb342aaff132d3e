"""Which implementation computes a tensor, and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from megatron_xielu.ops import cpu, eager, triton
from megatron_xielu.ops.family import Activation

Impl = Literal["auto", "triton", "cpu", "eager", "reference"]


class Implementation(Protocol):
    """What a module offers that can compute the family."""

    def unavailable(self, x: Tensor) -> str | None: ...

    def forward(
        self,
        activation: Activation,
        x: Tensor,
        bias: Tensor | None,
        alphas: Sequence[Tensor],
        beta: float,
    ) -> Tensor: ...

    def backward(
        self,
        activation: Activation,
        grad_y: Tensor,
        x: Tensor,
        bias: Tensor | None,
        alphas: Sequence[Tensor],
        beta: float,
    ) -> list[Tensor]: ...


_IMPLEMENTATIONS: dict[str, Implementation] = {"triton": triton, "cpu": cpu, "eager": eager}
_FUSED = {"cuda": "triton", "cpu": "cpu"}


def choose(x: Tensor, impl: str) -> tuple[str, str]:
    """The implementation for x, one of "triton", "cpu" and "eager", and the reason.

    Raises:
        ValueError: impl is unknown, or cannot compute x; the message says what is missing.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(get_args(Impl))}")
    if x.is_meta:
        return "eager", "only shapes are computed"
    if impl != "auto":
        reason = None if impl == "reference" else _IMPLEMENTATIONS[impl].unavailable(x)
        if reason is not None:
            raise ValueError(f"impl={impl!r} cannot compute this: {reason}")
        return impl, "chosen by the caller"
    fused = _FUSED.get(x.device.type)
    if fused is None:
        return "eager", f"no fused kernel for {x.device.type} tensors"
    reason = _IMPLEMENTATIONS[fused].unavailable(x)
    if reason is not None:
        return "eager", reason
    return fused, f"fused kernel for {x.device.type} tensors of {x.dtype}"


def implementation(x: Tensor, impl: str) -> Implementation:
    """The module that computes x."""
    return _IMPLEMENTATIONS[choose(x, impl)[0]]


def describe(device: torch.device | str, dtype: torch.dtype, impl: str = "auto") -> str:
    """One line for a log: which implementation tensors of this kind get, and why."""
    chosen, reason = choose(torch.empty(0, device=device, dtype=dtype), impl)
    return f"{chosen} ({reason})"
