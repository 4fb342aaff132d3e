"""Every GPU kernel in each form that its launch code chooses between, as calls of that code.

The tensors are on the device "meta", where they have a size and no memory (see `ahead`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_xielu.ops import triton
from megatron_xielu.ops.family import FAMILY, XIELU, Activation

if TYPE_CHECKING:
    from megatron_xielu.ops.fp8_reference import Scaling

# x in the MLP of the 1.1B recipe, of five sequences of 4096 tokens
ROWS, COLUMNS = 5 * 4096, 9216
BETA = 0.5
# whole tiles, multiples of 16 (which keep loads and stores wide), and neither
SIZES = {"even": (ROWS, COLUMNS), "16": (ROWS - 16, COLUMNS - 16), "any": (ROWS - 1, COLUMNS - 1)}
# the first compute capability that converts to FP8
FP8_CAPABILITY = 89


@dataclass(frozen=True)
class Variant:
    """One call of launch code.

    Attributes:
        name: what is computed. FP8 results are written as they are and transposed.
        size: a key of `SIZES`.
        elements: of x.
        work: the call.
    """

    name: str
    size: str
    elements: int
    work: Callable[[], object]


def variants(capability: int) -> list[Variant]:
    """All of them that a GPU of a compute capability such as 90 has."""
    found = [*_elementwise(XIELU, torch.bfloat16, SIZES)]
    if capability >= FP8_CAPABILITY:
        found += _quantized()
    found += _elementwise(XIELU, torch.bfloat16, ("even", "16"), biased=True)
    for dtype in (torch.float32, torch.float16):
        found += _elementwise(XIELU, dtype, ("even", "16"))
    for activation in FAMILY.values():
        if activation is not XIELU:
            found += _elementwise(activation, torch.bfloat16, ("even",))
    return found


def _elementwise(
    activation: Activation, dtype: torch.dtype, sizes: Iterable[str], *, biased: bool = False
) -> Iterator[Variant]:
    alphas = _alphas(activation)
    name = "bf16" if dtype == torch.bfloat16 else f"fp{8 * dtype.itemsize}"
    name = f"{activation.name} {name}{' + bias' if biased else ''}".removeprefix("xielu ")
    for size in sizes:
        x = _meta(*SIZES[size], dtype=dtype)
        bias = _meta(x.shape[1], dtype=dtype) if biased else None

        def forward(x: Tensor = x, bias: Tensor | None = bias) -> None:
            triton.forward(activation, x, bias, alphas, BETA)

        def backward(x: Tensor = x, bias: Tensor | None = bias) -> None:
            triton.backward(activation, torch.empty_like(x), x, bias, alphas, BETA)

        yield Variant(f"forward {name}", size, x.numel(), forward)
        yield Variant(f"backward {name}", size, x.numel(), backward)


def _quantized() -> Iterator[Variant]:
    from megatron_xielu.ops.fp8_reference import Blockwise, Current, Delayed

    scale = _meta(1, dtype=torch.float32)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    for size in SIZES:
        yield from _to_fp8("", size, Delayed(scale, e4m3), Delayed(scale, e5m2))
    yield from _to_fp8(", current scale", "even", Current(e4m3), Current(e5m2))
    yield from _to_fp8(", 1 x 128", "even", Blockwise(e4m3), Blockwise(e5m2))
    square = Blockwise(e4m3, square=True), Blockwise(e5m2, square=True)
    yield from _to_fp8(", 128 x 128", "even", *square)


def _to_fp8(suffix: str, size: str, y: Scaling, grad_x: Scaling) -> Iterator[Variant]:
    from megatron_xielu.ops.triton import quantized

    alphas = _alphas(XIELU)
    x = _meta(*SIZES[size], dtype=torch.bfloat16)

    def forward() -> None:
        quantized.forward(XIELU, x, None, alphas, BETA, y, quantized.allocate(x, y))

    def backward() -> None:
        out = quantized.allocate(x, grad_x)
        quantized.backward(XIELU, torch.empty_like(x), x, None, alphas, BETA, grad_x, out)

    yield Variant(f"forward bf16 to e4m3{suffix}", size, x.numel(), forward)
    yield Variant(f"backward bf16 to e5m2{suffix}", size, x.numel(), backward)


def _alphas(activation: Activation) -> list[Tensor]:
    return [_meta(1, dtype=torch.float32) for _ in activation.alphas]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
