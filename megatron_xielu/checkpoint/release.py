"""What lies beside the weights of a release: Megatron's state, and a recipe to train with.

A release is Megatron's word for weights without a step: training begins from them at step 0, with
a fresh optimizer, learning-rate schedule and random state.
"""

from __future__ import annotations

import argparse
import time
from importlib.metadata import version
from typing import Any

import torch

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.recipes import Recipe, padded_vocab_size
from megatron_xielu.recipes.schema import Model, Optimizer, Schedule, Training


def recipe_of(arch: Architecture, name: str) -> Recipe:
    """The model of the folder; a short, careful training whose values are to be replaced."""
    grouped = arch.num_query_groups != arch.num_attention_heads
    derived_dim = arch.head_dim * arch.num_attention_heads == arch.hidden_size
    rows = padded_vocab_size(arch.vocab_size)
    model = Model(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups if grouped else None,
        head_dim=None if derived_dim else arch.head_dim,
        ffn_hidden_size=arch.ffn_hidden_size,
        activation=arch.activation,
        seq_length=arch.seq_length,
        vocab_size=arch.vocab_size,
        padded_vocab_size=rows if rows > arch.vocab_size else None,
        tie_embeddings=arch.tie_embeddings,
        rope_theta=arch.rope_theta,
        rope_scaling_factor=arch.rope_scaling_factor,
        norm_epsilon=arch.norm_epsilon,
        init_std=arch.init_std,
        qk_layernorm=arch.qk_layernorm,
    )
    return Recipe(
        name=name,
        model=model,
        training=Training(train_iters=1000, global_batch_size=32, micro_batch_size=1),
        optimizer=Optimizer(lr=1e-5),
        schedule=Schedule(lr_warmup_iters=100, lr_wsd_decay_iters=200),
    )


def common_state(arch: Architecture) -> dict[str, Any]:
    """The small state beside the tensors."""
    return {
        "args": argparse.Namespace(**megatron_arguments(arch)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        # how a model of the same kind names and cuts what it loads
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def extra_states(arch: Architecture) -> dict[str, Any]:
    """What Megatron's own linear layers save beside their weights, and stock Megatron demands."""
    linears = [f"self_attention.linear_{name}" for name in ("qkv", "proj")]
    linears += [f"mlp.linear_{name}" for name in ("fc1", "fc2")]
    return {
        f"decoder.layers.{linear}._extra_state/shard_{layer}_{arch.num_layers}": None
        for linear in linears
        for layer in range(arch.num_layers)
    }


def megatron_arguments(arch: Architecture) -> dict[str, Any]:
    """What decides the model among Megatron's arguments; `Architecture.of_arguments` reads it."""
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "group_query_attention": arch.num_query_groups != arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "seq_length": arch.seq_length,
        "max_position_embeddings": arch.seq_length,
        "vocab_size": arch.vocab_size,
        "padded_vocab_size": padded_vocab_size(arch.vocab_size),
        "untie_embeddings_and_output_weights": not arch.tie_embeddings,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.norm_epsilon,
        "qk_layernorm": arch.qk_layernorm,
        "position_embedding_type": "rope",
        "rotary_base": int(arch.rope_theta),
        "use_rope_scaling": arch.rope_scaling_factor is not None,
        "rope_scaling_factor": arch.rope_scaling_factor or 8.0,
        "swiglu": arch.activation == "swiglu",
        "squared_relu": arch.activation == "relu2",
        "add_bias_linear": False,
        "init_method_std": arch.init_std,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "world_size": 1,
        "data_parallel_size": 1,
    }


def about(source: str) -> dict[str, Any]:
    """What the manifest says for people, as a run's save has it; `source` is what was converted."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "world_size": 1,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "data_parallel_size": 1,
        "torch": torch.__version__,
        "megatron-xielu": version("megatron-xielu"),
        "converted_from": source,
    }
