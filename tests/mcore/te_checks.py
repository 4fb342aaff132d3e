"""xIELU between the linears of TransformerEngine's operation fuser, on a CPU (TRITON_INTERPRET=1).

TransformerEngine's own fuser, linears, recipes, quantizers and tensors run. Stood in for are what
needs a GPU: the GEMM, the cast that a quantizer launches and the allocation that asks the driver,
by float64 and ops/fp8_reference.py; and the last rounding to FP8, which the interpreter of
Triton does not do as GPUs do.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from megatron_xielu.ops import fp8_reference
from megatron_xielu.ops.fp8_reference import (
    BLOCK,
    Blockwise,
    Current,
    Delayed,
    Scaling,
    amax_of,
    block_scales,
    scale_of,
)
from megatron_xielu.ops.reference import REFERENCES
from megatron_xielu.ops.saved_input import pack, unpack
from megatron_xielu.ops.triton import quantized
from tests.ops.triton_quantized_interpreted import EPS, compare, fp8

# neither tokens nor columns are multiples of a block
TOKENS, HIDDEN, FFN = (17, 8), 32, 144
BETA = 0.5
RECIPES = ("delayed", "tensorwise", "blockwise")
Operand = Literal["input", "weight", "grad_output"]
"""What a linear casts."""


class Gemm(NamedTuple):
    """One product that a linear asked for."""

    layout: str
    a: Any
    b: Any
    result: Tensor


class Fuser:
    """fc1, xIELU and fc2, with what passed between them."""

    def __init__(self, recipe: Any, **settings: Any) -> None:
        from transformer_engine.pytorch import ops
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager

        from megatron_xielu.mcore.activation import ParallelXIELU, XIELUPlaceholder
        from megatron_xielu.mcore.te_fused_mlp import HighPrecisionLinear, XIELUOp

        torch.manual_seed(1)
        # it would go on updating the scales of earlier ones
        FP8GlobalStateManager.reset()
        self.recipe = recipe
        self.gemms: list[Gemm] = []
        self.cast: list[Any] = []
        self.held = 0
        half = {"device": "cpu", "dtype": torch.bfloat16}
        self.activation = ParallelXIELU(
            XIELUPlaceholder(**settings), torch.distributed.group.WORLD, sequence_parallel=False
        )
        self.fc1 = ops.BasicLinear(HIDDEN, FFN, **half)
        self.fc2 = ops.BasicLinear(FFN, HIDDEN, **half)
        with torch.no_grad():
            # so that xIELU's input covers both sides of zero
            self.fc1.weight.copy_(0.5 * torch.randn(FFN, HIDDEN))
            self.activation.alpha_p.fill_(0.3)
            self.activation.alpha_n.fill_(-0.4)
        self.xielu = XIELUOp(self.activation)
        if self.activation.fc2_input == "bf16":
            self.fc2.__class__ = HighPrecisionLinear
        self.mlp = ops.Sequential(self.fc1, self.xielu, self.fc2)
        self.x = torch.randn(*TOKENS, HIDDEN).bfloat16().requires_grad_()
        self.grad_output = torch.randn(*TOKENS, HIDDEN).bfloat16()
        self.elements = TOKENS[0] * TOKENS[1] * FFN

    def run(self) -> None:
        """Forward and backward, afresh."""
        import transformer_engine.pytorch as te

        self.gemms.clear()
        self.cast.clear()
        self.held = 0

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() == self.elements:
                self.held += tensor.nbytes
            return tensor

        self.mlp.zero_grad()
        self.x.grad = None
        with stood_in(self):
            with (
                te.autocast(enabled=self.recipe is not None, recipe=self.recipe),
                torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            ):
                y = self.mlp(self.x)
            y.backward(self.grad_output)

    def quantizer(self, linear: Any, operand: Operand) -> Any:
        """What one of both linears casts an operand with."""
        if operand == "grad_output":
            return linear.get_quantizer("backward", 0)
        return linear.get_quantizer("forward", ("input", "weight").index(operand))

    def cast_by(self, quantizer: Any, tensor: Tensor) -> Any:
        """What a quantizer that is called returns."""
        return by_oracle(self, quantizer, tensor)

    def grads(self) -> dict[str, Tensor]:
        """Of the parameters and the input."""
        named = {name: parameter.grad for name, parameter in self.mlp.named_parameters()}
        return {**named, "x": self.x.grad}

    def between(self) -> dict[str, Any]:
        """By name: x and y of xIELU and their gradients, as the linears gave or took them."""
        forward1, forward2, *rest = self.gemms
        assert [gemm.layout for gemm in self.gemms] == ["TN", "TN", "NN", "NT", "NN", "NT"]
        return {
            "x": forward1.result,
            "y": forward2.b,
            "grad_y": rest[0].result,
            "grad_x": rest[2].b,
        }

    def exact(self) -> dict[str, Any]:
        """What they should be, in float64, as matrices, with the gradients of the alphas."""
        found = self.between()
        alphas = [alpha.detach().double().requires_grad_() for alpha in self.xielu.alphas]
        x = unpack(pack(found["x"], self.activation.saved_input), torch.bfloat16)
        x = x.double().flatten(0, -2).requires_grad_()
        y = REFERENCES["xielu"](x, *alphas, BETA)
        grad_y = found["grad_y"].double().flatten(0, -2)
        grad_x, *grads = torch.autograd.grad(y, (x, *alphas), grad_y)
        return {"y": y.detach(), "grad_x": grad_x, "alphas": grads}


@contextmanager
def stood_in(fuser: Any) -> Iterator[None]:
    from transformer_engine.pytorch import quantization, utils
    from transformer_engine.pytorch import tensor as te_tensor
    from transformer_engine.pytorch.module import linear
    from transformer_engine.pytorch.ops.basic import basic_linear
    from transformer_engine.pytorch.tensor.storage import (
        float8_blockwise_tensor_storage,
        float8_tensor_storage,
    )

    def gemm(a: Any, b: Any, *, out_dtype: Any, layout: str = "TN", **_: Any) -> tuple[Any, ...]:
        # FP8 multiplies along the contiguous dimension, which decides the data that is read
        first, second = plain(a, by_row=layout == "TN"), plain(b, by_row=layout != "NT")
        if layout == "NT":
            result = second.T @ first
        else:
            result = (second @ (first.T if layout == "TN" else first)).unflatten(0, TOKENS)
        result = result.to(out_dtype)
        fuser.gemms.append(Gemm(layout, snapshot(a), snapshot(b), result.clone()))
        return result, None, None, None

    def quantize(quantizer: Any, tensor: Tensor) -> Any:
        fuser.cast.append(quantizer)
        return fuser.cast_by(quantizer, tensor)

    kinds = (
        te_tensor.Float8Quantizer,
        te_tensor.Float8CurrentScalingQuantizer,
        te_tensor.Float8BlockQuantizer,
    )
    with ExitStack() as stack:
        enter = stack.enter_context
        for user in (basic_linear, linear):
            enter(patch.object(user, "general_gemm", gemm))
        for module in (utils, float8_tensor_storage, float8_blockwise_tensor_storage):
            # what is put in the place of data that is let go is on the GPU
            enter(patch.object(module, "_empty_tensor", torch.Tensor))
        for kind in kinds:
            enter(patch.object(kind, "quantize_impl", quantize))
        for kind in kinds[:2]:
            enter(patch.object(kind, "make_empty", make_empty))
        enter(patch.object(quantization, "_FP8_SUPPORT", (True, "")))
        enter(patch.object(quantization, "_FP8_BLOCK_SCALING_SUPPORT", (True, "")))
        # TransformerEngine's update of scales in torch
        enter(patch.dict(os.environ, NVTE_UNFUSED_FP8_UPDATE="1"))
        for name in ("forward", "backward"):
            enter(patch.object(quantized, name, rounded_in_torch(getattr(quantized, name))))
        yield


def plain(tensor: Any, *, by_row: bool) -> Tensor:
    """A matrix in float64, from the one of its two copies that is named."""
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor.detach().double().flatten(0, -2)
    by_row_data, by_column_data, scale_inv, scale_inv_t = parts(tensor)
    data, inverse = (by_row_data, scale_inv) if by_row else (by_column_data, scale_inv_t)
    assert data is not None, f"the {'rowwise' if by_row else 'columnwise'} data is missing"
    values = data.double()
    if inverse.numel() == 1:
        values = values * inverse.double()
    else:
        square = tensor._is_2D_scaled
        spread = (inverse if square else inverse.T).double().repeat_interleave(128, 1)
        if square:
            spread = spread.repeat_interleave(128, 0)
        values = values * spread[: values.shape[0], : values.shape[1]]
    return values if by_row else values.T


def parts(tensor: Any) -> tuple[Any, Any, Tensor, Tensor]:
    """FP8 data as matrices, by row and transposed, and what to multiply each with."""
    from transformer_engine.pytorch.constants import TE_DType_To_Torch

    dtype = TE_DType_To_Torch[tensor._fp8_dtype]
    if hasattr(tensor, "_data"):
        row, column = tensor._data, None if tensor._transpose_invalid else tensor._transpose
        inverses = tensor._scale_inv, tensor._scale_inv
    else:
        row, column = tensor._rowwise_data, tensor._columnwise_data
        inverses = tensor._rowwise_scale_inv, tensor._columnwise_scale_inv
    row = None if row is None else row.view(dtype).flatten(0, -2)
    column = None if column is None else column.view(dtype).flatten(1)
    return row, column, *inverses


def snapshot(tensor: Any) -> Any:
    """A copy: the linears drop data that they no longer need."""
    if not hasattr(tensor, "_fp8_dtype"):
        return tensor.detach().clone()
    copied = [None if part is None else part.clone() for part in parts(tensor)]
    return type(tensor).__name__, copied


def make_empty(quantizer: Any, shape: Any, *, dtype: Any, device: Any) -> Any:
    """As a quantizer with one scale allocates on Hopper."""
    from transformer_engine.pytorch.tensor import Float8Tensor
    from transformer_engine.pytorch.tensor.storage.float8_tensor_storage import Float8TensorStorage

    data = torch.empty(*shape, dtype=torch.uint8)
    transpose = torch.empty(shape[-1], *shape[:-1], dtype=torch.uint8)
    kind, alone = Float8TensorStorage, {}
    if not quantizer.internal:
        kind, alone = Float8Tensor, {"shape": shape, "dtype": dtype, "device": device}
    return kind(
        **alone,
        data=data if quantizer.rowwise_usage else None,
        data_transpose=transpose if quantizer.columnwise_usage else None,
        fp8_scale_inv=torch.empty(1),
        fp8_dtype=quantizer.dtype,
        fake_dtype=dtype,
        quantizer=quantizer,
    )


def by_oracle(fuser: Any, quantizer: Any, tensor: Tensor) -> Any:
    """What one of a fuser's quantizers makes of a tensor [..., K], in the tensors it would return.

    The scaling is what the recipe says of the operand, whatever the quantizer is set to.
    """
    result = quantizer.make_empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    operands: tuple[Operand, ...] = ("input", "weight", "grad_output")
    (operand,) = {
        operand
        for linear, operand in itertools.product((fuser.fc1, fuser.fc2), operands)
        if fuser.quantizer(linear, operand) is quantizer
    }
    scaling = scaling_by(fuser.recipe, operand, quantizer)
    expected = fp8_reference.quantize(tensor.detach().flatten(0, -2), scaling)
    for own_part, part in zip(parts(result), expected, strict=False):
        if own_part is not None:
            assert part is not None
            own_part.copy_(part)
    if isinstance(scaling, Delayed):
        assert expected.amax is not None
        quantizer.amax.copy_(torch.maximum(quantizer.amax, expected.amax))
    return result


def scaling_by(recipe: Any, operand: Operand, quantizer: Any) -> Scaling:
    """What a recipe of TransformerEngine says of an operand; of delayed scaling's, with a state.

    The kernels get theirs from the quantizer's attributes.
    """
    from transformer_engine.common.recipe import Format

    short = recipe.fp8_format is Format.E4M3 or operand != "grad_output"
    dtype = torch.float8_e4m3fn if short else torch.float8_e5m2
    if recipe.delayed():
        return Delayed(quantizer.scale, dtype)
    options, block_dim = {
        "input": (recipe.fp8_quant_fwd_inp, "x_block_scaling_dim"),
        "weight": (recipe.fp8_quant_fwd_weight, "w_block_scaling_dim"),
        "grad_output": (recipe.fp8_quant_bwd_grad, "grad_block_scaling_dim"),
    }[operand]
    power_of_two, epsilon = options.power_2_scale, options.amax_epsilon
    if recipe.float8_current_scaling():
        return Current(dtype, power_of_two=power_of_two, epsilon=epsilon)
    square = getattr(recipe, block_dim) == 2
    return Blockwise(dtype, square=square, power_of_two=power_of_two, epsilon=epsilon)


def rounded_in_torch(kernel: Any) -> Any:
    """Our kernel, storing float32, with the rounding to FP8 that the interpreter gets wrong."""

    def run(*arguments: Any) -> Any:
        *rest, out = arguments
        wide = {
            name: torch.empty(data.shape)
            for name in ("rowwise", "columnwise")
            if (data := getattr(out, name)) is not None
        }
        result = kernel(*rest, out._replace(**wide))
        for name, values in wide.items():
            dtype = rest[-1].dtype
            getattr(out, name).view(dtype).copy_(fp8(values.double(), dtype).to(dtype))
        return result

    return run


def check_against_oracle(name: str, found: Any, exact: Tensor, scaling: Any) -> int:
    """Every byte, in both orientations; how many are only within float32 round-off of a tie."""
    _, (row, column, scale_inv, scale_inv_t) = found
    # the terms of xIELU and of its slope are a few times as large as their sum here
    slack = 16 * EPS * (exact.abs() + 1)
    off = 0
    for data, values, room, inverse in (
        (row, exact, slack, scale_inv),
        (column, exact.T, slack.T, scale_inv_t),
    ):
        if isinstance(scaling, Blockwise):
            scale, expected = block_scales(values, scaling)
            # powers of two follow from an amax without rounding
            rounding = 0 if scaling.power_of_two else 8 * EPS
            # the rest of a row aligns the next and is never read
            width = -(-values.shape[1] // BLOCK) if scaling.square else values.shape[0]
            torch.testing.assert_close(
                inverse.double()[:, :width],
                expected[:, :width],
                rtol=rounding,
                atol=0,
                msg=f"{name}: scales",
            )
            room = room + rounding * values.abs()
        elif isinstance(scaling, Delayed):
            assert torch.equal(inverse, 1 / scaling.scale.reshape(1)), f"{name}: scale"
            scale = scaling.scale.double()
        else:
            single = scale_of(amax_of(exact), scaling)
            torch.testing.assert_close(inverse.double(), 1 / single, rtol=8 * EPS, atol=0)
            scale, room = 1 / inverse.double(), room + 8 * EPS * values.abs()
        off += compare(data, values, room, scale, scaling.dtype)
    return off


def recipe(name: str) -> Any:
    from transformer_engine.common import recipe as recipes

    if name == "none":
        return None
    return {
        "delayed": recipes.DelayedScaling(fp8_format=recipes.Format.HYBRID),
        "tensorwise": recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID),
        "blockwise": recipes.Float8BlockScaling(fp8_format=recipes.Format.E4M3),
    }[name]


def recipe_with(name: str, **options: Any) -> Any:
    """A recipe with options that are not TransformerEngine's defaults."""
    changed = recipe(name)
    for option, value in options.items():
        assert hasattr(changed, option)
        setattr(changed, option, value)
    return changed


def transformer_engine_writes_fp8_between_the_linears() -> dict[str, float]:
    """What fc2 reads and what fc1's gradients are computed from, byte by byte, in each recipe."""
    counts: dict[str, float] = {}
    for name in RECIPES:
        fuser = Fuser(recipe(name))
        fuser.run()
        ours, scalings = written_by_us(fuser)
        if name == "delayed":
            # as a history of smaller tensors would have chosen them: some values saturate
            scalings = [
                Delayed(torch.tensor([scale]), scaling.dtype)
                for scaling, scale in zip(scalings, (31.3, 9000.0), strict=True)
            ]
            for quantizer, scaling in zip(ours, scalings, strict=True):
                quantizer.scale.copy_(scaling.scale[0])
            fuser.run()
        found, exact = fuser.between(), fuser.exact()
        assert not any(quantizer is own for quantizer in fuser.cast for own in ours)
        # x, both weights and the gradient of fc2's output are left to TransformerEngine
        assert len(fuser.cast) == 4
        off = 0
        for what, scaling in zip(("y", "grad_x"), scalings, strict=True):
            off += check_against_oracle(f"{name}: {what}", found[what], exact[what], scaling)
        if name == "delayed":
            states = fuser.fc2._fp8_metas["forward"], fuser.fc1._fp8_metas["backward"]
            for what, state, mode in zip(("y", "grad_x"), states, ("fwd", "bwd"), strict=True):
                history = state[f"scaling_{mode}"].amax_history[:, 0].double()
                (amax,) = amax_of(exact[what])
                # TransformerEngine moves the newest to the end
                torch.testing.assert_close(history[-1], amax, rtol=8 * EPS, atol=0)
        check_alphas(fuser, exact["alphas"])
        elements = 4 * exact["y"].numel()
        counts[f"{name}: bytes within round-off of a tie, of {elements}"] = off
        assert off <= 1e-3 * elements
        # the input of xIELU in bf16, and its output transposed in FP8
        held = fuser.held / fuser.elements
        counts[f"{name}: bytes held per element"] = held
        assert held == 3
    return counts


def written_by_us(fuser: Fuser) -> tuple[list[Any], list[Scaling]]:
    """The quantizers in whose place xIELU's output and gradient are written, and their scalings."""
    y, grad_x = fuser.quantizer(fuser.fc2, "input"), fuser.quantizer(fuser.fc1, "grad_output")
    scalings = [scaling_by(fuser.recipe, "input", y)]
    scalings.append(scaling_by(fuser.recipe, "grad_output", grad_x))
    return [y, grad_x], scalings


def transformer_engine_options_of_a_recipe_reach_the_kernels() -> dict[str, float]:
    """Powers of two, epsilon and the shape of blocks, of xIELU's output and of its gradient."""
    from transformer_engine.common.recipe import QParams

    # TransformerEngine 2.20's operations do not hand current scaling's epsilon to the quantizers
    powers, plain = QParams(power_2_scale=True), QParams(power_2_scale=False, amax_epsilon=12.0)
    squares = {"w_block_scaling_dim": 1}
    changes = {
        "tensorwise, y in powers of two": {"fp8_quant_fwd_inp": powers},
        "tensorwise, grad_x in powers of two": {"fp8_quant_bwd_grad": powers},
        "blockwise, y in any scale": {"fp8_quant_fwd_inp": plain},
        "blockwise, grad_x in any scale": {"fp8_quant_bwd_grad": plain},
        "blockwise, y in squares": {"x_block_scaling_dim": 2, **squares},
        "blockwise, grad_x in squares": {"grad_block_scaling_dim": 2, **squares},
    }
    counts = {}
    for title, options in changes.items():
        name = title.partition(",")[0]
        fuser = Fuser(recipe_with(name, **options))
        fuser.run()
        found, exact = fuser.between(), fuser.exact()
        _, scalings = written_by_us(fuser)
        for what, scaling in zip(("y", "grad_x"), scalings, strict=True):
            off = counts[f"{title}: {what}"] = check_against_oracle(
                title, found[what], exact[what], scaling
            )
            assert off <= 1e-3 * 2 * exact[what].numel()
    return counts


def transformer_engine_without_fp8_gets_bf16() -> dict[str, float]:
    fuser = Fuser(None)
    fuser.run()
    found, exact = fuser.between(), fuser.exact()
    assert not fuser.cast
    for what in ("y", "grad_x"):
        assert found[what].dtype == torch.bfloat16
        # rounded once
        torch.testing.assert_close(
            found[what].double().flatten(0, -2), exact[what], rtol=2**-8, atol=1e-6
        )
    check_alphas(fuser, exact["alphas"])
    held = fuser.held / fuser.elements
    assert held == 4
    return {"bytes held per element": held}


def transformer_engine_recomputes_to_the_same_bits() -> dict[str, float]:
    """The input of xIELU alone is held, and every gradient is as without recomputation."""
    held = {}
    for name in ("none", "delayed", "tensorwise", "blockwise"):
        results, output = [], []
        for recompute in (False, True):
            fuser = Fuser(recipe(name), recompute=recompute)
            fuser.run()
            results.append(fuser.grads())
            output.append(fuser.gemms[1].result)
            if name == "delayed":
                state = fuser.fc2._fp8_metas["forward"]["scaling_fwd"]
                results[-1] |= {"scale": state.scale, "history": state.amax_history.clone()}
                assert state.scale.ne(1).all()
        assert torch.equal(*output)
        kept, recomputed = results
        assert kept.keys() == recomputed.keys()
        assert not [key for key in kept if not torch.equal(kept[key], recomputed[key])]
        held[name] = fuser.held / fuser.elements
        assert held[name] == 2
    return held


def transformer_engine_holds_the_input_in_e4m3() -> dict[str, float]:
    """The output is as without, the gradients are those of what is held."""
    held = {}
    for name in ("none", "delayed", "tensorwise", "blockwise"):
        plain = Fuser(recipe(name))
        plain.run()
        for recompute in (False, True):
            fuser = Fuser(recipe(name), recompute=recompute, saved_input="e4m3")
            fuser.run()
            assert torch.equal(fuser.gemms[1].result, plain.gemms[1].result)
            exact = fuser.exact()
            check_alphas(fuser, exact["alphas"])
            if name == "none":
                # rounded once
                torch.testing.assert_close(
                    fuser.between()["grad_x"].double().flatten(0, -2),
                    exact["grad_x"],
                    rtol=2**-8,
                    atol=1e-6,
                )
            found = held[f"{name}, recompute={recompute}"] = fuser.held / fuser.elements
            assert found == 1 + (not recompute) * (2 if name == "none" else 1)
    return held


def transformer_engine_keeps_fc2_in_bf16() -> None:
    for recompute in (False, True):
        fuser = Fuser(recipe("blockwise"), fc2_input="bf16", recompute=recompute)
        fuser.run()
        found, exact = fuser.between(), fuser.exact()
        assert found["y"].dtype == torch.bfloat16
        # x, fc1's weight
        assert len(fuser.cast) == 2
        (_, (row, *_)) = found["grad_x"]
        assert row.dtype == torch.float8_e4m3fn
        check_alphas(fuser, exact["alphas"])


def transformer_engine_quantizers_of_other_kinds_work_by_themselves() -> None:
    """A quantizer that we have no kernel for gets bf16, and a warning says so."""
    from transformer_engine.pytorch.tensor import Float8CurrentScalingQuantizer

    class Custom(Float8CurrentScalingQuantizer):
        pass

    fuser = Fuser(recipe("tensorwise"))
    fuser.run()
    for linear, mode in ((fuser.fc2, "forward"), (fuser.fc1, "backward")):
        linear.get_quantizer(mode, 0).__class__ = Custom
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        fuser.run()
    (warning,) = said
    assert "no kernel that writes xIELU as a Custom does" in str(warning.message)
    # fc2's input and the gradient of fc1's output now too
    assert len(fuser.cast) == 6
    assert sum(type(quantizer) is Custom for quantizer in fuser.cast) == 2
    check_alphas(fuser, fuser.exact()["alphas"])

    fuser = Fuser(recipe("tensorwise"))
    fuser.run()
    fuser.fc2.get_quantizer("forward", 0).with_amax_reduction = True
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        fuser.run()
    (warning,) = said
    assert "the kernels do not exchange amaxes between ranks" in str(warning.message)
    # x, both weights and the gradient, and fc2's input now too
    assert len(fuser.cast) == 5


def transformer_engine_backward_in_high_precision_gets_bf16() -> None:
    from transformer_engine.common import recipe as recipes

    fuser = Fuser(recipes.Float8CurrentScaling(backward_override="high_precision"))
    fuser.run()
    found = fuser.between()
    assert isinstance(found["grad_x"], Tensor)
    assert found["grad_x"].dtype == torch.bfloat16
    own = fuser.fc2.get_quantizer("forward", 0)
    assert any(quantizer is own for quantizer in fuser.cast)


def transformer_engine_sums_alphas_over_tensor_parallel_ranks() -> None:
    """In bf16 and from what xIELU wrote in FP8, with fc2's input kept and made again."""
    rank = torch.distributed.get_rank()
    for name, recompute in itertools.product(("none", *RECIPES), (False, True)):
        fuser = Fuser(recipe(name), recompute=recompute)
        assert fuser.xielu.tp_group is not None
        with torch.no_grad():
            fuser.x.mul_(1 + rank)
        fuser.run()
        assert isinstance(fuser.between()["grad_x"], Tensor) == (name == "none")
        check_summed(f"{name}, recompute={recompute}", fuser.xielu.alphas, fuser.exact()["alphas"])


def check_summed(title: str, alphas: Any, alone: list[Tensor]) -> None:
    """The gradients of alphas are the sum of what each rank has alone, in float64."""
    exact = torch.stack([grad.reshape(()) for grad in alone])
    own = exact.clone()
    torch.distributed.all_reduce(exact)
    assert not torch.allclose(own, exact, rtol=1e-2), title
    found = torch.cat([alpha.grad for alpha in alphas])
    assert found.dtype == torch.float32
    torch.testing.assert_close(
        found.double(), exact, rtol=1e-5, atol=0, msg=lambda text: f"{title}: {text}"
    )


def check_alphas(fuser: Fuser, exact: list[Tensor]) -> None:
    for alpha, expected in zip(fuser.xielu.alphas, exact, strict=True):
        assert alpha.grad is not None
        assert alpha.grad.dtype == torch.float32
        torch.testing.assert_close(alpha.grad.double(), expected, rtol=1e-5, atol=0)


def transformer_engine_saves_delayed_scaling() -> dict[str, int]:
    """Scales and histories of plain and fused linears go through a checkpoint, without a pickle."""
    from megatron_xielu.mcore import delayed_scaling

    delayed_scaling.save_as_numbers()
    counts = {}
    with tempfile.TemporaryDirectory() as scratch, no_pickle_of_te():
        for number, (save_fused, load_fused) in enumerate(((1, 1), (1, 0), (0, 1))):
            folder = Path(scratch, str(number))
            folder.mkdir()
            torch.manual_seed(number)
            saved = fp8_model(fused=save_fused)
            for _, state in states_of(saved):
                state.scale.uniform_(1, 9)
                state.amax_history.uniform_(1, 9)
            dist_checkpointing_save(saved, folder)
            loaded = fp8_model(fused=load_fused, ready=False)
            dist_checkpointing_load(loaded, folder)
            expected, found = dict(states_of(saved)), dict(states_of(loaded))
            # 3 layers with 4 linears, forward and backward
            assert expected.keys() == found.keys()
            assert len(found) == 24
            for key, state in found.items():
                # an operation has no place for its output
                n = min(len(state.scale), len(expected[key].scale))
                assert torch.equal(state.scale[:n], expected[key].scale[:n])
                assert torch.equal(state.amax_history[:, :n], expected[key].amax_history[:, :n])
            counts[f"fused {save_fused} -> {load_fused}"] = len(found)
        # a run that goes on in bf16, and one with a shorter history
        plain = fp8_model(fused=False, ready=False, fp8=None)
        dist_checkpointing_load(plain, folder)
        assert not any("scaling_fwd" in linear.fp8_meta for linear in linears_of(plain))
        shorter = fp8_model(fused=False, ready=False, fp8_amax_history_len=3)
        dist_checkpointing_load(shorter, folder)
        for key, state in states_of(shorter):
            history = expected[key].amax_history
            assert torch.equal(state.amax_history, history[[0, -2, -1]])
    return counts


def fp8_model(*, fused: bool, ready: bool = True, **changes: Any) -> Any:
    """A model with delayed scaling; `ready` as after its first forward."""
    from megatron.core.fp8_utils import get_fp8_recipe

    from tests.mcore.checks import build, config

    fields = {
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "fp8": "hybrid",
        "fp8_recipe": "delayed",
    }
    fields |= {"fp8_amax_history_len": 5, "use_transformer_engine_op_fuser": bool(fused)}
    model = build(config(transformer_impl="transformer_engine", **(fields | changes)))
    if ready:
        recipe = get_fp8_recipe(model.config)
        for linear in linears_of(model):
            linear.fp8_meta["num_gemms"] = 1
            linear.init_fp8_meta_tensors(recipe)
        for op in operations_of(model):
            op.reset_recipe_state(recipe=recipe)
    return model


def linears_of(model: Any) -> list[Any]:
    return [
        linear
        for layer in model.decoder.layers
        for linear in (
            layer.self_attention.linear_qkv,
            layer.self_attention.linear_proj,
            layer.mlp.linear_fc1,
            layer.mlp.linear_fc2,
        )
    ]


def operations_of(model: Any) -> list[Any]:
    """The linears of fused MLPs, made as the first forward makes them."""
    from transformer_engine.pytorch.ops import BasicLinear

    from megatron_xielu.mcore.te_fused_mlp import XIELUFusedMLP

    found = []
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, XIELUFusedMLP):
            if layer.mlp._fused_impl is None:
                layer.mlp._fused_impl = (layer.mlp._make_fused_impl(),)
            found += [op for op in layer.mlp._fused_impl[0] if isinstance(op, BasicLinear)]
    return found


def states_of(model: Any) -> Iterator[tuple[str, Any]]:
    """By name, the state that computes: in fused MLPs that of the operations."""
    operations = operations_of(model)
    for number, linear in enumerate(linears_of(model)):
        metas = linear.fp8_meta
        if operations and number % 4 >= 2:
            own = operations[number // 4 * 2 + number % 4 - 2]._fp8_metas
            metas = {"scaling_fwd": own["forward"]["scaling_fwd"]}
            metas["scaling_bwd"] = own["backward"]["scaling_bwd"]
        for key in ("scaling_fwd", "scaling_bwd"):
            yield f"{number} {key}", metas[key]


def dist_checkpointing_save(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def dist_checkpointing_load(model: Any, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    state = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    model.load_state_dict(state)


@contextmanager
def no_pickle_of_te() -> Iterator[None]:
    from transformer_engine.pytorch.module import base

    def refuse(*_: Any) -> None:
        raise AssertionError("the state was pickled")

    with patch.object(base.pickle, "dumps", refuse), patch.object(base.pickle, "loads", refuse):
        yield


def share_one_step_off(one: Tensor | None, other: Tensor | None) -> float:
    """Of the bytes of two FP8 tensors of equal shape; 1 for a step of more, or where one lacks."""
    if one is None or other is None:
        return float(one is not other)
    steps = (one.view(torch.int8).int() - other.view(torch.int8).int()).abs()
    return 1.0 if steps.max() > 1 else float((steps > 0).float().mean())


def on_a_gpu_ours_is_what_the_quantizer_would_write() -> dict[str, float]:
    """Against TransformerEngine's own casts of xIELU, and of its gradient, in float32.

    The oracle of ops/fp8_reference.py stands beside both, so that a difference has an owner.
    """
    from transformer_engine.pytorch import ops
    from transformer_engine.pytorch.quantization import autocast

    from megatron_xielu.mcore.activation import ParallelXIELU, XIELUPlaceholder
    from megatron_xielu.mcore.te_fused_mlp import XIELUOp
    from megatron_xielu.mcore.te_quantizers import scaling_of

    counts: dict[str, float] = {}
    for name in ("delayed", "tensorwise", "blockwise"):
        group = torch.distributed.group.WORLD
        op = XIELUOp(ParallelXIELU(XIELUPlaceholder(), group, sequence_parallel=False).cuda())
        fc1, fc2 = (
            ops.BasicLinear(*size, dtype=torch.bfloat16) for size in ((128, 512), (512, 128))
        )
        with autocast(recipe=recipe(name)):
            ops.Sequential(fc1, op, fc2)(torch.randn(256, 128, device="cuda").bfloat16())
        x = (2 * torch.randn(256, 512, device="cuda")).bfloat16()
        grad_y = torch.randn_like(x)
        alphas = [alpha.detach().float() for alpha in op.alphas]
        wide = x.float().requires_grad_()
        exact_y = REFERENCES["xielu"](wide, *alphas, BETA)
        (exact_grad,) = torch.autograd.grad(exact_y, wide, grad_y.float())
        for what, quantizer, exact in (
            ("y", fc2.get_quantizer("forward", 0), exact_y.detach()),
            ("grad_x", fc1.get_quantizer("backward", 0), exact_grad),
        ):
            scaling = scaling_of(quantizer, x)
            assert scaling is not None
            if what == "y":
                found = op.compute(x, scaling, quantizer)
            else:
                found = op._quantized_backward(grad_y, x, quantizer)[0]
            oracle = fp8_reference.quantize(exact, scaling)
            ours, theirs = parts(found), parts(quantizer(exact))
            for mine, its in zip(ours[2:], theirs[2:], strict=True):
                torch.testing.assert_close(mine, its, rtol=8 * EPS, atol=0)
            for which in (0, 1):
                data = {"ours": ours[which], "theirs": theirs[which], "oracle": oracle[which]}
                for one, other in itertools.combinations(data, 2):
                    key = f"{name} {what} {('rowwise', 'columnwise')[which]}: {one} and {other}"
                    counts[key] = share_one_step_off(data[one], data[other])
    # float32 round-off next to a tie
    assert max(counts.values()) <= 1e-3, {key: share for key, share in counts.items() if share}
    return counts


def transformer_engine_seams_hold() -> int:
    from megatron_xielu.mcore import contract

    seams = contract.TRANSFORMER_ENGINE_SEAMS
    problems = [problem for seam in seams if (problem := contract.problem_with(seam))]
    assert not problems, "\n".join(problems)
    return len(seams)


def transformer_engine_fused_mlps_get_xielu() -> None:
    """Megatron's op-fuser MLPs, which save what the local ones do."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from transformer_engine.pytorch import ops

    from megatron_xielu.mcore.activation import XIELUPlaceholder
    from megatron_xielu.mcore.te_fused_mlp import HighPrecisionLinear, XIELUFusedMLP, XIELUOp
    from tests.mcore.checks import build, config

    fused = {"transformer_impl": "transformer_engine", "use_transformer_engine_op_fuser": True}
    model = build(config(**fused))
    mlps = [module for module in model.modules() if isinstance(module, XIELUFusedMLP)]
    assert len(mlps) == 3
    for mlp in mlps:
        kinds = [type(op) for op in mlp._make_fused_impl()]
        assert kinds == [ops.RMSNorm, ops.BasicLinear, XIELUOp, ops.BasicLinear]
        _, fc1, op, fc2 = mlp._make_fused_impl()
        assert op.alpha_p is mlp.activation_func.alpha_p
        assert list(op.parameters()) == [*mlp.activation_func.parameters()]
        assert (fc1.weight, fc2.weight) == (mlp.linear_fc1.weight, mlp.linear_fc2.weight)
    in_bf16 = config(**fused, activation_func=XIELUPlaceholder(fc2_input="bf16"))
    *_, fc2 = build(in_bf16).decoder.layers[0].mlp._make_fused_impl()
    assert type(fc2) is HighPrecisionLinear
    shapes = []
    for each in (build(config()), model):
        state = each.sharded_state_dict()
        tensors = [value for value in state.values() if isinstance(value, ShardedTensor)]
        shapes.append({tensor.key: tensor.global_shape for tensor in tensors})
    assert shapes[0] == shapes[1]
