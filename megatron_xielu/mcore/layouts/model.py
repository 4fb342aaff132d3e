"""The small models of the layout matrix, built and wrapped as pretraining builds and wraps them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig
from torch import nn

from megatron_xielu.mcore.activation import ParallelXIELU
from megatron_xielu.mcore.hybrid import finish_norms, xielu_hybrid_spec
from megatron_xielu.mcore.layer_specs import install_on_chunks, use_xielu, xielu_layer_spec
from megatron_xielu.mcore.layouts.grid import Layout, Model

VOCAB = 64
SEQ_LENGTH = 16
NUM_LAYERS = 4


def build(model: Model, layout: Layout) -> tuple[TransformerConfig, list[Any]]:
    """This rank's chunks of the model, wrapped for data parallelism; Megatron's groups exist."""
    transformer = _transformer(model, layout)
    use_xielu(transformer)
    builder = _builder(model, transformer)
    # the overlap needs more than one bucket to overlap anything
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=layout.overlap,
        overlap_param_gather=layout.overlap and layout.distributed,
        use_distributed_optimizer=layout.distributed,
        bucket_size=4096,
    )
    chunks = builder.build_distributed_models(
        ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=ddp,
        data_parallel_random_init=False,
    )
    return transformer, chunks


def _transformer(model: Model, layout: Layout) -> TransformerConfig:
    fields: dict[str, Any] = {
        # in a hybrid model attention and MLP count as a layer each
        "num_layers": NUM_LAYERS * (2 if model.kind == "hybrid" else 1),
        "hidden_size": 32,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 64,
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # larger than usual, so that each layer's share in the result is far above round-off
        "init_method_std": 0.2,
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if layout.vpp > 1 else None,
        "sequence_parallel": layout.sp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "bf16": layout.bf16,
        "params_dtype": torch.bfloat16 if layout.bf16 else torch.float32,
        "pipeline_dtype": torch.bfloat16 if layout.bf16 else torch.float32,
        "deallocate_pipeline_outputs": True,
        "batch_p2p_comm": False,
        "attention_softmax_in_fp32": True,
    }
    if model.experts:
        fields |= {
            "num_moe_experts": 4,
            "moe_ffn_hidden_size": 32,
            "moe_router_topk": 2,
            # a balancing loss is of a micro-batch, so it differs with how the batch is cut
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_token_dispatcher_type": "alltoall",
            "moe_shared_expert_intermediate_size": 32,
            "moe_grouped_gemm": False,
        }
    if model.mtp:
        fields |= {"mtp_num_layers": 1}
    return TransformerConfig(**fields)


def _builder(model: Model, transformer: TransformerConfig) -> Any:
    shared: dict[str, Any] = {
        "transformer": transformer,
        "vocab_size": VOCAB,
        "seq_length": SEQ_LENGTH,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": model.tied,
    }
    if model.kind == "hybrid":
        hybrid = HybridModelConfig(
            hybrid_layer_pattern="*-" * NUM_LAYERS,
            hybrid_stack_spec=xielu_hybrid_spec(transformer),
            **shared,
        )
        hybrid.pre_wrap_hooks += [finish_norms, install_on_chunks, distinct_alphas]
        return HybridModelBuilder(hybrid)
    gpt = GPTModelConfig(transformer_layer_spec=xielu_layer_spec, **shared)
    gpt.pre_wrap_hooks += [install_on_chunks, distinct_alphas]
    return GPTModelBuilder(gpt)


@torch.no_grad()
def distinct_alphas(chunks: list[nn.Module]) -> list[nn.Module]:
    """A hook: every layer and expert starts with alphas of its own, so that a mix-up shows.

    Only the one rank that makes the start calls it with all layers; others load over it.
    """
    index = 0
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, ParallelXIELU):
                module.alpha_p.fill_(0.2 + 0.06 * index)
                module.alpha_n.fill_(-1.0 + 0.04 * index)
                index += 1
    return chunks
