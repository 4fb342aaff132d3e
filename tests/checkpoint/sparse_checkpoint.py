"""A checkpoint of any size that takes no room on disk: its files are holes, which read as zeros."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_xielu.checkpoint.architecture import Architecture
from megatron_xielu.checkpoint.mapping import table


def write(step: Path, arch: Architecture, dtype: torch.dtype) -> int:
    """Writes a folder as Megatron would, one chunk per layer; returns the bytes of its tensors."""
    step.mkdir(parents=True)
    metadata = Metadata(state_dict_metadata={}, storage_data={})
    total = 0
    for entry in table(arch):
        name, shape = entry.megatron[0], entry.shape(arch)
        kind = torch.float32 if entry.keep_fp32 else dtype
        layers = arch.num_layers if "{i}" in name else 0
        key = name.replace(".{i}", "")
        chunk = (1, *shape) if layers else shape
        offsets = [(i, *[0] * len(shape)) for i in range(layers)] or [(0,) * len(shape)]
        metadata.state_dict_metadata[key] = TensorStorageMetadata(
            TensorProperties(dtype=kind),
            torch.Size((layers, *shape) if layers else shape),
            [ChunkStorageMetadata(torch.Size(o), torch.Size(chunk)) for o in offsets],
        )
        for number, offset in enumerate(offsets):
            file = step / f"__{len(metadata.storage_data)}_0.distcp"
            with torch.serialization.skip_data():
                torch.save(torch.empty(chunk, dtype=kind), file)
            index = MetadataIndex(key, torch.Size(offset), number)
            metadata.storage_data[index] = _StorageInfo(file.name, 0, file.stat().st_size)
            total += torch.Size(chunk).numel() * kind.itemsize
    (step / ".metadata").write_bytes(pickle.dumps(metadata))
    torch.save({"args": Namespace(**arguments(arch))}, step / "common.pt")
    return total


def arguments(arch: Architecture) -> dict[str, Any]:
    """What Megatron would save beside such a model."""
    return {
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.head_dim,
        "vocab_size": arch.vocab_size,
        "untie_embeddings_and_output_weights": not arch.tie_embeddings,
        "qk_layernorm": arch.qk_layernorm,
        "norm_epsilon": arch.norm_epsilon,
        "rotary_base": int(arch.rope_theta),
        "seq_length": arch.seq_length,
    }
