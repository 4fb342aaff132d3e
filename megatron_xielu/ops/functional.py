"""The public functions: they check their input and pick an implementation."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd import forward_ad

from megatron_xielu.ops import library
from megatron_xielu.ops.dispatch import Impl, choose
from megatron_xielu.ops.family import RELU2, XIELU, XIEP, XIPRELU, Activation
from megatron_xielu.ops.reference import REFERENCES, compute_dtype, xielu_as_published

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def xielu(
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,
    impl: Impl = "auto",
    reference_numerics: bool = False,
) -> Tensor:
    """The trainable activation xIELU (arXiv 2411.13010); `ops.reference` states the formula.

    Args:
        x: any shape and strides; float64, float32, bfloat16 or float16.
        alpha_p, alpha_n: one element each, before softplus, on x's device; their gradients come in
            their own dtype, so keep them in float32 where they are trained.
        beta: slope at zero; not trained.
        bias: added to x first, in the arithmetic type; shape (x.shape[-1],), x's dtype.
        impl: "auto" takes the fastest implementation for x. "triton" (GPU) and "cpu" are fused
            kernels, "eager" is torch operations with a backward by hand, and "reference" is the
            formula under autograd. All but the last save x, the bias and the alphas alone and
            refuse second derivatives.
        reference_numerics: the arithmetic of the code published with the paper instead, to the bit
            (impl "auto" or "reference"), for comparisons: its y(0) and slope at 0 are off. That
            code rounds after each operation, to the type that torch promotes x and the alphas to.

    Returns:
        A tensor of x's shape and dtype, rounded once from float32 or wider arithmetic.

    Raises:
        TypeError: a tensor is not of a dtype named above, or the bias is not of x's.
        ValueError: an alpha does not hold exactly one element, the bias has another shape, a tensor
            is on another device than x, or impl is unknown or cannot compute x.
    """
    alphas = (alpha_p, alpha_n)
    if reference_numerics:
        if impl not in ("auto", "reference"):
            raise ValueError(
                f"xielu: reference_numerics=True is plain torch, but impl={impl!r} was asked for; "
                'use impl="reference"'
            )
        _check(XIELU, x, bias, alphas)
        x = x if bias is None else x + bias
        # what torch promotes to alphas of another type, or of more dimensions, comes back as x's
        return xielu_as_published(x, alpha_p, alpha_n, beta).to(x.dtype).reshape(x.shape)
    return _apply(XIELU, x, alphas, beta, bias, impl)


def xiprelu(
    x: Tensor,
    alpha_p: Tensor,
    alpha_n: Tensor,
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """xIPReLU (arXiv 2411.13010): a_p x^2 + beta x above zero, a_n x^2 + beta x below.

    Here a_n = softplus(alpha_n) without beta. Everything else is as in `xielu`.
    """
    return _apply(XIPRELU, x, (alpha_p, alpha_n), beta, bias, impl)


def xiep(
    x: Tensor,
    alpha_p3: Tensor,
    alpha_p2: Tensor,
    alpha_n: Tensor,
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """XIEP (the code of arXiv 2411.13010): xIELU with a_p3 x^3 + a_p2 x^2 + beta x above zero.

    Everything else is as in `xielu`.
    """
    return _apply(XIEP, x, (alpha_p3, alpha_p2, alpha_n), beta, bias, impl)


def relu2(x: Tensor, *, bias: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """max(x + bias, 0)^2 in one pass, saving x alone; arguments as in `xielu`."""
    return _apply(RELU2, x, (), 0.0, bias, impl)


def _apply(
    activation: Activation,
    x: Tensor,
    alphas: tuple[Tensor, ...],
    beta: float,
    bias: Tensor | None,
    impl: Impl,
) -> Tensor:
    if not math.isfinite(beta):
        raise ValueError(f"{activation.name}: beta={beta} must be finite; the paper has 0.5")
    _check(activation, x, bias, alphas)
    # shape () broadcasts against every x, a 0-d x included, without changing its shape
    alphas = tuple(alpha.reshape(()) for alpha in alphas)
    if impl == "reference":
        dtype = compute_dtype(x.dtype)
        wide = x if bias is None else x.to(dtype) + bias.to(dtype)
        return REFERENCES[activation.name](wide, *alphas, beta).to(x.dtype)
    if not torch.compiler.is_compiling():
        _refuse_transforms(activation.name, (x, *alphas))
        choose(x, impl)
    return library.forward(x, bias, alphas, beta, activation.name, impl)


def _refuse_transforms(name: str, tensors: tuple[Tensor, ...]) -> None:
    """Refuse what the kernels have no rule for, and torch would answer with zero derivatives."""
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"{name}: forward-mode derivatives and torch.func transforms are not implemented by "
            'its kernels; use impl="reference"'
        )


def _check(
    activation: Activation, x: Tensor, bias: Tensor | None, alphas: tuple[Tensor, ...]
) -> None:
    """Refuse what no implementation computes, before any of them starts."""
    name = activation.name
    named = dict(zip(activation.alphas, alphas, strict=True))
    for what, tensor in ({"x": x} | named).items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            found = getattr(tensor, "layout", type(tensor).__name__)
            raise TypeError(f"{name}: {what} must be a dense tensor, got {found}")
        if tensor.dtype not in DTYPES:
            legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{name}: {what} is {tensor.dtype}; it must be one of {legal}")
    for what, tensor in named.items():
        if tensor.numel() != 1:
            raise ValueError(
                f"{name}: {what} must hold one element, got shape {tuple(tensor.shape)}; "
                "one set of alphas belongs to one call"
            )
    if bias is not None:
        named["bias"] = bias
        if bias.dtype != x.dtype:
            raise TypeError(
                f"{name}: bias is {bias.dtype} and x is {x.dtype}; cast the bias with "
                f".to({x.dtype})"
            )
        if x.dim() == 0 or bias.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: bias has shape {tuple(bias.shape)}, but x of shape {tuple(x.shape)} "
                f"needs {tuple(x.shape[-1:])}"
            )
    for what, tensor in named.items():
        if tensor.device != x.device:
            raise ValueError(
                f"{name}: {what} is on {tensor.device} and x on {x.device}; move it with "
                f".to({str(x.device)!r})"
            )
