"""Checks of the FP8 kernels: triton_quantized_interpreted.py OUT DEVICE NAME ...

Writes what each check measured, or its traceback, so that one process serves many tests. DEVICE is
cpu, with TRITON_INTERPRET=1, or cuda. The interpreter does not round to FP8 as GPUs do, so most
checks have the kernels store the scaled and clamped values in float32 and round these in torch.

The oracle is the formula in float64. A result may be any value that the rounding of some number
within float32 round-off of the oracle's gives; how many differ from the oracle's own is counted.
"""

from __future__ import annotations

import json
import math
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatron_xielu.ops import fp8_reference
from megatron_xielu.ops.family import FAMILY, RELU2, XIELU, XIPRELU, Activation
from megatron_xielu.ops.fp8_reference import (
    Blockwise,
    Current,
    Delayed,
    Quantized,
    Scaling,
    block_scales,
)
from megatron_xielu.ops.reference import REFERENCES
from megatron_xielu.ops.triton import quantized
from megatron_xielu.ops.triton.quantized import allocate
from megatron_xielu.ops.triton.quantized_kernels import scale_of

DEVICE = sys.argv[2] if __name__ == "__main__" else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# bits of the mantissa, exponent of the smallest normal number, largest value
FORMATS = {E4M3: (3, -6, 448.0), E5M2: (2, -14, 57344.0)}
BETA = 0.5
RAW = {"alpha_p": 0.3, "alpha_n": -0.4, "alpha_p2": -0.2, "alpha_p3": -1.5}
EPS = torch.finfo(torch.float32).eps
# whole tiles; multiples of 16 that are not; divisible by nothing
SHAPES = [(256, 64), (144, 48), (131, 39), (1, 1)]


class Case(NamedTuple):
    """Inputs of forward, or with grad_y of backward, and what float64 makes of them."""

    activation: Activation
    x: Tensor
    bias: Tensor | None
    alphas: list[Tensor]
    beta: float
    grad_y: Tensor | None
    exact: Tensor
    # how far float32 arithmetic may be off: a few roundings of the terms
    slack: Tensor
    exact_sums: list[Tensor]

    def run(self, scaling: Scaling, out: Quantized) -> list[Tensor]:
        arguments = (self.x, self.bias, self.alphas, self.beta, scaling, out)
        if self.grad_y is None:
            quantized.forward(self.activation, *arguments)
            return []
        return quantized.backward(self.activation, self.grad_y, *arguments)


def case(
    shape: tuple[int, int],
    *,
    activation: Activation = XIELU,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    backward: bool = False,
    x: Tensor | None = None,
) -> Case:
    generator = torch.Generator().manual_seed(shape[0])

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = (2 * normal(*shape) if x is None else x).to(dtype)
    shift = normal(shape[1]).to(dtype) if bias else None
    # of one sign, so that the sums for the alphas do not cancel
    grad_y = normal(*shape).abs().to(dtype) if backward else None
    alphas = [torch.tensor([RAW[name]]) for name in activation.alphas]
    beta = 0.0 if activation is RELU2 else BETA

    wide = x.double() if shift is None else x.double() + shift.double()
    wide.requires_grad_()
    exact_alphas = [alpha.double().requires_grad_() for alpha in alphas]
    exact = REFERENCES[activation.name](wide, *exact_alphas, beta)
    size, slope_size = _sizes(activation, exact_alphas, wide.detach(), beta)
    sums: tuple[Tensor, ...] = ()
    if grad_y is not None:
        exact, *sums = torch.autograd.grad(exact, (wide, *exact_alphas), grad_y.double())
        size = slope_size * grad_y.double()
    exact, size = exact.detach().to(DEVICE), size.to(DEVICE)
    slack = torch.where(exact.isfinite(), 4 * EPS * size, 0.0)
    x, shift, grad_y = (t if t is None else t.to(DEVICE) for t in (x, shift, grad_y))
    alphas = [alpha.to(DEVICE) for alpha in alphas]
    return Case(activation, x, shift, alphas, beta, grad_y, exact, slack, list(sums))


def _sizes(
    activation: Activation, alphas: list[Tensor], x: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The sum of the magnitudes of the terms of y and of dy/dx."""
    found = {
        name: F.softplus(alpha.detach())
        for name, alpha in zip(activation.coefficients, alphas, strict=True)
    }
    p2, p3, n = found.get("p2", 1.0), found.get("p3", 0.0), found.get("n", 0.0)
    a = x.abs()
    above = a * (beta + a * (p2 + a * p3))
    slope_above = beta + a * (2 * p2 + 3 * a * p3)
    if activation is XIPRELU:
        below, slope_below = a * (beta + n * a), beta + 2 * n * a
    else:
        below, slope_below = a * 2 * (beta + n), 0 * a + 2 * beta + n
    return torch.where(x > 0, above, below), torch.where(x > 0, slope_above, slope_below)


def unrounded(x: Tensor, scaling: Scaling, *, backward: bool = False) -> Quantized:
    """Where a kernel leaves float32 values, with nan where it leaves nothing."""
    out = allocate(x, scaling)
    assert out.rowwise is not None
    assert out.columnwise is not None
    return out._replace(
        rowwise=torch.full(out.rowwise.shape, math.nan, device=DEVICE),
        columnwise=torch.full(out.columnwise.shape, math.nan, device=DEVICE),
    )


def fp8(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 rounded to nearest, ties to even, in a format whose largest value saturates."""
    digits, smallest, limit = FORMATS[dtype]
    clamped = values.clamp(-limit, limit)
    _, exponent = torch.frexp(clamped)
    step = torch.ldexp(torch.ones_like(clamped), (exponent - 1).clamp(min=smallest) - digits)
    return torch.round(clamped / step) * step


def compare(got: Tensor, exact: Tensor, slack: Tensor, scale: Tensor, dtype: torch.dtype) -> int:
    """Require every byte to be right; how many are only within float32 round-off of being so."""
    got = got.to(dtype)
    assert torch.equal(got.double().isnan(), exact.isnan()), "nan is not where it belongs"
    low, middle, high = (fp8((exact + d * slack) * scale, dtype).to(dtype) for d in (-1, 0, 1))
    sure = low.view(torch.uint8) == high.view(torch.uint8)
    equal = (got.view(torch.uint8) == middle.view(torch.uint8)) | exact.isnan()
    wrong = sure & ~equal
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} bytes wrong, the first at "
        f"{wrong.nonzero()[0].tolist()}: {got[wrong][:3].double().tolist()} for "
        f"{(exact * scale)[wrong][:3].tolist()}"
    )
    between = (low.double() <= got.double()) & (got.double() <= high.double())
    assert (between | equal).all(), "a byte is further off than float32 round-off explains"
    return int((~equal).sum())


def largest(dtype: torch.dtype) -> Tensor:
    """A tensor, because torch divides a Python number by a tensor with two roundings."""
    return torch.tensor([FORMATS[dtype][2]], device=DEVICE)


def relative(got: Tensor, want: Tensor) -> float:
    return float(abs(got.double() / want.double() - 1).max())


def check_transpose(out: Quantized) -> None:
    assert out.rowwise is not None
    assert out.columnwise is not None
    width = torch.int32 if out.rowwise.dtype == torch.float32 else torch.uint8
    by_row, by_column = out.rowwise.view(width), out.columnwise.view(width)
    assert torch.equal(by_row, by_column.T), "columnwise is not the transpose of rowwise"


def check_sums(case: Case, got: list[Tensor]) -> float:
    """The largest relative error of the gradients of the alphas, whose terms are all positive."""
    errors = [relative(a.cpu(), b) for a, b in zip(got, case.exact_sums, strict=True)]
    assert max(errors, default=0.0) <= 1e-6, errors
    return max(errors, default=0.0)


def variants(backward: bool) -> Iterator[Case]:
    for activation in FAMILY.values():
        yield case((48, 80), activation=activation, backward=backward)
    for dtype in (torch.float32, torch.float16):
        yield case((51, 77), dtype=dtype, backward=backward)
    for shape in SHAPES:
        yield case(shape, backward=backward)
        yield case(shape, bias=True, backward=backward)


def delayed(backward: bool) -> dict[str, float]:
    """Values, amax, scale_inv and transpose with a given scale."""
    elements = off = 0
    errors, sum_errors = [0.0], [0.0]
    for each in variants(backward):
        # both saturate
        dtype, factor = (E5M2, 9000.0) if backward else (E4M3, 31.3)
        scale = torch.tensor([factor], device=DEVICE)
        out = unrounded(each.x, Delayed(scale, dtype))
        sum_errors.append(check_sums(each, each.run(Delayed(scale, dtype), out)))
        check_transpose(out)
        off += compare(out.rowwise, each.exact, each.slack, scale.double(), dtype)
        elements += each.x.numel()
        errors.append(relative(out.amax, each.exact.abs().max()))
        assert torch.equal(out.rowwise_scale_inv, 1 / scale)
    assert max(errors) <= 1e-6, errors
    assert off <= 1e-4 * elements
    return {
        "bytes": elements,
        "bytes within round-off of a tie": off,
        "amax relative error": max(errors),
        "alpha gradient relative error": max(sum_errors),
    }


def delayed_forward() -> dict[str, float]:
    return delayed(backward=False)


def delayed_backward() -> dict[str, float]:
    return delayed(backward=True)


def amax_is_raised_only() -> dict[str, float]:
    each = case((131, 77))
    scaling = Delayed(torch.ones(1, device=DEVICE))
    out = unrounded(each.x, scaling)
    each.run(scaling, out)
    own = out.amax.clone()
    out.amax.fill_(1e4)
    each.run(scaling, out)
    assert out.amax.item() == 1e4
    out.amax.copy_(own / 2)
    each.run(scaling, out)
    assert torch.equal(out.amax, own)
    return {}


def current_scaling() -> dict[str, float]:
    """The scale follows from the amax, which is stored, by one float32 division."""
    elements = off = 0
    errors = [0.0]
    for backward in (False, True):
        for shape in SHAPES[1:]:
            each = case(shape, backward=backward)
            for scaling in (Current(E5M2), Current(E4M3, power_of_two=True)):
                out = unrounded(each.x, scaling)
                out.amax.fill_(1e9)
                check_sums(each, each.run(scaling, out))
                errors.append(relative(out.amax, each.exact.abs().max()))
                scale = fp8_reference.scale_of(out.amax, scaling)
                assert torch.equal(out.rowwise_scale_inv, 1 / scale)
                check_transpose(out)
                off += compare(out.rowwise, each.exact, each.slack, scale.double(), scaling.dtype)
                elements += each.x.numel()
    tiny = case((144, 80), x=torch.full((144, 80), 1e-6))
    scaling = Current(epsilon=1e-3)
    out = unrounded(tiny.x, scaling)
    tiny.run(scaling, out)
    scale = largest(E4M3) / torch.tensor([1e-3], device=DEVICE)
    assert torch.equal(out.rowwise_scale_inv, 1 / scale)
    zero = case((144, 80), x=torch.zeros(144, 80))
    zero.run(Current(), out)
    assert out.rowwise_scale_inv.item() == 1
    assert out.amax.item() == 0
    assert not out.rowwise.any()
    assert max(errors) <= 1e-6, errors
    return {
        "bytes": elements,
        "bytes within round-off of a tie": off,
        "amax relative error": max(errors),
    }


def check_blocks(each: Case, scaling: Blockwise) -> tuple[int, list[Tensor]]:
    """How many bytes are only within round-off of being right, and the alphas' gradients."""
    out = unrounded(each.x, scaling)
    sums = each.run(scaling, out)
    off = 0
    for values, slack, data, scale_inv in (
        (each.exact, each.slack, out.rowwise, out.rowwise_scale_inv),
        (each.exact.T, each.slack.T, out.columnwise, out.columnwise_scale_inv),
    ):
        scale, inverse = block_scales(values, scaling)
        if scaling.power_of_two:
            assert torch.equal(scale_inv.double(), inverse)
        else:
            torch.testing.assert_close(scale_inv.double(), inverse, rtol=8 * EPS, atol=0)
            slack = slack + 8 * EPS * values.abs()
        off += compare(data, values, slack, scale, scaling.dtype)
    return off, sums


def blockwise(backward: bool) -> dict[str, float]:
    elements = off = 0
    sum_errors = [0.0]
    for shape in ((128, 256), (131, 9), (9, 139)):
        each = case(shape, backward=backward, bias=shape == (9, 139))
        for scaling in (
            Blockwise(),
            Blockwise(E5M2),
            Blockwise(power_of_two=False, epsilon=3.0),
            Blockwise(square=True),
            Blockwise(E5M2, square=True, epsilon=30.0),
            Blockwise(square=True, power_of_two=False),
        ):
            found, sums = check_blocks(each, scaling)
            off += found
            elements += 2 * each.x.numel()
            sum_errors.append(check_sums(each, sums))
    return {
        "bytes": elements,
        "bytes within round-off of a tie": off,
        "alpha gradient relative error": max(sum_errors),
    }


def blockwise_forward() -> dict[str, float]:
    return blockwise(backward=False)


def blockwise_backward() -> dict[str, float]:
    return blockwise(backward=True)


def extreme_values() -> dict[str, float]:
    """Blocks of zeros, an infinity, a nan, nothing but nan, values from 1e-30 to 1e15."""
    x = 2 * torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    x[:128, :128] = 0
    x[130, 10] = math.inf
    x[140, 20] = -math.inf
    x[150, 30] = math.nan
    x[160, 128:] = 1e15
    x[170] = 1e-30
    x[180, 128:] = -2e-38
    # one thread's: the nan must not hide the largest of the column
    x[200, 50], x[201, 50] = 3e4, math.nan
    x[:128, 128:] = math.nan
    each = case((256, 256), x=x)
    for square in (False, True):
        for dtype in (E4M3, E5M2):
            check_blocks(each, Blockwise(dtype, square))
    for scaling in (Delayed(torch.tensor([3.0], device=DEVICE)), Current()):
        out = unrounded(each.x, scaling)
        each.run(scaling, out)
        assert out.amax.item() == math.inf
        scale = torch.tensor(3.0 if isinstance(scaling, Delayed) else 1.0, dtype=torch.float64)
        compare(out.rowwise, each.exact, each.slack, scale.to(DEVICE), E4M3)
        torch.testing.assert_close(out.rowwise, out.columnwise.T, rtol=0, atol=0, equal_nan=True)
    return {}


def a_bias_counts_in_rows_that_exist_only() -> dict[str, float]:
    """x + bias is 0 everywhere, but not where a tile goes on below x."""
    x = torch.full((51, 77), -20.0, device=DEVICE)
    each = case((51, 77), bias=True)._replace(x=x, bias=-x[0])
    for scaling in (Current(), Blockwise(), Blockwise(square=True)):
        out = unrounded(x, scaling)
        each.run(scaling, out)
        assert not out.rowwise.any()
        for inverse in (out.rowwise_scale_inv, out.columnwise_scale_inv):
            assert inverse[inverse != 0].unique().tolist() == [1.0]
    return {}


@triton.jit
def _scales(amax, scale, inverse, epsilon, EXPONENT: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    lane = tl.arange(0, 64)
    found, inverted = scale_of(tl.load(amax + lane), epsilon, EXPONENT, POWER_OF_TWO)
    tl.store(scale + lane, found)
    tl.store(inverse + lane, inverted)


def scales_at_the_edges() -> dict[str, float]:
    """Against a float32 division whose digits are cut off; subnormal and largest maxima too."""
    one = torch.tensor([2.0**e for e in (-149, -140, -127, -126, -119, -118, -112, -1, 0, 9, 127)])
    huge = torch.tensor(torch.finfo(torch.float32).max)
    edge = 1.75 * one[3:]
    amax = torch.cat(
        [
            one,
            edge,
            torch.nextafter(edge, huge),
            torch.nextafter(edge, -huge),
            torch.tensor([0.0, math.inf, math.nan, 448.0, 57344.0]),
            huge[None],
        ]
    )
    amax = F.pad(amax, (0, 64 - amax.numel()), value=1.0)
    for dtype, exponent in ((E4M3, 8), (E5M2, 15)):
        for epsilon in (0.0, 1e-3):
            for power_of_two in (False, True):
                scale, inverse = torch.empty(2, 64, device=DEVICE)
                _scales[(1,)](
                    amax.to(DEVICE),
                    scale,
                    inverse,
                    epsilon,
                    EXPONENT=exponent,
                    POWER_OF_TWO=power_of_two,
                )
                floor = torch.tensor(epsilon)
                raised = torch.where(amax >= floor, amax, floor)
                want = (largest(dtype).cpu() / raised).clamp(max=huge)
                if power_of_two:
                    want = (want.view(torch.int32) & 0x7F800000).view(torch.float32)
                want = torch.where((raised == 0) | raised.isinf(), 1.0, want)
                assert torch.equal(scale.cpu(), want)
                assert torch.equal(inverse.cpu(), 1 / want)
                assert inverse.isfinite().all()
                assert (inverse > 0).all()
    return {"maxima": 8 * 64}


def bytes_are_packed_in_order() -> dict[str, float]:
    """FP8 storage: the same bytes by rows and transposed, as words (M % 4 == 0) and singly."""
    for shape in ((128, 64), (48, 80), (52, 77), (51, 77)):
        for dtype in (E4M3, E5M2):
            scale = torch.tensor([20.0], device=DEVICE)
            each = case(shape, backward=dtype == E5M2)
            for scaling in (Delayed(scale, dtype), Blockwise(dtype, square=True)):
                out = allocate(each.x, scaling)
                out.rowwise.view(torch.uint8).fill_(0xAA)
                out.columnwise.view(torch.uint8).fill_(0x55)
                each.run(scaling, out)
                check_transpose(out)
                if isinstance(scaling, Delayed):
                    value = out.rowwise.double() / scale.double()
                    error = (value - each.exact).abs().median()
                    assert error < 0.1 * each.exact.abs().median(), "not the values at all"
    return {}


def what_is_left_out_changes_nothing() -> dict[str, float]:
    """Rowwise alone and columnwise alone are what they are together."""
    for each in (case((128, 64)), case((51, 77), backward=True)):
        for scaling in (Delayed(torch.tensor([20.0], device=DEVICE)), Current(), Blockwise()):
            both = unrounded(each.x, scaling)
            sums = each.run(scaling, both)
            for gone in ("rowwise", "columnwise"):
                part = unrounded(each.x, scaling)
                part = part._replace(**{gone: None, f"{gone}_scale_inv": None})
                assert all(map(torch.equal, each.run(scaling, part), sums))
                for one, other in zip(part, both, strict=True):
                    assert one is None or torch.equal(one, other)
    return {}


def the_same_bits_again() -> dict[str, float]:
    for backward in (False, True):
        each = case((51, 77), backward=backward)
        for scaling in (Current(), Blockwise()):
            runs = []
            for _ in range(2):
                out = unrounded(each.x, scaling)
                sums = each.run(scaling, out)
                runs.append([t for t in (*out, *sums) if t is not None])
            assert all(map(torch.equal, *runs))
    return {}


def nothing_to_compute() -> dict[str, float]:
    for shape in ((0, 64), (64, 0)):
        each = case(shape, backward=True, x=torch.empty(shape))
        for scaling in (Delayed(torch.tensor([4.0], device=DEVICE)), Current(), Blockwise()):
            out = allocate(each.x, scaling)
            sums = each.run(scaling, out)
            assert [total.item() for total in sums] == [0, 0]
            if not isinstance(scaling, Blockwise):
                assert out.amax.item() == 0
                assert out.rowwise_scale_inv.item() == (0.25 if isinstance(scaling, Delayed) else 1)
    return {}


def bytes_are_torchs_cast() -> dict[str, float]:
    """A GPU's own rounding and saturation (the interpreter's are not these)."""
    elements = 0
    for shape in ((512, 512), (131, 77)):
        for dtype in (E4M3, E5M2):
            each = case(shape, x=40 * torch.randn(shape), backward=dtype == E5M2)
            for scaling in (
                Delayed(torch.tensor([3.0], device=DEVICE), dtype),
                Current(dtype),
                Blockwise(dtype),
                Blockwise(dtype, square=True),
            ):
                wide, out = unrounded(each.x, scaling), allocate(each.x, scaling)
                each.run(scaling, wide)
                each.run(scaling, out)
                for name in ("rowwise", "columnwise"):
                    got, want = getattr(out, name), getattr(wide, name).to(dtype)
                    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8)), name
                    elements += got.numel()
    return {"bytes": elements}


def wrong_tensors_are_refused() -> dict[str, float]:
    each = case((64, 32), bias=True, backward=True)
    current = Current()
    good = allocate(each.x, current)

    def refused(
        match: str, scaling: Scaling = current, out: Quantized = good, **changes: object
    ) -> None:
        with pytest.raises(ValueError, match=re.escape(match)):
            each._replace(**changes).run(scaling, out)

    refused("use .contiguous()", x=each.x.T.contiguous().T)
    refused("flatten", x=each.x[None])
    refused("x is torch.int64", x=each.x.long())
    refused("grad_y has shape (32, 64)", grad_y=each.grad_y.reshape(32, 64))
    refused("bias is torch.float32", bias=each.bias.float())
    refused("out.rowwise has shape", out=good._replace(rowwise=good.columnwise))
    refused("out.columnwise is torch.bfloat16", out=good._replace(columnwise=each.x.T.contiguous()))
    refused("out.amax is None", out=good._replace(amax=None))
    refused("scale is torch.float64", Delayed(torch.ones(1, dtype=torch.float64, device=DEVICE)))
    refused("scale has shape (2,)", Delayed(torch.ones(2, device=DEVICE)))
    refused("cannot be torch.bfloat16", Current(torch.bfloat16))
    refused("out.rowwise_scale_inv has shape", Blockwise())
    blocks = allocate(each.x, Blockwise())
    refused(
        "out.columnwise_scale_inv is None", Blockwise(), blocks._replace(columnwise_scale_inv=None)
    )
    return {}


def main(out: str, _device: str, *names: str) -> None:
    torch.set_num_threads(1)
    results = {}
    for name in names:
        try:
            results[name] = {"measured": globals()[name](), "error": None}
        except Exception:
            results[name] = {"measured": {}, "error": traceback.format_exc()}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
