"""Recipes: what decides a pretraining run, checked as a whole and turned into Megatron's flags."""

from megatron_xielu.recipes.derived import (
    data_parallel_size,
    embedding_rows,
    fp8_format,
    head_dim,
    num_query_groups,
    padded_vocab_size,
)
from megatron_xielu.recipes.loader import diff, load_recipe, preset_names, recipe_keys, to_yaml
from megatron_xielu.recipes.megatron_args import megatron_args
from megatron_xielu.recipes.schema import Recipe
from megatron_xielu.recipes.validate import RecipeError, check, validate

__all__ = [
    "Recipe",
    "RecipeError",
    "check",
    "data_parallel_size",
    "diff",
    "embedding_rows",
    "fp8_format",
    "head_dim",
    "load_recipe",
    "megatron_args",
    "num_query_groups",
    "padded_vocab_size",
    "preset_names",
    "recipe_keys",
    "to_yaml",
    "validate",
]
