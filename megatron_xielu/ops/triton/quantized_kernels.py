"""The Triton kernels behind `quantized`: compute a tile once, store it in FP8 twice.

A program computes BLOCK_M x BLOCK_K elements as four slices, of which slice r holds the rows
r, r + 4, r + 8, ... of the tile. A thread then has four elements above each other, which makes up
the four bytes of one word of the transposed tensor: the transposition through shared memory moves
words rather than bytes, and both stores are 128 bits wide.

EXPONENT names the format: the largest value of e4m3 and of e5m2 is 1.75 * 2^EXPONENT (8 and 15).
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (what a kernel takes is decided where it is launched, and a tuple may grow)

from __future__ import annotations

import os

import triton
import triton.language as tl

from megatron_xielu.ops.triton.formula import (
    gradient,
    load_coefficients,
    value,
    widen,
    widen_pairs,
)

# float32 with the GPU's own 2^x is exact enough for 3 bits, whatever type x is stored in
_ARITHMETIC = tl.constexpr("fast")
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")

# Turns four words of four bytes into its transpose: output j has byte j of every input.
TRANSPOSE_BYTES = tl.constexpr("""{
    .reg .b32 low<2>, high<2>;
    prmt.b32 low0, $4, $5, 0x5140;
    prmt.b32 low1, $6, $7, 0x5140;
    prmt.b32 high0, $4, $5, 0x7362;
    prmt.b32 high1, $6, $7, 0x7362;
    prmt.b32 $0, low0, low1, 0x5410;
    prmt.b32 $1, low0, low1, 0x7632;
    prmt.b32 $2, high0, high1, 0x5410;
    prmt.b32 $3, high0, high1, 0x7632;
}""")


@triton.jit
def tile_kernel(
    grad_y,
    x,
    bias,
    alpha_p2,
    alpha_p3,
    alpha_n,
    beta: tl.float32,
    rowwise,
    columnwise,
    rowwise_scale_inv,
    columnwise_scale_inv,
    scale,
    maxima,
    sums,
    epsilon: tl.float32,
    M,
    K,
    CUBIC: tl.constexpr,
    BELOW: tl.constexpr,
    SCALING: tl.constexpr,
    EXPONENT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    EVEN: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the activation of x + bias, or with grad_y of the gradient by x, in FP8.

    What is None is left out: rowwise [M, K] or columnwise [K, M] data; maxima, which gets the
    largest magnitude of each program; sums [alphas, programs], each program's sums for the
    gradients of the alphas in the order p2, p3, n.

    SCALING "tensor" multiplies by `scale`. "row" finds a scale for each row of the tile and each
    row of its transpose, "tile" one for the tile, and both store the inverses; BLOCK_M and BLOCK_K
    are the sizes of a block then. EVEN promises that the blocks divide M and K, and PACKED that M
    and the address of columnwise are divisible by 4.
    """
    coefficients = load_coefficients(alpha_p2, alpha_p3, alpha_n, beta, CUBIC, BELOW, _ARITHMETIC)
    program = tl.program_id(0)
    tiles_k = tl.cdiv(K, BLOCK_K)
    tile_m = program // tiles_k
    tile_k = program - tile_m * tiles_k

    i = tl.arange(0, BLOCK_M // 4)
    k = tl.arange(0, BLOCK_K)
    first_m = tile_m * BLOCK_M + 4 * i
    inside_k = tile_k * BLOCK_K + k < K
    start = tile_m.to(tl.int64) * BLOCK_M * K + tile_k * BLOCK_K
    other = None if EVEN else 0.0
    if bias is not None:
        # loaded as if it were a tile, which leaves it where the threads need it
        columns = tl.broadcast_to((tile_k * BLOCK_K + k)[None, :], [BLOCK_M // 4, BLOCK_K])
        shift = tl.load(bias + columns, mask=None if EVEN else columns < K, other=other)
        shift = widen(shift, _ARITHMETIC)

    row_scale = 1.0
    column_scale = 1.0
    if SCALING == "tensor" and scale is not None:
        # before the elements, so that each is converted as soon as it is known
        row_scale = tl.load(scale)
        column_scale = row_scale

    slices = ()
    largest = tl.zeros([BLOCK_M // 4, BLOCK_K], tl.float32)
    sum_p2 = largest
    sum_p3 = largest
    sum_n = largest
    for r in tl.static_range(4):
        offset = start + (4 * i + r)[:, None] * K + k[None, :]
        inside = None if EVEN else (first_m + r < M)[:, None] & inside_k[None, :]
        loaded = tl.load(x + offset, mask=inside, other=other)
        # what `value` compares with its thresholds is cheaper as it comes
        if grad_y is None and bias is None:
            elements = widen(loaded, _ARITHMETIC)
        else:
            elements = widen_pairs(loaded, _ARITHMETIC)
        if bias is not None:
            elements += shift
            if not EVEN:
                elements = tl.where(inside, elements, 0.0)
        if grad_y is None:
            result = value(elements, coefficients, CUBIC, BELOW, _ARITHMETIC)
        else:
            g = widen_pairs(tl.load(grad_y + offset, mask=inside, other=other), _ARITHMETIC)
            slope, by_p2, by_p3, by_n = gradient(elements, coefficients, CUBIC, BELOW, _ARITHMETIC)
            sum_p2 = tl.fma(g, by_p2, sum_p2)
            sum_p3 = tl.fma(g, by_p3, sum_p3)
            sum_n = tl.fma(g, by_n, sum_n)
            result = g * slope
        largest = _larger(largest, tl.abs(result))
        slices += (result,)

    if sums is not None:
        programs = tl.num_programs(0)
        sums += program
        if alpha_p2 is not None:
            tl.store(sums, tl.sum(sum_p2))
            sums += programs
        if CUBIC:
            tl.store(sums, tl.sum(sum_p3))
            sums += programs
        if alpha_n is not None:
            tl.store(sums, tl.sum(sum_n))
    if maxima is not None:
        tl.store(maxima + program, tl.max(largest))

    if SCALING == "tile":
        row_scale, inverse = scale_of(tl.max(largest), epsilon, EXPONENT, POWER_OF_TWO)
        column_scale = row_scale
        if rowwise is not None:
            tl.store(rowwise_scale_inv + tile_m * _padded(tiles_k) + tile_k, inverse)
        if columnwise is not None:
            tiles_m = tl.cdiv(M, BLOCK_M)
            tl.store(columnwise_scale_inv + tile_k * _padded(tiles_m) + tile_m, inverse)
    if SCALING == "row" and columnwise is not None:
        column_scale, inverse = scale_of(tl.max(largest, axis=0), epsilon, EXPONENT, POWER_OF_TWO)
        column_scale = column_scale[None, :]
        columnwise_scale_inv += tile_m.to(tl.int64) * _padded(K) + tile_k * BLOCK_K + k
        tl.store(columnwise_scale_inv, inverse, mask=None if EVEN else inside_k)

    column_bytes = ()
    for r in tl.static_range(4):
        inside_m = first_m + r < M
        inside = None if EVEN else inside_m[:, None] & inside_k[None, :]
        if rowwise is not None:
            if SCALING == "row":
                row_scale, inverse = scale_of(
                    tl.max(tl.abs(slices[r]), axis=1), epsilon, EXPONENT, POWER_OF_TWO
                )
                row_scale = row_scale[:, None]
                inverses = tile_k.to(tl.int64) * _padded(M) + first_m + r
                tl.store(rowwise_scale_inv + inverses, inverse, mask=None if EVEN else inside_m)
            offset = start + (4 * i + r)[:, None] * K + k[None, :]
            data = _rounded(slices[r] * row_scale, rowwise.dtype.element_ty, EXPONENT)
            tl.store(rowwise + offset, data, mask=inside)
        if columnwise is not None:
            data = _rounded(slices[r] * column_scale, columnwise.dtype.element_ty, EXPONENT)
            if PACKED:
                column_bytes += (data.to(tl.uint8, bitcast=True),)
            else:
                offset = (tile_k * BLOCK_K + k).to(tl.int64)[None, :] * M
                offset += (first_m + r)[:, None]
                tl.store(columnwise + offset, data, mask=inside)

    if PACKED and columnwise is not None:
        words = columnwise.to(tl.pointer_type(tl.int32), bitcast=True)
        words += tile_k.to(tl.int64) * BLOCK_K * (M // 4) + tile_m * (BLOCK_M // 4)
        words += k[:, None] * (M // 4) + i[None, :]
        inside = None
        if not EVEN:
            inside = inside_k[:, None] & (tile_m * (BLOCK_M // 4) + i < M // 4)[None, :]
        tl.store(words, tl.trans(_words(column_bytes)), mask=inside)


@triton.jit
def finish_kernel(
    maxima,
    count,
    amax,
    scale,
    rowwise_scale_inv,
    columnwise_scale_inv,
    epsilon: tl.float32,
    CURRENT: tl.constexpr,
    EXPONENT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The largest of `count` maxima, and what depends on it; one program.

    CURRENT: amax and scale are written. Otherwise amax is raised to the maximum where it is below
    it, and scale is given.
    """
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        largest = _larger(largest, tl.load(maxima + index, mask=index < count, other=0.0))
    found = tl.max(largest, axis=0)
    if CURRENT:
        factor, inverse = scale_of(found, epsilon, EXPONENT, POWER_OF_TWO)
        tl.store(scale, factor)
    else:
        found = _larger(found, tl.load(amax))
        inverse = tl.div_rn(1.0, tl.load(scale))
    tl.store(amax, found)
    if rowwise_scale_inv is not None:
        tl.store(rowwise_scale_inv, inverse)
    if columnwise_scale_inv is not None:
        tl.store(columnwise_scale_inv, inverse)


@triton.jit
def scale_of(amax, epsilon, EXPONENT: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The factor that brings amax, but at least epsilon, to the format's largest value; 1 / factor.

    It is 1 for 0 and infinity, and at most the largest float32. POWER_OF_TWO rounds it down.
    """
    # an amax of nan, that of a block of nans, is replaced too
    amax = tl.where(amax >= epsilon, amax, epsilon)
    amax = tl.where((amax == 0.0) | (amax == float("inf")), 1.75 * 2.0**EXPONENT, amax)
    if POWER_OF_TWO:
        # the exponent of amax / 2^EXPONENT, one more where its digits are above 1.75
        inverse = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000) - (EXPONENT << 23)
        inverse = tl.maximum(inverse, 0)
        factor = ((254 << 23) - inverse).to(tl.float32, bitcast=True)
        # the inverse of 2^127 is subnormal
        return factor, tl.where(inverse == 0, 1 << 22, inverse).to(tl.float32, bitcast=True)
    factor = tl.minimum(tl.div_rn(1.75 * 2.0**EXPONENT, amax), 3.4028234663852886e38)
    return factor, tl.div_rn(1.0, factor)


@triton.jit
def _larger(a, b):
    """The larger of a, which is no nan, and b, which loses if it is one."""
    # the interpreter's maximum would be nan
    return tl.where(b > a, b, a) if _INTERPRETED else tl.maximum(a, b)


@triton.jit
def _padded(count):
    return (count + 3) // 4 * 4


@triton.jit
def _rounded(scaled, dtype: tl.constexpr, EXPONENT: tl.constexpr):
    """`scaled` in FP8, what is too large as the largest value; nan stays nan.

    The GPU's conversion saturates. float32 storage, which tests use because the interpreter does
    not round to FP8 as GPUs do, gets the saturated values as they are.
    """
    if dtype == tl.float32 or _INTERPRETED:
        limit: tl.constexpr = 1.75 * 2.0**EXPONENT
        scaled = tl.minimum(scaled, limit, propagate_nan=tl.PropagateNan.ALL)
        scaled = tl.maximum(scaled, -limit, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(dtype)


@triton.jit
def _words(column_bytes):
    """Four bytes that lie above each other as one word, the first as its lowest."""
    a, b, c, d = column_bytes
    if _INTERPRETED:
        low = a.to(tl.int32) | (b.to(tl.int32) << 8)
        return low | (c.to(tl.int32) << 16) | (d.to(tl.int32) << 24)
    return tl.inline_asm_elementwise(
        TRANSPOSE_BYTES,
        "=r,=r,=r,=r,r,r,r,r",
        [a, b, c, d],
        dtype=tl.int32,
        is_pure=True,
        pack=4,
    )
