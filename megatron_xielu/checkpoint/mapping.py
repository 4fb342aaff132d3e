"""The one table of names between Megatron's checkpoints and Hugging Face's classes.

An entry says how Megatron and Hugging Face name a weight, its shape, and how one becomes the other
(`split`) and back (`merge`). What the classes call differently stands in braces; see `targets`.

GPTModel stores a layer's weights stacked, `decoder.layers.mlp...` of shape (layers, ...); models
whose layers differ store `decoder.layers.3.mlp...`. HybridModel counts attention and MLP as layers
of their own, `decoder.layers.6.self_attention...` and `decoder.layers.7.mlp...`. All are found.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.targets import Target
from megatron_xielu.checkpoint.torch_dist import TorchDistReader
from megatron_xielu.errors import UserError

XIELU_CONSTANTS = {
    "model.layers.{i}.mlp.act_fn.beta": 0.5,
    "model.layers.{i}.mlp.act_fn.eps": -1e-6,
}
"""What transformers keeps in every layer and Megatron does not: 0-dim tensors, always fp32. Without
them transformers leaves uninitialized memory in their place."""


def _same(tensor: Tensor, arch: Architecture) -> tuple[Tensor, ...]:
    return (tensor,)


def _only(tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
    (tensor,) = tensors
    return tensor


def split_qkv(qkv: Tensor, arch: Architecture) -> tuple[Tensor, ...]:
    """(rows, hidden) -> q, k, v; Megatron's rows go group by group: queries, key, value."""
    queries = arch.num_attention_heads // arch.num_query_groups
    grouped = qkv.view(arch.num_query_groups, queries + 2, arch.head_dim, -1)
    parts = grouped.split([queries, 1, 1], dim=1)
    return tuple(part.reshape(-1, qkv.shape[-1]) for part in parts)


def merge_qkv(tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
    """The inverse of `split_qkv`."""
    hidden = tensors[0].shape[-1]
    grouped = [t.view(arch.num_query_groups, -1, arch.head_dim, hidden) for t in tensors]
    return torch.cat(grouped, dim=1).reshape(-1, hidden)


def split_gate(fc1: Tensor, arch: Architecture) -> tuple[Tensor, ...]:
    """(2 * ffn, hidden) -> gate, up; Megatron stores all of the gate's rows first."""
    return fc1.split(arch.ffn_hidden_size)


def merge_gate(tensors: Sequence[Tensor], arch: Architecture) -> Tensor:
    """The inverse of `split_gate`."""
    return torch.cat(list(tensors))


def _always(arch: Architecture) -> bool:
    return True


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One weight, or one per layer where the names hold {i}."""

    megatron: tuple[str, ...]
    """Names it may have in a checkpoint; the first is what Megatron's GPT layers store."""
    hf: tuple[str, ...]
    shape: Callable[[Architecture], tuple[int, ...]]
    """Megatron's shape, of one layer."""
    split: Callable[[Tensor, Architecture], tuple[Tensor, ...]] = _same
    merge: Callable[[Sequence[Tensor], Architecture], Tensor] = _only
    padded: bool = False
    """Megatron may hold more rows than `shape` says: the vocabulary, rounded up."""
    keep_fp32: bool = False
    """Exported in fp32 whatever the rest is."""
    flat: bool = False
    """May be stored as a vector of all layers' values, as the swiss-ai fork once did."""
    present: Callable[[Architecture], bool] = _always
    """Whether a model has it."""

    @property
    def in_mlp(self) -> bool:
        """Where HybridModel puts it: into an MLP layer, not one of attention."""
        return "mlp" in self.megatron[0]


def _alpha(name: str) -> Entry:
    return Entry(
        megatron=(f"decoder.layers.{{i}}.mlp.activation_func.{name}",),
        hf=(f"model.layers.{{i}}.mlp.act_fn.{name}",),
        shape=lambda a: (1,),
        keep_fp32=True,
        flat=True,
        present=lambda a: a.activation == "xielu",
    )


def _head_norm(part: str) -> Entry:
    return Entry(
        megatron=(f"decoder.layers.{{i}}.self_attention.{part}_layernorm.weight",),
        hf=(f"model.layers.{{i}}.self_attn.{part}_norm.weight",),
        shape=lambda a: (a.head_dim,),
        present=lambda a: a.qk_layernorm,
    )


EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_HYBRID_FINAL_NORM = "decoder.final_norm.weight"
# a norm is stored under the linear layer behind it, into which TransformerEngine fuses it, also by
# Megatron's local layers; other specs store it under its own name
TABLE = (
    Entry(
        megatron=("embedding.word_embeddings.weight",),
        hf=(EMBEDDING,),
        shape=lambda a: (a.vocab_size, a.hidden_size),
        padded=True,
    ),
    Entry(
        megatron=(
            "decoder.layers.{i}.self_attention.linear_qkv.layer_norm_weight",
            "decoder.layers.{i}.input_layernorm.weight",
        ),
        hf=("model.layers.{i}.{input_norm}.weight",),
        shape=lambda a: (a.hidden_size,),
    ),
    Entry(
        megatron=("decoder.layers.{i}.self_attention.linear_qkv.weight",),
        hf=tuple(f"model.layers.{{i}}.self_attn.{part}_proj.weight" for part in "qkv"),
        shape=lambda a: (
            (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim,
            a.hidden_size,
        ),
        split=split_qkv,
        merge=merge_qkv,
    ),
    _head_norm("q"),
    _head_norm("k"),
    Entry(
        megatron=("decoder.layers.{i}.self_attention.linear_proj.weight",),
        hf=("model.layers.{i}.self_attn.o_proj.weight",),
        shape=lambda a: (a.hidden_size, a.num_attention_heads * a.head_dim),
    ),
    Entry(
        megatron=(
            "decoder.layers.{i}.mlp.linear_fc1.layer_norm_weight",
            "decoder.layers.{i}.pre_mlp_layernorm.weight",
        ),
        hf=("model.layers.{i}.{mlp_norm}.weight",),
        shape=lambda a: (a.hidden_size,),
    ),
    Entry(
        megatron=("decoder.layers.{i}.mlp.linear_fc1.weight",),
        hf=("model.layers.{i}.mlp.up_proj.weight",),
        shape=lambda a: (a.ffn_hidden_size, a.hidden_size),
        present=lambda a: not a.gated,
    ),
    Entry(
        megatron=("decoder.layers.{i}.mlp.linear_fc1.weight",),
        hf=tuple(f"model.layers.{{i}}.mlp.{part}_proj.weight" for part in ("gate", "up")),
        shape=lambda a: (2 * a.ffn_hidden_size, a.hidden_size),
        split=split_gate,
        merge=merge_gate,
        present=lambda a: a.gated,
    ),
    _alpha("alpha_p"),
    _alpha("alpha_n"),
    Entry(
        megatron=("decoder.layers.{i}.mlp.linear_fc2.weight",),
        hf=("model.layers.{i}.mlp.down_proj.weight",),
        shape=lambda a: (a.hidden_size, a.ffn_hidden_size),
    ),
    Entry(
        megatron=("decoder.final_layernorm.weight", _HYBRID_FINAL_NORM),
        hf=("model.norm.weight",),
        shape=lambda a: (a.hidden_size,),
    ),
    Entry(
        megatron=("output_layer.weight",),
        hf=(LM_HEAD,),
        shape=lambda a: (a.vocab_size, a.hidden_size),
        padded=True,
        present=lambda a: not a.tie_embeddings,
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

    def hf_names(self, target: Target) -> tuple[str, ...]:
        """The names it gets in an export, in the order of `Entry.split`."""
        return hf_names(self.entry, target, self.layer)


def hf_names(entry: Entry, target: Target, layer: int | None) -> tuple[str, ...]:
    """Hugging Face's names of an entry, in the order of `Entry.split`."""
    norms = {"input_norm": target.input_norm, "mlp_norm": target.mlp_norm}
    return tuple(name.format(i=layer, **norms) for name in entry.hf)


def table(arch: Architecture) -> list[Entry]:
    """The entries that a model has."""
    return [entry for entry in TABLE if entry.present(arch)]


def locate(
    reader: TorchDistReader, arch: Architecture, *, drop_mtp: bool = False
) -> list[Placement]:
    """Every weight of the model in its checkpoint, layer by layer in the table's order.

    Args:
        drop_mtp: pass over the layers of multi-token prediction.

    Raises:
        UserError: a weight is missing, stored twice, of another shape or of a type without its
            scale (FP8), or the checkpoint holds a model tensor that the table has no name for.
            Nothing is dropped silently; only optimizer and random state and TransformerEngine's
            `_extra_state` are passed over.
    """
    keys = set(filter(_is_model_key, reader.keys()))
    objects = [key for key in reader.object_keys() if _is_unknown_object(key)]
    mtp = [key for key in [*keys, *objects] if key.startswith("mtp.")]
    if mtp and not drop_mtp:
        raise UserError(
            f"{reader.path} holds layers of multi-token prediction ({min(mtp)}, ...), which no "
            f"export has a place for. --drop-mtp leaves them out; the model predicts the next "
            f"token without them as before."
        )
    keys -= set(mtp)
    names = [(entry, _stored_name(entry, keys, reader)) for entry in table(arch)]
    placements = [
        placement for entry, name in names for placement in _place(entry, name, keys, arch)
    ]
    if unknown := sorted(keys - {placement.key for placement in placements}):
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UserError(
            f"{reader.path} holds weights that {_description(arch)} has no place for: "
            f"{', '.join(unknown[:3])}{more}. Is recipe.yaml this run's? Biases and experts cannot "
            f"be exported."
        )
    if unknown := sorted(set(objects) - set(mtp)):
        raise UserError(f"{reader.path} holds an unknown part of the model: {unknown[0]}.")
    for placement in placements:
        _check_shape(placement, reader, arch)
        _check_dtype(placement, reader)
    reader.check_files({placement.key for placement in placements})
    return sorted(placements, key=_layer_order)


def embedding_rows(reader: TorchDistReader) -> int:
    """Rows of the embedding, padding included; raises UserError if there is none."""
    (entry,) = (entry for entry in TABLE if entry.hf == (EMBEDDING,))
    return reader.shape(_stored_name(entry, set(reader.keys()), reader))[0]


def untied(placements: Sequence[Placement]) -> list[Placement]:
    """The same with an output layer of its own, a copy of the embedding."""
    (entry,) = (entry for entry in TABLE if entry.hf == (LM_HEAD,))
    (embedding,) = (p for p in placements if p.entry.hf == (EMBEDDING,))
    return [*placements, Placement(entry, embedding.key, None, None)]


def read_weight(
    reader: TorchDistReader,
    placement: Placement,
    arch: Architecture,
    buffer: Tensor | None = None,
) -> Tensor:
    """The weight as Megatron holds it, without padding rows, in its stored type.

    Args:
        buffer: see `TorchDistReader.read`.
    """
    weight = reader.read(placement.key, placement.index, buffer)
    if placement.entry.flat and weight.dim() == 0:
        return weight.view(1)
    return weight[: arch.vocab_size] if placement.entry.padded else weight


def hf_shapes(
    placement: Placement, arch: Architecture, target: Target
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every exported tensor of a placement; reads nothing."""
    weight = torch.empty(placement.entry.shape(arch), device="meta")
    parts = placement.entry.split(weight, arch)
    names = placement.hf_names(target)
    return {name: tuple(part.shape) for name, part in zip(names, parts, strict=True)}


def _description(arch: Architecture) -> str:
    details = ["QK-norm"] * arch.qk_layernorm + ["tied embeddings"] * arch.tie_embeddings
    extra = f" and {' and '.join(details)}" if details else ""
    return f"a Llama with {arch.activation} of {arch.num_layers} layers{extra}"


def _is_model_key(key: str) -> bool:
    return not re.match(r"(chained_\d+\.)?optimizer\.", key) and "_extra_state" not in key


def _is_unknown_object(key: str) -> bool:
    in_model = key.startswith(("embedding.", "decoder.", "output_layer.", "mtp."))
    return in_model and "_extra_state" not in key


def _stored_name(entry: Entry, keys: set[str], reader: TorchDistReader) -> str:
    """Which of an entry's names this checkpoint uses."""
    first = _index(entry, 0, keys)
    found = [
        name for name in entry.megatron if _stacked(name) in keys or name.format(i=first) in keys
    ]
    if not found:
        near = [_stacked(name) for name in entry.megatron]
        raise UserError(
            f"{reader.path} has no {' or '.join(near)}, which becomes {entry.hf[0]}. Is "
            f"recipe.yaml this run's, and the checkpoint complete?"
        )
    if len(found) > 1:
        raise UserError(f"{reader.path} holds one weight under two names: {' and '.join(found)}.")
    return found[0]


def _place(entry: Entry, name: str, keys: set[str], arch: Architecture) -> Iterator[Placement]:
    if "{i}" not in name:
        yield Placement(entry, name, None, None)
        return
    stacked = _stacked(name)
    for layer in range(arch.num_layers):
        if stacked in keys:
            yield Placement(entry, stacked, layer, layer)
        else:
            yield Placement(entry, name.format(i=_index(entry, layer, keys)), None, layer)


def _index(entry: Entry, layer: int, keys: set[str]) -> int:
    """The number in the keys of a layer; HybridModel's final norm tells whose they are."""
    return 2 * layer + entry.in_mlp if _HYBRID_FINAL_NORM in keys else layer


def _stacked(name: str) -> str:
    return name.replace(".{i}", "")


def _check_shape(placement: Placement, reader: TorchDistReader, arch: Architecture) -> None:
    found, expected = reader.shape(placement.key), placement.entry.shape(arch)
    if placement.index is not None:
        expected = (arch.num_layers, *expected)
        if placement.entry.flat and found == (arch.num_layers,):
            return
    padding = placement.entry.padded and found[0] > expected[0]
    if found != expected and not (padding and found[1:] == expected[1:]):
        raise UserError(
            f"{reader.path}: {placement.key} has shape {found}, the recipe and tokenizer mean "
            f"{expected}. Use the recipe.yaml and tokenizer of this run."
        )


def _check_dtype(placement: Placement, reader: TorchDistReader) -> None:
    dtype = reader.dtype(placement.key)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(
            f"{reader.path}: {placement.key} is stored as {str(dtype).removeprefix('torch.')}; "
            f"only float32, bfloat16 and float16 are weights as they stand, and the scales of FP8 "
            f"are not in the checkpoint. Megatron-Core 0.19 writes FP8 parameters "
            f"(--fp8-param-gather) as bf16, so another program saved these: load the checkpoint "
            f"with it and save the weights in bf16."
        )


def _layer_order(placement: Placement) -> tuple[int, int, int]:
    """Embedding, layer 0, layer 1, ..., final norm and output layer."""
    position = TABLE.index(placement.entry)
    if placement.layer is None:
        return (0 if position == 0 else 2), 0, position
    return 1, placement.layer, position
