"""Megatron's HybridModel of attention and MLP layers with xIELU.

In a hybrid model attention and MLP are layers of their own (`*-*-`). Megatron's stack spec for it
is written for TransformerEngine; where layers are local this one takes the parts of the local GPT
layer instead.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import nn

from megatron_xielu.mcore.layer_specs import use_torch_kernels, use_xielu, with_xielu
from megatron_xielu.mcore.norm import RMSNorm


def xielu_hybrid_spec(config: TransformerConfig) -> ModuleSpec:
    """Megatron's hybrid stack with xIELU in its MLP layers.

    With local layers the model's `pre_wrap_hooks` need `finish_norms` as well.
    """
    use_xielu(config)
    if config.transformer_impl != "local":
        # the module-level spec is one object for all models
        stack = copy.deepcopy(hybrid_stack_spec)
        mlp = stack.submodules.mlp_layer.submodules
        mlp.mlp = with_xielu(mlp.mlp)
        return stack
    layer = get_gpt_layer_local_spec(normalization=config.normalization).submodules
    use_torch_kernels(layer, config)
    attention = TransformerLayerSubmodules(
        # checkpoints name a norm by the linear behind it, into which TransformerEngine fuses it
        sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
        input_layernorm=layer.input_layernorm,
        self_attention=layer.self_attention,
        self_attn_bda=layer.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(
        sharded_state_dict_keys_map=layer.sharded_state_dict_keys_map,
        pre_mlp_layernorm=layer.pre_mlp_layernorm,
        mlp=with_xielu(layer.mlp),
        mlp_bda=layer.mlp_bda,
    )
    return ModuleSpec(
        module=HybridStack,
        # the stack's last norm is TransformerEngine's, without a place in the spec
        params={"post_layer_norm": False},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


def finish_norms(chunks: list[nn.Module]) -> list[nn.Module]:
    """A `pre_wrap_hooks` entry: gives a stack of local layers the norm at its end."""
    for stack in _stacks(chunks):
        if stack.post_process and not stack.post_layer_norm:
            stack.final_norm = RMSNorm(
                stack.config, stack.config.hidden_size, eps=stack.config.layernorm_epsilon
            )
            stack.post_layer_norm = True
    return chunks


def _stacks(chunks: list[nn.Module]) -> list[Any]:
    return [m for chunk in chunks for m in chunk.modules() if isinstance(m, HybridStack)]
