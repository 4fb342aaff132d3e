"""The family as Triton kernels for NVIDIA GPUs: one pass forward, one pass backward.

`formula` has the arithmetic and `elementwise` the kernels. Triton is imported with the first tensor
that is computed, so that importing the package needs torch alone.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_xielu.ops.dense import dense_like
from megatron_xielu.ops.family import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the oldest GPUs with bfloat16, and with a minimum that propagates nan
CAPABILITY = (8, 0)
# the oldest Triton whose functions take tuples; torch 2.7 brings it
VERSION = (3, 3)


def unavailable(x: Tensor) -> str | None:
    """Why x cannot be computed here, or None."""
    if x.dtype not in DTYPES:
        return f'there is no Triton kernel for {x.dtype}; use impl="eager"'
    if x.device.type == "cuda":
        return _unusable_triton() or _unsuitable_gpu(x.device)
    if x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return _unusable_triton()
    return (
        f"Triton computes CUDA tensors, and x is on {x.device}; move it to a GPU or use "
        'impl="auto" (for tests, TRITON_INTERPRET=1 in the environment computes CPU tensors slowly)'
    )


@functools.cache
def _unusable_triton() -> str | None:
    """Why the installed Triton does not do, or None."""
    if importlib.util.find_spec("triton") is None:
        return 'Triton is not installed; "pip install triton" (Linux only), or use impl="eager"'
    import triton

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < VERSION:
        return (
            f"Triton {triton.__version__} is too old; the kernels need {VERSION[0]}.{VERSION[1]}, "
            'which comes with torch 2.7, or use impl="eager"'
        )
    return None


@functools.cache
def _unsuitable_gpu(device: torch.device) -> str | None:
    """Why a GPU cannot run the kernels, or None."""
    if torch.version.hip is not None:
        return 'the kernels hold instructions of NVIDIA, and this GPU is of AMD; use impl="eager"'
    capability = torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        return (
            f"the kernels need compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer, and "
            f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}; use "
            'impl="eager"'
        )
    return None


def forward(
    activation: Activation, x: Tensor, bias: Tensor | None, alphas: Sequence[Tensor], beta: float
) -> Tensor:
    """The activation of x + bias, in x's memory order."""
    from megatron_xielu.ops.triton.elementwise import launch_forward

    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    if bias is not None and not y.is_contiguous():
        return y.copy_(forward(activation, x.contiguous(), bias, alphas, beta))
    launch_forward(activation, dense_like(x, y), _dense(bias), alphas, beta, y)
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
    from megatron_xielu.ops.triton.elementwise import launch_backward

    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        scalars = [*alphas] if bias is None else [*alphas, bias]
        return [grad_x, *(torch.zeros_like(scalar) for scalar in scalars)]
    if bias is not None and not grad_x.is_contiguous():
        grads = backward(activation, grad_y, x.contiguous(), bias, alphas, beta)
        return [grad_x.copy_(grads[0]), *grads[1:]]
    grad_y, x = dense_like(grad_y, grad_x), dense_like(x, grad_x)
    return [grad_x, *launch_backward(activation, grad_y, x, _dense(bias), alphas, beta, grad_x)]


def _dense(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()
