"""Who computes xIELU in `gpu`'s measurements, with results in the type of x.

What is not installed raises ImportError when it is asked to compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megatron_xielu.bench.gpu.problem import (
    BETA,
    BFLOAT16_ARITHMETIC,
    ONE_ROUNDING,
    TWO_ROUNDINGS,
    Allowance,
    Problem,
    Results,
)
from megatron_xielu.bench.peers import Function, published_extension
from megatron_xielu.ops import xielu
from megatron_xielu.ops.dispatch import Impl, implementation
from megatron_xielu.ops.family import XIELU
from megatron_xielu.ops.reference import xielu_as_published

Work = Callable[[], Results]
OURS, COMPILED = "ours", "torch.compile"
# TransformerEngine's activations that move as many bytes: GELU by tanh, and ReLU squared
OTHER_ACTIVATIONS = ("gelu", "srelu")


@dataclass(frozen=True)
class Side:
    """Whoever computes an activation.

    Attributes:
        name: for people.
        forward: computes y.
        backward: computes dx and, of xIELU, the alphas' gradients; None where it cannot be had
            without the forward.
        both: computes all of them; None where only the forward is there.
        allowance, activation: of the results, as in `Problem.wrong`.
    """

    name: str
    forward: Work
    backward: Work | None
    both: Work | None
    allowance: Allowance
    activation: str = "xielu"

    @staticmethod
    def of_two(
        name: str, forward: Work, backward: Work, allowance: Allowance, activation: str = "xielu"
    ) -> Side:
        """Whose forward and backward do not depend on each other."""

        def both() -> Results:
            y, rest = forward().y, backward()
            return Results(y, rest.dx, rest.alphas)

        return Side(name, forward, backward, both, allowance, activation)


def sides(problem: Problem, impl: Impl) -> list[Side]:
    """Ours first.

    Args:
        impl: ours, as an argument of `megatron_xielu.xielu`.
    """
    function = partial(xielu, beta=BETA, impl=impl)
    with_autograd = _differentiated(OURS, function, problem, problem.alphas, ONE_ROUNDING)
    kernels = our_kernels(problem, impl)
    return [
        Side(OURS, kernels.forward, kernels.backward, with_autograd.both, ONE_ROUNDING),
        *_published(problem),
        *_transformer_engine(problem),
    ]


def our_kernels(problem: Problem, impl: Impl) -> Side:
    """Ours without autograd."""
    x, grad_y, alphas = problem.x, problem.grad_y, problem.alphas
    kernels = implementation(x, impl)

    def forward() -> Results:
        return Results(kernels.forward(XIELU, x, None, alphas, BETA))

    def backward() -> Results:
        dx, *sums = kernels.backward(XIELU, grad_y, x, None, alphas, BETA)
        return Results(None, dx, tuple(sums))

    return Side.of_two(OURS, forward, backward, ONE_ROUNDING)


def _differentiated(
    name: str,
    function: Function,
    problem: Problem,
    alphas: tuple[Tensor, ...],
    allowance: Allowance,
) -> Side:
    """A function of x and the alphas that autograd differentiates."""
    leaves = [tensor.detach().requires_grad_() for tensor in (problem.x, *alphas)]

    def forward() -> Results:
        with torch.no_grad():
            return Results(function(*leaves))

    def both() -> Results:
        y = function(*leaves)
        dx, *sums = torch.autograd.grad(y, leaves, problem.grad_y)
        return Results(y.detach(), dx, tuple(sums))

    return Side(name, forward, None, both, allowance)


def _published(problem: Problem) -> Iterator[Side]:
    """The published ways to compute xIELU, which keep the alphas in the model's type."""
    alphas = tuple(alpha.to(problem.x.dtype) for alpha in problem.alphas)
    functions: dict[str, Function] = {
        "published code": xielu_as_published,
        f"{COMPILED} of it": torch.compile(xielu_as_published, dynamic=False),
        "transformers' module": _transformers(problem),
        "published CUDA kernel": _extension(vector=False),
        "published CUDA kernel, packed": _extension(vector=True),
    }
    for name, function in functions.items():
        yield _differentiated(name, function, problem, alphas, BFLOAT16_ARITHMETIC)


def _transformers(problem: Problem) -> Function:
    """It takes the published CUDA kernel where that is installed."""

    @functools.cache
    def module() -> torch.nn.Module:
        from transformers.activations import XIELUActivation

        return XIELUActivation(dtype=problem.x.dtype).to(problem.x.device)

    def function(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
        parameters = {"alpha_p": alpha_p, "alpha_n": alpha_n}
        y: Tensor = torch.func.functional_call(module(), parameters, (x,))
        return y

    return function


def _extension(*, vector: bool) -> Function:
    load = functools.cache(published_extension)

    def function(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
        # it takes tensors of three dimensions
        return load(vector=vector)(x[None], alpha_p, alpha_n)[0]

    return function


def _transformer_engine(problem: Problem) -> Iterator[Side]:
    def forward(name: str) -> Results:
        from megatron_xielu.mcore import te_kernels

        return Results(te_kernels.forward(name, problem.x))

    def backward(name: str) -> Results:
        from megatron_xielu.mcore import te_kernels

        return Results(None, te_kernels.backward(name, problem.grad_y, problem.x))

    for name in OTHER_ACTIVATIONS:
        works = partial(forward, name), partial(backward, name)
        # its tanh may be the GPU's own approximation
        yield Side.of_two(f"TransformerEngine {name}", *works, TWO_ROUNDINGS, name)
