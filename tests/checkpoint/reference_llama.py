"""A Llama with xIELU in float64: the formulas on Megatron's names, one head at a time.

Shares nothing with the package: neither its table of names nor its activation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu.recipes import Recipe, head_dim, num_query_groups

Weight = Callable[[str], Tensor]
"""A Megatron key, with the stacked layer axis first where it has one, to its tensor."""


def reference_logits(recipe: Recipe, weight: Weight, prompts: list[list[int]]) -> list[Tensor]:
    """float64 logits (tokens, padded vocabulary) of each prompt."""
    return [_forward(recipe, lambda key: weight(key).double(), torch.tensor(p)) for p in prompts]


def _forward(recipe: Recipe, weight: Weight, ids: Tensor) -> Tensor:
    model = recipe.model
    embedding = weight("embedding.word_embeddings.weight")
    x = embedding[ids]
    for i in range(model.num_layers):
        normed = _rms(
            x, weight("decoder.layers.self_attention.linear_qkv.layer_norm_weight")[i], recipe
        )
        x = x + _attention(normed, recipe, weight, i)
        normed = _rms(x, weight("decoder.layers.mlp.linear_fc1.layer_norm_weight")[i], recipe)
        hidden = normed @ weight("decoder.layers.mlp.linear_fc1.weight")[i].T
        alpha_p = weight("decoder.layers.mlp.activation_func.alpha_p")[i]
        alpha_n = weight("decoder.layers.mlp.activation_func.alpha_n")[i]
        x = (
            x
            + _xielu(hidden, alpha_p, alpha_n) @ weight("decoder.layers.mlp.linear_fc2.weight")[i].T
        )
    x = _rms(x, weight("decoder.final_layernorm.weight"), recipe)
    return x @ (embedding if model.tie_embeddings else weight("output_layer.weight")).T


def _attention(x: Tensor, recipe: Recipe, weight: Weight, layer: int) -> Tensor:
    model, size = recipe.model, head_dim(recipe.model)
    groups = num_query_groups(model)
    per_group = model.num_attention_heads // groups
    rows = weight("decoder.layers.self_attention.linear_qkv.weight")[layer]
    rows = rows.view(groups, (per_group + 2) * size, -1)
    outputs = []
    for group in range(groups):
        heads = [x @ rows[group, n * size : (n + 1) * size].T for n in range(per_group + 2)]
        value, key = heads.pop(), _rotate(heads.pop(), model.rope_theta)
        for query in heads:
            scores = _rotate(query, model.rope_theta) @ key.T / size**0.5
            future = torch.ones_like(scores).triu(1).bool()
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value)
    projection = weight("decoder.layers.self_attention.linear_proj.weight")[layer]
    return torch.cat(outputs, dim=-1) @ projection.T


def _rotate(x: Tensor, theta: float) -> Tensor:
    tokens, size = x.shape
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    first, second = x[:, : size // 2], x[:, size // 2 :]
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ],
        dim=-1,
    )


def _rms(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + recipe.model.norm_epsilon).sqrt() * weight


def _xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    a_p, a_n = F.softplus(alpha_p), 0.5 + F.softplus(alpha_n)
    return torch.where(x > 0, a_p * x**2, a_n * (torch.expm1(x.clamp(max=0)) - x)) + 0.5 * x
