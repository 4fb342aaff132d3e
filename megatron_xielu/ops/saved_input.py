"""xIELU's input between forward and backward: as it is, or in FP8 at half of bf16's bytes.

    kept = e4m3(x * scale),  scale = 448 / amax(x)          x is about kept * scale_inv

The output is that of x. The gradients of x and of the alphas are those at kept * scale_inv, which
differs from x by 2^-4 of itself at most, or by 2^-10 / scale where that is more. All else that
`fp8_reference` says of current scaling holds: nan stays nan, infinities become the largest number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_xielu.ops import library
from megatron_xielu.ops.family import XIELU
from megatron_xielu.ops.fp8_reference import Current, amax_of, rounded, scale_of

SavedInput = Literal["exact", "e4m3"]
# elements that are in float32 at a time, so that saving memory does not first take it
_PIECE = 2**24


def pack(x: Tensor, how: SavedInput) -> tuple[Tensor, ...]:
    """What is kept of x, of any shape: itself, or the data in x's shape and one float32 scale."""
    if how == "exact":
        return (x,)
    pieces = x.detach().reshape(-1).split(_PIECE)
    amax = torch.stack([amax_of(piece.float()) for piece in pieces]).amax(0)
    scale = scale_of(amax, Current())
    data = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    for piece, place in zip(pieces, data.view(-1).split(_PIECE), strict=True):
        place.copy_(rounded(piece.float() * scale, data.dtype))
    return data, 1 / scale


def unpack(kept: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """x of the dtype that it had, or what `pack` left of it."""
    if len(kept) == 1:
        return kept[0]
    data, scale_inv = kept
    x = torch.empty(data.shape, dtype=dtype, device=data.device)
    for piece, place in zip(data.view(-1).split(_PIECE), x.view(-1).split(_PIECE), strict=True):
        place.copy_(piece.float() * scale_inv)
    return x


def xielu_from_e4m3(
    x: Tensor, alpha_p: Tensor, alpha_n: Tensor, *, beta: float, impl: str
) -> Tensor:
    """xIELU of x by a fused kernel or "eager"; backward knows x in e4m3 alone.

    Args:
        x: any shape; float32, bfloat16 or float16.
        alpha_p, alpha_n: one element each, before softplus.
        beta: slope at zero.
        impl: as of `ops.xielu`, but not "reference".
    """
    y: Tensor = _FromE4M3.apply(x, alpha_p.reshape(()), alpha_n.reshape(()), beta, impl)
    return y


def again(y: Tensor, compute: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    """How to compute y, of `xielu_from_e4m3`, from what is kept for its backward alone.

    Args:
        compute: the forward pass.
    """
    assert y.grad_fn is not None
    kept = y.grad_fn.saved_tensors[:2]  # type: ignore[attr-defined]
    return partial(_from_kept, compute, kept, y.dtype)


def _from_kept(
    compute: Callable[[Tensor], Tensor], kept: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    return compute(unpack(kept, dtype))


class _FromE4M3(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, impl: str
    ) -> Tensor:
        ctx.save_for_backward(*pack(x, "e4m3"), alpha_p, alpha_n)
        ctx.beta, ctx.impl = beta, impl
        return library.forward(x, None, (alpha_p, alpha_n), beta, XIELU.name, impl)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        *kept, alpha_p, alpha_n = ctx.saved_tensors
        x = unpack(kept, grad_y.dtype)
        grads = library.backward(
            grad_y, x, None, (alpha_p, alpha_n), ctx.beta, XIELU.name, ctx.impl
        )
        return *grads, None, None
