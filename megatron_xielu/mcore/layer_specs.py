"""Megatron's own layer specs, and the same with xIELU in the MLP.

`xielu_layer_spec` is what Megatron's `--spec megatron_xielu.mcore.layer_specs xielu_layer_spec`
names, so a stock Megatron entry script trains xIELU without a change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_xielu.mcore import patches
from megatron_xielu.mcore.activation import XIELUPlaceholder, install
from megatron_xielu.mcore.attention import SDPAttention
from megatron_xielu.mcore.norm import RMSNorm


def xielu_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec Megatron would choose for this config, with xIELU in every MLP.

    Args:
        config: the model's config; its activation becomes the placeholder unless it is one already.
        vp_stage: virtual pipeline stage.
    """
    use_xielu(config.transformer)
    patches.group_alphas()
    spec = stock_layer_spec(config, vp_stage)
    for layer in _layers(spec):
        layer.submodules.mlp = with_xielu(layer.submodules.mlp)
    return spec


def stock_layer_spec(
    config: GPTModelConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The spec Megatron would choose for this config; local layers get torch's kernels.

    Args:
        config: the model's config.
        vp_stage: virtual pipeline stage.
    """
    spec = default_layer_spec(config, vp_stage)
    if config.transformer.transformer_impl == "local":
        for layer in _layers(spec):
            use_torch_kernels(layer.submodules, config.transformer)
    if config.transformer.transformer_impl == "local" and isinstance(spec, ModuleSpec):
        count = get_num_layers_to_build(config.transformer, vp_stage)
        spec = TransformerBlockSubmodules(layer_specs=[spec] * count, layer_norm=RMSNorm)
    if isinstance(spec, TransformerBlockSubmodules) and _local_rms_norm(config.transformer):
        spec.layer_norm = RMSNorm
    return spec


def _layers(spec: ModuleSpec | TransformerBlockSubmodules) -> list[ModuleSpec]:
    layers = spec.layer_specs if isinstance(spec, TransformerBlockSubmodules) else [spec]
    # a spec object may stand for many layers, and is edited once
    return list({id(layer): layer for layer in layers}.values())


def use_xielu(config: TransformerConfig, placeholder: XIELUPlaceholder | None = None) -> None:
    """Make xIELU a transformer config's activation, keeping a placeholder that is there already."""
    if placeholder is not None or not isinstance(config.activation_func, XIELUPlaceholder):
        config.activation_func = placeholder or XIELUPlaceholder()
    # Megatron's fused bias + activation kernels know their own activations only
    config.bias_activation_fusion = False


def install_on_chunks(chunks: list[Any]) -> list[Any]:
    """A Megatron `pre_wrap_hooks` entry: reaches MTP, mixture and hybrid layers as well."""
    return [install(chunk) for chunk in chunks]


def with_xielu(build_mlp: Callable[..., Any]) -> Callable[..., Any]:
    """An MLP builder whose MLPs have xIELU."""

    def build(*args: Any, **kwargs: Any) -> Any:
        return install(build_mlp(*args, **kwargs))

    return build


def use_torch_kernels(submodules: Any, config: TransformerConfig) -> None:
    """Give a local layer's submodules torch's attention and a norm that knows sequence parallelism.

    Args:
        submodules: a `TransformerLayerSubmodules`, which is changed.
    """
    attention = submodules.self_attention.submodules
    if attention.core_attention is DotProductAttention:
        attention.core_attention = SDPAttention
    if _local_rms_norm(config):
        submodules.input_layernorm = submodules.pre_mlp_layernorm = RMSNorm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm


def _local_rms_norm(config: TransformerConfig) -> bool:
    return config.transformer_impl == "local" and config.normalization == "RMSNorm"
