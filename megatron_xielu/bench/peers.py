"""How others compute xIELU, for comparison: their code where it runs here, their arithmetic else.

The CUDA extension published with the paper's training code (nickjbrowning/XIELU) needs a GPU. Its
two bf16 paths are emulated below operation by operation, with the roundings and fused
multiply-adds that nvcc 13 emits for sm_90 (read from the PTX and SASS of its device functions);
what is left out is the error of the GPU's ex2, 2 units of float32, and the order of its sums.

Every peer keeps its parameters in the type of x, bfloat16 here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu.bench.truth import rounded
from megatron_xielu.ops.reference import PAPER_EPS, xielu_as_published

BETA = 0.5
# what cuda_bf16.hpp multiplies by before ex2: log2 e rounded up in float32
_LOG2_E = float.fromhex("0x1.715478p0")
# elements whose intermediates are held at once
_PIECE = 1 << 20

Function = Callable[..., Tensor]
"""y of x and the alphas, one element each, which autograd differentiates."""


@dataclass(frozen=True)
class Result:
    """y and dx in x's type, and the gradient of each alpha in the alpha's."""

    y: Tensor
    dx: Tensor
    alpha_gradients: tuple[float, ...]


Compute = Callable[[Tensor, Sequence[Tensor], Tensor], Result]
"""Everything from x, the alphas and dy."""


@dataclass(frozen=True)
class Peer:
    """One way to compute xIELU.

    Attributes:
        name: the column of a table.
        source: where the arithmetic comes from.
        compute: of x, (alpha_p, alpha_n) and dy.
    """

    name: str
    source: str
    compute: Compute


def peers() -> tuple[list[Peer], list[str]]:
    """All that can be computed here on a CPU, and a line for each that cannot."""
    found = [
        Peer("paper's code", "ops.reference.xielu_as_published", differentiated(xielu_as_published))
    ]
    missing = []
    try:
        found.append(
            Peer(
                "transformers",
                "transformers.activations.XIELUActivation",
                differentiated(_transformers()),
            )
        )
    except ImportError as error:
        missing.append(f"transformers is left out: {error}")
    found += [
        Peer(
            "torch.compile",
            "Inductor's code for the paper's formula",
            differentiated(torch.compile(xielu_as_published)),
        ),
        Peer("CUDA, scalar", "the extension's default path, emulated", emulated(cuda_scalar)),
        Peer("CUDA, vector", "its path for packed pairs, emulated", emulated(cuda_vector)),
    ]
    return found, missing


def published_extension(*, vector: bool) -> Function:
    """The CUDA extension itself, for tensors on a GPU of three dimensions, the last divisible by 8.

    Args:
        vector: its path with packed loads; transformers does not use it by default.

    Raises:
        ImportError: it is not installed, or was built for another torch.
    """
    try:
        importlib.import_module("xielu.ops")
        extension = torch.classes.xielu.XIELU()
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"the CUDA extension nickjbrowning/XIELU cannot be loaded ({error}); build it with the "
            "CMake file of its repository"
        ) from error

    def function(x: Tensor, *alphas: Tensor) -> Tensor:
        raw = (alpha.reshape(1).to(x.dtype) for alpha in alphas)
        y: Tensor = extension.forward(x, *raw, BETA, -PAPER_EPS, vector)
        return y

    return function


def differentiated(function: Function) -> Compute:
    """A function and its gradients by autograd."""

    def compute(x: Tensor, alphas: Sequence[Tensor], grad_y: Tensor) -> Result:
        inputs = [tensor.detach().requires_grad_() for tensor in (x, *alphas)]
        y = function(*inputs)
        dx, *grads = torch.autograd.grad(y, inputs, grad_y)
        return Result(y.detach(), dx, tuple(float(grad) for grad in grads))

    return compute


def _transformers() -> Function:
    from transformers.activations import XIELUActivation

    module = XIELUActivation(beta=BETA, eps=-PAPER_EPS, dtype=torch.bfloat16)

    def function(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(module, {"alpha_p": alpha_p, "alpha_n": alpha_n}, x)
        return y

    return function


# ---- the CUDA extension in bf16: y, dy/dx times dy, and the terms of both alphas' gradients

Terms = tuple[Tensor, Tensor, Tensor, Tensor]


def emulated(kernel: Callable[[Tensor, Tensor, Tensor, Tensor], Terms]) -> Compute:
    """A kernel with its terms summed in float64, which is better than its float32 atomics."""

    def compute(x: Tensor, alphas: Sequence[Tensor], grad_y: Tensor) -> Result:
        y, dx = torch.empty_like(x), torch.empty_like(x)
        sums = torch.zeros(len(alphas), dtype=torch.float64)
        for start in range(0, x.numel(), _PIECE):
            part = slice(start, start + _PIECE)
            y[part], dx[part], *terms = kernel(x[part], grad_y[part], *alphas)
            sums += torch.stack([term.double().sum() for term in terms])
        return Result(y, dx, tuple(sums.to(x.dtype).tolist()))

    return compute


def cuda_scalar(x: Tensor, grad_y: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Terms:
    """One element a thread: c10::BFloat16 rounds after each operation, e^x - 1 is one in float32.

    Source: compute, compute_dx, compute_dp and compute_dn of xielu_impl.cu.
    """
    p, n, slope_p, slope_n, beta, eps = _parameters(alpha_p, alpha_n)
    # std::min, which returns its first argument unless the second is smaller
    clamped = torch.where(eps < x, eps, x)
    expm1 = (clamped.float().exp() - 1).to(x.dtype)
    above = x > 0
    y = torch.where(above, x * (p * x + beta), (beta + n) * expm1 - n * x)
    slope = torch.where(above, 2 * p * x + beta, (beta + n) * expm1 + beta)
    term_p = torch.where(above, grad_y * slope_p * x * x, 0.0)
    term_n = torch.where(x <= 0, grad_y * slope_n * (expm1 - x), 0.0)
    return y, grad_y * slope, term_p, term_n


def cuda_vector(x: Tensor, grad_y: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Terms:
    """Two elements a register: e^x is rounded to bf16 before the 1 is taken away.

    Source: compute_f16, compute_dx_f16, compute_dp_f16 and compute_dn_f16 of xielu_impl.cu, whose
    products and sums nvcc fuses where `_fma` stands.
    """
    p, n, slope_p, slope_n, beta, eps = _parameters(alpha_p, alpha_n)
    # HMNMX2, which returns the other operand for a nan
    clamped = torch.fmin(x, eps)
    expm1 = torch.exp2(clamped.float() * _LOG2_E).to(x.dtype) - 1
    above = x > 0
    y = torch.where(above, _fma(p, x, beta) * x, _fma(beta + n, expm1, -(n * x)))
    two = torch.full_like(x, 2)
    slope = torch.where(above, _fma(p * x, two, beta), _fma(beta + n, expm1, beta))
    term_p = torch.where(above, grad_y * (slope_p * (x * x)), 0.0)
    term_n = torch.where(x <= 0, grad_y * (slope_n * (expm1 - x)), 0.0)
    return y, grad_y * slope, term_p, term_n


def _parameters(alpha_p: Tensor, alpha_n: Tensor) -> tuple[Tensor, ...]:
    """softplus and sigmoid of both alphas, beta and eps, each of them rounded to bf16 once."""
    alphas = alpha_p.float(), alpha_n.float()
    values = (
        *(F.softplus(alpha) for alpha in alphas),
        *(torch.sigmoid(alpha) for alpha in alphas),
        torch.tensor(BETA),
        torch.tensor(-PAPER_EPS),
    )
    return tuple(value.to(torch.bfloat16) for value in values)


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a b + c of bf16 numbers, rounded once; float64 holds the product and all that matters."""
    exact = a.double() * b.double() + c.double()
    return rounded(exact, torch.bfloat16).to(torch.bfloat16)
