"""Our FP8 in plain torch beside what TransformerEngine has in Python, which needs no GPU.

It leaves to its kernels: the values of blocks, saturation and infinite maxima.
"""

from __future__ import annotations

from typing import Any

import torch
from transformer_engine.common.recipe import DelayedScaling
from transformer_engine.pytorch.custom_recipes.reference_current_scaling import (
    CurrentScalingQuantizerRef,
)
from transformer_engine.pytorch.quantization import _amax_and_scale_update
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockQuantizer
from transformer_engine.pytorch.tensor.float8_tensor import tex

from megatron_xielu.ops.fp8_reference import LARGEST, Blockwise, Current, DelayedScale, quantize


def current_scaling() -> int:
    """Bytes and scales of tensors of all sizes of numbers; returns how many bytes."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    for dtype in LARGEST:
        for power_of_two in (False, True):
            for exponent in range(-30, 31, 5):
                x = torch.randn(33, 70, generator=generator) * 2.0**exponent
                for given in (x, x.bfloat16(), torch.zeros(2, 3)):
                    ours = quantize(given, Current(dtype, power_of_two, epsilon=1e-9))
                    theirs = CurrentScalingQuantizerRef(
                        dtype, pow_2_scales=power_of_two, eps=1e-9
                    )._quantize(given)
                    found = (ours.rowwise, ours.rowwise_scale_inv, ours.columnwise)
                    for one, other in zip(found, theirs, strict=False):
                        assert one is not None
                        width = torch.uint8 if one.itemsize == 1 else torch.int32
                        assert torch.equal(one.view(width), other.view(width))
                    count += given.numel()
    return count


def delayed_scaling() -> int:
    """Scales and histories over amaxes that grow, shrink, vanish and overflow."""
    amaxes = [3.0, 5.0, 0.0, 1e-3, 1e-42, 0.7, float("inf"), 2.0, 9.0, 0.0, 0.0, 0.0, 0.1] * 2
    count = 0
    algorithm: Any
    for dtype, largest in LARGEST.items():
        for algorithm in ("max", "most_recent"):
            for length in (1, 2, 5, 1024):
                for margin in (0, 2):
                    recipe = DelayedScaling(
                        margin=margin, amax_history_len=length, amax_compute_algo=algorithm
                    )
                    history, scale = torch.zeros(length, 1), torch.ones(1)
                    # a tensor is divided, as in its fused kernel; a number would be multiplied by
                    # a rounded reciprocal
                    limit: Any = torch.tensor([largest])
                    ours = DelayedScale(dtype, length=length, algorithm=algorithm, margin=margin)
                    for amax in amaxes:
                        history[0] = amax
                        ours.record(torch.tensor([amax]))
                        _amax_and_scale_update(history, scale, limit, recipe)
                        ours.update()
                        assert torch.equal(ours.scale, scale), (algorithm, length, margin, amax)
                        assert torch.equal(ours.amaxes, history[:, 0])
                        count += 1
    return count


def shapes_of_blocks() -> int:
    """How scale_inv lies in both orientations; the defaults are powers of two and no epsilon."""
    count = 0
    for square in (False, True):
        theirs = Float8BlockQuantizer(
            tex.DType.kFloat8E4M3,
            rowwise=True,
            columnwise=True,
            block_scaling_dim=1 + square,
        )
        scaling = Blockwise(square=square)
        assert theirs.force_pow_2_scales == scaling.power_of_two
        assert theirs.amax_epsilon == scaling.epsilon
        for shape in ((3, 130), (130, 260), (128, 128), (1, 1), (1025, 77)):
            ours = quantize(torch.ones(shape), scaling)
            for found, columnwise in (
                (ours.rowwise_scale_inv, False),
                (ours.columnwise_scale_inv, True),
            ):
                assert found is not None
                assert tuple(found.shape) == tuple(theirs.get_scale_shape(shape, columnwise))
                count += 1
    return count


if __name__ == "__main__":
    print(f"current scaling: {current_scaling()} bytes equal")
    print(f"delayed scaling: {delayed_scaling()} scales equal")
    print(f"blocks: {shapes_of_blocks()} shapes equal")
