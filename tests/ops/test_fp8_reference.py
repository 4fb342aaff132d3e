"""FP8 in plain torch, against tables and numbers worked out by hand, and TransformerEngine."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_xielu.ops.fp8_reference import (
    LARGEST,
    Blockwise,
    Current,
    Delayed,
    DelayedScale,
    Scaling,
    amax_of,
    block_scales,
    dequantize,
    quantize,
    rounded,
    scale_of,
)
from tests.ranks import environment

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2])
MODES: tuple[Scaling, ...] = (
    Delayed(torch.tensor([3.0])),
    Current(),
    Current(power_of_two=True),
    Blockwise(),
    Blockwise(square=True),
    Blockwise(power_of_two=False),
)


def table(dtype: torch.dtype) -> Tensor:
    """The finite values of a format that are not negative, in the order of their bytes."""
    values = torch.arange(128, dtype=torch.uint8).view(dtype).float()
    return values[values.isfinite()]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))


@FORMATS
def test_rounding_is_to_nearest_and_ties_go_to_the_even_byte(dtype: torch.dtype) -> None:
    values = table(dtype)
    assert values[-1] == LARGEST[dtype]
    below, above = values[:-1], values[1:]
    middle = (below + above) / 2
    even = torch.arange(len(below)) % 2 == 0
    cases = {
        "itself": (values, values),
        "a tie": (middle, torch.where(even, below, above)),
        "below a tie": (middle.nextafter(below), below),
        "above a tie": (middle.nextafter(above), above),
    }
    for what, (given, want) in cases.items():
        for sign in (1, -1):
            got = rounded(sign * given, dtype)
            assert torch.equal(got.view(torch.uint8), (sign * want).to(dtype).view(torch.uint8)), (
                what
            )
    print(f"{dtype}: {8 * len(values) - 6} numbers")


@FORMATS
def test_what_is_too_large_saturates_and_nan_stays(dtype: torch.dtype) -> None:
    largest = LARGEST[dtype]
    given = torch.tensor([largest * 1.01, largest * 2, 3e38, math.inf, -math.inf, math.nan, -0.0])
    got = rounded(given, dtype).float()
    assert got[:4].tolist() == [largest] * 4
    assert got[4] == -largest
    assert got[5].isnan()
    assert math.copysign(1, got[6]) == -1


def test_scales_by_hand() -> None:
    amax = torch.tensor([448.0, 3.0, 0.0, math.inf, math.nan, 1e-40])
    assert scale_of(amax, Current()).tolist() == [
        1.0,
        float(torch.tensor(448.0) / torch.tensor(3.0)),
        1.0,
        1.0,
        1.0,
        torch.finfo(torch.float32).max,
    ]
    # rounded down to a power of two: 448 / 3 = 149.33
    powers = scale_of(amax, Current(power_of_two=True))
    assert powers.tolist() == [1.0, 128.0, 1.0, 1.0, 1.0, 2.0**127]
    raised = scale_of(amax, Current(E5M2, epsilon=14.0))
    assert raised.tolist() == [128.0, 4096.0, 4096.0, 1.0, 4096.0, 4096.0]


def test_amax_does_not_count_nan() -> None:
    assert amax_of(torch.tensor([1.0, -3.0, math.nan])).tolist() == [3.0]
    assert amax_of(torch.tensor([1.0, -math.inf, math.nan])).tolist() == [math.inf]
    assert amax_of(torch.tensor([math.nan])).tolist() == [0.0]
    assert amax_of(torch.empty(0, 5)).tolist() == [0.0]


def test_one_scale_per_tensor_by_hand() -> None:
    x = torch.tensor([[1.0, -2.0, 0.3], [0.0, 500.0, math.inf]])
    found = quantize(x, Delayed(torch.tensor([2.0])))
    assert found.rowwise is not None
    assert found.columnwise is not None
    # 0.6 lies between 0.5625 and 0.625, each 1/16 apart
    assert found.rowwise.float().tolist() == [[2.0, -4.0, 0.625], [0.0, 448.0, 448.0]]
    assert torch.equal(found.columnwise.float(), found.rowwise.float().T)
    assert found.rowwise_scale_inv == found.columnwise_scale_inv == 0.5
    assert found.amax == math.inf
    exact = quantize(x[:1], Current())
    assert exact.rowwise_scale_inv == 1 / torch.tensor(224.0)
    assert exact.amax == 2.0
    assert exact.rowwise is not None
    assert exact.rowwise.float().tolist() == [[224.0, -448.0, 64.0]]


def test_ragged_blocks_by_hand() -> None:
    """Three rows of a whole block and two more columns."""
    x = torch.zeros(3, 130)
    x[0, 5], x[0, 129] = 7.0, 0.875
    x[1, 127], x[1, 128] = -3.5, 448.0
    by_row, inverse = block_scales(x, Blockwise())
    # 448 / 7 = 64, 448 / 0.875 = 512, 448 / 3.5 = 128; a block of zeros has 1
    assert by_row[:, 0].tolist() == [64.0, 128.0, 1.0]
    assert by_row[:, 129].tolist() == [512.0, 1.0, 1.0]
    # [B(K), P(M)]
    assert inverse.tolist() == [[1 / 64, 1 / 128, 1, 0], [1 / 512, 1, 1, 0]]
    found = quantize(x, Blockwise())
    assert found.rowwise_scale_inv is not None
    assert torch.equal(found.rowwise_scale_inv, inverse)
    assert found.columnwise_scale_inv is not None
    # [B(M), P(K)]: a column's block has its three rows
    assert found.columnwise_scale_inv.shape == (1, 132)
    assert found.columnwise_scale_inv[0, [5, 127, 128, 129, 130]].tolist() == [
        *(1 / 64, 1 / 128, 1.0, 1 / 512),
        0.0,
    ]
    assert found.columnwise is not None
    assert found.columnwise.shape == (130, 3)
    assert found.columnwise[5].float().tolist() == [448.0, 0.0, 0.0]


def test_ragged_square_blocks_by_hand() -> None:
    x = torch.zeros(130, 260)
    x[0, 0], x[127, 127], x[128, 259], x[129, 128] = 1.75, -7.0, 3.5, 14.0
    found = quantize(x, Blockwise(square=True))
    # [B(M), P(B(K))] and, transposed, [B(K), P(B(M))]
    by_row = [[1 / 64, 1, 1, 0], [1, 1 / 32, 1 / 128, 0]]
    assert found.rowwise_scale_inv is not None
    assert found.rowwise_scale_inv.tolist() == by_row
    assert found.columnwise_scale_inv is not None
    assert found.columnwise_scale_inv.tolist() == [
        [1 / 64, 1, 0, 0],
        [1, 1 / 32, 0, 0],
        [1, 1 / 128, 0, 0],
    ]
    assert found.rowwise is not None
    assert found.columnwise is not None
    assert torch.equal(found.rowwise.view(torch.uint8), found.columnwise.view(torch.uint8).T)
    assert found.rowwise[0, 0].float() == 1.75 * 64


@pytest.mark.parametrize("scaling", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_come_back_within_half_a_step_and_again_the_same(
    scaling: Scaling, dtype: torch.dtype
) -> None:
    x = normal(131, 300).to(dtype)
    found = quantize(x, scaling)
    for data, scale_inv, given in (
        (found.rowwise, found.rowwise_scale_inv, x),
        (found.columnwise, found.columnwise_scale_inv, x.T),
    ):
        assert data is not None
        assert scale_inv is not None
        back = dequantize(data, scale_inv, scaling)
        # e4m3: half a step of a normal number is at most 2^-4 of it; of a subnormal one, 2^-10
        # before scaling, where the smallest scale here is 3
        bound = given.double().abs() * 2**-4 * (1 + 1e-6) + 2**-10 / 3
        assert ((back.double() - given.double()).abs() <= bound).all()
    assert found.rowwise is not None
    assert found.rowwise_scale_inv is not None
    back = dequantize(found.rowwise, found.rowwise_scale_inv, scaling)
    again = quantize(back, scaling)
    assert again.rowwise is not None
    assert again.rowwise_scale_inv is not None
    if scaling.power_of_two:
        # a maximum that was rounded down to one leaves room for twice the scale: other bytes
        assert torch.equal(dequantize(again.rowwise, again.rowwise_scale_inv, scaling), back)
    else:
        assert torch.equal(again.rowwise.view(torch.uint8), found.rowwise.view(torch.uint8))


@pytest.mark.parametrize("scaling", MODES, ids=str)
def test_one_orientation_alone_is_that_of_both(scaling: Scaling) -> None:
    x = normal(50, 140)
    both = quantize(x, scaling)
    for gone in ("rowwise", "columnwise"):
        part = quantize(x, scaling, **{gone: False})
        for name, tensor in part._asdict().items():
            assert (tensor is None) == (
                name.startswith(gone) or (name == "amax" and both.amax is None)
            )
            if tensor is not None:
                want = getattr(both, name)
                width = torch.uint8 if tensor.itemsize == 1 else torch.int32
                assert torch.equal(tensor.view(width), want.view(width))


def test_delayed_scale_by_hand() -> None:
    scale = DelayedScale(E4M3, length=2)
    assert scale.scale == 1
    # two micro-batches of one step, then an update: 448 / 14
    scale.record(torch.tensor([14.0]))
    scale.record(torch.tensor([7.0]))
    assert scale.scale == 1
    scale.update()
    assert scale.scale == 32
    # the larger of 3.5 and 14, which is remembered for one more update
    scale.record(torch.tensor([3.5]))
    scale.update()
    assert scale.scale == 32
    scale.record(torch.tensor([1.75]))
    scale.update()
    assert scale.scale == 128
    # nothing recorded: 1.75 is the largest
    scale.update()
    assert scale.scale == 256
    # nothing at all, and an amax that is no number to divide by
    scale.update()
    assert scale.scale == 256
    scale.record(torch.tensor([math.inf]))
    scale.update()
    assert scale.scale == 256


def test_delayed_scale_settings_by_hand() -> None:
    latest = DelayedScale(E5M2, algorithm="most_recent", margin=1)
    for amax in (7.0, 1.75):
        latest.record(torch.tensor([amax]))
        latest.update()
    assert latest.scale == 57344 / 1.75 / 2
    shortest = DelayedScale(E4M3, length=1)
    for amax in (448.0, 1e-40):
        shortest.record(torch.tensor([amax]))
        shortest.update()
    assert shortest.scale == torch.finfo(torch.float32).max


@pytest.mark.te
def test_it_is_what_transformer_engines_python_computes() -> None:
    """In a process of its own, because Megatron uses TransformerEngine wherever it is imported."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("TransformerEngine is not installed")
    program = Path(__file__).with_name("fp8_beside_transformer_engine.py")
    done = subprocess.run(
        [sys.executable, str(program)],
        env=environment(NVTE_TORCH_COMPILE=0),
        capture_output=True,
        text=True,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
