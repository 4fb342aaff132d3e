"""config.json of a Hugging Face folder to an Architecture, as transformers itself would read it.

A key that is not there means the default of the model's class, which differs from class to class.
RoPE is written in two ways, `rope_parameters` by transformers 5, `rope_theta` and `rope_scaling` by
transformers 4; what the two versions would read differently is refused instead of guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from math import inf
from pathlib import Path
from typing import Any

from megatron_xielu.checkpoint.architecture import (
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    ORIGINAL_MAX_POSITION_EMBEDDINGS,
    Architecture,
)
from megatron_xielu.checkpoint.targets import SpecialTokens, Target
from megatron_xielu.errors import UserError

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
"""transformers has defaults for these too, but a model of a default size says so."""
_COUNTS = (
    *_SIZES,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "original_max_position_embeddings",
)
_NUMBERS = ("rms_norm_eps", "initializer_range", "rope_theta", "factor", "partial_rotary_factor")
_ROPE_KEYS = ("rope_parameters", "rope_scaling")
_NAMES = ("model_type", "hidden_act", "rope_type")
_TOKEN_KEYS = tuple(SpecialTokens().as_config())
_FLAGS = ("attention_bias", "mlp_bias", "use_sliding_window", "tie_word_embeddings")
_NO_SCALING: dict[str, Any] = {"rope_type": "default"}
_LLAMA3 = {
    "low_freq_factor": LOW_FREQ_FACTOR,
    "high_freq_factor": HIGH_FREQ_FACTOR,
    "original_max_position_embeddings": ORIGINAL_MAX_POSITION_EMBEDDINGS,
}
_COMMON: dict[str, Any] = {
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
_TOKEN_IDS = {
    "arcee": SpecialTokens(bos=128000, eos=128001),
    "apertus": SpecialTokens(bos=1, eos=2, pad=3),
    "llama": SpecialTokens(bos=1, eos=2),
    "qwen3": SpecialTokens(),
}
_THETA = 1e4
_APERTUS_THETA = 12e6
_APERTUS_SCALING: dict[str, Any] = {"rope_type": "llama3", "factor": 8.0, **_LLAMA3}


def check_types(content: Mapping[str, Any], path: Path) -> None:
    """Raises UserError with every key of a config.json whose value is of no such key's type."""
    ropes = [content[key] for key in _ROPE_KEYS if isinstance(content.get(key), dict)]
    if wrong := [line for values in (content, *ropes) for line in _wrong_types(values)]:
        raise UserError(
            "\n  ".join([f"{path} cannot be read:", *wrong]) + "\nGet it again from its source."
        )


def _wrong_types(values: Mapping[str, Any]) -> Iterator[str]:
    rules: tuple[tuple[Collection[str], Callable[[Any], bool], str], ...] = (
        (_COUNTS, lambda value: type(value) is int and value > 0, "a whole number above 0"),
        (_NUMBERS, lambda value: type(value) in (int, float) and 0 < value < inf, "above 0"),
        (_NAMES, lambda value: isinstance(value, str), "a name"),
        (_FLAGS, lambda value: isinstance(value, bool), "true or false"),
        (_ROPE_KEYS, lambda value: isinstance(value, dict), "names and values"),
        (("layer_types",), _is_list_of(str), "a list of names"),
        (_TOKEN_KEYS, _is_token, "a token's id or a list of such"),
    )
    for names, holds, rule in rules:
        for name in names:
            # null is what transformers writes for "not set"
            if (value := values.get(name)) is not None and not holds(value):
                yield f"{name} is {value!r} and must be {rule}"


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(type(part) is kind for part in value)


def _is_token(value: Any) -> bool:
    return type(value) is int or _is_list_of(int)(value)


def special_tokens(content: Mapping[str, Any], target: Target) -> SpecialTokens:
    """The ids that a config.json names; one that it does not mention is the class's."""
    return SpecialTokens.of_config({**_TOKEN_IDS[target.name].as_config(), **content})


def read_architecture(content: Mapping[str, Any], target: Target, path: Path) -> Architecture:
    """The model that a config.json describes.

    Args:
        content: config.json as it is; `check_types` must pass.
        target: the class of its model_type.
        path: where it came from, for messages.

    Raises:
        UserError: it lacks a size, says what Megatron cannot compute, or versions of transformers
            would read it differently; every reason is named.
    """
    if missing := [name for name in _SIZES if content.get(name) is None]:
        raise UserError(f"{path} does not say {', '.join(missing)}. Copy it again from its source.")
    # null is what transformers writes for "not set"
    config = _COMMON | _DEFAULTS[target.name]
    config |= {name: value for name, value in content.items() if value is not None}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    groups = config.get("num_key_value_heads", heads)
    reasons = _refusals(config, target)
    if heads % groups:
        reasons.append(f"num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    if "head_dim" not in config and hidden % heads:
        reasons.append(f"num_attention_heads={heads} does not divide hidden_size={hidden}")
    rope_theta, rope_scaling_factor = _rope(content, config, reasons)
    if reasons:
        raise UserError(
            f"{path}: Megatron cannot compute this model:\n"
            + "\n".join(f"  {reason}" for reason in reasons)
        )
    activations = {hf: ours for ours, hf in target.hidden_acts.items()}
    return Architecture(
        num_layers=config["num_hidden_layers"],
        hidden_size=hidden,
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=config.get("head_dim", hidden // heads),
        vocab_size=config["vocab_size"],
        tie_embeddings=config["tie_word_embeddings"],
        qk_layernorm=target.qk_norm,
        activation=activations[config["hidden_act"]],
        norm_epsilon=config["rms_norm_eps"],
        rope_theta=rope_theta,
        rope_scaling_factor=rope_scaling_factor,
        seq_length=config["max_position_embeddings"],
        init_std=config["initializer_range"],
    )


def _refusals(config: Mapping[str, Any], target: Target) -> list[str]:
    reasons = []
    if config["hidden_act"] not in target.hidden_acts.values():
        known = " or ".join(target.hidden_acts.values())
        reasons.append(
            f"hidden_act={config['hidden_act']!r}: of {target.class_name} it has {known}"
        )
    for name, what in (
        ("attention_bias", "attention has biases"),
        ("mlp_bias", "the MLP has biases"),
        ("use_sliding_window", "attention sees a window only"),
    ):
        if config[name]:
            reasons.append(f"{name}=true: {what}")
    if other := {kind for kind in config.get("layer_types", ()) if kind != "full_attention"}:
        reasons.append(f"layer_types has {', '.join(sorted(other))}: attention sees a window only")
    if config["quantization_config"]:
        reasons.append("quantization_config: the weights are quantized; use the unquantized model")
    return reasons


def _rope(
    content: Mapping[str, Any], config: Mapping[str, Any], reasons: list[str]
) -> tuple[float, float | None]:
    """RoPE's theta and llama3's factor; what stands against either is added to `reasons`.

    Args:
        content: config.json as it is.
        config: the same with the class's defaults.
    """
    apertus = config["model_type"] == "apertus"
    written = [
        value for name in ("rope_parameters", "rope_scaling") if (value := content.get(name))
    ]
    thetas = [value["rope_theta"] for value in (*written, content) if value.get("rope_theta")]
    scalings = [_scaling(value, config) for value in written]
    theta = thetas[0] if thetas else _APERTUS_THETA if apertus else _THETA
    scaling = scalings[0] if scalings else _APERTUS_SCALING if apertus else _NO_SCALING
    if any(other != theta for other in thetas) or any(other != scaling for other in scalings):
        reasons.append(
            "rope_parameters, rope_theta and rope_scaling contradict each other, and versions of "
            "transformers follow different ones: remove what is wrong"
        )
    if apertus and not written and (theta != _APERTUS_THETA or "rope_scaling" in content):
        reasons.append(
            "rope_theta or rope_scaling without rope_parameters: transformers 5 passes over it and "
            f"computes with theta {_APERTUS_THETA:g} and llama3 scaling, transformers 4 does not; "
            'add "rope_parameters": {"rope_type": ..., "rope_theta": ...} as it was trained'
        )
    if any(value.get("partial_rotary_factor", 1.0) != 1.0 for value in (*written, config)):
        reasons.append("partial_rotary_factor: RoPE turns only a part of the channels")
    if scaling["rope_type"] == "llama3":
        reasons += [
            f"{name}={scaling.get(name)} of RoPE's llama3: Megatron has {value:g}, no flag for it"
            for name, value in _LLAMA3.items()
            if scaling.get(name) != value
        ]
        if not isinstance(scaling.get("factor"), (int, float)):
            reasons.append(f"factor={scaling.get('factor')} of RoPE's llama3 is no number")
            return theta, None
        return float(theta), float(scaling["factor"])
    if scaling["rope_type"] != "default":
        reasons.append(f"rope_type={scaling['rope_type']!r}: Megatron scales RoPE by llama3 or not")
    return float(theta), None


def _scaling(written: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """What one of the two keys says of scaling, as transformers completes it."""
    kind = written.get("rope_type", written.get("type", "default"))
    if kind == "default":
        return _NO_SCALING
    others = ("rope_theta", "partial_rotary_factor", "type", "rope_type")
    length = config.get("original_max_position_embeddings", config["max_position_embeddings"])
    return {
        "rope_type": kind,
        "original_max_position_embeddings": length,
        **{name: value for name, value in written.items() if name not in others},
    }
