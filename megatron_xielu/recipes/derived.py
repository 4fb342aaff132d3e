"""Numbers that follow from a recipe whose optional fields may be None."""

from __future__ import annotations

from typing import Literal

from megatron_xielu.recipes.schema import FP8, Model, Recipe

_VOCAB_MULTIPLE = 128


def head_dim(model: Model) -> int:
    """Channels of one attention head."""
    if model.head_dim is not None:
        return model.head_dim
    return model.hidden_size // model.num_attention_heads


def num_query_groups(model: Model) -> int:
    """Key/value heads."""
    return model.num_query_groups or model.num_attention_heads


def embedding_rows(model: Model) -> int | None:
    """Rows of the embedding, padding included; None where they follow from the data."""
    return model.padded_vocab_size or model.vocab_size


def padded_vocab_size(vocab_size: int) -> int:
    """Rows of the embedding for a vocabulary, the same whatever the tensor-parallel size is."""
    return -(-vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Model replicas among `world_size` ranks; the recipe must pass `validate` for that size."""
    parallel = recipe.parallel
    ranks_per_replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    assert world_size % ranks_per_replica == 0
    return world_size // ranks_per_replica


def fp8_format(fp8: FP8) -> Literal["hybrid", "e4m3"]:
    """The number formats of a run whose fp8.recipe is not off."""
    if fp8.format is not None:
        return fp8.format
    return "hybrid" if fp8.recipe in ("delayed", "tensorwise") else "e4m3"
