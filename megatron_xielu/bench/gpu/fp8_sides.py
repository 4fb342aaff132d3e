"""Who writes the activation in FP8 in `gpu`'s measurements: e4m3 forward, e5m2 backward.

Data are written as they are and transposed, with scales that are given (delayed scaling) and the
amax. As in `sides`, what is not installed raises ImportError when it is asked to compute.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_xielu.bench.gpu.problem import (
    BETA,
    BFLOAT16_ARITHMETIC,
    ONE_ROUNDING,
    TWO_ROUNDINGS,
    Float8,
    Problem,
    Results,
)
from megatron_xielu.bench.gpu.sides import (
    COMPILED,
    OTHER_ACTIVATIONS,
    OURS,
    Side,
    our_kernels,
)
from megatron_xielu.ops.dispatch import Impl
from megatron_xielu.ops.family import XIELU
from megatron_xielu.ops.fp8_reference import Delayed
from megatron_xielu.ops.reference import xielu_as_published
from megatron_xielu.ops.triton import quantized

UNFUSED = "ours bf16, then "
FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
# the largest of hundreds of millions of normal numbers comes into the upper half of the range
SCALES = {FORWARD: 8.0, BACKWARD: 512.0}

Cast = Callable[[Tensor, torch.dtype], Float8]


def fp8_sides(problem: Problem, impl: Impl) -> list[Side]:
    """Ours first; `impl` computes what others cast."""
    scales = {
        dtype: problem.x.new_full((1,), scale, dtype=torch.float32)
        for dtype, scale in SCALES.items()
    }
    kernels, te = our_kernels(problem, impl), _TransformerEngine(problem, scales)
    return [
        _fused(problem, scales),
        _chain(f"{UNFUSED}{COMPILED} of cast and transpose", kernels, _compiled_cast(scales)),
        _chain(f"{UNFUSED}TransformerEngine's cast", kernels, te.cast),
        _compiled_as_one(problem, scales[FORWARD]),
        *te.sides(),
    ]


def cast_and_transpose(
    tensor: Tensor, scale: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 data, the same transposed, and the amax."""
    limit = torch.finfo(dtype).max
    data = (tensor.float() * scale).clamp(-limit, limit).to(dtype)
    return data, data.t().contiguous(), tensor.abs().amax()


def _fused(problem: Problem, scales: dict[torch.dtype, Tensor]) -> Side:
    """Ours in one pass."""
    x, grad_y, alphas = problem.x, problem.grad_y, problem.alphas
    scaling = {dtype: Delayed(scale, dtype) for dtype, scale in scales.items()}
    out = {dtype: quantized.allocate(x, scaling[dtype]) for dtype in scales}

    def result(dtype: torch.dtype) -> Float8:
        written = out[dtype]
        assert written.rowwise is not None
        assert written.columnwise is not None
        assert written.amax is not None
        return Float8(written.rowwise, written.columnwise, written.amax, scales[dtype])

    def forward() -> Results:
        quantized.forward(XIELU, x, None, alphas, BETA, scaling[FORWARD], out[FORWARD])
        return Results(result(FORWARD))

    def backward() -> Results:
        fp8 = BACKWARD
        sums = quantized.backward(XIELU, grad_y, x, None, alphas, BETA, scaling[fp8], out[fp8])
        return Results(None, result(fp8), tuple(sums))

    return Side.of_two(OURS, forward, backward, ONE_ROUNDING)


def _chain(name: str, kernels: Side, cast: Cast) -> Side:
    """Kernels whose results another one casts."""

    def forward() -> Results:
        y = kernels.forward().y
        assert isinstance(y, Tensor)
        return Results(cast(y, FORWARD))

    def backward() -> Results:
        assert kernels.backward is not None
        results = kernels.backward()
        assert isinstance(results.dx, Tensor)
        return Results(None, cast(results.dx, BACKWARD), results.alphas)

    return Side.of_two(name, forward, backward, TWO_ROUNDINGS)


def _compiled_cast(scales: dict[torch.dtype, Tensor]) -> Cast:
    compiled = torch.compile(cast_and_transpose, dynamic=False)

    def cast(tensor: Tensor, dtype: torch.dtype) -> Float8:
        return _float8(compiled(tensor, scales[dtype], dtype), scales[dtype])

    return cast


def _compiled_as_one(problem: Problem, scale: Tensor) -> Side:
    """What torch.compile makes of the published formula with all that follows it."""

    @torch.compile(dynamic=False)
    def function(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return cast_and_transpose(xielu_as_published(x, alpha_p, alpha_n), scale, FORWARD)

    alphas = [alpha.to(problem.x.dtype) for alpha in problem.alphas]

    def forward() -> Results:
        return Results(_float8(function(problem.x, *alphas), scale))

    return Side(f"{COMPILED} of all", forward, None, None, BFLOAT16_ARITHMETIC)


def _float8(result: tuple[Tensor, Tensor, Tensor], scale: Tensor) -> Float8:
    return Float8(*result, scale)


class _TransformerEngine:
    """Its cast, and its activations that cast in the same pass."""

    def __init__(self, problem: Problem, scales: dict[torch.dtype, Tensor]) -> None:
        self._problem, self._scales = problem, scales
        # made outside of what is timed, and one for each that casts: a cast raises the amax that it
        # finds and never lowers it
        self._quantizer = functools.cache(self._make_quantizer)

    def cast(self, tensor: Tensor, dtype: torch.dtype) -> Float8:
        return _float8(self._quantizer(dtype, "cast").cast(tensor), self._scales[dtype])

    def sides(self) -> Iterator[Side]:
        for name in OTHER_ACTIVATIONS:
            works = partial(self._forward, name), partial(self._backward, name)
            yield Side.of_two(f"TransformerEngine {name} and cast", *works, TWO_ROUNDINGS, name)

    def _forward(self, name: str) -> Results:
        result = self._quantizer(FORWARD, name).forward(name, self._problem.x)
        return Results(_float8(result, self._scales[FORWARD]))

    def _backward(self, name: str) -> Results:
        result = self._quantizer(BACKWARD, name).backward(
            name, self._problem.grad_y, self._problem.x
        )
        return Results(None, _float8(result, self._scales[BACKWARD]))

    def _make_quantizer(self, dtype: torch.dtype, _: str) -> Any:
        from megatron_xielu.mcore.te_kernels import Quantizer

        return Quantizer(self._scales[dtype], dtype)
