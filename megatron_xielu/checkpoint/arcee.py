"""The config of ArceeForCausalLM with hidden_act="xielu": Llama around a non-gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, head_dim, num_query_groups


@dataclass(frozen=True)
class SpecialTokens:
    """A tokenizer's size and the ids that a model's config names."""

    vocab_size: int
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def refuse_unrepresentable(recipe: Recipe) -> None:
    """Raises UserError with every reason why Arcee cannot hold this recipe's model."""
    model, reasons = recipe.model, []
    if recipe.xielu.beta != 0.5:
        reasons.append(
            f"xielu.beta={recipe.xielu.beta}: clients compute with 0.5 whatever the file says"
        )
    if model.activation != "xielu":
        reasons.append(f"model.activation={model.activation}: no export has been written for it")
    if model.rope_scaling_factor is not None:
        reasons.append(
            f"model.rope_scaling_factor={model.rope_scaling_factor}: no export has been written "
            "for it"
        )
    if model.qk_layernorm:
        reasons.append("model.qk_layernorm=true: Arcee has no QK-norm")
    if model.hidden_size % model.num_attention_heads:
        reasons.append(
            f"model.hidden_size={model.hidden_size} is no multiple of num_attention_heads="
            f"{model.num_attention_heads}, which Arcee demands whatever the head_dim"
        )
    if reasons:
        raise UserError(
            f"recipe {recipe.name!r} cannot be exported as ArceeForCausalLM:\n"
            + "\n".join(f"  {reason}" for reason in reasons)
        )


def arcee_config(recipe: Recipe, tokens: SpecialTokens, dtype: torch.dtype) -> dict[str, Any]:
    """config.json.

    Some facts stand twice: transformers 5 reads dtype and rope_parameters, transformers 4 and
    other clients torch_dtype, rope_theta and rope_scaling, and a missing key means a silent
    default. Token ids are always named, for Arcee's (128000) exceed small vocabularies.
    """
    model = recipe.model
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "architectures": ["ArceeForCausalLM"],
        "model_type": "arcee",
        "hidden_act": "xielu",
        "vocab_size": tokens.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": num_query_groups(model),
        "head_dim": head_dim(model),
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "qk_norm": False,
        "post_norm": False,
        "tie_word_embeddings": model.tie_embeddings,
        "use_cache": True,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def generation_config(tokens: SpecialTokens) -> dict[str, Any]:
    """generation_config.json: where to stop, nothing about sampling."""
    return {
        "_from_model_config": True,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "pad_token_id": tokens.pad,
    }
