"""Faults for the real command, through Megatron's own `--spec tests.mcore.faulty_spec spec`.

FAULT=KIND:LAYER:STEP:RANK in the environment, as in forward:3:4:1, says what breaks. Kinds:

    forward    the activation's output is nan, whenever that step is computed
    once       the same, but not when it is computed again
    backward   the gradient of the activation's output is nan
    flip       one bit of the norm's weight in front of the MLP flips
    outlier    channel 5 of xIELU's input is 1000 times as large; from the start
    no-sum     alphas without the sum of their gradients over tensor-parallel ranks; at any step
"""

from __future__ import annotations

import os
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.training.global_vars import get_args

from megatron_xielu.mcore.layer_specs import xielu_layer_spec

KIND, *NUMBERS = os.environ["FAULT"].split(":")
LAYER, STEP, RANK = map(int, NUMBERS)


def spec(config: Any, vp_stage: int | None = None) -> Any:
    """xielu_layer_spec, whose models carry the fault."""
    # the layers must exist before one of them can be told by its number
    build = LanguageModule.setup_embeddings_and_output_layer

    def with_fault(model: Any) -> None:
        build(model)
        for layer in model.decoder.layers:
            if layer.layer_number == LAYER or KIND == "no-sum":
                plant(layer)

    LanguageModule.setup_embeddings_and_output_layer = with_fault
    return xielu_layer_spec(config, vp_stage)


def plant(layer: Any) -> None:
    """Break one layer."""
    activation = layer.mlp.activation_func
    if KIND == "no-sum":
        activation.sum_in_backward = False
        return
    if KIND == "outlier":
        layer.mlp.linear_fc1.weight.data[5] *= 1000
        return
    left = [1] if KIND in ("once", "flip") else [1_000_000]

    def break_output(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        # evaluation calls the modules too
        here = torch.distributed.get_rank() == RANK and torch.is_grad_enabled()
        if not here or get_args().curr_iteration + 1 != STEP or not left[0]:
            return None
        left[0] -= 1
        if KIND == "backward":
            output.register_hook(lambda gradient: gradient * torch.nan)
            return None
        if KIND == "flip":
            # by .data, so that autograd does not notice either
            layer.pre_mlp_layernorm.weight.data.view(torch.int32)[5] ^= 1
            return None
        return output * torch.nan

    activation.register_forward_hook(break_output)
