"""The layouts' models in float64: the formulas on Megatron's names, one head at a time.

Shares nothing with the package: neither its table of names, nor its activation or description.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from checkpoint_layouts import LAYOUTS
from torch import Tensor
from write_checkpoint import weight_of

from megatron_xielu.recipes import embedding_rows, head_dim, num_query_groups
from megatron_xielu.recipes.schema import Model

Weight = Callable[..., Tensor]
"""A name and a layer's shape to the layer's tensor."""


def float64_logits(layout: str, prompts: list[list[int]]) -> list[Tensor]:
    """Logits (tokens, padded vocabulary) of each prompt."""
    model, _, options = LAYOUTS[layout]
    factor = model.rope_scaling_factor

    def weight(name: str, *shape: int, layer: int | None = None) -> Tensor:
        stacked = shape if layer is None else (model.num_layers, *shape)
        tensor = weight_of(name, stacked)
        if options.get("precision") == "bf16" and "alpha" not in name:
            tensor = tensor.bfloat16()
        return (tensor if layer is None else tensor[layer]).double()

    return [_forward(model, factor, weight, torch.tensor(prompt)) for prompt in prompts]


def _forward(model: Model, factor: float | None, weight: Weight, ids: Tensor) -> Tensor:
    hidden, rows = model.hidden_size, embedding_rows(model)
    embedding = weight("embedding.word_embeddings.weight", rows, hidden)
    x = embedding[ids]
    for i in range(model.num_layers):

        def of_layer(name: str, *shape: int, i: int = i) -> Tensor:
            return weight(f"decoder.layers.{name}", *shape, layer=i)

        norm = of_layer("self_attention.linear_qkv.layer_norm_weight", hidden)
        x = x + _attention(_rms(x, norm, model), model, factor, of_layer)
        norm = of_layer("mlp.linear_fc1.layer_norm_weight", hidden)
        x = x + _mlp(_rms(x, norm, model), model, of_layer)
    x = _rms(x, weight("decoder.final_layernorm.weight", hidden), model)
    head = embedding if model.tie_embeddings else weight("output_layer.weight", rows, hidden)
    return x @ head.T


def _mlp(x: Tensor, model: Model, weight: Weight) -> Tensor:
    width = model.ffn_hidden_size
    if model.activation == "swiglu":
        gate, up = weight("mlp.linear_fc1.weight", 2 * width, model.hidden_size).split(width)
        y = F.silu(x @ gate.T) * (x @ up.T)
    else:
        y = x @ weight("mlp.linear_fc1.weight", width, model.hidden_size).T
        if model.activation == "relu2":
            y = y.clamp(min=0) ** 2
        else:
            alphas = (weight(f"mlp.activation_func.alpha_{sign}", 1) for sign in "pn")
            y = _xielu(y, *alphas)
    return y @ weight("mlp.linear_fc2.weight", model.hidden_size, width).T


def _attention(x: Tensor, model: Model, factor: float | None, weight: Weight) -> Tensor:
    size, groups = head_dim(model), num_query_groups(model)
    per_group = model.num_attention_heads // groups
    rows = weight(
        "self_attention.linear_qkv.weight", groups * (per_group + 2) * size, model.hidden_size
    )
    rows = rows.view(groups, (per_group + 2) * size, -1)

    def turned(head: Tensor, part: str) -> Tensor:
        if model.qk_layernorm:
            head = _rms(head, weight(f"self_attention.{part}_layernorm.weight", size), model)
        return _rotate(head, model.rope_theta, factor)

    outputs = []
    for group in range(groups):
        heads = [x @ rows[group, n * size : (n + 1) * size].T for n in range(per_group + 2)]
        value, key = heads.pop(), turned(heads.pop(), "k")
        for query in heads:
            scores = turned(query, "q") @ key.T / size**0.5
            future = torch.ones_like(scores).triu(1).bool()
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value)
    width = model.num_attention_heads * size
    projection = weight("self_attention.linear_proj.weight", model.hidden_size, width)
    return torch.cat(outputs, dim=-1) @ projection.T


def _rotate(x: Tensor, theta: float, factor: float | None) -> Tensor:
    tokens, size = x.shape
    frequency = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    if factor is not None:
        frequency = torch.tensor([_scaled(f.item(), factor) for f in frequency]).double()
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * frequency
    first, second = x[:, : size // 2], x[:, size // 2 :]
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ],
        dim=-1,
    )


def _scaled(frequency: float, factor: float) -> float:
    """Llama 3's rule, by the wavelength in tokens."""
    wavelength = 2 * math.pi / frequency
    if wavelength < 8192 / 4:
        return frequency
    if wavelength > 8192 / 1:
        return frequency / factor
    smooth = (8192 / wavelength - 1) / (4 - 1)
    return (1 - smooth) * frequency / factor + smooth * frequency


def _rms(x: Tensor, weight: Tensor, model: Model) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + model.norm_epsilon).sqrt() * weight


def _xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    a_p, a_n = F.softplus(alpha_p), 0.5 + F.softplus(alpha_n)
    return torch.where(x > 0, a_p * x**2, a_n * (torch.expm1(x.clamp(max=0)) - x)) + 0.5 * x
