"""Megatron's arguments to the config of a model, with our layers in it."""

from __future__ import annotations

from typing import Any

from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models.gpt import GPTModelConfig

from megatron_xielu.mcore.activation import XIELUPlaceholder
from megatron_xielu.mcore.layer_specs import (
    install_on_chunks,
    stock_layer_spec,
    use_xielu,
    xielu_layer_spec,
)


def model_config(args: Any, activation: XIELUPlaceholder | None) -> GPTModelConfig:
    """The model that parsed and validated arguments describe.

    A spec of the user's own (--spec) wins over ours; the hook still installs xIELU into its layers.

    Args:
        activation: xIELU's settings; None leaves the activation to the arguments.
    """
    model = gpt_config_from_args(args)
    # of --rope-scaling-factor that function hands nothing on: every model would scale by 8
    model.rope_scaling_factor = args.rope_scaling_factor
    if activation is None:
        model.transformer_layer_spec = model.transformer_layer_spec or stock_layer_spec
        return model
    use_xielu(model.transformer, activation)
    model.transformer_layer_spec = model.transformer_layer_spec or xielu_layer_spec
    model.pre_wrap_hooks.append(install_on_chunks)
    return model
