"""config.json of a Hugging Face folder to an Architecture, as transformers itself would read it.

A key that is not there means the default of the model's class, which differs from class to class.
RoPE is written in two ways, `rope_parameters` by transformers 5, `rope_theta` and `rope_scaling` by
transformers 4; what the two versions would read differently is refused instead of guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoint.architecture import (
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    ORIGINAL_MAX_POSITION_EMBEDDINGS,
    Architecture,
)
from megatron_xielu.checkpoint.targets import TARGETS, Target
from megatron_xielu.errors import UserError

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
"""transformers has defaults for these too, but a model of a default size says so."""
_NO_SCALING = {"rope_type": "default"}
_LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": LOW_FREQ_FACTOR,
    "high_freq_factor": HIGH_FREQ_FACTOR,
    "original_max_position_embeddings": ORIGINAL_MAX_POSITION_EMBEDDINGS,
}
_COMMON = {
    "attention_bias": False,
    "mlp_bias": False,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
    "use_sliding_window": False,
}
# of transformers' configuration classes, 4.57 and 5.23 alike
_DEFAULTS: dict[str, dict[str, Any]] = {
    "arcee": {"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "apertus": {"hidden_act": "xielu", "max_position_embeddings": 65536, "rms_norm_eps": 1e-5},
    "llama": {"hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6},
    "qwen3": {
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "head_dim": 128,
        "num_key_value_heads": 32,
    },
}
_APERTUS_ROPE = {**_LLAMA3, "factor": 8.0}
_APERTUS_THETA = 12e6
_THETA = 1e4


@dataclass(frozen=True)
class HfModel:
    """What config.json says."""

    target: Target
    architecture: Architecture


def read_config(hf_dir: Path) -> HfModel:
    """The model that a Hugging Face folder's config.json describes.

    Raises:
        UserError: there is none, it is of another architecture, it says what Megatron cannot
            compute, or versions of transformers would read it differently; every reason is named.
    """
    path = Path(hf_dir) / "config.json"
    if not path.is_file():
        raise UserError(f"{hf_dir} is not a Hugging Face model folder: it has no config.json.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}. Copy it again.") from error
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type not in TARGETS:
        known = ", ".join(target.class_name for target in TARGETS.values())
        raise UserError(f"{path}: model_type {model_type!r} is none of those that convert: {known}")
    if missing := [name for name in _SIZES if content.get(name) is None]:
        raise UserError(f"{path} does not say {', '.join(missing)}. Copy it again from its source.")
    target = TARGETS[model_type]
    # null is what transformers writes for "not set"
    config = _COMMON | _DEFAULTS[model_type]
    config |= {name: value for name, value in content.items() if value is not None}
    reasons = [*_refusals(config, target), *_rope_refusals(content, config)]
    if reasons:
        raise UserError(
            f"{path}: the model cannot be trained on in Megatron:\n"
            + "\n".join(f"  {reason}" for reason in reasons)
        )
    activations = {hf: ours for ours, hf in target.hidden_acts.items()}
    theta, scaling = _rope(content, config)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    architecture = Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim", hidden // heads),
        vocab_size=config["vocab_size"],
        tie_embeddings=config["tie_word_embeddings"],
        qk_layernorm=target.qk_norm,
        activation=activations[config["hidden_act"]],
        norm_epsilon=config["rms_norm_eps"],
        rope_theta=theta,
        rope_scaling_factor=scaling.get("factor"),
        seq_length=config["max_position_embeddings"],
        init_std=config["initializer_range"],
    )
    return HfModel(target, architecture)


def _refusals(config: Mapping[str, Any], target: Target) -> list[str]:
    reasons = []
    if config["hidden_act"] not in target.hidden_acts.values():
        known = " or ".join(target.hidden_acts.values())
        reasons.append(f"hidden_act={config['hidden_act']!r}: {target.class_name} needs {known}")
    for name, what in (
        ("attention_bias", "attention has biases"),
        ("mlp_bias", "the MLP has biases"),
        ("use_sliding_window", "attention sees a window only"),
    ):
        # transformers passes over a key that its class does not have
        if config[name] and not (name == "mlp_bias" and target.name in ("apertus", "qwen3")):
            reasons.append(f"{name}=true: {what}")
    if other := {kind for kind in config.get("layer_types", ()) if kind != "full_attention"}:
        reasons.append(f"layer_types has {', '.join(sorted(other))}: attention sees a window only")
    if config["quantization_config"]:
        reasons.append("quantization_config: the weights are quantized; use the unquantized model")
    return reasons


def _rope_refusals(content: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    reasons = []
    written = [content.get(name) for name in ("rope_parameters", "rope_scaling")]
    scalings = [_scaling(value, config) for value in written if value]
    thetas = {
        value.get("rope_theta") for value in (*written, content) if value
    } - {None}  # fmt: skip
    if len(thetas) > 1 or (len(scalings) == 2 and scalings[0] != scalings[1]):
        reasons.append(
            "rope_parameters contradicts rope_theta or rope_scaling, so that versions of "
            "transformers compute different models: remove what is wrong"
        )
    elif config["model_type"] == "apertus" and not scalings and _legacy_apertus(content):
        reasons.append(
            "rope_theta or rope_scaling without rope_parameters: transformers 5 passes over it and "
            f"computes with theta {_APERTUS_THETA:g} and llama3 scaling, transformers 4 does not; "
            'add "rope_parameters": {"rope_type": ..., "rope_theta": ...} as it was trained'
        )
    partial = {value.get("partial_rotary_factor", 1.0) for value in (*written, config) if value}
    if partial != {1.0}:
        reasons.append("partial_rotary_factor: RoPE turns only a part of the channels")
    return reasons + [reason for scaling in scalings[:1] for reason in _unlike_llama3(scaling)]


def _legacy_apertus(content: Mapping[str, Any]) -> bool:
    other_theta = content.get("rope_theta", _APERTUS_THETA) != _APERTUS_THETA
    return other_theta or "rope_scaling" in content


def _unlike_llama3(scaling: Mapping[str, Any]) -> list[str]:
    if scaling["rope_type"] == "default":
        return []
    if scaling["rope_type"] != "llama3":
        return [f"rope_type={scaling['rope_type']!r}: Megatron scales RoPE as llama3 does or not"]
    return [
        f"{name}={scaling.get(name)!r} of llama3's RoPE: Megatron has {value:g} and no flag for it"
        for name, value in _LLAMA3.items()
        if name != "rope_type" and scaling.get(name) != value
    ] + ["factor of llama3's RoPE is missing"] * ("factor" not in scaling)


def _scaling(written: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a RoPE dictionary of either style, with transformers' defaults."""
    kind = written.get("rope_type", written.get("type", "default"))
    if kind == "default":
        return _NO_SCALING
    skipped = ("rope_theta", "partial_rotary_factor", "type")
    length = config.get("original_max_position_embeddings", config["max_position_embeddings"])
    return {
        "original_max_position_embeddings": length,
        **{name: value for name, value in written.items() if name not in skipped},
        "rope_type": kind,
    }


def _rope(content: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Theta and scaling of a config without a reason to refuse it."""
    written = [value for name in ("rope_parameters", "rope_scaling") if (value := content.get(name))]
    apertus = config["model_type"] == "apertus"
    thetas = [value["rope_theta"] for value in (*written, content) if value.get("rope_theta")]
    theta = thetas[0] if thetas else _APERTUS_THETA if apertus else _THETA
    if not written:
        return float(theta), dict(_APERTUS_ROPE if apertus else _NO_SCALING)
    return float(theta), _scaling(written[0], config)
