"""The family as operations of torch, so that torch.compile, torch.export and meta tensors know it.

Two operations serve every activation and implementation. What is saved for backward is the input,
the bias where there is one, and the alphas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_xielu.ops.dispatch import implementation
from megatron_xielu.ops.family import FAMILY

_LIBRARY = torch.library.Library("megatron_xielu", "DEF")
_LIBRARY.define(
    "forward(Tensor x, Tensor? bias, Tensor[] alphas, float beta, str name, str impl) -> Tensor"
)
_LIBRARY.define(
    "backward(Tensor grad_y, Tensor x, Tensor? bias, Tensor[] alphas, float beta, str name, "
    "str impl) -> Tensor[]"
)
# The activation `name` of x + bias: shape and type of x, and its strides where x is dense.
forward = torch.ops.megatron_xielu.forward.default
# dx, the gradient of each alpha in its own type, and that of the bias if there is one.
backward = torch.ops.megatron_xielu.backward.default


def _forward(
    x: Tensor, bias: Tensor | None, alphas: Sequence[Tensor], beta: float, name: str, impl: str
) -> Tensor:
    return implementation(x, impl).forward(FAMILY[name], x, bias, alphas, beta)


def _backward(
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    alphas: Sequence[Tensor],
    beta: float,
    name: str,
    impl: str,
) -> list[Tensor]:
    return implementation(x, impl).backward(FAMILY[name], grad_y, x, bias, alphas, beta)


def _forward_shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _backward_shapes(
    grad_y: Tensor, x: Tensor, bias: Tensor | None, alphas: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    grads = [torch.empty_like(x), *(torch.empty_like(alpha) for alpha in alphas)]
    return grads if bias is None else [*grads, torch.empty_like(bias)]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, alphas, ctx.beta, ctx.name, ctx.impl = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, *([bias] if ctx.has_bias else []), *alphas)


def _forward_backward(ctx: Any, grad_y: Tensor) -> tuple[Any, ...]:
    x, *rest = ctx.saved_tensors
    bias, alphas = (rest[0], rest[1:]) if ctx.has_bias else (None, rest)
    grad_x, *grads = backward(grad_y, x, bias, alphas, ctx.beta, ctx.name, ctx.impl)
    grad_bias = grads.pop() if ctx.has_bias else None
    return grad_x, grad_bias, grads, None, None, None


def _no_second_derivative(ctx: Any, grads: list[Tensor]) -> None:
    raise RuntimeError(
        "second derivatives of this activation are not implemented by its kernels; use "
        'impl="reference", which autograd differentiates any number of times'
    )


_LIBRARY.impl("forward", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake(forward, _forward_shape, lib=_LIBRARY)
torch.library.register_fake(backward, _backward_shapes, lib=_LIBRARY)
torch.library.register_autograd(
    forward, _forward_backward, setup_context=_setup_context, lib=_LIBRARY
)
torch.library.register_autograd(backward, _no_second_derivative, lib=_LIBRARY)
