"""One pass forward and one backward, and the sums that finish the backward's partial sums.

A program computes a fixed tile, whatever the GPU, and leaves one partial sum per alpha, and one per
column where there is a bias. A second kernel adds these in float64 in a fixed order. There is no
atomic operation, so the same input gives the same bits.
"""

# mypy: disable-error-code="no-untyped-def"
# (what a kernel takes is decided where it is launched)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_xielu.ops.family import Activation
from megatron_xielu.ops.triton.formula import (
    arithmetic,
    gradient,
    load_coefficients,
    value,
    widen,
    widen_pairs,
)


class Tile(NamedTuple):
    """What one program computes: `steps` times `block` elements, by `warps` warps of 32 threads."""

    block: int
    steps: int
    warps: int

    @property
    def size(self) -> int:
        return self.block * self.steps


# for each arithmetic of `formula`; 64 elements per thread share what is computed once per thread,
# and the steps of BACKWARD, also of the forward with a bias, share sums and the bias
FORWARD = {
    "fast": Tile(block=8192, steps=1, warps=4),
    "single": Tile(block=4096, steps=1, warps=4),
    "double": Tile(block=2048, steps=1, warps=4),
}
BACKWARD = {
    "fast": Tile(block=1024, steps=8, warps=4),
    "single": Tile(block=512, steps=8, warps=4),
    "double": Tile(block=1024, steps=2, warps=4),
}
# with a bias a tile has so many columns, or all of them; narrow, so that it has many rows and
# leaves few partial sums of the bias's gradient
COLUMNS = 128
# the second stage: so many partial sums of an alpha at a time, and many loads at once, for its one
# program waits for memory only
SUM = Tile(block=8192, steps=1, warps=16)
# and of the bias's gradient: so many rows of so many columns at a time
SUM_ROWS, SUM_COLUMNS, SUM_WARPS = 64, 32, 4


@triton.jit
def forward_kernel(
    x,
    y,
    alpha_p2,
    alpha_p3,
    alpha_n,
    beta: tl.float64,
    count,
    CUBIC: tl.constexpr,
    BELOW: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """y of `count` elements, which the tiles fit exactly where EVEN."""
    coefficients = load_coefficients(alpha_p2, alpha_p3, alpha_n, beta, CUBIC, BELOW, ARITHMETIC)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    left = tl.minimum(count - first, BLOCK * STEPS).to(tl.int32)
    for step in tl.static_range(STEPS):
        lane = step * BLOCK + tl.arange(0, BLOCK)
        mask = None if EVEN else lane < left
        wide = widen(tl.load(x + first + lane, mask=mask), ARITHMETIC)
        result = value(wide, coefficients, CUBIC, BELOW, ARITHMETIC)
        tl.store(y + first + lane, result, mask=mask)


@triton.jit
def backward_kernel(
    grad_y,
    x,
    grad_x,
    partials,
    alpha_p2,
    alpha_p3,
    alpha_n,
    beta: tl.float64,
    count,
    CUBIC: tl.constexpr,
    BELOW: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """dx, and each program's sums of the derivatives by the coefficients (`_store_sums`)."""
    coefficients = load_coefficients(alpha_p2, alpha_p3, alpha_n, beta, CUBIC, BELOW, ARITHMETIC)
    first = tl.program_id(0).to(tl.int64) * (BLOCK * STEPS)
    left = tl.minimum(count - first, BLOCK * STEPS).to(tl.int32)
    sum_p2 = widen(tl.zeros([BLOCK], tl.float32), ARITHMETIC)
    sum_p3 = sum_p2
    sum_n = sum_p2
    for step in tl.static_range(STEPS):
        lane = step * BLOCK + tl.arange(0, BLOCK)
        mask = None if EVEN else lane < left
        other = None if EVEN else 0.0
        wide = widen_pairs(tl.load(x + first + lane, mask=mask, other=other), ARITHMETIC)
        g = widen_pairs(tl.load(grad_y + first + lane, mask=mask, other=other), ARITHMETIC)
        slope, by_p2, by_p3, by_n = gradient(wide, coefficients, CUBIC, BELOW, ARITHMETIC)
        tl.store(grad_x + first + lane, g * slope, mask=mask)
        sum_p2 = tl.fma(g, by_p2, sum_p2)
        sum_p3 = tl.fma(g, by_p3, sum_p3)
        sum_n = tl.fma(g, by_n, sum_n)
    _store_sums(partials, sum_p2, sum_p3, sum_n, alpha_p2, alpha_n, CUBIC)


@triton.jit
def forward_bias_kernel(
    x,
    bias,
    y,
    alpha_p2,
    alpha_p3,
    alpha_n,
    beta: tl.float64,
    rows,
    columns,
    CUBIC: tl.constexpr,
    BELOW: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """y of x + bias for rows in row-major order; a tile has STEPS times ROWS rows."""
    coefficients = load_coefficients(alpha_p2, alpha_p3, alpha_n, beta, CUBIC, BELOW, ARITHMETIC)
    _, left, row, column, start = _place(rows, columns, ROWS, COLUMNS, STEPS)
    valid = None if EVEN else column < columns
    # one for each row, which leaves it where the threads need it
    added = tl.load(tl.broadcast_to(bias + column, [ROWS, COLUMNS]), mask=valid)
    added = widen_pairs(added, ARITHMETIC)
    x += start
    y += start
    for step in tl.static_range(STEPS):
        mask = None if EVEN else valid & (row + step * ROWS < left)
        wide = widen_pairs(tl.load(x, mask=mask), ARITHMETIC) + added
        tl.store(y, value(wide, coefficients, CUBIC, BELOW, ARITHMETIC), mask=mask)
        x += ROWS * columns
        y += ROWS * columns


@triton.jit
def backward_bias_kernel(
    grad_y,
    x,
    bias,
    grad_x,
    partials,
    bias_partials,
    alpha_p2,
    alpha_p3,
    alpha_n,
    beta: tl.float64,
    rows,
    columns,
    CUBIC: tl.constexpr,
    BELOW: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """As `backward_kernel`, and bias_partials[tile down, column], the tile's sum of dx."""
    coefficients = load_coefficients(alpha_p2, alpha_p3, alpha_n, beta, CUBIC, BELOW, ARITHMETIC)
    down, left, row, column, start = _place(rows, columns, ROWS, COLUMNS, STEPS)
    valid = None if EVEN else column < columns
    other = None if EVEN else 0.0
    added = tl.load(tl.broadcast_to(bias + column, [ROWS, COLUMNS]), mask=valid, other=other)
    added = widen_pairs(added, ARITHMETIC)
    grad_y += start
    x += start
    grad_x += start
    sum_bias = widen(tl.zeros([ROWS, COLUMNS], tl.float32), ARITHMETIC)
    sum_p2 = sum_bias
    sum_p3 = sum_bias
    sum_n = sum_bias
    for step in tl.static_range(STEPS):
        mask = None if EVEN else valid & (row + step * ROWS < left)
        wide = widen_pairs(tl.load(x, mask=mask, other=other), ARITHMETIC) + added
        g = widen_pairs(tl.load(grad_y, mask=mask, other=other), ARITHMETIC)
        slope, by_p2, by_p3, by_n = gradient(wide, coefficients, CUBIC, BELOW, ARITHMETIC)
        result = g * slope
        tl.store(grad_x, result, mask=mask)
        sum_bias += result
        sum_p2 = tl.fma(g, by_p2, sum_p2)
        sum_p3 = tl.fma(g, by_p3, sum_p3)
        sum_n = tl.fma(g, by_n, sum_n)
        grad_y += ROWS * columns
        x += ROWS * columns
        grad_x += ROWS * columns
    bias_partials += down.to(tl.int64) * columns
    tl.store(bias_partials + column, tl.sum(sum_bias, 0, keep_dims=True), mask=valid)
    _store_sums(partials, sum_p2, sum_p3, sum_n, alpha_p2, alpha_n, CUBIC)


@triton.jit
def _place(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    """Where a program computes.

    Returns:
        The number of tiles above its own; how many rows of its tile there are; rows in the tile
        [ROWS, 1], columns in the tensor [1, COLUMNS] and offsets in the tensor of its first step.
    """
    across = tl.cdiv(columns, COLUMNS)
    down = tl.program_id(0) // across
    first = down.to(tl.int64) * (ROWS * STEPS)
    left = tl.minimum(rows - first, ROWS * STEPS).to(tl.int32)
    row = tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return down, left, row, column, first * columns + row * columns + column


@triton.jit
def _store_sums(partials, sum_p2, sum_p3, sum_n, alpha_p2, alpha_n, CUBIC: tl.constexpr):
    """partials[coefficient, program]; the coefficients there are, in the order p2, p3, n."""
    partials += tl.program_id(0)
    if alpha_p2 is not None:
        tl.store(partials, tl.sum(sum_p2))
        partials += tl.num_programs(0)
    if CUBIC:
        tl.store(partials, tl.sum(sum_p3))
        partials += tl.num_programs(0)
    if alpha_n is not None:
        tl.store(partials, tl.sum(sum_n))


@triton.jit
def alpha_kernel(
    partials,
    count,
    alpha_p2,
    alpha_p3,
    alpha_n,
    grad_p2,
    grad_p3,
    grad_n,
    CUBIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The alphas' gradients from partials[coefficient, count]; one program per coefficient."""
    row = tl.program_id(0)
    partials += row.to(tl.int64) * count
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        sums += tl.load(partials + index, mask=index < count, other=0.0).to(tl.float64)
    total = tl.sum(sums)
    if alpha_p2 is not None:
        _store_gradient(grad_p2, alpha_p2, total, row == 0)
    if CUBIC:
        _store_gradient(grad_p3, alpha_p3, total, row == 1)
    if alpha_n is not None:
        _store_gradient(grad_n, alpha_n, total, row == tl.num_programs(0) - 1)


@triton.jit
def _store_gradient(grad, alpha, total, mine):
    # the slope of softplus is the sigmoid
    sigmoid = 1.0 / (1.0 + tl.exp(-tl.load(alpha).to(tl.float64)))
    # Triton's interpreter turns float64 into bfloat16 by way of float32 only
    tl.store(grad, (total * sigmoid).to(tl.float32), mask=mine)


@triton.jit
def bias_kernel(partials, grad_bias, count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The bias's gradient from partials[count, columns]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < columns
    sums = tl.zeros([ROWS, COLUMNS], tl.float64)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        offset = row[:, None].to(tl.int64) * columns + column[None, :]
        mask = (row < count)[:, None] & valid[None, :]
        sums += tl.load(partials + offset, mask=mask, other=0.0).to(tl.float64)
    tl.store(grad_bias + column, tl.sum(sums, 0).to(tl.float32), mask=valid)


@dataclass(frozen=True)
class _Grid:
    """How many programs compute a tensor, and the arguments that say how.

    Attributes:
        programs: tiles of the whole tensor.
        down: tiles one below another, where there is a bias.
        arguments: of the kernel, among them num_warps for Triton.
    """

    programs: int
    down: int
    arguments: dict[str, Any]

    @classmethod
    def of_elements(cls, x: Tensor, tile: Tile) -> _Grid:
        count = x.numel()
        programs = triton.cdiv(count, tile.size)
        arguments = {"count": count, "BLOCK": tile.block, "EVEN": count % tile.size == 0}
        return cls(programs, programs, arguments | _steps(tile))

    @classmethod
    def of_rows(cls, x: Tensor, tile: Tile) -> _Grid:
        columns = x.shape[-1]
        rows = x.numel() // columns
        width = min(COLUMNS, triton.next_power_of_2(columns))
        height = tile.size // width
        down = triton.cdiv(rows, height)
        arguments = {
            "rows": rows,
            "columns": columns,
            "ROWS": tile.block // width,
            "COLUMNS": width,
            "EVEN": rows % height == 0 and columns % width == 0,
        }
        return cls(down * triton.cdiv(columns, width), down, arguments | _steps(tile))


def _steps(tile: Tile) -> dict[str, Any]:
    return {"STEPS": tile.steps, "num_warps": tile.warps}


def _template(activation: Activation, alphas: Sequence[Tensor], x: Tensor) -> dict[str, Any]:
    return {
        **by_coefficient("alpha", activation, alphas),
        "CUBIC": activation.cubic,
        "BELOW": int(activation.below),
        "ARITHMETIC": arithmetic(activation, x.dtype),
    }


def by_coefficient(
    prefix: str, activation: Activation, tensors: Sequence[Tensor]
) -> dict[str, Tensor | None]:
    """One tensor per alpha as a kernel's arguments: prefix_p2, prefix_p3 and prefix_n, or None."""
    found = dict(zip(activation.coefficients, tensors, strict=True))
    return {f"{prefix}_{name}": found.get(name) for name in ("p2", "p3", "n")}


def launch_forward(
    activation: Activation,
    x: Tensor,
    bias: Tensor | None,
    alphas: Sequence[Tensor],
    beta: float,
    y: Tensor,
) -> None:
    """Write the activation of x + bias into y.

    Args:
        x, y: the same shape and the same dense strides, of row-major order where there is a bias;
            at least one element. y may be of any floating type.
        bias: contiguous, or None.
        alphas: in the activation's order, one element each.
    """
    template = _template(activation, alphas, x)
    with torch.cuda.device_of(x):
        if bias is None:
            grid = _Grid.of_elements(x, FORWARD[template["ARITHMETIC"]])
            forward_kernel[(grid.programs,)](x, y, beta=beta, **template, **grid.arguments)
        else:
            grid = _Grid.of_rows(x, BACKWARD[template["ARITHMETIC"]])
            forward_bias_kernel[(grid.programs,)](
                x, bias, y, beta=beta, **template, **grid.arguments
            )


def launch_backward(
    activation: Activation,
    grad_y: Tensor,
    x: Tensor,
    bias: Tensor | None,
    alphas: Sequence[Tensor],
    beta: float,
    grad_x: Tensor,
) -> list[Tensor]:
    """Write dx into grad_x; the gradient of each alpha, then that of the bias if there is one.

    The tensors are as in `launch_forward`; grad_x may be of any floating type.
    """
    template = _template(activation, alphas, x)
    tile = BACKWARD[template["ARITHMETIC"]]
    grid = (_Grid.of_elements if bias is None else _Grid.of_rows)(x, tile)
    partials = x.new_empty((len(alphas), grid.programs), dtype=torch.float32)
    with torch.cuda.device_of(x):
        if bias is None:
            backward_kernel[(grid.programs,)](
                grad_y, x, grad_x, partials, beta=beta, **template, **grid.arguments
            )
            return alpha_gradients(activation, partials, alphas)
        bias_partials = x.new_empty((grid.down, bias.numel()), dtype=torch.float32)
        backward_bias_kernel[(grid.programs,)](
            grad_y,
            x,
            bias,
            grad_x,
            partials,
            bias_partials,
            beta=beta,
            **template,
            **grid.arguments,
        )
        grads = alpha_gradients(activation, partials, alphas)
        return [*grads, _bias_gradient(bias_partials, bias)]


def alpha_gradients(
    activation: Activation, partials: Tensor, alphas: Sequence[Tensor]
) -> list[Tensor]:
    """The second stage: the gradient of each alpha, in its type.

    Args:
        partials: [len(alphas), programs] float32, the sums for p2, p3 and n, in this order, of
            those that the activation has.
        alphas: in the activation's order, one element each.
    """
    grads = [torch.empty_like(alpha) for alpha in alphas]
    if alphas:
        with torch.cuda.device_of(partials):
            alpha_kernel[(len(alphas),)](
                partials,
                partials.shape[1],
                **by_coefficient("alpha", activation, alphas),
                **by_coefficient("grad", activation, grads),
                CUBIC=activation.cubic,
                BLOCK=SUM.block,
                num_warps=SUM.warps,
            )
    return grads


def _bias_gradient(partials: Tensor, bias: Tensor) -> Tensor:
    grad_bias = torch.empty_like(bias)
    count, columns = partials.shape
    bias_kernel[(triton.cdiv(columns, SUM_COLUMNS),)](
        partials,
        grad_bias,
        count,
        columns,
        ROWS=SUM_ROWS,
        COLUMNS=SUM_COLUMNS,
        num_warps=SUM_WARPS,
    )
    return grad_bias
