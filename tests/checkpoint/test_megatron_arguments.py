"""Every argument of Megatron's that may change a model's function is looked at by conversion.

Megatron saves its arguments with a checkpoint, and most of them leave no tensor behind. One that a
new Megatron brings must become a reason to refuse in `architecture.LLAMA`, or find its place here.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterable
from fnmatch import fnmatchcase

import pytest
from checkpoint_layouts import recipe_of

from megatron_xielu.checkpoint.architecture import LLAMA, Architecture
from megatron_xielu.checkpoint.release import megatron_arguments

# groups of Megatron's parser
MODEL = [
    "transformer configuration",
    "network size",
    "experimental_attention_variant",
    "heterogeneous architecture",
    "Transformer-Engine",
    "experimental",
]
NO_LLAMA = ["biencoder", "mla", "moe", "vision"]
NO_MODEL = [
    "positional arguments",
    "options",
    "regularization",
    "profiling",
    "training",
    "rl",
    "RNG and initialization",
    "learning rate and weight decay",
    "checkpointing",
    "mixed precision",
    "distributed init",
    "validation",
    "data and dataloader",
    "tokenizer",
    "autoresume",
    "logging",
    "Logits Distillation",
    "straggler",
    "workload inspector",
    "inference",
    "one logger",
    "In-process restart",
    "ft_package",
    "rerun engine",
    "msc",
    "sft",
    "fault injector",
]

# what may have any value, as `fnmatch` writes names
FREE = {
    "means nothing unless an argument that is looked at is set": """
        dsa_* linear_* mrope_section mup_* window_attn_skip_freq
        moe_* use_grouped_gemm_* yarn_* relative_attention_*
        heterogeneous_layers_config_encoded_json
        """,
    "leaves tensors, or none of those that an export needs": """
        mamba_* is_hybrid_model mtp_* encoder_num_layers decoder_num_layers bert_binary_head
        openai_gelu quick_geglu
        """,
    "is in the weights once they are trained": """
        *_dropout calculate_per_token_loss embedding_init_method_std init_model_with_meta_device
        perform_initialization qk_clip* use_cpu_initialization
        """,
    "rounds otherwise, or takes other numbers": """
        apply_query_key_layer_scaling attention_backend batch_invariant_mode bf16 deterministic_mode
        disable_bf16_reduced_precision_matmul first_last_layers_bf16 flash_* fp16 fp32_* fp4* fp8*
        fused_* num_layers_at_* te_precision_config_file use_fused_* *kitchen_attention*
        """,
    "says how and where it is computed": """
        *_cuda_graph* *_parallel_comm* *_parallel_num_weight_shards *context_parallel*
        *offload* *overlap_* *wgrad* account_for_* config_logger_dir
        clone_scatter_output_in_embedding cpu_offloading_* cross_entropy_* cuda_graph_* delay_*
        distribute_saved_activations enable_cuda_graph expert_*_parallel_size external_cuda_graph
        high_priority_a2a_comm_stream inference_* max_seqlen_per_dp_cp_rank microbatch_group_size_*
        mlp_chunks_for_* nccl_* recompute_* sequence_parallel symmetric_ar_type tp_comm_*
        transformer_impl use_mamba_mem_eff_path use_ring_exchange_p2p use_te_activation_func
        use_transformer_engine_op_fuser
        """,
    "is another name, or of no effect": """
        add_position_embedding make_vocab_size_divisible_by onnx_safe use_rotary_position_embeddings
        """,
    "is the optimizer's": "*_dtype use_precision_aware_optimizer megatron_fsdp_* fsdp_*",
    "is code, whose model only its tensors show": "enable_experimental spec yaml_cfg",
}


@pytest.fixture(scope="module")
def groups() -> dict[str, list[str]]:
    """Megatron's arguments by the group of its parser."""
    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return {
        group.title or "": [action.dest for action in group._group_actions]
        for group in parser._action_groups
    }


def test_every_group_is_known(groups: dict[str, list[str]]) -> None:
    assert sorted(groups) == sorted(MODEL + NO_LLAMA + NO_MODEL)


def test_every_argument_of_a_model_is_looked_at_or_free(groups: dict[str, list[str]]) -> None:
    arguments = {name for group in MODEL for name in groups[group]}
    looked_at = {
        *LLAMA,
        *megatron_arguments(Architecture.of_recipe(recipe_of("gqa"), 384)),
        "hybrid_layer_pattern",
        "hybrid_override_pattern",
    }
    unknown = {name for name in arguments - looked_at if not matches(name, patterns())}
    assert unknown == set()
    # a pattern must not hide what is looked at, nor stay when its argument is gone
    assert {name for name in looked_at & arguments if matches(name, patterns())} == set()
    assert {p for p in patterns() if not any(matches(name, [p]) for name in arguments)} == set()


def patterns() -> list[str]:
    return [pattern for names in FREE.values() for pattern in names.split()]


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
