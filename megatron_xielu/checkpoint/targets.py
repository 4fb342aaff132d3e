"""The classes of transformers that a saved model can become, their config.json, and what they lack.

Arcee and Apertus are the two that compute xIELU; Llama, Qwen3 and Arcee with squared ReLU hold the
models that xIELU is compared with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from megatron_xielu.checkpoint.architecture import (
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    ORIGINAL_MAX_POSITION_EMBEDDINGS,
    Activation,
    Architecture,
)
from megatron_xielu.errors import UserError

Arch = Literal["auto", "arcee", "apertus", "llama", "qwen3"]
TokenIds = int | list[int] | None


@dataclass(frozen=True)
class SpecialTokens:
    """The ids that a model's config names; a model may end its texts in several ways."""

    bos: TokenIds = None
    eos: TokenIds = None
    pad: TokenIds = None

    @staticmethod
    def of_config(content: Mapping[str, Any]) -> SpecialTokens:
        """From transformers' names."""
        return SpecialTokens(*(content.get(f"{role}_token_id") for role in ("bos", "eos", "pad")))

    def as_config(self) -> dict[str, TokenIds]:
        """By transformers' names."""
        return {"bos_token_id": self.bos, "eos_token_id": self.eos, "pad_token_id": self.pad}


@dataclass(frozen=True, kw_only=True)
class Target:
    """One class of transformers."""

    name: str
    """What `--arch` and config.json's model_type call it."""
    class_name: str
    hidden_acts: dict[Activation, str]
    """The activations it computes, by transformers' names."""
    qk_norm: bool
    """Whether it normalizes queries and keys; each class always or never does."""
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    splits_hidden: bool = False
    """Demands that the heads divide the hidden size, whatever the head_dim."""
    extra: dict[str, Any]
    """What its config.json says beyond what all have."""


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="arcee",
            class_name="ArceeForCausalLM",
            hidden_acts={"xielu": "xielu", "relu2": "relu2"},
            qk_norm=False,
            splits_hidden=True,
            extra={"mlp_bias": False, "qk_norm": False, "post_norm": False},
        ),
        Target(
            name="apertus",
            class_name="ApertusForCausalLM",
            hidden_acts={"xielu": "xielu"},
            qk_norm=True,
            input_norm="attention_layernorm",
            mlp_norm="feedforward_layernorm",
            # mlx-lm does not load without them
            extra={"mlp_bias": False, "qk_norm": True, "post_norm": False},
        ),
        Target(
            name="llama",
            class_name="LlamaForCausalLM",
            hidden_acts={"swiglu": "silu"},
            qk_norm=False,
            splits_hidden=True,
            extra={"mlp_bias": False},
        ),
        Target(
            name="qwen3",
            class_name="Qwen3ForCausalLM",
            hidden_acts={"swiglu": "silu"},
            qk_norm=True,
            extra={"use_sliding_window": False, "sliding_window": None},
        ),
    )
}


def choose_target(arch: Architecture, name: Arch = "auto") -> Target:
    """The class for a model: the named one, or the one that fits.

    Raises:
        UserError: it cannot hold the model, with every reason.
    """
    if name == "auto":
        return _fitting(arch)
    if name not in TARGETS:
        raise UserError(f"--arch {name!r} is none of auto, {', '.join(TARGETS)}.")
    target = TARGETS[name]
    if reasons := _reasons(target, arch):
        raise UserError(_refusal(target, reasons))
    return target


def hf_config(
    target: Target, arch: Architecture, tokens: SpecialTokens, dtype: torch.dtype
) -> dict[str, Any]:
    """config.json.

    Some facts stand twice: transformers 5 reads dtype and rope_parameters, transformers 4 and
    other clients torch_dtype, rope_theta and rope_scaling, and a missing key means a silent
    default. Token ids are always named, for defaults (128000 of Arcee, 3 for padding of Apertus)
    exceed small vocabularies or freeze a row.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    scaling = _rope_scaling(arch)
    return {
        "architectures": [target.class_name],
        "model_type": target.name,
        "hidden_act": target.hidden_acts[arch.activation],
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.hidden_size,
        "intermediate_size": arch.ffn_hidden_size,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.num_attention_heads,
        "num_key_value_heads": arch.num_query_groups,
        "head_dim": arch.head_dim,
        "max_position_embeddings": arch.seq_length,
        "rms_norm_eps": arch.norm_epsilon,
        "initializer_range": arch.init_std,
        "rope_parameters": {
            **(scaling or {"rope_type": "default"}),
            "rope_theta": arch.rope_theta,
        },
        "rope_theta": arch.rope_theta,
        "rope_scaling": scaling,
        "attention_bias": False,
        "attention_dropout": 0.0,
        **target.extra,
        "tie_word_embeddings": arch.tie_embeddings,
        "use_cache": True,
        **tokens.as_config(),
        "dtype": dtype_name,
        "torch_dtype": dtype_name,
    }


def generation_config(tokens: SpecialTokens) -> dict[str, Any]:
    """generation_config.json: where to stop, nothing about sampling."""
    return {"_from_model_config": True, **tokens.as_config()}


def _fitting(arch: Architecture) -> Target:
    refused = []
    for target in TARGETS.values():
        reasons = _reasons(target, arch)
        if not reasons:
            return target
        refused.append(_refusal(target, reasons))
    raise UserError("\n".join(["No class of transformers holds this model.", *refused]))


def _refusal(target: Target, reasons: list[str]) -> str:
    lines = [f"The model cannot be exported as {target.class_name}:"]
    return "\n".join([*lines, *(f"  {reason}" for reason in reasons)])


def _reasons(target: Target, arch: Architecture) -> list[str]:
    """Every reason why a class cannot hold a model."""
    reasons = []
    if arch.activation not in target.hidden_acts:
        reasons.append(
            f"activation={arch.activation}: its MLP computes {' or '.join(target.hidden_acts)}"
        )
    elif arch.activation == "xielu" and arch.beta != 0.5:
        reasons.append(f"beta={arch.beta}: clients compute with 0.5 whatever the file says")
    if arch.qk_layernorm != target.qk_norm:
        reasons.append(
            f"qk_layernorm={str(arch.qk_layernorm).lower()}: {target.class_name} "
            f"{'always normalizes' if target.qk_norm else 'cannot normalize'} queries and keys"
        )
    if target.splits_hidden and arch.hidden_size % arch.num_attention_heads:
        reasons.append(
            f"hidden_size={arch.hidden_size} is no multiple of num_attention_heads="
            f"{arch.num_attention_heads}, which it demands whatever the head_dim"
        )
    return reasons


def _rope_scaling(arch: Architecture) -> dict[str, Any] | None:
    if arch.rope_scaling_factor is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": arch.rope_scaling_factor,
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": ORIGINAL_MAX_POSITION_EMBEDDINGS,
    }
