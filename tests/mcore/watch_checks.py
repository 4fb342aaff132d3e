"""What the watch of FP8's outliers measures, against float64 by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_xielu.ops import fp8_reference
from megatron_xielu.ops.fp8_reference import Blockwise, Current, Delayed
from tests.mcore.te_checks import Fuser, recipe


def _kurtosis(x: Tensor) -> float:
    x = x.double()
    return float(x.pow(4).mean() / x.square().mean() ** 2)


def a_look_counts_what_a_tensor_has() -> dict[str, float]:
    from megatron_xielu.mcore.outliers import SUMS, Look

    x = torch.randn(33, 130, generator=torch.Generator().manual_seed(1)).bfloat16()
    # a value that drowns others, zeros of both signs, and a few that a given scale cannot hold
    y = torch.cat((x.float(), torch.tensor([[0.0, -0.0] * 65]))).bfloat16()
    y[0, 0] = 3e6
    scale = torch.tensor([448 / 2.0])
    measured = {}
    for scaling in (Delayed(scale), Current(), Blockwise()):
        look = Look()
        look.begin()
        look.see_input(x[:20])
        look.see_input(x[20:])
        parts = fp8_reference.quantize(y, scaling)
        look.see_output(y, parts, scaling)
        assert look.sums is not None
        assert look.amax is not None
        seen = dict(zip(SUMS, look.sums.tolist(), strict=True))
        kurtosis = seen["inputs"] * seen["fourths"] / seen["squares"] ** 2
        # float32 sums of 33 * 130 terms
        assert abs(kurtosis / _kurtosis(x) - 1) < 1e-4
        kept = fp8_reference.dequantize(parts.rowwise, parts.rowwise_scale_inv, scaling)
        lost = int(((y != 0) & (kept == 0)).sum())
        # 240 / 448 steps above 448 round to it without being saturated
        beyond = int((y.double().abs() * float(scale) > 464).sum())
        saturated = beyond if isinstance(scaling, Delayed) else 0
        assert (seen["written"], seen["flushed"], seen["saturated"]) == (
            y.numel(),
            lost,
            saturated,
        )
        assert look.amax.item() == y[0, 0].item()
        measured[type(scaling).__name__] = lost
    # an outlier drowns a tensor's small numbers, and in blocks only its neighbours
    assert measured["Current"] > 20 * measured["Blockwise"] > 0
    assert measured["Delayed"] < measured["Blockwise"]
    return measured


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


def a_step_that_is_not_looked_at_costs_nothing() -> dict[str, int]:
    from megatron_xielu.mcore.activation import ParallelXIELU, XIELUPlaceholder

    module = ParallelXIELU(
        XIELUPlaceholder(), torch.distributed.group.WORLD, sequence_parallel=False
    )
    bare = ParallelXIELU(XIELUPlaceholder(), torch.distributed.group.WORLD, sequence_parallel=False)
    # what it would be without a look
    bare.look = None
    x = torch.randn(4, 8)
    counts = {}
    for name, on in (("off", False), ("on", True)):
        module.look.on = on
        with _Count() as count:
            module(x)
        counts[name] = count.operations
    with _Count() as count:
        super(ParallelXIELU, bare).forward(x)
    assert counts["off"] == count.operations < counts["on"]
    return counts


def transformer_engine_looks_at_what_it_writes() -> dict[str, list[float]]:
    """The fused operation's own bytes, for the three recipes, with and without recomputation."""
    from megatron_xielu.mcore.outliers import SUMS

    measured = {}
    for name in ("delayed", "tensorwise", "blockwise"):
        for recompute in (False, True):
            fuser = Fuser(recipe(name), recompute=recompute)
            with torch.no_grad():
                fuser.fc1.weight[5] *= 300
            # unwatched first: no sums, and delayed scaling has a history
            fuser.run()
            assert fuser.activation.look.sums is None
            fuser.activation.look.begin()
            fuser.run()
            look = fuser.activation.look
            look.on = False
            found, exact = fuser.between(), fuser.exact()
            x, y = found["x"], exact["y"]
            seen = dict(zip(SUMS, look.sums.tolist(), strict=True))
            assert (seen["inputs"], seen["written"]) == (x.numel(), y.numel())
            kurtosis = seen["inputs"] * seen["fourths"] / seen["squares"] ** 2
            assert abs(kurtosis / _kurtosis(x) - 1) < 1e-3
            assert abs(look.amax.item() / y.abs().max().item() - 1) < 2**-7
            flushed = seen["flushed"] / seen["written"]
            # tensors lose what is 2^-10 / 448 of the largest, or less; a rounding may decide
            limit = y.abs().max() / 448 * 2**-10
            if name != "blockwise":
                expected = float(((y.abs() <= limit) & (y != 0)).double().mean())
                assert abs(flushed - expected) < 0.01, (flushed, expected)
                assert flushed > 0.1
            assert seen["saturated"] == 0
            measured[f"{name}{', recomputed' if recompute else ''}"] = [kurtosis, flushed]
    assert measured["blockwise"][1] < measured["tensorwise"][1]
    return measured


def a_layer_that_cannot_leave_fp8_ends_every_rank() -> None:
    """One stage has the layer, and the others would wait for it."""
    from megatron_xielu.errors import SharedUserError, UserError
    from megatron_xielu.mcore import fp8_watch

    def refuse(mlp: None) -> None:
        raise UserError("fp8.fused")

    rank = torch.distributed.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_watch, "mlps", lambda model: [(rank + 1, None)])
        patch.setattr(fp8_watch, "keep_in_bf16", refuse)
        watch = fp8_watch.Watch(fp8_watch.WatchSettings(), listener=None, record=None)  # type: ignore[arg-type]
        watch._keep_in_bf16([], [3])
        with pytest.raises(SharedUserError, match=r"fp8\.fused"):
            watch._keep_in_bf16([], [2])


def transformer_engine_takes_a_layer_out_of_fp8() -> None:
    """fc2 of a fused MLP in mid-run: the next forward pass has no FP8 for it."""
    from transformer_engine.pytorch.ops import BasicLinear

    from megatron_xielu.mcore import delayed_scaling
    from megatron_xielu.mcore.fp8_watch import keep_in_bf16, mlps
    from megatron_xielu.mcore.te_fused_mlp import HighPrecisionLinear
    from tests.mcore.te_checks import fp8_model, states_of

    delayed_scaling.save_as_numbers()
    model = fp8_model(fused=True)
    (number, mlp), *others = mlps([model])
    assert number == 1
    before = mlp._fused_impl
    for _, state in states_of(model):
        state.amax_history.uniform_(1, 2)
    keep_in_bf16(mlp)
    assert mlp._fused_impl is None
    assert before is not None
    fc1, fc2 = (op for op in mlp._make_fused_impl() if isinstance(op, BasicLinear))
    assert isinstance(fc2, HighPrecisionLinear)
    assert not isinstance(fc1, HighPrecisionLinear)
    # the history of fc1 went over
    old, _ = (op for op in before[0] if isinstance(op, BasicLinear))
    states = [op._fp8_metas["forward"]["scaling_fwd"] for op in (old, fc1)]
    assert states[0].amax_history.equal(states[1].amax_history)
    for _, other in others:
        assert other.activation_func.fc2_input == "fp8"
