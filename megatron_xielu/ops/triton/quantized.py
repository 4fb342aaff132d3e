"""The family with FP8 results: what a GEMM reads next is written by the activation itself.

Forward writes y = activation(x + bias), backward dx = grad_y * slope(x + bias), each as it is and
transposed (Hopper multiplies FP8 along the contiguous dimension only), without ever storing it in
a wider type: 4 bytes of traffic per element forward and 6 backward where x is bfloat16.

    data = round(clamp(y * scale, -L, L))        y is about data * scale_inv, scale_inv = 1 / scale

with the format's largest value L, 448 for float8_e4m3fn and 57344 for float8_e5m2. The rounding is
to nearest, ties to even, from float32 arithmetic that no rounding to x's type interrupts; nan stays
nan and infinities saturate. How `scale` is found is one of `Delayed`, `Current` and `Blockwise`.
The layouts and scales are those of TransformerEngine's quantizers of the same names;
`ops.fp8_reference` has all of it in plain torch.

An amax is a largest magnitude, nan not counted: it is computed from the unrounded, unscaled values.
Every sum and maximum has two stages in a fixed order, so the same input gives the same bits. FP8
needs a GPU of compute capability 8.9 or newer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from megatron_xielu.ops import triton as kernels
from megatron_xielu.ops.family import Activation
from megatron_xielu.ops.fp8_reference import Blockwise, Current, Delayed, Quantized, Scaling
from megatron_xielu.ops.triton.elementwise import alpha_gradients, by_coefficient
from megatron_xielu.ops.triton.quantized_kernels import finish_kernel, tile_kernel

# the largest value is 1.75 * 2^EXPONENT
EXPONENTS = {torch.float8_e4m3fn: 8, torch.float8_e5m2: 15}
CAPABILITY = (8, 9)


class Tile(NamedTuple):
    """What one program computes, 64 elements per thread.

    Where the tiles fit x, a thread gets at most `registers` (None: as many as the compiler likes);
    the masks of other sizes would not fit into the limit.
    """

    rows: int
    columns: int
    warps: int
    registers: int | None


# both the rows of the transposed data and those of x are at least a cache line
TENSOR_TILE = Tile(128, 64, warps=4, registers=None)
# two programs per multiprocessor, so that one computes while the other waits for memory
BLOCK_TILE = Tile(128, 128, warps=8, registers=128)
FINISH_BLOCK, FINISH_WARPS = 4096, 8
_DATA = ("rowwise", "columnwise")


def unavailable(x: Tensor) -> str | None:
    """Why the results for x cannot be computed in FP8 here, or None."""
    reason = kernels.unavailable(x)
    if reason is None and x.is_cuda and torch.cuda.get_device_capability(x.device) < CAPABILITY:
        return (
            f"FP8 needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]} or newer, which "
            f"{torch.cuda.get_device_name(x.device)} does not have; use bfloat16"
        )
    return reason


def allocate(
    x: Tensor, scaling: Scaling, *, rowwise: bool = True, columnwise: bool = True
) -> Quantized:
    """New tensors for a result of x's shape; amax and the excess of scale_inv are 0."""
    shapes = _shapes(x, scaling)
    per_tensor = not isinstance(scaling, Blockwise)
    by_row = x.new_zeros(shapes["rowwise_scale_inv"], dtype=torch.float32)
    by_column = by_row
    if not per_tensor:
        by_column = x.new_zeros(shapes["columnwise_scale_inv"], dtype=torch.float32)
    return Quantized(
        rowwise=x.new_empty(shapes["rowwise"], dtype=scaling.dtype) if rowwise else None,
        columnwise=x.new_empty(shapes["columnwise"], dtype=scaling.dtype) if columnwise else None,
        rowwise_scale_inv=by_row if rowwise else None,
        columnwise_scale_inv=by_column if columnwise else None,
        amax=x.new_zeros(1, dtype=torch.float32) if per_tensor else None,
    )


def forward(
    activation: Activation,
    x: Tensor,
    bias: Tensor | None,
    alphas: Sequence[Tensor],
    beta: float,
    scaling: Scaling,
    out: Quantized,
) -> None:
    """Write the activation of x + bias to `out`.

    Args:
        activation: of the family.
        x: [M, K], contiguous; bfloat16, float16 or float32.
        bias: [K] or None, in x's dtype.
        alphas: one element each, any floating type, in the activation's order.
        beta: the slope at zero.
        scaling: how the scale is found, and the format.
        out: from `allocate`, or the tensors of a TransformerEngine quantizer.

    Raises:
        ValueError: a tensor has a wrong shape, dtype, device or memory order, or one that is needed
            is missing in `out`. Whether x can be computed at all, `unavailable` says.
    """
    _Job(activation, None, x, bias, alphas, beta, scaling, out).run(None)


def backward(
    activation: Activation,
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    alphas: Sequence[Tensor],
    beta: float,
    scaling: Scaling,
    out: Quantized,
) -> list[Tensor]:
    """Write the gradient by x to `out`, and return that of each alpha in its dtype.

    grad_y is like x; everything else is as in `forward`. The bias gets no gradient here: it is the
    sum of dx over the rows, which belongs to whatever adds the bias.
    """
    job = _Job(activation, grad_y, x, bias, alphas, beta, scaling, out)
    sums = x.new_empty((len(alphas), job.programs), dtype=torch.float32)
    job.run(sums)
    return alpha_gradients(activation, sums, alphas)


@dataclass(frozen=True)
class _Job:
    """One call of `forward`, where grad_y is None, or `backward`."""

    activation: Activation
    grad_y: Tensor | None
    x: Tensor
    bias: Tensor | None
    alphas: Sequence[Tensor]
    beta: float
    scaling: Scaling
    out: Quantized

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tile(self) -> Tile:
        return BLOCK_TILE if isinstance(self.scaling, Blockwise) else TENSOR_TILE

    @property
    def programs(self) -> int:
        rows, columns = self.x.shape
        return triton.cdiv(rows, self.tile.rows) * triton.cdiv(columns, self.tile.columns)

    def run(self, sums: Tensor | None) -> None:
        with torch.cuda.device_of(self.x):
            if isinstance(self.scaling, Blockwise):
                self._compute(self.out, sums=sums)
                return
            maxima = self.x.new_empty(self.programs, dtype=torch.float32)
            if isinstance(self.scaling, Delayed):
                scale = self.scaling.scale
                self._compute(self.out, scale, maxima, sums)
                self._finish(scale, maxima)
            else:
                scale = maxima.new_empty(1)
                self._compute(Quantized(), None, maxima, sums)
                self._finish(scale, maxima)
                self._compute(self.out, scale)

    def _compute(
        self,
        out: Quantized,
        scale: Tensor | None = None,
        maxima: Tensor | None = None,
        sums: Tensor | None = None,
    ) -> None:
        if self.programs == 0:
            return
        rows, columns = self.x.shape
        even = rows % self.tile.rows == 0 and columns % self.tile.columns == 0
        tile_kernel[(self.programs,)](
            self.grad_y,
            self.x,
            self.bias,
            **by_coefficient("alpha", self.activation, self.alphas),
            beta=self.beta,
            rowwise=_fp8(out.rowwise, self.scaling),
            columnwise=_fp8(out.columnwise, self.scaling),
            rowwise_scale_inv=out.rowwise_scale_inv,
            columnwise_scale_inv=out.columnwise_scale_inv,
            scale=scale,
            maxima=maxima,
            sums=sums,
            epsilon=self.scaling.epsilon,
            M=rows,
            K=columns,
            CUBIC=self.activation.cubic,
            BELOW=int(self.activation.below),
            SCALING=self.scaling.mode,
            EXPONENT=EXPONENTS[self.scaling.dtype],
            POWER_OF_TWO=self.scaling.power_of_two,
            EVEN=even,
            PACKED=_in_words(out.columnwise),
            BLOCK_M=self.tile.rows,
            BLOCK_K=self.tile.columns,
            num_warps=self.tile.warps,
            maxnreg=self._register_limit() if even else None,
        )

    def _register_limit(self) -> int | None:
        # counted on Hopper; for Blackwell the same limit would spill, and the interpreter has none
        if self.tile.registers is None or self.x.device.type == "cpu":
            return None
        target = triton.runtime.driver.active.get_current_target()
        return self.tile.registers if target.arch == 90 else None

    def _finish(self, scale: Tensor, maxima: Tensor) -> None:
        finish_kernel[(1,)](
            maxima,
            self.programs,
            self.out.amax,
            scale,
            self.out.rowwise_scale_inv,
            self.out.columnwise_scale_inv,
            self.scaling.epsilon,
            CURRENT=isinstance(self.scaling, Current),
            EXPONENT=EXPONENTS[self.scaling.dtype],
            POWER_OF_TWO=self.scaling.power_of_two,
            BLOCK=FINISH_BLOCK,
            num_warps=FINISH_WARPS,
        )


def _fp8(data: Tensor | None, scaling: Scaling) -> Tensor | None:
    return data.view(scaling.dtype) if data is not None and data.dtype == torch.uint8 else data


def _in_words(columnwise: Tensor | None) -> bool:
    """Whether the rows of the transposed bytes can be written as 32-bit words."""
    if columnwise is None or columnwise.itemsize != 1:
        return False
    return columnwise.shape[1] % 4 == 0 and columnwise.data_ptr() % 4 == 0


def _shapes(x: Tensor, scaling: Scaling) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of `Quantized`."""
    rows, columns = x.shape
    by_row: tuple[int, ...] = (1,)
    by_column: tuple[int, ...] = (1,)
    if isinstance(scaling, Blockwise):
        blocks = [triton.cdiv(rows, 128), triton.cdiv(columns, 128)]
        if scaling.square:
            by_row = (blocks[0], _padded(blocks[1]))
            by_column = (blocks[1], _padded(blocks[0]))
        else:
            by_row = (blocks[1], _padded(rows))
            by_column = (blocks[0], _padded(columns))
    return {
        "rowwise": (rows, columns),
        "columnwise": (columns, rows),
        "rowwise_scale_inv": by_row,
        "columnwise_scale_inv": by_column,
        "amax": (1,),
    }


def _padded(count: int) -> int:
    return (count + 3) // 4 * 4


def _check(job: _Job) -> None:
    """Refuse what the kernels would read or write wrongly."""
    x, scaling = job.x, job.scaling
    if x.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; make it [tokens, columns] by .flatten(0, -2)"
        )
    if scaling.dtype not in EXPONENTS:
        raise ValueError(f"the result cannot be {scaling.dtype}, but float8_e4m3fn or float8_e5m2")
    fp32 = (torch.float32,)
    _check_tensor("x", x, x, x.shape, kernels.DTYPES)
    if job.grad_y is not None:
        _check_tensor("grad_y", job.grad_y, x, x.shape, kernels.DTYPES)
    if job.bias is not None:
        _check_tensor("bias", job.bias, x, x.shape[1:], (x.dtype,))
    if isinstance(scaling, Delayed):
        _check_tensor("scale", scaling.scale, x, (1,), fp32)
    for name, shape in _shapes(x, scaling).items():
        tensor = getattr(job.out, name)
        if tensor is not None:
            dtypes = (scaling.dtype, torch.uint8, *fp32) if name in _DATA else fp32
            _check_tensor(f"out.{name}", tensor, x, shape, dtypes)

    needed = ["amax"]
    if isinstance(scaling, Blockwise):
        needed = [f"{name}_scale_inv" for name in _DATA if getattr(job.out, name) is not None]
    for name in needed:
        if getattr(job.out, name) is None:
            raise ValueError(f"out.{name} is None, but {type(scaling).__name__} writes it")


def _check_tensor(
    name: str, tensor: Tensor, x: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype]
) -> None:
    one = tensor.numel() == 1 and tuple(shape) == (1,)
    if tuple(tensor.shape) != tuple(shape) and not one:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(shape)}")
    if tensor.dtype not in dtypes:
        legal = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} is {tensor.dtype}; it must be one of {legal}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and x on {x.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous (strides {tensor.stride()}); use .contiguous()")
