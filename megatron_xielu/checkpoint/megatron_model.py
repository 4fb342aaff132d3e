"""A Megatron checkpoint: its tensors by Hugging Face's names, and the logits that follow from them.

The model is written out here from Megatron's conventions, without the table's `split`: what the
table gets wrong shows as other logits. It needs no Megatron and holds one weight at a time, as it
is stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_xielu.checkpoint.architecture import (
    HIGH_FREQ_FACTOR,
    LOW_FREQ_FACTOR,
    ORIGINAL_MAX_POSITION_EMBEDDINGS,
    Architecture,
)
from megatron_xielu.checkpoint.mapping import (
    XIELU_CONSTANTS,
    Placement,
    hf_shapes,
    locate,
    read_weight,
)
from megatron_xielu.checkpoint.row_blocks import Round, linear, row_blocks
from megatron_xielu.checkpoint.run import architecture_of, open_run
from megatron_xielu.checkpoint.safetensors_file import TensorSpec
from megatron_xielu.checkpoint.targets import Target, choose_target
from megatron_xielu.checkpoint.torch_dist import TorchDistReader


class MegatronCheckpoint:
    """One saved step.

    Args:
        path: a run, checkpoints or iter_ folder; see `open_run`.
        target: whose names its tensors get; None means the class that fits.
        vocab_size: rows without padding, for where neither the recipe nor the arguments say it.
        given: Megatron's arguments that the checkpoint lacks.

    Raises:
        UserError: it cannot be read, or no class of transformers holds it.
    """

    def __init__(
        self,
        path: Path,
        *,
        target: Target | None = None,
        vocab_size: int | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        run = open_run(path)
        self.path = run.path
        self.reader = TorchDistReader(run.path)
        self.arch = architecture_of(run, self.reader, vocab_size=vocab_size, given=given)
        self.target = target or choose_target(self.arch)
        self.tied = self.arch.tie_embeddings
        # layers of multi-token prediction have no part in these logits, and no place in an export
        self._placements = locate(self.reader, self.arch, drop_mtp=True)
        self._by_name: dict[str, Placement] = {}
        self.specs: dict[str, TensorSpec] = {}
        for placement in self._placements:
            dtype = self.reader.dtype(placement.key)
            for name, shape in hf_shapes(placement, self.arch, self.target).items():
                self._by_name[name] = placement
                self.specs[name] = TensorSpec(dtype, shape)
        if self.arch.activation == "xielu":
            for pattern in XIELU_CONSTANTS:
                for layer in range(self.arch.num_layers):
                    self.specs[pattern.format(i=layer)] = TensorSpec(torch.float32, ())
        self._parts: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """One tensor by its Hugging Face name, in its stored type."""
        placement = self._by_name.get(name)
        if placement is None:
            pattern = name.replace(name.split(".")[2], "{i}", 1)
            return torch.tensor(XIELU_CONSTANTS[pattern], dtype=torch.float32)
        # queries, keys and values are stored as one, and asked for one after the other
        if name not in self._parts:
            weight = read_weight(self.reader, placement, self.arch)
            parts = placement.entry.split(weight, self.arch)
            self._parts = dict(zip(placement.hf_names(self.target), parts, strict=True))
        return self._parts.pop(name)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """What `read` returns, a few rows at a time."""
        return row_blocks(self.read(name))

    def logits(self, prompts: Sequence[Sequence[int]], rounded: Round) -> list[Tensor]:
        """fp32 logits (tokens, vocabulary) of each prompt.

        Memory holds one weight as it is stored, and beside it a few rows in fp32.

        Args:
            rounded: applied to every weight as Megatron stores it.
        """
        layers: list[dict[str, Placement]] = [{} for _ in range(self.arch.num_layers)]
        others: dict[str, Placement] = {}
        for placement in self._placements:
            group = others if placement.layer is None else layers[placement.layer]
            group[placement.entry.megatron[0].removeprefix("decoder.layers.{i}.")] = placement
        outer, *inner = (_Weights(self, placements, rounded) for placements in (others, *layers))
        head = "embedding.word_embeddings.weight" if self.tied else "output_layer.weight"
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.tensor([token for prompt in prompts for token in prompt])
        with torch.inference_mode():
            x = outer.rows("embedding.word_embeddings.weight", ids)
            for weights in inner:
                x = _layer(x, lengths, weights, self.arch)
            x = _rms(x, outer.whole("decoder.final_layernorm.weight"), self.arch)
            return list(outer.linear(x, head).split(lengths))


@dataclass(frozen=True)
class _Weights:
    """Those of one layer or of none, read when they are asked for; what they return is fp32."""

    model: MegatronCheckpoint
    placements: Mapping[str, Placement]
    rounded: Round

    def whole(self, name: str) -> Tensor:
        return self._rounded(name, self._stored(name))

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """The rows of these numbers, (ids, columns)."""
        return self._rounded(name, self._stored(name)[ids])

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x (tokens, columns) by the transpose of a matrix."""
        stored = self._stored(name)
        blocks = (self._rounded(name, rows) for rows in row_blocks(stored))
        return linear(x, blocks, len(stored))

    def _stored(self, name: str) -> Tensor:
        return read_weight(self.model.reader, self.placements[name], self.model.arch)

    def _rounded(self, name: str, stored: Tensor) -> Tensor:
        hf_name, *_ = self.placements[name].hf_names(self.model.target)
        return self.rounded(hf_name, stored).float()


def _layer(x: Tensor, lengths: list[int], weights: _Weights, arch: Architecture) -> Tensor:
    """One pair of attention and MLP; x: (tokens, hidden), prompts of these lengths joined."""
    normed = _rms(x, weights.whole("self_attention.linear_qkv.layer_norm_weight"), arch)
    x = x + _attention(normed, lengths, weights, arch)
    normed = _rms(x, weights.whole("mlp.linear_fc1.layer_norm_weight"), arch)
    hidden = weights.linear(normed, "mlp.linear_fc1.weight")
    return x + weights.linear(_activation(hidden, weights, arch), "mlp.linear_fc2.weight")


def _attention(x: Tensor, lengths: list[int], weights: _Weights, arch: Architecture) -> Tensor:
    groups, size = arch.num_query_groups, arch.head_dim
    queries = arch.num_attention_heads // groups
    # of every group its queries, then its key, then its value
    mixed = weights.linear(x, "self_attention.linear_qkv.weight")
    mixed = mixed.view(-1, groups, queries + 2, size).permute(1, 2, 0, 3)
    q, k, v = mixed[:, :-2], mixed[:, -2:-1], mixed[:, -1:]
    if arch.qk_layernorm:
        q = _rms(q, weights.whole("self_attention.q_layernorm.weight"), arch)
        k = _rms(k, weights.whole("self_attention.k_layernorm.weight"), arch)
    prompts = zip(*(part.split(lengths, dim=2) for part in (q, k, v)), strict=True)
    mean = torch.cat([_mean(q, k, v, arch) for q, k, v in prompts], dim=2)
    joined = mean.permute(2, 0, 1, 3).reshape(len(x), -1)
    return weights.linear(joined, "self_attention.linear_proj.weight")


def _mean(q: Tensor, k: Tensor, v: Tensor, arch: Architecture) -> Tensor:
    """Attention within one prompt; each (groups, heads, tokens, head_dim)."""
    scores = _rotate(q, arch) @ _rotate(k, arch).mT / math.sqrt(arch.head_dim)
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1) @ v


def _activation(x: Tensor, weights: _Weights, arch: Architecture) -> Tensor:
    if arch.activation == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    if arch.activation == "relu2":
        return x.relu().square()
    alpha_p = F.softplus(weights.whole("mlp.activation_func.alpha_p"))
    alpha_n = arch.beta + F.softplus(weights.whole("mlp.activation_func.alpha_n"))
    negative = alpha_n * (torch.expm1(x.clamp(max=0)) - x)
    return torch.where(x > 0, alpha_p * x.square(), negative) + arch.beta * x


def _rms(x: Tensor, weight: Tensor, arch: Architecture) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, arch.norm_epsilon)


def _rotate(x: Tensor, arch: Architecture) -> Tensor:
    """RoPE on (..., tokens, channels), whose two halves are the pairs."""
    angle = torch.arange(x.shape[-2]).double()[:, None] * rope_frequencies(arch)
    cos, sin = angle.cos().float(), angle.sin().float()
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rope_frequencies(arch: Architecture) -> Tensor:
    """Radians per token, float64 (head_dim / 2,); with Llama 3's scaling as Megatron computes it.

    Wavelengths above the first limit are stretched by the factor, those below the second are kept,
    those between are interpolated.
    """
    channels = torch.arange(0, arch.head_dim, 2, dtype=torch.float64)
    frequencies = arch.rope_theta ** (-channels / arch.head_dim)
    if arch.rope_scaling_factor is None:
        return frequencies
    turns = ORIGINAL_MAX_POSITION_EMBEDDINGS * frequencies / (2 * math.pi)
    kept = (turns - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR)
    kept = kept.clamp(0, 1)
    return frequencies * (kept + (1 - kept) / arch.rope_scaling_factor)
