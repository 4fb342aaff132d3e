"""The family as C++ kernels for CPUs (`csrc`): one pass forward, one pass backward, all threads.

float32 is computed in float32. bfloat16 and float16 have 65,536 values, so a tensor with more
elements than that looks up what was computed once per value in float64; smaller ones compute each
element that way.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_xielu.ops.cpu.build import load
from megatron_xielu.ops.dense import dense_like
from megatron_xielu.ops.family import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Outputs that do not fit the caches are written past them, which spares reading them first.
STREAM_BYTES = 32 << 20


def unavailable(x: Tensor) -> str | None:
    """Why x cannot be computed here, or None. Builds the kernels on first use."""
    if x.device.type != "cpu":
        return f"it computes CPU tensors, and x is on {x.device}"
    if x.dtype not in DTYPES:
        return f"there is no CPU kernel for {x.dtype}"
    return load()


def forward(
    activation: Activation, x: Tensor, bias: Tensor | None, alphas: Sequence[Tensor], beta: float
) -> Tensor:
    """The activation of x + bias, in x's memory order."""
    y = torch.empty_like(x)
    if bias is not None and not y.is_contiguous():
        return y.copy_(forward(activation, x.contiguous(), bias, alphas, beta))
    torch.ops.megatron_xielu_cpu.forward(
        dense_like(x, y), _dense(bias), list(alphas), beta, activation.name, y, _streams(y)
    )
    return y


def backward(
    activation: Activation,
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    alphas: Sequence[Tensor],
    beta: float,
) -> list[Tensor]:
    """dx, then the gradient of each alpha, then that of the bias if there is one."""
    grad_x = torch.empty_like(x)
    if bias is not None and not grad_x.is_contiguous():
        grads = backward(activation, grad_y, x.contiguous(), bias, alphas, beta)
        return [grad_x.copy_(grads[0]), *grads[1:]]
    sums = torch.ops.megatron_xielu_cpu.backward(
        dense_like(grad_y, grad_x),
        dense_like(x, grad_x),
        _dense(bias),
        list(alphas),
        beta,
        activation.name,
        grad_x,
        _streams(grad_x),
    )
    grads = [total.to(alpha.dtype) for total, alpha in zip(sums, alphas, strict=True)]
    if bias is not None:
        rows = grad_x.flatten(0, -2) if grad_x.dim() > 1 else grad_x[None]
        grads.append(_column_sums(rows).to(bias.dtype))
    return [grad_x, *grads]


def _column_sums(rows: Tensor) -> Tensor:
    """Sums of rows [n, columns], as they were rounded, in an order that threads do not change.

    torch splits a sum over threads where it has few results, so each has at most 256 terms.
    """
    while len(rows) > 1:
        whole = len(rows) // 256 * 256
        pieces = [part.unflatten(0, (-1, size)) for part, size in _split(rows, whole)]
        rows = torch.cat([piece.sum(1, dtype=torch.float64) for piece in pieces])
    return rows.sum(0)


def _split(rows: Tensor, whole: int) -> list[tuple[Tensor, int]]:
    parts = [(rows[:whole], 256), (rows[whole:], len(rows) - whole)]
    return [(part, size) for part, size in parts if len(part)]


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _streams(output: Tensor) -> bool:
    return output.nbytes >= STREAM_BYTES
