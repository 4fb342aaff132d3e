"""TransformerEngine's FP8 training in numbers, on any machine: quantize, dequantize, multiply.

`install` replaces the matrix products of a built model's layers (qkv, proj, fc1 and fc2 of
Megatron's local kind; not the embedding and the output layer, which TransformerEngine leaves in
bf16 too) by ones whose operands went through FP8 and back:

    forward            y  = X W^T        X: the input, W: the weight, G: the gradient by y;
    gradient by input  dx = G W          each quantized once, from its own type
    gradient by weight dW = G^T X

X and W are e4m3, and G is e5m2 under `hybrid`. Blocks of 1 x 128 lie along the dimension that a
product sums over, so under `blockwise` X and G have other values by rows (forward, dx) than by
columns (dW). The products are those of float32, rounded once to the type of the layer. What of the
real thing this leaves out, docs/fp8-emulation.md says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from megatron_xielu.errors import UserError
from megatron_xielu.ops import fp8_reference
from megatron_xielu.ops.fp8_reference import Blockwise, Current, Delayed, DelayedScale, Scaling

Kind = Literal["input", "weight", "grad_output"]
KINDS: tuple[Kind, ...] = ("input", "weight", "grad_output")


@dataclass(frozen=True)
class FP8Settings:
    """What is emulated; the names are those of the recipe's `fp8` section."""

    recipe: Literal["off", "delayed", "tensorwise", "blockwise"] = "off"
    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid has gradients in e5m2."""
    amax_history_len: int = 1024
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    fc2_input: Literal["fp8", "bf16"] = "fp8"
    """bf16 leaves all of fc2 as it is: tensor cores do not multiply bf16 by FP8."""


@dataclass
class Statistics:
    """What quantizing did to the values of one tensor since they were last taken."""

    amax: float = 0.0
    elements: int = 0
    saturated: int = 0
    """Values so large that rounding alone would not have led to the format's largest."""
    flushed: int = 0
    """Values that were not zero and are now."""

    @property
    def saturated_share(self) -> float:
        """Of all values."""
        return self.saturated / max(1, self.elements)

    @property
    def flushed_share(self) -> float:
        """Of all values."""
        return self.flushed / max(1, self.elements)


class Operand:
    """One of the three tensors that a linear layer quantizes.

    Args:
        settings: not off.
        kind: which of the three.
        group: the ranks whose amaxes make one scale under delayed scaling.
    """

    def __init__(
        self,
        settings: FP8Settings,
        kind: Kind,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        e5m2 = kind == "grad_output" and settings.format == "hybrid"
        self.dtype = torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn
        self.statistics = Statistics()
        self._square = kind == "weight"
        self._recipe = settings.recipe
        self._group = group
        self.delayed = DelayedScale(
            self.dtype,
            length=settings.amax_history_len,
            algorithm=settings.amax_compute_algo,
        )

    def __call__(self, x: Tensor, *, training: bool) -> tuple[Tensor, Tensor]:
        """What is left of x [M, K] for sums over K and for sums over M; float32, both [M, K].

        Args:
            x: the operand.
            training: count it in the statistics, and end a step of the history. TransformerEngine
                ends one with each micro-batch that is trained on; an evaluation only raises the
                amax of the next.
        """
        scaling = self._scaling()
        by_row_only = not isinstance(scaling, Blockwise) or scaling.square
        found = fp8_reference.quantize(x, scaling, columnwise=not by_row_only)
        assert found.rowwise is not None
        assert found.rowwise_scale_inv is not None
        rows = fp8_reference.dequantize(found.rowwise, found.rowwise_scale_inv, scaling)
        columns = rows
        if found.columnwise is not None and found.columnwise_scale_inv is not None:
            columns = fp8_reference.dequantize(
                found.columnwise, found.columnwise_scale_inv, scaling
            ).T
        amax = fp8_reference.amax_of(x) if found.amax is None else found.amax
        if isinstance(scaling, Delayed):
            of_all = amax.clone()
            if self._group is not None:
                torch.distributed.all_reduce(
                    of_all, torch.distributed.ReduceOp.MAX, group=self._group
                )
            self.delayed.record(of_all)
            if training:
                self.delayed.update()
        if training:
            self._count(x, rows, float(amax), scaling)
        return rows, columns

    def _scaling(self) -> Scaling:
        match self._recipe:
            case "delayed":
                return Delayed(self.delayed.scale, self.dtype)
            case "tensorwise":
                return Current(self.dtype)
            case _:
                return Blockwise(self.dtype, self._square)

    def _count(self, x: Tensor, kept: Tensor, amax: float, scaling: Scaling) -> None:
        counted = self.statistics
        counted.amax = max(counted.amax, amax)
        counted.elements += x.numel()
        counted.flushed += int(x.count_nonzero() - kept.count_nonzero())
        limit = float(fp8_reference.saturates_above(scaling, x.dtype))
        if amax > limit:
            counted.saturated += int((x.float().abs() > limit).sum())


class EmulatedProduct:
    """Takes the place of a linear layer's `_forward_impl`."""

    def __init__(
        self, settings: FP8Settings, group: torch.distributed.ProcessGroup | None = None
    ) -> None:
        self.operands = {kind: Operand(settings, kind, group) for kind in KINDS}

    def get_histories(self) -> Tensor:
        """Delayed scaling's state, for checkpoints: [3, 1 + amax_history_len] in float32."""
        found = [operand.delayed for operand in self.operands.values()]
        return torch.stack([torch.cat((each.scale, each.amaxes)) for each in found])

    def set_histories(self, state: Any) -> None:
        """Go on with what `get_histories` gave; anything else (None, real FP8's) is not for it.

        A history of another length keeps its newest entries.
        """
        if not isinstance(state, Tensor) or state.dim() != 2:
            return
        for operand, row in zip(self.operands.values(), state, strict=True):
            operand.delayed.scale = row[:1].clone()
            amaxes, loaded = operand.delayed.amaxes, row[1:]
            amaxes[0] = loaded[0]
            steps = min(len(amaxes), len(loaded)) - 1
            if steps > 0:
                amaxes[-steps:] = loaded[-steps:]

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        """input: [..., K]; weight: [N, K]; bias: [N] or None. Returns [..., N] in input's dtype.

        Megatron's other arguments are about tensor parallelism and fused gradients, which `install`
        refuses.
        """
        result: Tensor = _Product.apply(input, weight, self.operands, torch.is_grad_enabled())
        return result if bias is None else result + bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, operands: dict[Kind, Operand], training: bool
    ) -> Tensor:
        x_rows, x_columns = operands["input"](x.flatten(0, -2), training=training)
        w_rows, w_columns = operands["weight"](weight, training=training)
        ctx.save_for_backward(x_columns, w_columns)
        ctx.grad_output = operands["grad_output"]
        ctx.dtypes = x.dtype, weight.dtype
        return (x_rows @ w_rows.T).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        rows, columns = ctx.grad_output(grad.flatten(0, -2), training=True)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (rows @ weight).to(x_dtype).unflatten(0, grad.shape[:-1])
        if ctx.needs_input_grad[1]:
            dw = (columns.T @ x).to(weight_dtype)
        return dx, dw, None, None


def install(model: nn.Module, settings: FP8Settings) -> nn.Module:
    """Emulate FP8 in every layer of a built model; with recipe off the model is left alone.

    Raises:
        UserError: the layers are not Megatron's local ones, or are cut by tensor parallelism.
    """
    if settings.recipe == "off":
        return model
    linears = _linears(model)
    group = None
    if settings.recipe == "delayed" and parallel_state.is_initialized():
        # the one that Megatron gives TransformerEngine
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
    if not linears:
        raise UserError(
            "no layer to emulate FP8 in: the emulation replaces the products of Megatron's own "
            "linear layers (--transformer-impl local); TransformerEngine's compute in FP8 by "
            "themselves"
        )
    for name, linear in linears.items():
        size = linear.config.tensor_model_parallel_size
        if size > 1:
            raise UserError(
                f"{name} is cut into {size} parts by tensor parallelism, whose amaxes the FP8 "
                "emulation does not exchange; use parallel.tensor_model_parallel_size=1"
            )
        if linear.gradient_accumulation_fusion:
            raise UserError(
                f"{name} adds its gradient to the buffer itself, which the FP8 emulation does not; "
                "use --no-gradient-accumulation-fusion"
            )
        if not (settings.fc2_input == "bf16" and name.endswith("linear_fc2")):
            linear._forward_impl = product = EmulatedProduct(settings, group)
            if settings.recipe == "delayed":
                linear.get_extra_state = product.get_histories
                linear.set_extra_state = product.set_histories
    return model


def install_on_chunks(chunks: list[Any], settings: FP8Settings) -> list[Any]:
    """With its settings bound, a Megatron `pre_wrap_hooks` entry."""
    return [install(chunk, settings) for chunk in chunks]


def take_statistics(model: nn.Module) -> dict[str, Statistics]:
    """What quantizing did in training since the last call, by the tensor's name.

    The names are those of the modules with the operand: "decoder.layers.0.mlp.linear_fc2.input".
    """
    taken = {}
    for name, linear in _linears(model).items():
        if isinstance(linear._forward_impl, EmulatedProduct):
            for kind, operand in linear._forward_impl.operands.items():
                taken[f"{name}.{kind}"], operand.statistics = operand.statistics, Statistics()
    return taken


def _linears(model: nn.Module) -> dict[str, Any]:
    """The linear layers inside a model's transformer layers, by their names in it."""
    return {
        f"{layer_name}.{name}".strip("."): module
        for layer_name, layer in model.named_modules()
        if isinstance(layer, TransformerLayer)
        for name, module in layer.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }
