"""The one table of names between Megatron's checkpoint and Hugging Face's ArceeForCausalLM.

An entry says how Megatron and Hugging Face name a weight, its shape, and how one becomes the other
(`split`) and back (`merge`). Conversion reads the table from left to right, verification from right
to left, so neither can hide the other's mistake.

GPTModel stores a layer's weights stacked, `decoder.layers.mlp...` of shape (layers, ...); models
whose layers differ store `decoder.layers.3.mlp...`. Both are found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError
from megatron_xielu.recipes import Recipe, head_dim, num_query_groups

XIELU_CONSTANTS = {
    "model.layers.{i}.mlp.act_fn.beta": 0.5,
    "model.layers.{i}.mlp.act_fn.eps": -1e-6,
}
"""What transformers keeps in every layer and Megatron does not: 0-dim tensors, always fp32. Without
them transformers leaves uninitialized memory in their place."""


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes that shapes and splits depend on."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    """Without the rows that Megatron pads the embedding with."""
    tie_embeddings: bool

    @staticmethod
    def of(recipe: Recipe, vocab_size: int) -> Dims:
        """The sizes of a recipe's model."""
        model = recipe.model
        return Dims(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=num_query_groups(model),
            head_dim=head_dim(model),
            ffn_hidden_size=model.ffn_hidden_size,
            vocab_size=vocab_size,
            tie_embeddings=model.tie_embeddings,
        )


def _same(tensor: Tensor, dims: Dims) -> tuple[Tensor, ...]:
    return (tensor,)


def _only(tensors: Sequence[Tensor], dims: Dims) -> Tensor:
    (tensor,) = tensors
    return tensor


def split_qkv(qkv: Tensor, dims: Dims) -> tuple[Tensor, ...]:
    """(rows, hidden) -> q, k, v; Megatron's rows go group by group: queries, key, value."""
    queries = dims.num_attention_heads // dims.num_query_groups
    grouped = qkv.view(dims.num_query_groups, queries + 2, dims.head_dim, -1)
    parts = grouped.split([queries, 1, 1], dim=1)
    return tuple(part.reshape(-1, qkv.shape[-1]) for part in parts)


def merge_qkv(tensors: Sequence[Tensor], dims: Dims) -> Tensor:
    """The inverse of `split_qkv`."""
    hidden = tensors[0].shape[-1]
    grouped = [t.view(dims.num_query_groups, -1, dims.head_dim, hidden) for t in tensors]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One weight, or one per layer where the names hold {i}."""

    megatron: tuple[str, ...]
    """Names it may have in a checkpoint; the first is what Megatron's GPT layers store."""
    hf: tuple[str, ...]
    shape: Callable[[Dims], tuple[int, ...]]
    """Megatron's shape, of one layer."""
    split: Callable[[Tensor, Dims], tuple[Tensor, ...]] = _same
    merge: Callable[[Sequence[Tensor], Dims], Tensor] = _only
    padded: bool = False
    """Megatron may hold more rows than `shape` says: the vocabulary, rounded up."""
    keep_fp32: bool = False
    """Exported in fp32 whatever the rest is."""
    flat: bool = False
    """May be stored as a vector of all layers' values, as the swiss-ai fork once did."""


def _alpha(name: str) -> Entry:
    return Entry(
        megatron=(f"decoder.layers.{{i}}.mlp.activation_func.{name}",),
        hf=(f"model.layers.{{i}}.mlp.act_fn.{name}",),
        shape=lambda d: (1,),
        keep_fp32=True,
        flat=True,
    )


LM_HEAD = "lm_head.weight"
# a norm is stored under the linear layer behind it, into which TransformerEngine fuses it, also by
# Megatron's local layers; other specs store it under its own name
TABLE = (
    Entry(
        megatron=("embedding.word_embeddings.weight",),
        hf=("model.embed_tokens.weight",),
        shape=lambda d: (d.vocab_size, d.hidden_size),
        padded=True,
    ),
    Entry(
        megatron=(
            "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.{i}.input_layernorm.weight",
        ),
        hf=("model.layers.{i}.input_layernorm.weight",),
        shape=lambda d: (d.hidden_size,),
    ),
    Entry(
        megatron=("decoder.layers.{i}.self_attention.linear_qkv.weight",),
        hf=tuple(f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
        shape=lambda d: (
            (d.num_attention_heads + 2 * d.num_query_groups) * d.head_dim,
            d.hidden_size,
        ),
        split=split_qkv,
        merge=merge_qkv,
    ),
    Entry(
        megatron=("decoder.layers.{i}.self_attention.linear_proj.weight",),
        hf=("model.layers.{i}.self_attn.o_proj.weight",),
        shape=lambda d: (d.hidden_size, d.num_attention_heads * d.head_dim),
    ),
    Entry(
        megatron=(
            "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
            "decoder.layers.{i}.pre_mlp_layernorm.weight",
        ),
        hf=("model.layers.{i}.post_attention_layernorm.weight",),
        shape=lambda d: (d.hidden_size,),
    ),
    Entry(
        megatron=("decoder.layers.{i}.mlp.linear_fc1.weight",),
        hf=("model.layers.{i}.mlp.up_proj.weight",),
        shape=lambda d: (d.ffn_hidden_size, d.hidden_size),
    ),
    _alpha("alpha_p"),
    _alpha("alpha_n"),
    Entry(
        megatron=("decoder.layers.{i}.mlp.linear_fc2.weight",),
        hf=("model.layers.{i}.mlp.down_proj.weight",),
        shape=lambda d: (d.hidden_size, d.ffn_hidden_size),
    ),
    Entry(
        megatron=("decoder.final_layernorm.weight",),
        hf=("model.norm.weight",),
        shape=lambda d: (d.hidden_size,),
    ),
    Entry(
        megatron=("output_layer.weight",),
        hf=(LM_HEAD,),
        shape=lambda d: (d.vocab_size, d.hidden_size),
        padded=True,
    ),
)


@dataclass(frozen=True)
class Placement:
    """Where a checkpoint holds one entry of one layer."""

    entry: Entry
    key: str
    index: int | None
    """The row of a stacked key; None where the key holds this weight alone."""
    layer: int | None

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The names it gets in the export, in the order of `Entry.split`."""
        return tuple(name.format(i=self.layer) for name in self.entry.hf)


def table(dims: Dims) -> list[Entry]:
    """The entries a model of these sizes has: with tied embeddings there is no output layer."""
    return [entry for entry in TABLE if not (dims.tie_embeddings and entry.hf == (LM_HEAD,))]


def locate(reader: TorchDistReader, dims: Dims) -> list[Placement]:
    """Every weight of the model in its checkpoint, layer by layer in the table's order.

    Raises:
        UserError: a weight is missing, stored twice or of another shape, or the checkpoint holds a
            model tensor that the table has no name for. Nothing is dropped silently; only optimizer
            and random state and TransformerEngine's `_extra_state` are passed over.
    """
    keys = set(filter(_is_model_key, reader.keys()))
    names = [(entry, _stored_name(entry, keys, reader)) for entry in table(dims)]
    placements = [
        placement for entry, name in names for placement in _place(entry, name, keys, dims)
    ]
    if unknown := sorted(keys - {placement.key for placement in placements}):
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{reader.path} holds weights that a Llama with xIELU of {dims.num_layers} layers"
            f"{' and tied embeddings' if dims.tie_embeddings else ''} has no place for: "
            f"{', '.join(unknown[:3])}{more}. Is recipe.yaml this run's? Biases, QK-norm, gates "
            f"and experts cannot be exported."
        )
    if unknown := sorted(key for key in reader.object_keys() if _is_unknown_object(key)):
        raise UserError(f"{reader.path} holds an unknown part of the model: {unknown[0]}.")
    for placement in placements:
        _check_shape(placement, reader, dims)
    reader.check_files({placement.key for placement in placements})
    return sorted(placements, key=_layer_order)


def read_weight(reader: TorchDistReader, placement: Placement, dims: Dims) -> Tensor:
    """The weight as Megatron holds it, without padding rows, in its stored type."""
    weight = reader.read(placement.key, placement.index)
    if placement.entry.flat and weight.dim() == 0:
        return weight.view(1)
    return weight[: dims.vocab_size] if placement.entry.padded else weight


def hf_shapes(placement: Placement, dims: Dims) -> dict[str, tuple[int, ...]]:
    """Name and shape of every exported tensor of a placement; reads nothing."""
    weight = torch.empty(placement.entry.shape(dims), device="meta")
    parts = placement.entry.split(weight, dims)
    return {name: tuple(part.shape) for name, part in zip(placement.hf_names, parts, strict=True)}


def _is_model_key(key: str) -> bool:
    return not re.match(r"(chained_\d+\.)?optimizer\.", key) and "_extra_state" not in key


def _is_unknown_object(key: str) -> bool:
    in_model = key.startswith(("embedding.", "decoder.", "output_layer.", "mtp."))
    return in_model and "_extra_state" not in key


def _stored_name(entry: Entry, keys: set[str], reader: TorchDistReader) -> str:
    """Which of an entry's names this checkpoint uses."""
    found = [name for name in entry.megatron if _stacked(name) in keys or name.format(i=0) in keys]
    if not found:
        near = [_stacked(name) for name in entry.megatron]
        raise UserError(
            f"{reader.path} has no {' or '.join(near)}, which becomes {entry.hf[0]}. Is "
            f"recipe.yaml this run's, and the checkpoint complete?"
        )
    if len(found) > 1:
        raise UserError(f"{reader.path} holds one weight under two names: {' and '.join(found)}.")
    return found[0]


def _place(entry: Entry, name: str, keys: set[str], dims: Dims) -> Iterator[Placement]:
    if "{i}" not in name:
        yield Placement(entry, name, None, None)
        return
    stacked = _stacked(name)
    for layer in range(dims.num_layers):
        if stacked in keys:
            yield Placement(entry, stacked, layer, layer)
        else:
            yield Placement(entry, name.format(i=layer), None, layer)


def _stacked(name: str) -> str:
    return name.replace(".{i}", "")


def _check_shape(placement: Placement, reader: TorchDistReader, dims: Dims) -> None:
    found, expected = reader.shape(placement.key), placement.entry.shape(dims)
    if placement.index is not None:
        expected = (dims.num_layers, *expected)
        if placement.entry.flat and found == (dims.num_layers,):
            return
    padding = placement.entry.padded and found[0] > expected[0]
    if found != expected and not (padding and found[1:] == expected[1:]):
        raise UserError(
            f"{reader.path}: {placement.key} has shape {found}, the recipe and tokenizer mean "
            f"{expected}. Use the recipe.yaml and tokenizer of this run."
        )


def _layer_order(placement: Placement) -> tuple[int, int, int]:
    """Embedding, layer 0, layer 1, ..., final norm and output layer."""
    position = TABLE.index(placement.entry)
    if placement.layer is None:
        return (0 if position == 0 else 2), 0, position
    return 1, placement.layer, position
