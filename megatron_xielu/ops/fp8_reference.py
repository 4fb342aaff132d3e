"""FP8 in plain torch: what the kernels must write, and the arithmetic of the emulation.

    data = round(clamp(x * scale, -L, L))       x is about data * scale_inv, scale_inv = 1 / scale

with the format's largest value L, 448 for float8_e4m3fn and 57344 for float8_e5m2. All of it is
float32 arithmetic, as in TransformerEngine's kernels: one rounding of x * scale, then one to the
format, to nearest, ties to even. nan stays nan and infinities saturate. How `scale` is found is one
of `Delayed`, `Current` and `Blockwise`; an amax is a largest magnitude, nan not counted, and one
that is 0 or infinite makes the scale 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
BLOCK = 128
_FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Delayed:
    """One scale, chosen from the amax of earlier tensors: one pass.

    Attributes:
        scale: float32, one element, on x's device.
        dtype: float8_e4m3fn or float8_e5m2.
    """

    scale: Tensor
    dtype: torch.dtype = torch.float8_e4m3fn

    mode: ClassVar[str] = "tensor"
    power_of_two: ClassVar[bool] = False
    epsilon: ClassVar[float] = 0.0


@dataclass(frozen=True)
class Current:
    """One scale, L / amax of the tensor itself: two passes, the first of which only reads.

    Attributes:
        dtype: float8_e4m3fn or float8_e5m2.
        power_of_two: round the scale down to one.
        epsilon: an amax below this counts as this.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    power_of_two: bool = False
    epsilon: float = 0.0

    mode: ClassVar[str] = "tensor"


@dataclass(frozen=True)
class Blockwise:
    """A scale L / amax for every block: one pass.

    Attributes:
        dtype: float8_e4m3fn or float8_e5m2.
        square: blocks of 128 x 128, else of 1 x 128, which are 128 elements of a row in rowwise
            data and 128 of a column in columnwise data.
        power_of_two: round the scales down to one.
        epsilon: an amax below this counts as this.
    """

    dtype: torch.dtype = torch.float8_e4m3fn
    square: bool = False
    power_of_two: bool = True
    epsilon: float = 0.0

    @property
    def mode(self) -> str:
        return "tile" if self.square else "row"

    @property
    def rows(self) -> int:
        """How many rows share a scale."""
        return BLOCK if self.square else 1


Scaling = Delayed | Current | Blockwise


class Quantized(NamedTuple):
    """The tensors that a result of M rows and K columns is written to; None is left out.

    Attributes:
        rowwise: data [M, K], in the scaling's dtype or as uint8. In float32 it is scaled and
            clamped but not rounded, for tests without a GPU.
        columnwise: the same transposed, [K, M].
        rowwise_scale_inv, columnwise_scale_inv: float32. Delayed and Current: one element, best the
            same tensor for both. Blockwise, with B(n) = ceil(n / 128) and P(n) = n rounded up to a
            multiple of 4, whose excess is left alone: [B(K), P(M)] and [B(M), P(K)], or for square
            blocks [B(M), P(B(K))] and [B(K), P(B(M))].
        amax: float32, one element, not for Blockwise. Delayed: raised to this tensor's amax where
            it is below, as a history over micro-batches needs it. Current: set to it.
    """

    rowwise: Tensor | None = None
    columnwise: Tensor | None = None
    rowwise_scale_inv: Tensor | None = None
    columnwise_scale_inv: Tensor | None = None
    amax: Tensor | None = None


def quantize(
    x: Tensor, scaling: Scaling, *, rowwise: bool = True, columnwise: bool = True
) -> Quantized:
    """The bytes and scales of x; the excess of scale_inv is 0, and amax is x's own.

    Args:
        x: [M, K]; bfloat16, float16 or float32.
        scaling: how the scale is found, and the format.
        rowwise, columnwise: which of the two orientations is wanted.
    """
    x = x.float()
    if isinstance(scaling, Blockwise):
        row, row_scale_inv = _blocks(x, scaling) if rowwise else (None, None)
        column, column_scale_inv = (
            _blocks(x.T.contiguous(), scaling) if columnwise else (None, None)
        )
        return Quantized(row, column, row_scale_inv, column_scale_inv)
    amax = amax_of(x)
    scale = scaling.scale if isinstance(scaling, Delayed) else scale_of(amax, scaling)
    data = rounded(x * scale, scaling.dtype)
    return Quantized(
        data if rowwise else None,
        data.T.contiguous() if columnwise else None,
        1 / scale if rowwise else None,
        1 / scale if columnwise else None,
        amax,
    )


def _blocks(values: Tensor, scaling: Blockwise) -> tuple[Tensor, Tensor]:
    scale, scale_inv = block_scales(values, scaling)
    return rounded(values * scale, scaling.dtype), scale_inv.contiguous()


def dequantize(data: Tensor, scale_inv: Tensor, scaling: Scaling) -> Tensor:
    """What the bytes stand for.

    Args:
        data: [R, C], rowwise or columnwise data in the scaling's dtype.
        scale_inv: the one that goes with it, in the layout of `Quantized`.

    Returns:
        float32 [R, C].
    """
    if not isinstance(scaling, Blockwise):
        return data.float() * scale_inv
    if not scaling.square:
        scale_inv = scale_inv[:, : data.shape[0]].T
    scale_inv = scale_inv[:, : -(-data.shape[1] // BLOCK)]
    return data.float() * _spread(scale_inv, data.shape, scaling)


def rounded(scaled: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 values as they are stored: saturated, to nearest, ties to even."""
    return scaled.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


def saturates_above(scaling: Scaling, dtype: torch.dtype) -> Tensor | float:
    """The magnitude above which a scale makes saturation of a number, and not rounding alone.

    Args:
        scaling: those that follow from the values themselves let only infinities saturate.
        dtype: of the values.
    """
    if not isinstance(scaling, Delayed):
        return torch.finfo(dtype).max
    # half a step above the largest, 1.75 * 2^e, whose step is eps * 2^e
    half_step = 1 + torch.finfo(scaling.dtype).eps / 3.5
    return LARGEST[scaling.dtype] * half_step / scaling.scale


def amax_of(values: Tensor) -> Tensor:
    """The largest magnitude, nan not counted; one element, 0 where there are no values."""
    return _magnitudes(values).amax().reshape(1) if values.numel() else values.new_zeros(1)


def scale_of(amax: Tensor, scaling: Current | Blockwise) -> Tensor:
    """The scales that follow from maxima of any shape, float32 or float64, in their type."""
    # fmax: nan counts as nothing
    amax = torch.fmax(amax, amax.new_tensor(scaling.epsilon))
    plain = (amax == 0) | amax.isinf()
    # tensors both, because torch divides a Python number by a tensor with two roundings
    largest = torch.full_like(amax, LARGEST[scaling.dtype])
    scale = (largest / torch.where(plain, 1.0, amax)).clamp(max=_FLOAT32_MAX)
    if scaling.power_of_two:
        _, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - 1)
    return torch.where(plain, 1.0, scale)


def block_scales(values: Tensor, scaling: Blockwise) -> tuple[Tensor, Tensor]:
    """The scale of every element of `values` [M, K], and scale_inv in its layout, for its rows."""
    rows, columns = values.shape
    padded = F.pad(_magnitudes(values), (0, -columns % BLOCK, 0, -rows % scaling.rows))
    blocks = padded.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, scaling.rows)).amax((1, 3))
    scale = scale_of(blocks, scaling)
    inverse = 1 / scale if scaling.square else (1 / scale).T
    return _spread(scale, values.shape, scaling), F.pad(inverse, (0, -inverse.shape[1] % 4))


def _magnitudes(values: Tensor) -> Tensor:
    return values.abs().nan_to_num(nan=0.0, posinf=math.inf)


def _spread(scale: Tensor, shape: torch.Size, scaling: Blockwise) -> Tensor:
    """One number per block [M / rows, K / 128], rounded up, to one per element."""
    rows, columns = scale.shape
    spread = scale[:, None, :, None].expand(rows, scaling.rows, columns, BLOCK)
    return spread.reshape(rows * scaling.rows, columns * BLOCK)[: shape[0], : shape[1]]


class DelayedScale:
    """The scale of one tensor of a layer under delayed scaling, from the amaxes of its past.

    `record` what was quantized with `scale`, then `update`: from then on scale is
    L / (2^margin * amax) for the largest (or the latest) amax recorded in the last `length`
    updates. An amax of 0, infinity or nan leaves it as it is; it begins with 1.

    Args:
        dtype: float8_e4m3fn or float8_e5m2.
        length: updates that are remembered.
        algorithm: which of the remembered amaxes counts.
        margin: powers of two kept free above the amax.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        *,
        length: int = 1024,
        algorithm: Literal["max", "most_recent"] = "max",
        margin: int = 0,
    ) -> None:
        self.dtype = dtype
        self.algorithm = algorithm
        self.margin = margin
        self.scale = torch.ones(1)
        # the first is the update to come, the others go from old to new
        self.amaxes = torch.zeros(length)

    def record(self, amax: Tensor) -> None:
        """Raise the amax of the update to come; several micro-batches may share one."""
        self.amaxes[0] = torch.fmax(self.amaxes[0], amax.reshape(()).cpu())

    def update(self) -> None:
        """Close the open entry of the history and set `scale`."""
        amax = self.amaxes.max() if self.algorithm == "max" else self.amaxes[0].clone()
        if amax.isfinite() and amax > 0:
            found = torch.tensor(LARGEST[self.dtype]) / amax / 2**self.margin
            self.scale = found.clamp(max=_FLOAT32_MAX).reshape(1)
        # the oldest makes room for the one that was open
        self.amaxes = self.amaxes.roll(-1)
        self.amaxes[0] = 0.0
