"""config.json becomes the model that transformers makes of it, or is refused with every reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import LLAMA3, MODELS, SIZES, write_hf

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.hf_config import read_architecture, special_tokens
from megatron_xielu.checkpoint.targets import TARGETS, SpecialTokens, hf_config
from megatron_xielu.errors import UserError

TINY = Architecture(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=500,
    tie_embeddings=False,
    qk_layernorm=False,
    activation="xielu",
    norm_epsilon=1e-5,
    rope_theta=5e5,
    seq_length=64,
)
EXPECTED = {
    "arcee": TINY,
    "apertus": replace(TINY, qk_layernorm=True, head_dim=24, rope_scaling_factor=4.0),
    "apertus-bf16": replace(TINY, qk_layernorm=True),
    "llama": replace(TINY, activation="swiglu", num_query_groups=4, rope_scaling_factor=4.0),
    "qwen3-tied": replace(
        TINY, activation="swiglu", qk_layernorm=True, head_dim=24, tie_embeddings=True
    ),
    "arcee-relu2-bf16": replace(TINY, activation="relu2"),
}
BARE = {name: SIZES[name] for name in list(SIZES)[:5]}
"""What a config must say; everything else has a default."""


def read(content: dict[str, Any]) -> Architecture:
    return read_architecture(content, TARGETS[content["model_type"]], Path("config.json"))


@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes(tmp_path: Path, name: str) -> None:
    content = json.loads((write_hf(tmp_path, name) / "config.json").read_text())
    assert read(content) == EXPECTED[name]


@pytest.mark.parametrize("name", MODELS)
def test_what_an_export_writes(name: str) -> None:
    target = TARGETS[name.partition("-")[0]]
    content = hf_config(target, EXPECTED[name], SpecialTokens(), torch.float32)
    assert read(content) == EXPECTED[name]
    legacy = {key: value for key, value in content.items() if key != "rope_parameters"}
    if target.name != "apertus":
        assert read(legacy) == EXPECTED[name]


@pytest.mark.parametrize("kind", TARGETS)
def test_defaults_are_those_of_transformers(kind: str) -> None:
    from transformers import AutoConfig

    bare = BARE | ({"num_key_value_heads": 2} if kind == "qwen3" else {})
    config = AutoConfig.for_model(kind, **bare)
    arch = read({"model_type": kind, **bare})
    rope = config.rope_parameters
    assert arch.norm_epsilon == config.rms_norm_eps
    assert arch.seq_length == config.max_position_embeddings
    assert arch.num_query_groups == config.num_key_value_heads
    assert arch.head_dim == getattr(config, "head_dim", 16)
    assert arch.tie_embeddings == config.tie_word_embeddings
    assert arch.rope_theta == rope["rope_theta"]
    assert arch.rope_scaling_factor == rope.get("factor")
    assert TARGETS[kind].hidden_acts[arch.activation] == config.hidden_act
    ids = special_tokens({"model_type": kind, **bare}, TARGETS[kind])
    expected = [getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")]
    assert [ids.bos, ids.eos, ids.pad] == expected


@pytest.mark.parametrize(
    ("kind", "keys", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, r"hidden_act='gelu': .*LlamaForCausalLM.* silu"),
        ("arcee", {"attention_bias": True}, "attention_bias=true: attention has biases"),
        ("arcee", {"mlp_bias": True}, "mlp_bias=true: the MLP has biases"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window=true: attention sees a window"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention"),
        ("llama", {"quantization_config": {"bits": 4}}, "use the unquantized model"),
        ("llama", {"partial_rotary_factor": 0.5}, "RoPE turns only a part of the channels"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear'"),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 2.0}},
            r"low_freq_factor=2\.0 of RoPE's llama3: Megatron has 1, no flag for it",
        ),
        (
            "llama",
            {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 4096}},
            "original_max_position_embeddings=4096",
        ),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": None}}, "factor=None of RoPE's llama3"),
        ("llama", {"rope_parameters": LLAMA3, "rope_theta": 1e4}, "contradict each other"),
        (
            "apertus",
            {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3 | {"factor": 2.0}},
            "contradict each other",
        ),
        ("apertus", {"rope_theta": 5e5}, "transformers 5 passes over it"),
        ("apertus", {"rope_theta": 12e6, "rope_scaling": None}, "transformers 5 passes over it"),
    ],
)
def test_what_megatron_cannot_compute(kind: str, keys: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read({"model_type": kind, **BARE, **keys})


def test_all_reasons_at_once() -> None:
    with pytest.raises(UserError) as error:
        read({"model_type": "arcee", **BARE, "mlp_bias": True, "hidden_act": "silu"})
    assert "config.json" in str(error.value)
    assert len(str(error.value).splitlines()) == 3


def test_sizes_must_be_said() -> None:
    with pytest.raises(UserError, match=r"does not say hidden_size, intermediate_size\."):
        read({"model_type": "llama", **BARE, "hidden_size": None, "intermediate_size": None})


def test_published_apertus_is_read() -> None:
    """The keys of Apertus-8B, written by transformers 4."""
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    keys = {"rope_theta": 12e6, "rope_scaling": scaling | {"factor": 8.0}}
    arch = read({"model_type": "apertus", **BARE, **keys})
    assert (arch.rope_theta, arch.rope_scaling_factor) == (12e6, 8.0)
