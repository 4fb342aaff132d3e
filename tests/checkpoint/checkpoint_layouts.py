"""The models and layouts whose checkpoints these tests read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_xielu.recipes import Recipe
from megatron_xielu.recipes.schema import Model, Optimizer, Parallel, Schedule, Training

GQA = Model(
    num_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=96,
    seq_length=32,
    vocab_size=320,
    padded_vocab_size=384,
    tie_embeddings=False,
    rope_theta=5000.0,
    norm_epsilon=1e-5,
)
# four heads of 24 channels: head_dim times heads is not the hidden size
MHA_TIED = replace(GQA, num_query_groups=None, head_dim=24, tie_embeddings=True)
QK_NORM = replace(GQA, qk_layernorm=True)
SWIGLU = replace(GQA, activation="swiglu")
# wavelengths lie on both sides of Llama 3's limits
SCALED = replace(QK_NORM, rope_scaling_factor=4.0)
HYBRID = ["--hybrid-layer-pattern", "*-*-*-*-"]
TP2 = Parallel(tensor_model_parallel_size=2)
PP2 = Parallel(pipeline_model_parallel_size=2)

LAYOUTS: dict[str, tuple[Model, Parallel, dict[str, Any]]] = {
    "gqa": (GQA, Parallel(), {}),
    "mha-tied-per-layer": (MHA_TIED, Parallel(), {"per_layer_keys": True}),
    "bf16": (GQA, Parallel(), {"precision": "bf16"}),
    "gqa-tp2": (GQA, TP2, {}),
    "mha-tied-pp2": (MHA_TIED, PP2, {}),
    "apertus": (QK_NORM, Parallel(), {}),
    "apertus-tied-tp2": (replace(MHA_TIED, qk_layernorm=True), TP2, {}),
    "apertus-scaled": (SCALED, Parallel(), {}),
    "llama": (SWIGLU, Parallel(), {}),
    "llama-tp2": (SWIGLU, TP2, {}),
    "qwen3": (replace(SWIGLU, qk_layernorm=True, head_dim=24), Parallel(), {}),
    "relu2": (replace(GQA, activation="relu2"), Parallel(), {"per_layer_keys": True}),
    "plain": (GQA, Parallel(), {"plain": True}),
    "hybrid": (GQA, Parallel(), {"flags": HYBRID, "plain": True}),
    "hybrid-tp2": (GQA, TP2, {"flags": HYBRID, "plain": True}),
}
TARGETS = {"apertus": "apertus", "llama": "llama", "qwen3": "qwen3"}
"""What layouts become, by the first word of their names; the rest becomes Arcee."""


def target_of(name: str) -> str:
    """The class that a layout's export must get."""
    return TARGETS.get(name.partition("-")[0], "arcee")


def recipe_of(name: str) -> Recipe:
    """The recipe of one layout."""
    model, parallel, _ = LAYOUTS[name]
    return Recipe(
        name=name,
        model=model,
        parallel=parallel,
        training=Training(train_iters=400, global_batch_size=8, micro_batch_size=2),
        optimizer=Optimizer(lr=1e-3),
        schedule=Schedule(lr_warmup_iters=10, lr_wsd_decay_iters=10),
    )
