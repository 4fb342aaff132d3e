"""xIELU as an operation of TransformerEngine's operation fuser, inside Megatron's `TEFusedMLP`.

Between two FP8 linears TransformerEngine's own activations write bfloat16 wherever it has no fused
kernel for the recipe (blockwise scaling, current scaling), and the linear's quantizer reads it
again. `XIELUOp` writes what the next linear's quantizer would have made, data and transpose and
scales, in the pass that computes xIELU, and in backward the same for the gradient that the linear
before it multiplies. Quantizers that it has no kernel for get bfloat16 and do their own work.

`XIELULinear` is the two operations from xIELU's input to fc2's output in one, which holds only the
input until backward and makes fc2's input from it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEFusedMLP
from torch import Tensor
from transformer_engine.pytorch.ops import (
    BasicLinear,
    BasicOperation,
    FusedOperation,
    Sequential,
    register_forward_backward_fusion,
)
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, autocast
from transformer_engine.pytorch.quantized_tensor import QuantizedTensorStorage
from transformer_engine.pytorch.utils import clear_tensor_data

from megatron_xielu.mcore import delayed_scaling
from megatron_xielu.mcore.te_quantizers import empty, rows, scaling_of
from megatron_xielu.ops import library, saved_input
from megatron_xielu.ops.family import XIELU
from megatron_xielu.ops.fp8_reference import Delayed, Scaling
from megatron_xielu.ops.triton import quantized


class XIELUFusedMLP(TEFusedMLP):
    """Megatron's MLP over TransformerEngine's operation fuser, with xIELU."""

    def _make_activation_op(self, activation_func: Callable[..., Any], *_: bool) -> BasicOperation:
        return XIELUOp(activation_func)

    def _make_fused_impl(self) -> Sequential:
        operations = super()._make_fused_impl()
        fc1, fc2 = (op for op in operations if isinstance(op, BasicLinear))
        if self.activation_func.fc2_input == "bf16":
            # it has the weight and the options that Megatron gave it
            fc2.__class__ = HighPrecisionLinear
        delayed_scaling.belongs_to(fc1, self.linear_fc1)
        delayed_scaling.belongs_to(fc2, self.linear_fc2)
        return operations


class XIELUOp(BasicOperation):
    """xIELU between two operations of TransformerEngine.

    Args:
        activation: the `ParallelXIELU` whose parameters it trains; both hold the same ones.
    """

    def __init__(self, activation: Any) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = activation.alpha_p, activation.alpha_n
        self.beta, self.impl = activation.beta, activation.impl
        self.recompute, self.saved_input = activation.recompute, activation.saved_input
        self.look = activation.look
        # the sum over ranks that Megatron does not do by itself
        self.tp_group = activation.tp_group if activation.sum_in_backward else None

    @property
    def alphas(self) -> tuple[Tensor, Tensor]:
        """In the order of the parameters."""
        return self.alpha_p, self.alpha_n

    def op_forward(
        self,
        ctx: Any,
        input_: Tensor,
        *,
        prev_op_grad_output_quantizer: Any | None,
        next_op_input_quantizer: Any | None,
    ) -> Tensor:
        """xIELU of input_ [..., ffn_hidden_size / tp], in FP8 if the next operation wants it."""
        x = _plain(input_)
        if _backward_in_high_precision():
            # both linears keep and get unquantized tensors then
            prev_op_grad_output_quantizer = next_op_input_quantizer = None
        scaling = scaling_of(next_op_input_quantizer, x)
        if ctx.requires_grad:
            ctx.save_for_backward(*saved_input.pack(x, self.saved_input))
            ctx.dtype = x.dtype
            ctx.quantizer = prev_op_grad_output_quantizer
            # scales of delayed scaling may be others by the time of backward
            ctx.scaling = scaling
            if self.recompute and isinstance(scaling, Delayed):
                ctx.scaling = replace(scaling, scale=scaling.scale.clone())
        look = self.look.on and ctx.requires_grad
        if look:
            self.look.see_input(x)
        return self.compute(x, scaling, next_op_input_quantizer, look=look)

    def compute(
        self,
        x: Tensor,
        scaling: Scaling | None,
        quantizer: Any,
        amax: Tensor | None = None,
        *,
        look: bool = False,
    ) -> Any:
        """xIELU of x: for a scaling as the quantizer's tensor, else in x's dtype.

        Args:
            amax: takes the largest magnitude in the quantizer's place.
            look: count what FP8 loses; computes xIELU once more, in x's dtype.
        """
        if scaling is None:
            return library.forward(x, None, self.alphas, self.beta, XIELU.name, self.impl)
        result, parts = empty(quantizer, x)
        if amax is not None:
            parts = parts._replace(amax=amax)
        quantized.forward(XIELU, rows(x), None, self.alphas, self.beta, scaling, parts)
        if look:
            y = library.forward(x, None, self.alphas, self.beta, XIELU.name, self.impl)
            self.look.see_output(y, parts, scaling)
        return result

    def op_backward(self, ctx: Any, grad_output: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The gradients by the input, in FP8 if the operation before wants it, and the alphas."""
        kept = ctx.saved_tensors
        x = saved_input.unpack(kept, ctx.dtype)
        grad_y = _plain(grad_output).to(x.dtype)
        with torch.no_grad():
            results = self._quantized_backward(grad_y, x, ctx.quantizer)
            if results is None:
                results = library.backward(
                    grad_y, x, None, self.alphas, self.beta, XIELU.name, self.impl
                )
            grad_x, *grads = results
            both = torch.stack([grad.reshape(1) for grad in grads])
            if self.tp_group is not None:
                torch.distributed.all_reduce(both, group=self.tp_group)
        # the fuser holds it until the whole MLP's backward is done
        clear_tensor_data(*kept)
        return grad_x, both.unbind()

    def _quantized_backward(
        self, grad_y: Tensor, x: Tensor, quantizer: Any | None
    ) -> list[Any] | None:
        scaling = scaling_of(quantizer, x)
        if scaling is None:
            return None
        result, parts = empty(quantizer, x)
        grads = quantized.backward(
            XIELU, rows(grad_y), rows(x), None, self.alphas, self.beta, scaling, parts
        )
        return [result, *grads]


class XIELULinear(FusedOperation):
    """xIELU and the linear after it, whose input is not kept but made again from xIELU's.

    Costs a second pass of xIELU: 3 bytes of traffic per element in FP8, 5 where the scale follows
    from the tensor, and 4 in bfloat16. Saves 1 byte per element that is held from forward to
    backward in FP8 and 2 in bfloat16.
    """

    def __init__(self, xielu: XIELUOp, linear: BasicLinear) -> None:
        super().__init__((xielu, linear))

    def fuser_forward(
        self,
        basic_op_ctxs: list[Any],
        input_: Tensor,
        *,
        prev_op_grad_output_quantizer: Any | None,
        next_op_input_quantizer: Any | None,
        **_: Any,
    ) -> tuple[Tensor, list[tuple[()]]]:
        """Both operations one after the other."""
        xielu, linear = self.basic_ops
        first, second = basic_op_ctxs
        y = xielu.op_forward(
            first,
            input_,
            prev_op_grad_output_quantizer=prev_op_grad_output_quantizer,
            next_op_input_quantizer=linear.get_input_quantizer(),
        )
        result = linear.op_forward(
            second,
            y,
            prev_op_grad_output_quantizer=None,
            next_op_input_quantizer=next_op_input_quantizer,
        )
        if second.requires_grad:
            _, weight = second.to_save
            second.save_for_backward(None, weight)
        return result, [(), ()]

    def fuser_backward(
        self, basic_op_ctxs: list[Any], grad_output: Tensor, **_: Any
    ) -> tuple[Tensor, list[Any], list[tuple[()]]]:
        """The linear's gradients from its input made again, then those of xIELU."""
        xielu, linear = self.basic_ops
        first, second = basic_op_ctxs
        x, (_, weight) = saved_input.unpack(first.saved_tensors, first.dtype), second.saved_tensors
        first.saved_tensors = (x,)
        y = None
        if second.weight_requires_grad:
            if first.scaling is not None:
                second.input_quantizer.set_usage(rowwise=False, columnwise=True)
            # this tensor's amax is in the history already
            amax = x.new_zeros(1, dtype=torch.float32)
            with torch.no_grad():
                y = xielu.compute(x, first.scaling, second.input_quantizer, amax)
        second.saved_tensors = (y, weight)
        grad_y, grads_of_linear = linear.op_backward(second, grad_output)
        grad_x, grads_of_xielu = xielu.op_backward(first, grad_y)
        return grad_x, [grads_of_xielu, grads_of_linear], [(), ()]


def _fuse_recomputation(operations: list[Any], **_: Any) -> list[Any]:
    """Put `XIELULinear` where xIELU is to be recomputed for the linear after it."""
    fused: list[Any] = []
    for op in operations:
        before = fused[-1] if fused else None
        if isinstance(before, XIELUOp) and before.recompute and isinstance(op, BasicLinear):
            fused[-1] = XIELULinear(before, op)
        else:
            fused.append(op)
    return fused


register_forward_backward_fusion(_fuse_recomputation)


class HighPrecisionLinear(BasicLinear):
    """A linear that computes in its weight's dtype under FP8 too."""

    def reset_recipe_state(self, *, recipe: Any | None) -> None:
        """No quantizers, so that what comes before writes no FP8 for it."""
        BasicOperation.reset_recipe_state(self, recipe=None)

    def pre_fuser_forward(self, *, requires_grad: bool) -> None:
        """Nothing to prepare: there are no quantizers."""

    def op_forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As without FP8; backward follows the context that is filled here."""
        with autocast(enabled=False):
            result: Tensor = super().op_forward(*args, **kwargs)
        return result


def _plain(tensor: Any) -> Tensor:
    if isinstance(tensor, QuantizedTensorStorage):
        tensor = tensor.dequantize()
    return tensor.contiguous()


def _backward_in_high_precision() -> bool:
    if not FP8GlobalStateManager.is_fp8_enabled():
        return False
    return FP8GlobalStateManager.get_fp8_recipe().backward_override is not None
