from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoint_layouts import recipe_of

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.run import architecture_of, open_run
from megatron_xielu.checkpoint.targets import choose_target
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError

# what the swiss-ai fork of Megatron stores, as far as it matters
ARGUMENTS: dict[str, Any] = {
    "num_layers": 32,
    "hidden_size": 4096,
    "ffn_hidden_size": 21504,
    "num_attention_heads": 32,
    "group_query_attention": True,
    "num_query_groups": 8,
    "kv_channels": 128,
    "vocab_size": 131072,
    "padded_vocab_size": 131072,
    "untie_embeddings_and_output_weights": True,
    "qk_layernorm": True,
    "xielu": True,
    "swiglu": False,
    "squared_relu": False,
    "norm_epsilon": 1e-5,
    "rotary_base": 500000,
    "use_rope_scaling": False,
    "rope_scaling_factor": 8.0,
    "seq_length": 4096,
    "max_position_embeddings": 4096,
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "num_experts": None,
}


def of(**change: Any) -> Architecture:
    return Architecture.of_arguments(ARGUMENTS | change, has_alphas=False)


def test_arguments_of_the_swiss_ai_fork() -> None:
    arch = of()
    assert (arch.activation, arch.norm_epsilon, arch.head_dim) == ("xielu", 1e-5, 128)
    assert arch.rope_scaling_factor is None
    assert choose_target(arch).class_name == "ApertusForCausalLM"
    assert of(use_rope_scaling=True).rope_scaling_factor == 8.0
    # HybridModel has no parameter for it
    hybrid = {"hybrid_layer_pattern": "*-" * 32}
    assert of(use_rope_scaling=True, **hybrid).rope_scaling_factor is None
    # without grouped queries the number of groups is an unused default
    assert of(group_query_attention=False, num_query_groups=1).num_query_groups == 32


def test_a_checkpoints_arguments_say_what_its_recipe_says(runs: dict[str, Path]) -> None:
    for layout in ("gqa", "mha-tied-pp2", "apertus-tied-tp2", "qwen3", "relu2"):
        run = open_run(runs[layout])
        reader = TorchDistReader(run.path)
        by_recipe = architecture_of(run, reader)
        # init_std is spelled as given, theta as an integer
        assert architecture_of(replace(run, recipe=None), reader) == by_recipe
        assert by_recipe == Architecture.of_recipe(recipe_of(layout), 320)


@pytest.mark.parametrize(
    ("change", "class_name"),
    [
        ({}, "ApertusForCausalLM"),
        ({"qk_layernorm": False}, "ArceeForCausalLM"),
        ({"xielu": False, "swiglu": True}, "Qwen3ForCausalLM"),
        ({"xielu": False, "swiglu": True, "qk_layernorm": False}, "LlamaForCausalLM"),
        ({"xielu": False, "squared_relu": True, "qk_layernorm": False}, "ArceeForCausalLM"),
    ],
)
def test_the_class_that_fits(change: dict[str, Any], class_name: str) -> None:
    assert choose_target(of(**change)).class_name == class_name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalization": "LayerNorm"}, r"normalization='LayerNorm': norms are not RMSNorm"),
        ({"rotary_percent": 0.5}, r"rotary_percent=0\.5: RoPE turns only a part"),
        ({"rotary_interleaved": True}, r"rotary_interleaved=True: RoPE pairs neighbouring"),
        ({"add_bias_linear": True}, r"add_bias_linear=True: linear layers have biases"),
        ({"add_qkv_bias": True}, r"add_qkv_bias=True: queries, keys and values have biases"),
        ({"num_experts": 8}, r"num_experts=8: the MLPs are mixtures of experts"),
        ({"window_size": (128, 0)}, r"window_size=\(128, 0\): attention sees a window only"),
        ({"use_mup": True, "mup_output_mult": 0.5}, r"use_mup=True: .* are scaled by muP"),
        ({"softmax_type": "off-by-one"}, r"softmax_type='off-by-one': .* one term more"),
        ({"glu_linear_offset": 1.0}, r"glu_linear_offset=1\.0: gated MLPs add a number"),
        ({"activation_func_clamp_value": 7.0}, r"clamp_value=7\.0: gated MLPs clamp"),
        ({"experimental_attention_variant": "dsa"}, r"variant='dsa': attention is not softmax"),
        ({"heterogeneous_layers_config_path": "x.json"}, r"'x\.json': layers differ"),
        ({"position_embedding_type": "learned_absolute"}, r"positions are not RoPE"),
        ({"xielu": False}, r"neither xIELU .* nor SwiGLU nor squared ReLU"),
        ({"swiglu": True}, r"holds xIELU's alphas, and its arguments say swiglu"),
        ({"hybrid_layer_pattern": "**--"}, r"'\*\*--' has no place .* in turns"),
    ],
)
def test_what_is_no_llama_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        of(**change)


@pytest.mark.parametrize(
    ("change", "name", "reason"),
    [
        ({"xielu_beta": 0.4}, "auto", r"beta=0\.4: clients compute with 0\.5 whatever"),
        ({}, "arcee", r"ArceeForCausalLM cannot normalize queries and keys"),
        ({"qk_layernorm": False}, "apertus", r"ApertusForCausalLM always normalizes"),
        ({}, "llama", r"activation=xielu: its MLP computes swiglu"),
        ({"xielu": False, "squared_relu": True}, "auto", r"activation=relu2: its MLP computes"),
        ({"hidden_size": 4097, "qk_layernorm": False}, "arcee", r"4097 is no multiple of"),
        ({}, "gpt2", r"--arch 'gpt2' is none of auto, arcee, apertus, llama, qwen3"),
    ],
)
def test_what_a_class_lacks_is_the_reason(change: dict[str, Any], name: Any, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        choose_target(of(**change), name)


def test_missing_arguments_are_named_with_the_way_to_give_them() -> None:
    args = {**ARGUMENTS, "rotary_base": None, "vocab_size": None}
    with pytest.raises(UserError) as error:
        Architecture.of_arguments(args, has_alphas=True)
    message = str(error.value)
    assert "does not say rotary_base, vocab_size; give each with --arg" in message
    assert "--arg rotary_base=VALUE --arg vocab_size=VALUE" in message
    assert "from --tokenizer (131072 rows are stored, padding included)" in message
    given = {**args, "rotary_base": 500000}
    arch = Architecture.of_arguments(given, has_alphas=True, vocab_size=131000)
    assert (arch.rope_theta, arch.vocab_size) == (500000.0, 131000)
