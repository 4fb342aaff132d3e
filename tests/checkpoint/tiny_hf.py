"""Hugging Face folders as transformers itself writes them, small and with numbers all distinct."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_xielu.checkpoint.hf_model import quiet_transformers

DEFAULT = {"rope_type": "default", "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SIZES = {
    # no multiple of 128: Megatron's embedding gets padding rows
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    "arcee": {"hidden_act": "xielu", "rope_parameters": DEFAULT},
    "apertus": {"rope_parameters": LLAMA3, "head_dim": 24},
    "apertus-bf16": {"rope_parameters": DEFAULT, "dtype": torch.bfloat16},
    "llama": {"rope_parameters": LLAMA3, "num_key_value_heads": 4},
    "qwen3-tied": {"rope_parameters": DEFAULT, "head_dim": 24, "tie_word_embeddings": True},
    "arcee-relu2-bf16": {
        "hidden_act": "relu2",
        "rope_parameters": DEFAULT,
        "dtype": torch.bfloat16,
    },
}


def write_hf(folder: Path, name: str, **changed: Any) -> Path:
    """One of MODELS, in several files; keys of config.json may be changed."""
    import transformers

    classes = {
        "arcee": transformers.ArceeConfig,
        "apertus": transformers.ApertusConfig,
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
    }
    options = {**SIZES, **MODELS[name], **changed}
    dtype = options.pop("dtype", torch.float32)
    # transformers writes into the dictionary it is given
    options["rope_parameters"] = dict(options["rope_parameters"])
    torch.manual_seed(0)
    with quiet_transformers():
        config = classes[name.partition("-")[0]](**options)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for key, parameter in model.named_parameters():
        mean, std = (1.0, 0.1) if "norm" in key else (0.0, 0.08)
        torch.nn.init.normal_(parameter, mean, std)
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp.act_fn, "alpha_p"):
            # Arcee builds them in bf16 whatever the dtype
            layer.mlp.act_fn.to(dtype)
            layer.mlp.act_fn.alpha_p.data.fill_(0.2034 + 0.7123 * index)
            layer.mlp.act_fn.alpha_n.data.fill_(-1.0502 + 0.5321 * index)
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size="100KB")
    return folder
